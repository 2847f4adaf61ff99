"""Losses, as the loss of every example, from three outputs and a target.

Traits say what the target is: `class` (an index), `real` (three numbers) or `prob` (three that sum to 1).
"""

from __future__ import annotations

from tests.fuzz.draft import Draft
from tests.fuzz.piece import Axis

LOSSES = Axis("loss")

TARGETS = {
    "class": "torch.randint(3, ({n},))",
    "real": "torch.randn({n}, 3)",
    "prob": "torch.softmax(torch.randn({n}, 3), 1)",
}


def loss(name: str, text: str, traits: str, weight: float = 1.0) -> None:
    def write(d: Draft) -> None:
        d.example = text

    LOSSES.put(name, write, traits, weight=weight)


loss("cross_entropy", 'F.cross_entropy({out}, {y}, reduction="none")', "class", 4)
loss("smoothed", 'F.cross_entropy({out}, {y}, label_smoothing=0.1, reduction="none")', "class", 2)
loss(
    "balanced", 'F.cross_entropy({out}, {y}, weight=torch.tensor([0.5, 1.0, 1.5]), reduction="none")', "class fixed", 2
)
loss("nll", 'F.nll_loss(F.log_softmax({out}, 1), {y}, reduction="none")', "class", 2)
loss("focal", "((1 - {out}.softmax(1)) ** 2 * -{out}.log_softmax(1) * F.one_hot({y}, 3)).sum(1)", "class")
loss("margin", 'F.multi_margin_loss({out}, {y}, p=2, reduction="none")', "class kinked first")
loss("gathered", "({out}.logsumexp(1) - {out}.gather(1, {y}.unsqueeze(1)).squeeze(1))", "class")
loss("mse", 'F.mse_loss({out}, {y}, reduction="none").mean(1)', "real", 3)
loss("module_mse", 'nn.MSELoss(reduction="none")({out}, {y}).sum(1)', "real")
loss("huber", 'F.huber_loss({out}, {y}, delta=0.7, reduction="none").mean(1)', "real kinked")
loss("smooth_l1", 'F.smooth_l1_loss({out}, {y}, beta=0.5, reduction="none").mean(1)', "real kinked")
loss("logcosh", "({out} - {y}).cosh().log().mean(1)", "real")
loss("cosine", "(1 - F.cosine_similarity({out}, {y}, dim=1))", "real")
loss("gaussian", "({out}[:, 2:].exp() * ({out}[:, :2] - {y}[:, :2]) ** 2 - {out}[:, 2:]).mean(1)", "real")
loss("bce", 'F.binary_cross_entropy_with_logits({out}, {y}, reduction="none").mean(1)', "prob", 2)
loss(
    "bce_weighted",
    "F.binary_cross_entropy_with_logits("
    '{out}, {y}, pos_weight=torch.tensor([2.0, 1.0, 0.5]), reduction="none").mean(1)',
    "prob fixed",
)
loss("bce_plain", 'F.binary_cross_entropy(torch.sigmoid({out}), {y}, reduction="none").mean(1)', "prob")
loss("kl", 'F.kl_div(F.log_softmax({out}, 1), {y}, reduction="none").sum(1)', "prob", 2)
loss("soft", 'F.cross_entropy({out}, {y}, reduction="none")', "prob")
loss("poisson", 'F.poisson_nll_loss({out}.tanh(), {y}, reduction="none").mean(1)', "prob")
loss("normal", "(-torch.distributions.Normal({out}, 1.0).log_prob({y}).mean(1))", "real library")
loss("categorical", "(-torch.distributions.Categorical(logits={out}).log_prob({y}))", "class library")
loss(
    "gaussian_nll",
    'F.gaussian_nll_loss({out}, {y}, {out}.exp().clamp(max=5.0), reduction="none").mean(1)',
    "real library",
)


def target(name: str) -> str:
    """What the target of a loss is."""
    (kind,) = LOSSES[name].traits & TARGETS.keys()
    return kind
