"""Learning by ignoring: which samples of a source are worth pre-training on? Three levels.

There are few digits of the target and many of a source, half of which show something else under their label. The
lowest level pre-trains a network on the source, with a weight for every sample; the middle one fine-tunes another
network on the few, pulled towards the pre-trained one; the top trains the weights by the fine-tuned network's loss on
held-out samples: its gradient goes through the fine-tuning and the pre-training.
(Zhang et al.: Learning by ignoring, with application to domain adaptation, 2021.)

    mlc run examples/ignoring.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc


def make_net():
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def distance(a, b):
    return sum((p - q).square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def problems(source, few, val, seed=0):
    """The levels, the fine-tuned network and the logits of the source's weights."""
    torch.manual_seed(seed)
    pretrained, tuned = make_net(), make_net()
    logits = torch.zeros(len(source[1]), requires_grad=True)

    def pretraining(batch):
        index, x, y = batch
        losses = F.cross_entropy(pretrained(x), y, reduction="none")
        return (2 * torch.sigmoid(logits[index]) * losses).mean()

    def finetuning(batch):
        x, y = batch
        return F.cross_entropy(tuned(x), y) + 0.05 * distance(tuned, pretrained)

    def held_out(batch):
        x, y = batch
        return F.cross_entropy(tuned(x), y)

    def batches():
        for index in torch.randperm(len(source[1])).split(200):
            yield index, source[0][index], source[1][index]

    def sgd(params):
        return torch.optim.SGD(params, lr=0.3)

    levels = [
        mlc.Level("pretrain", pretrained, sgd, pretraining, batches, steps=4),
        mlc.Level("finetune", tuned, sgd, finetuning, [few], steps=4),
        mlc.Level("ignore", logits, torch.optim.Adam([logits], lr=0.3), held_out, [val]),
    ]
    return levels, tuned, logits


def load(source=800, few=30, val=200, seed=0):
    """Source (images, labels, which are corrupt), few samples, held-out samples, a test set."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    corrupt = torch.rand(source) < 0.5
    other = x[:source][torch.randperm(source)]  # another image under this label
    ends = (source, source + few, source + few + val)
    parts = [(x[a:b], y[a:b]) for a, b in zip(ends, (*ends[1:], None), strict=True)]
    return (torch.where(corrupt[:, None], other, x[:source]), y[:source], corrupt), *parts


def accuracy(net, x, y):
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


def train(steps, learn, seed=0):
    """Run the levels; without ``learn`` all weights of the source stay equal."""
    (x, y, corrupt), few, val, test = load(seed=seed)
    levels, tuned, logits = problems((x, y), few, val, seed)
    if not learn:
        for group in levels[-1].optimizer.param_groups:
            group["lr"] = 0.0
    mlc.Training(levels).run(steps)
    return accuracy(tuned, *test), torch.sigmoid(logits).detach(), corrupt


def example_training():
    (x, y, _), few, val, _ = load()
    return mlc.Training(problems((x[:300], y[:300]), few, val)[0])


def main(steps=100, seed=0):
    equal, _, _ = train(steps, False, seed)
    learned, weights, corrupt = train(steps, True, seed)
    result = {
        "mean weight, good samples": weights[~corrupt].mean().item(),
        "mean weight, corrupt samples": weights[corrupt].mean().item(),
        "test accuracy, equal weights": equal,
        "test accuracy, learned weights": learned,
    }
    for name, value in result.items():
        print(f"{name:40s}{value:.3f}")
    return result


if __name__ == "__main__":
    main()
