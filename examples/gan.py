"""An unrolled GAN on a ring of eight Gaussians: two levels, each of which depends on the other.

The discriminator's loss reads the generator, the generator's loss reads the discriminator. A generator that plays
against the discriminator as it stands chases it from one Gaussian to the next. Here its gradient goes through the
steps that the discriminator takes next, in which it notices (Metz et al.: Unrolled generative adversarial networks,
2017). These steps are rolled back and taken again against the new generator. The opponent is the same pair taking
turns, at the same rates.

    mlc run examples/gan.py
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import mlc


def make_net(inputs, outputs, width=32):
    layers = nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    return nn.Sequential(*layers)


def ring(count):
    """(count, 2) points: eight Gaussians of width 0.05 on a circle of radius 1."""
    angle = 2 * math.pi * torch.randint(8, (count,)) / 8
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def problems(unroll, seed=0, batch=128):
    """The levels and the generator; ``unroll`` steps of the discriminator are seen (0: none, the two take turns)."""
    torch.manual_seed(seed)
    generator, judge = make_net(16, 2), make_net(2, 1)

    def noise():
        while True:
            yield torch.randn(batch, 16)

    def both():
        while True:
            yield ring(batch), torch.randn(batch, 16)

    def judging(data):
        real, z = data
        return F.softplus(-judge(real)).mean() + F.softplus(judge(generator(z))).mean()

    def fooling(z):
        return F.softplus(-judge(generator(z))).mean()

    def adam(rate):
        return lambda params: torch.optim.Adam(params, lr=rate, betas=(0.5, 0.999), eps=1e-4)

    lower = mlc.Level("judge", judge, adam(1e-3), judging, both, steps=max(unroll, 1), rollback=unroll > 1)
    upper = mlc.Level("generator", generator, adam(4e-3), fooling, noise)
    return ([lower, upper] if unroll else [mlc.Alternating(lower, upper)]), generator


def covered(generator, count=2000):
    """How many of the Gaussians at least 2% of the samples lie in, and the share of samples that lie in any."""
    torch.manual_seed(1)
    with torch.no_grad():
        points = generator(torch.randn(count, 16))
    angle = 2 * math.pi * torch.arange(8) / 8
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    distance, nearest = torch.cdist(points, centres).min(1)
    hits = nearest[distance < 0.2].bincount(minlength=8)
    return int((hits > 0.02 * count).sum()), hits.sum().item() / count


def example_training():
    levels, _ = problems(2, batch=8)
    return mlc.Training(levels)


def main(steps=400, unroll=5, seed=0):
    result = {}
    for name, seen in (("taking turns", 0), (f"unrolled {unroll} steps", unroll)):
        levels, generator = problems(seen, seed)
        mlc.Training(levels).run(steps)
        modes, share = covered(generator)
        print(f"{name:20s}{modes} of 8 Gaussians, {share:.0%} of the samples in them")
        result[name] = {"modes": modes, "share": share}
    return result


if __name__ == "__main__":
    main()
