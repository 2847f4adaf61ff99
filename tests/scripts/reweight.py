"""Learning to reweight: a copy steps under zero weights, whose gradient on clean data weighs the batch."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.func import functional_call


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2))
        self.classifier = nn.Linear(27, 2)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1)).log_softmax(1)


def accuracy(net, images, labels):
    net.eval()
    with torch.no_grad():
        predicted = net(images).argmax(1)
    net.train()
    return (predicted == labels).double().mean().item()


def main(args, loader, clean, test):
    net = Net()
    # was: opt = torch.optim.SGD(net.parameters(), lr=0.3)
    opt = torch.optim.SGD(net.parameters(), lr=args.lr)
    val_data, val_labels = clean
    net_losses, accuracy_log, smoothed = [], [], None
    for i, (image, labels) in enumerate(loader):
        net.train()
        # a copy of the network, stepped under weights of zero
        meta_net = Net()
        meta_net.load_state_dict(net.state_dict())
        params = dict(meta_net.named_parameters())
        cost = F.nll_loss(functional_call(meta_net, params, (image,)), labels, reduction="none")
        eps = torch.zeros(cost.size(), requires_grad=True)
        l_f_meta = torch.sum(cost * eps)
        grads = torch.autograd.grad(l_f_meta, list(params.values()), create_graph=True)
        fast = {name: p - args.meta_step * g for (name, p), g in zip(params.items(), grads)}
        l_g_meta = F.nll_loss(functional_call(meta_net, fast, (val_data,)), val_labels)
        grad_eps = torch.autograd.grad(l_g_meta, eps)[0]

        w_tilde = torch.clamp(-grad_eps, min=0)
        norm_c = torch.sum(w_tilde)
        if norm_c != 0:
            w = w_tilde / norm_c
        else:
            w = w_tilde

        cost = F.nll_loss(net(image), labels, reduction="none")
        l_f = torch.sum(cost * w)
        opt.zero_grad()
        l_f.backward()
        opt.step()

        smoothed = l_f.item() if smoothed is None else 0.9 * smoothed + 0.1 * l_f.item()
        net_losses.append(smoothed)
        if i % 2 == 0:
            accuracy_log.append((i, accuracy(net, *test)))
            print(f"{i}: training loss {smoothed:.4f}, test accuracy {accuracy_log[-1][1]:.2f}")
    args.net_losses, args.accuracy_log = net_losses, accuracy_log
    return F.nll_loss(net(test[0]), test[1])


def make():
    images, labels = digits(100)
    labels = (labels > 4).long()
    noisy = torch.where(torch.rand(100) < 0.3, 1 - labels, labels)
    train_set = torch.utils.data.TensorDataset(images[:32], noisy[:32])
    loader = torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True)
    args = Settings(lr=torch.tensor(0.3, requires_grad=True), meta_step=0.3)
    return {"args": args, "loader": loader, "clean": (images[32:40], labels[32:40]), "test": (images[40:], labels[40:])}


SCRIPT = Script("reweight", main, make, lambda a: {"lr": a["args"].lr})
