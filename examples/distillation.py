"""Distil a training set into ten images.

The ten images are the meta-parameters: a freshly initialised network takes twenty ordinary SGD steps on
them alone, and its loss on real digits is differentiated through those steps back to the pixels. The
opponents are ten real images, one per digit, and the ten class means, with the same twenty steps.
(Wang, Zhu, Torralba, Efros: Dataset distillation, 2018.)

    mlc run examples/distillation.py          # the images go to build/distillation.png
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import mlc

PICTURE = Path(__file__).resolve().parent.parent / "build" / "distillation.png"


def train(model, images, labels, x, y):
    """Twenty ordinary steps on the images; returns the loss of the trained model on (x, y)."""
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(20):
        opt.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        opt.step()
    return F.cross_entropy(model(x), y)


loss_after_training = mlc.compile(train)


def distil(model, x, y, outer_steps):
    """Learn one image per digit, starting from noise."""
    images = (0.1 * torch.randn(10, 64)).requires_grad_()
    meta_opt = torch.optim.Adam([images], lr=0.02)
    for _ in range(outer_steps):
        reset(model)
        index = torch.randint(len(y), (256,))
        meta_opt.zero_grad()
        loss_after_training(model, images, torch.arange(10), x[index], y[index]).backward()
        meta_opt.step()
    return images.detach()


def evaluate(model, images, x, y, runs=10):
    """Mean accuracy on (x, y) of networks trained on the images alone, from new initial weights."""
    torch.manual_seed(1)
    accuracy = 0.0
    for _ in range(runs):
        reset(model)
        train(model, images, torch.arange(10), x, y)
        accuracy += (model(x).argmax(1) == y).float().mean().item() / runs
    return accuracy


def make_net():
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))


def reset(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def load():
    """Training and test set of digits, pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


def save_picture(rows, path, zoom=16):
    """Rows of ten 8x8 images, each image stretched from black to white."""
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    tiles = ((rows - low) / (high - low) * 255).byte().view(-1, 10, 8, 8)
    tiles = F.pad(tiles, (1, 1, 1, 1), value=128)
    picture = Image.fromarray(tiles.transpose(1, 2).reshape(-1, 100).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def example_args():
    torch.manual_seed(0)
    (x, y), _ = load()
    images = (0.1 * torch.randn(10, 64)).requires_grad_()
    return make_net(), images, torch.arange(10), x[:256], y[:256]


def main(outer_steps=300, seed=0, picture=PICTURE):
    torch.manual_seed(seed)
    (x, y), test = load()
    model = make_net()
    sets = {
        "ten real images": torch.stack([x[y == digit][0] for digit in range(10)]),
        "ten class means": torch.stack([x[y == digit].mean(0) for digit in range(10)]),
        "ten learned images": distil(model, x, y, outer_steps),
    }
    result = {name: evaluate(model, images, *test) for name, images in sets.items()}
    for name, accuracy in result.items():
        print(f"test accuracy after training on {name:20s}{accuracy:.3f}")
    save_picture(torch.stack([sets["ten real images"], sets["ten learned images"]]), Path(picture))
    print(f"real (above) and learned images: {picture}")
    return result


if __name__ == "__main__":
    main()
