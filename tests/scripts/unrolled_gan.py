"""An unrolled adversarial pair on a ring of Gaussians, in two forms.

`main`: the generator's loss goes through the discriminator's next steps, as fast weights. `main_backup`: the
discriminator is really stepped, the generator steps against it, and its weights are put back.
"""

import copy
from math import pi

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings
from tests.scripts.script import Script
from torch.func import functional_call

criterion = nn.BCEWithLogitsLoss()


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.map1 = nn.Linear(4, 8)
        self.map2 = nn.Linear(8, 2)

    def forward(self, x):
        return self.map2(torch.tanh(self.map1(x)))


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.map1 = nn.Linear(2, 8)
        self.map2 = nn.Linear(8, 1)

    def forward(self, x):
        return self.map2(F.softplus(self.map1(x)))


def real_batch(size):
    angle = 2 * pi * torch.randint(0, 8, (size,)) / 8
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(size, 2)


def d_loss_of(judge, real, fake):
    d_real, d_fake = judge(real), judge(fake)
    return criterion(d_real, torch.ones_like(d_real)) + criterion(d_fake, torch.zeros_like(d_fake))


def unrolled_d(D, steps, lr, G, size):
    """The discriminator after `steps` more steps, as a function."""
    weights = dict(D.named_parameters())
    for _ in range(steps):

        def judge(x, weights=weights):
            return functional_call(D, weights, (x,))

        loss = d_loss_of(judge, real_batch(size), G(torch.randn(size, 4)))
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {name: w - lr * g for (name, w), g in zip(weights.items(), grads)}
    return lambda x: functional_call(D, weights, (x,))


def moments(G, noise, target):
    fake = G(noise)
    return (fake.mean(0) - target.mean(0)).square().sum() + (
        fake.T @ fake / len(fake) - target.T @ target / len(target)
    ).square().sum()


def main(cfg, G, D, noise, target):
    d_optimizer = torch.optim.Adam(D.parameters(), lr=0.02, betas=(0.5, 0.999))
    g_optimizer = torch.optim.Adam(G.parameters(), lr=0.02, betas=(0.5, 0.999))
    for it in range(cfg.num_iterations):
        d_optimizer.zero_grad()
        with torch.no_grad():
            fake = G(torch.randn(cfg.minibatch_size, 4))
        d_loss = d_loss_of(D, real_batch(cfg.minibatch_size), fake)
        d_loss.backward()
        d_optimizer.step()

        g_optimizer.zero_grad()
        # was: judge = unrolled_d(D, cfg.unrolled_steps, 0.1, G, cfg.minibatch_size)
        judge = unrolled_d(D, cfg.unrolled_steps, cfg.unrolled_lr, G, cfg.minibatch_size)
        d_fake = judge(G(torch.randn(cfg.minibatch_size, 4)))
        g_loss = criterion(d_fake, torch.ones_like(d_fake))
        g_loss.backward()
        g_optimizer.step()
        print(f"iteration {it}: D {d_loss.item():.4f} G {g_loss.item():.4f}")
    return moments(G, noise, target)


def d_loop(cfg, D, G, optimizer):
    optimizer.zero_grad()
    with torch.no_grad():
        fake = G(torch.randn(cfg.minibatch_size, 4))
    loss = d_loss_of(D, real_batch(cfg.minibatch_size), fake)
    loss.backward()
    optimizer.step()
    return loss.item()


def main_backup(cfg, G, D, noise, target):
    d_optimizer = torch.optim.SGD(D.parameters(), lr=cfg.unrolled_lr)
    g_optimizer = torch.optim.Adam(G.parameters(), lr=0.02, betas=(0.5, 0.999))
    log = []
    for it in range(cfg.num_iterations):
        d_info = d_loop(cfg, D, G, d_optimizer)
        backup = copy.deepcopy(D.state_dict())
        for _ in range(cfg.unrolled_steps):
            d_loop(cfg, D, G, d_optimizer)
        g_optimizer.zero_grad()
        d_fake = D(G(torch.randn(cfg.minibatch_size, 4)))
        g_loss = criterion(d_fake, torch.ones_like(d_fake))
        g_loss.backward()
        g_optimizer.step()
        D.load_state_dict(backup)
        del backup
        log.append((it, d_info, g_loss.item()))
    print("%d iterations, last D %.4f G %.4f" % (len(log), *log[-1][1:]))
    return moments(G, noise, target)


def make():
    lr = torch.tensor(0.3, requires_grad=True)
    cfg = Settings(num_iterations=3, minibatch_size=8, unrolled_steps=2, unrolled_lr=lr)
    return {"cfg": cfg, "G": Generator(), "D": Discriminator(), "noise": torch.randn(16, 4), "target": real_batch(16)}


def metas(a):
    return {"unrolled_lr": a["cfg"].unrolled_lr}


# Both discriminators are trained on fakes made under no_grad.
INNER = {"stop_gradient": "inner"}
SCRIPTS = [
    Script("unrolled_gan", main, make, metas, options=INNER),
    Script("unrolled_gan_backup", main_backup, make, metas, options=INNER),
]
