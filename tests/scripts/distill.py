"""Data distilled by matching trajectories: a student on the made-up images must land where an expert went."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.func import functional_call


class ReparamModule(nn.Module):
    """A module called with one flat vector of parameters."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.shapes = [p.shape for p in module.parameters()]
        self.sizes = [p.numel() for p in module.parameters()]

    def forward(self, x, flat_param):
        parts = (t.view(s) for t, s in zip(flat_param.split(self.sizes), self.shapes))
        return functional_call(self.module, dict(zip(self.names, parts)), (x,))


def get_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))


def expert(images, labels, epochs=4):
    """Weights after each epoch of an ordinary training."""
    net = get_network()
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    timestamps = [[p.detach().clone() for p in net.parameters()]]
    for _ in range(epochs):
        opt.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        opt.step()
        timestamps.append([p.detach().clone() for p in net.parameters()])
    return timestamps


def main(args, trajectories, image_syn, label_syn, val):
    np.random.seed(args.seed)
    image_syn = image_syn.detach().to("cpu").requires_grad_(True)
    syn_lr = torch.tensor(args.lr_teacher).to("cpu").detach().requires_grad_(True)
    # was: optimizer_img = torch.optim.SGD([image_syn], lr=1.0, momentum=0.5)
    optimizer_img = torch.optim.SGD([image_syn], lr=args.lr_img, momentum=0.5)
    optimizer_lr = torch.optim.SGD([syn_lr], lr=args.lr_lr, momentum=0.5)
    optimizer_img.zero_grad()
    criterion = nn.CrossEntropyLoss()

    for it in range(args.Iteration + 1):
        student_net = ReparamModule(get_network())
        student_net.train()
        num_params = sum(student_net.sizes)
        expert_trajectory = trajectories[np.random.randint(0, len(trajectories))]
        start_epoch = np.random.randint(0, args.max_start_epoch)
        starting_params = expert_trajectory[start_epoch]
        target_params = expert_trajectory[start_epoch + args.expert_epochs]
        target_params = torch.cat([p.data.reshape(-1) for p in target_params], 0)
        student_params = [torch.cat([p.data.reshape(-1) for p in starting_params], 0).requires_grad_(True)]
        starting_params = torch.cat([p.data.reshape(-1) for p in starting_params], 0)

        syn_images = image_syn
        y_hat = label_syn
        indices_chunks = []
        for _ in range(args.syn_steps):
            if not indices_chunks:
                indices = torch.randperm(len(syn_images))
                indices_chunks = list(torch.split(indices, args.batch_syn))
            these_indices = indices_chunks.pop()
            x = syn_images[these_indices]
            this_y = y_hat[these_indices]
            forward_params = student_params[-1]
            x = student_net(x, flat_param=forward_params)
            ce_loss = criterion(x, this_y)
            grad = torch.autograd.grad(ce_loss, student_params[-1], create_graph=True)[0]
            student_params.append(student_params[-1] - syn_lr * grad)

        param_loss = F.mse_loss(student_params[-1], target_params, reduction="sum") / num_params
        param_dist = F.mse_loss(starting_params, target_params, reduction="sum") / num_params
        param_loss /= param_dist
        grand_loss = param_loss
        optimizer_img.zero_grad()
        optimizer_lr.zero_grad()
        grand_loss.backward()
        optimizer_img.step()
        optimizer_lr.step()
        args.log.append({"Grand_Loss": grand_loss.detach().cpu(), "Start_Epoch": start_epoch})
        for _ in student_params:
            del _
        if it % 2 == 0:
            print("iter = %04d, loss = %.4f, lr = %.4f" % (it, grand_loss.item(), syn_lr.item()))
            torch.save(image_syn.detach().cpu(), f"images_{it}.pt")

    return evaluate_synset(image_syn, label_syn, syn_lr, val)


def evaluate_synset(image_syn, label_syn, syn_lr, val):
    """A fresh network trained on the distilled images, step by step, and its loss on real ones."""
    net = ReparamModule(get_network())
    params = torch.cat([p.data.reshape(-1) for p in net.parameters()]).requires_grad_(True)
    for _ in range(3):
        loss = F.cross_entropy(net(image_syn, flat_param=params), label_syn)
        params = params - syn_lr * torch.autograd.grad(loss, params, create_graph=True)[0]
    return F.cross_entropy(net(val[0], flat_param=params), val[1])


def make():
    images, labels = digits(60)
    lr_img = torch.tensor(0.5, requires_grad=True)
    args = Settings(
        seed=0,
        lr_img=lr_img,
        lr_lr=0.05,
        lr_teacher=0.3,
        Iteration=3,
        syn_steps=2,
        batch_syn=10,
        expert_epochs=2,
        max_start_epoch=3,
        log=[],
    )
    return {
        "args": args,
        "trajectories": [expert(images[:30], labels[:30]) for _ in range(2)],
        "image_syn": 0.5 + 0.2 * torch.randn(20, 1, 8, 8),
        "label_syn": torch.arange(10).repeat(2),
        "val": (images[30:], labels[30:]),
    }


SCRIPT = Script("distill", main, make, lambda a: {"lr_img": a["args"].lr_img})
