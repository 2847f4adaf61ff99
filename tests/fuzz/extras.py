"""Extras that change the step: clipping, accumulation, schedules, sharpness-aware steps, penalties, freezing, hooks.

Traits: `cut` (a loss reads a value that was detached, in lines marked so), `item` (Python takes a number and nothing
else), `guard` (Python decides by a number), `hook`, `mean` (keeps the loss a mean over examples).
"""

from __future__ import annotations

from tests.fuzz.draft import Draft
from tests.fuzz.losses import LOSSES
from tests.fuzz.metas import classes, copied, floats, functional
from tests.fuzz.models import MODELS
from tests.fuzz.piece import Axis
from tests.fuzz.spec import Spec
from tests.fuzz.updates import UPDATES

EXTRAS = Axis("extras")


def stepping(spec: Spec) -> bool:
    """Whether an optimizer steps."""
    return "opt" in UPDATES[spec.update].traits


def grads(spec: Spec) -> bool:
    """Whether the gradients stand in `p.grad`."""
    return "grad" in UPDATES[spec.update].traits


def unfrozen(spec: Spec) -> bool:
    return grads(spec) and "frozen" not in MODELS[spec.model].traits


def twice(spec: Spec) -> bool:
    """Whether plain PyTorch can differentiate the model twice (fused attention has no second derivative)."""
    return "first" not in MODELS[spec.model].traits | LOSSES[spec.loss].traits


def keep_inputs(d: Draft) -> None:
    """What made the batch is needed by a second backward."""
    if "input" in d.filled:
        d.backward = ["loss.backward(retain_graph=True)"]


def each(line: str) -> str:
    return f"for p in net.parameters():\n    if p.grad is not None:\n        {line}"


# --- gradients

CLIPS = {
    "clip_norm": "nn.utils.clip_grad_norm_(net.parameters(), 0.4)",
    "clip_norm_finite": "nn.utils.clip_grad_norm_(net.parameters(), 0.4, error_if_nonfinite=True)",
    "clip_norm_foreach": "nn.utils.clip_grad_norm_(list(net.parameters()), 1.0, norm_type=2.0, foreach=True)",
    "clip_value": "nn.utils.clip_grad_value_(net.parameters(), 0.1)",
    "clip_hand": "with torch.no_grad():\n    own = [p for p in net.parameters() if p.grad is not None]\n"
    "    total = sum((p.grad**2).sum() for p in own).sqrt()\n"
    "    for p in own:\n        p.grad.mul_(torch.clamp(0.4 / total, max=1.0))",
    "centralise": each("p.grad = p.grad - p.grad.mean()"),
    "grad_data": each("p.grad.data.mul_(0.7)"),
    "grad_decay": each("p.grad.add_(p.detach(), alpha=0.01)"),
    "grad_noise": "with torch.no_grad():\n    for p in net.parameters():\n        if p.grad is not None:\n"
    "            p.grad += 0.01 * torch.randn_like(p)",
}
for _name, _line in CLIPS.items():
    EXTRAS.put(_name, lambda d, line=_line: d.grads.append(line), takes="grads", fits=grads, weight=0.7)


def steps_twice(spec: Spec) -> bool:
    """What no step updates counts as a meta-parameter, unless the optimizer is made inside."""
    return stepping(spec) and (spec.place == "inside" or spec.steps - (spec.data == "split_randomly") >= 2)


@EXTRAS.add(takes="step zero", fits=steps_twice)
def accumulate(d: Draft) -> None:
    k = d.counter()
    d.zero = []
    d.backward = ["(loss / 2).backward()"]
    d.step = [f"if ({k} + 1) % 2 == 0:\n    opt.step()\n    opt.zero_grad()"]


@EXTRAS.add(takes="zero", fits=stepping)
def zero_after(d: Draft) -> None:
    d.zero = []
    d.post.insert(0, "opt.zero_grad()")


@EXTRAS.add(takes="zero", fits=stepping)
def zero_kept(d: Draft) -> None:
    d.zero = ["opt.zero_grad(set_to_none=False)"]


@EXTRAS.add(takes="zero", fits=stepping)
def never_zeroed(d: Draft) -> None:
    d.zero = []


@EXTRAS.add(takes="backward", fits=grads)
def two_backwards(d: Draft) -> None:
    d.backward = ["(0.5 * loss).backward(retain_graph=True)", "(0.5 * loss).backward()"]


@EXTRAS.add(takes="backward", fits=grads)
def backward_inputs(d: Draft) -> None:
    d.backward = ["loss.backward(inputs=[p for p in net.parameters() if p.requires_grad])"]


@EXTRAS.add(takes="backward step zero losses", fits=stepping)
def closure(d: Draft) -> None:
    d.closure = True


@EXTRAS.add(takes="step backward", fits=grads)
def sharpness(d: Draft) -> None:
    """A sharpness-aware step: the gradient is taken at the ascended weights (Foret et al. 2021)."""
    keep_inputs(d)
    d.grads[:0] = [
        "own = [p for p in net.parameters() if p.grad is not None]",
        "with torch.no_grad():\n    norm = sum((p.grad**2).sum() for p in own).sqrt() + 0.01\n"
        "    moves = [0.05 * p.grad / norm for p in own]\n    for p, e in zip(own, moves):\n        p.add_(e)",
        "net.zero_grad()",
        f"{d.loss('x', 'y')}.backward()",
        "with torch.no_grad():\n    for p, e in zip(own, moves):\n        p.sub_(e)",
    ]


@EXTRAS.add(takes="step backward", fits=grads)
def sharpness_data(d: Draft) -> None:
    """As the usual published optimizers write it: the old weights are put back through `.data`."""
    keep_inputs(d)
    d.grads[:0] = [
        "own = [p for p in net.parameters() if p.grad is not None]",
        "old = [p.data.clone() for p in own]",
        "for p in own:\n    p.data = p.data + 0.05 * p.grad.data",
        "net.zero_grad()",
        f"{d.loss('x', 'y')}.backward()",
        "for p, before in zip(own, old):\n    p.data = before",
    ]


@EXTRAS.add(takes="grad_input", fits=lambda spec: floats(spec) and twice(spec))
def input_penalty(d: Draft) -> None:
    d.pre.append("x = x.clone().requires_grad_()")
    d.terms.append("(slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)")
    d.terms.append("loss = loss + 0.1 * slope.square().mean()")


@EXTRAS.add(takes="grad_weights", fits=lambda spec: functional(spec) and twice(spec))
def weight_penalty(d: Draft) -> None:
    d.terms.append("own = [p for p in net.parameters() if p.requires_grad]")
    d.terms.append("slopes = torch.autograd.grad(loss, own, create_graph=True)")
    d.terms.append("loss = loss + 0.05 * sum(g.square().sum() for g in slopes)")


@EXTRAS.add(takes="freeze", fits=lambda spec: unfrozen(spec) and stepping(spec))
def freezing(d: Draft) -> None:
    """Progressive freezing: the first parameter stops learning after the second step."""
    k = d.counter()
    d.post.append(
        f"if {k} == 1:\n    next(net.parameters()).requires_grad_(False)\n    next(net.parameters()).grad = None"
    )


@EXTRAS.add(takes="freeze", fits=unfrozen)
def toggled(d: Draft) -> None:
    d.pre.insert(0, "net.requires_grad_(True)")
    d.post.append("net.requires_grad_(False)")
    d.after.append("net.requires_grad_(True)")


@EXTRAS.add("cut", takes="adversary grad_input", fits=lambda spec: floats(spec) and grads(spec))
def fgsm(d: Draft) -> None:
    d.pre.append("near = x.detach().clone().requires_grad_()  # cut")
    d.pre.append(f"(slope,) = torch.autograd.grad({d.loss('near', 'y')}, near)")
    d.pre.append("x = (near + 0.05 * slope.sign()).detach()  # cut")


@EXTRAS.add(takes="adversary", fits=lambda spec: floats(spec) and grads(spec))
def ascent(d: Draft) -> None:
    """Smooth adversarial inputs whose way is not cut: two steps of ascent."""
    d.pre.append("x = x.clone().requires_grad_()")
    d.pre.append(
        f"for _ in range(2):\n    (slope,) = torch.autograd.grad({d.loss('x', 'y')}, x)\n    x = x + 0.1 * slope"
    )


@EXTRAS.add(takes="step", fits=lambda spec: grads(spec) and twice(spec))
def maml(d: Draft) -> None:
    d.need("from torch.func import functional_call")
    rate = d.meta("inner_rate", "torch.tensor(0.1)")
    d.call = "functional_call(net, weights, ({x},))"
    d.pre += [
        "weights = {name: p for name, p in net.named_parameters() if p.requires_grad}",
        "for _ in range(2):\n"
        f"    found = torch.autograd.grad({d.loss('x', 'y', d.call)}, list(weights.values()), create_graph=True)\n"
        f"    weights = {{name: p - {rate} * g for (name, p), g in zip(weights.items(), found)}}",
    ]


@EXTRAS.add(takes="weights", fits=lambda spec: grads(spec) and twice(spec) and "init" not in spec.metas)
def middle(d: Draft) -> None:
    """A middle level: weights of positions that learn by their own gradient through one virtual step.

    Through a model that `mlc.clone` made, that gradient would also go through the training before.
    """
    d.need("from torch.func import functional_call")
    rate = d.meta("middle_rate", "torch.tensor(0.5)")
    d.late.append(f"v = torch.zeros({d.spec.batch}, requires_grad=True)")
    losses = d.example.format(out="net(x)", y="y")
    d.pre += [
        "own = {name: p for name, p in net.named_parameters() if p.requires_grad}",
        f"found = torch.autograd.grad((torch.sigmoid(v) * {losses}).mean(), list(own.values()), create_graph=True)",
        "moved = {name: p - 0.1 * g for (name, p), g in zip(own.items(), found)}",
        f"upper = {d.loss('val[0]', 'val[1]', 'functional_call(net, moved, ({x},))')}",
        "(slope,) = torch.autograd.grad(upper, v)",
        f"with torch.no_grad():\n    v -= {rate} * slope",
    ]
    d.weights.append("losses = torch.sigmoid(v) * losses")


@EXTRAS.add(takes="weights", fits=lambda spec: not functional(spec))
def middle_followed(d: Draft) -> None:
    """The same among fast weights: the path through `v` is followed, also through earlier iterations."""
    rate = d.meta("middle_rate", "torch.tensor(0.5)")
    d.late.append(f"v = torch.zeros({d.spec.batch}, requires_grad=True)")
    losses = d.example.format(out="functional_call(net, fast, (x,))", y="y")
    d.pre += [
        f"found = torch.autograd.grad((torch.sigmoid(v) * {losses}).mean(), list(fast.values()), create_graph=True)",
        "moved = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), found)}",
        f"upper = {d.loss('val[0]', 'val[1]', 'functional_call(net, moved, ({x},))')}",
        "(slope,) = torch.autograd.grad(upper, v, create_graph=True)",
        f"v = v - {rate} * slope",
    ]
    d.weights.append("losses = torch.sigmoid(v) * losses")


# --- schedules

SCHEDULES = {
    "lambda_lr": "torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1 / (1 + n))",
    "warmup": "torch.optim.lr_scheduler.LambdaLR(opt, lambda n: n / 3)",
    "linear_lr": "torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.5, total_iters=3)",
    "step_lr": "torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)",
    "multi_step": "torch.optim.lr_scheduler.MultiStepLR(opt, [1, 2], gamma=0.5)",
    "exponential": "torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)",
    "cosine": "torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6)",
    "restarts": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=2)",
    "polynomial": "torch.optim.lr_scheduler.PolynomialLR(opt, total_iters=8, power=2.0)",
    "one_cycle": "torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20, cycle_momentum=False)",
    "sequential_lr": "torch.optim.lr_scheduler.SequentialLR(opt, [torch.optim.lr_scheduler.ConstantLR(opt, 0.5, 1), "
    "torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[1])",
    "cyclic": "torch.optim.lr_scheduler.CyclicLR(opt, 0.02, 0.1, step_size_up=2, cycle_momentum=False)",
}


def schedule(name: str, line: str) -> None:
    def write(d: Draft) -> None:
        d.opt.append(f"sched = {line}")
        d.scheduled = True
        (d.epoch if len(d.loops) > 1 and d.spec.seed % 2 else d.post).append("sched.step()")

    def fits(spec: Spec) -> bool:
        sets = {"one_cycle", "cyclic"}  # these overwrite the rate
        filled = name in sets and "log_lr" in spec.metas
        return stepping(spec) and not filled and not {"opt_lr", "lr_groups"} & set(spec.metas)

    EXTRAS.put(name, write, takes="schedule", fits=fits, weight=0.5)


for _name, _line in SCHEDULES.items():
    schedule(_name, _line)


@EXTRAS.add(takes="schedule", fits=lambda spec: stepping(spec), weight=0.5)
def rate_by_hand(d: Draft) -> None:
    k = d.counter()
    rate = "0.05" if not {"opt_lr", "log_lr", "lr_groups"} & set(d.spec.metas) else 'group["lr"]'
    d.zero.append(f'for group in opt.param_groups:\n    group["lr"] = {rate} * 0.9**{k}')


@EXTRAS.add(
    "guard", takes="schedule", fits=lambda s: stepping(s) and not {"opt_lr", "lr_groups"} & set(s.metas), weight=0.5
)
def plateau(d: Draft) -> None:
    d.opt.append("sched = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)")
    d.scheduled = True
    d.post.append("sched.step(loss.item())")


# --- hooks

HOOKS = {
    "tensor_hook": ("outs", "out.register_hook(lambda g: 0.9 * g)", functional),
    "param_hook": ("late", "handle = next(net.parameters()).register_hook(lambda g: g * 0.5)", unfrozen),
    "forward_hook": ("late", "handle = net.register_forward_hook(lambda m, i, o: o * 1.1)", functional),
    "pre_hook": (
        "late",
        "handle = net.register_forward_pre_hook(lambda m, i: (i[0] * 1.0,))",
        lambda s: floats(s) and functional(s),
    ),
    "step_hook": ("late", "handle = opt.register_step_post_hook(lambda o, a, k: None)", stepping),
}
for _name, (_place, _line, _fits) in HOOKS.items():

    def _hook(d: Draft, place: str = _place, line: str = _line) -> None:
        getattr(d, place).append(line)
        if place == "late":
            d.after.append("handle.remove()")

    EXTRAS.put(_name, _hook, "hook", takes="hook", fits=_fits, weight=0.5)


@EXTRAS.add("hook", takes="hook", fits=unfrozen, weight=0.5)
def accumulate_hook(d: Draft) -> None:
    d.late.append(
        "def shrink(p):\n    with torch.no_grad():\n        p.grad.mul_(0.5)\n\n"
        "handle = next(net.parameters()).register_post_accumulate_grad_hook(shrink)"
    )
    d.after.append("handle.remove()")


# --- models and batches


@EXTRAS.add(takes="net", fits=copied)
def deep_copied(d: Draft) -> None:
    d.setup[0] = "net = copy.deepcopy(model)"


@EXTRAS.add(takes="net", fits=lambda spec: copied(spec) and "own" in MODELS[spec.model].traits)
def built(d: Draft) -> None:
    d.setup[0] = "net = Net()"


@EXTRAS.add(takes="net", fits=copied, weight=0.5)
def doubled(d: Draft) -> None:
    d.setup[0] = "net = model.double().to('cpu')"


@EXTRAS.add(takes="net", fits=lambda spec: copied(spec) and "hooked" not in MODELS[spec.model].traits, weight=0.5)
def initialised(d: Draft) -> None:
    d.setup.append("with torch.no_grad():\n    for p in net.parameters():\n        p.copy_(torch.randn_like(p) / 2)")


@EXTRAS.add(takes="noise", fits=floats)
def jitter(d: Draft) -> None:
    d.pre.append("x = x + 0.1 * torch.randn_like(x)")


@EXTRAS.add(takes="noise", fits=floats)
def own_generator(d: Draft) -> None:
    d.make.append("gen = torch.Generator().manual_seed(seed + 3)")
    d.args["gen"] = "gen"
    d.pre.append("x = x + 0.1 * torch.randn(x.shape, generator=gen)")


@EXTRAS.add(takes="noise", fits=floats)
def generator_made(d: Draft) -> None:
    d.setup.append("gen = torch.Generator().manual_seed(5)")
    d.pre.append("x = x + 0.1 * torch.randn(x.shape, generator=gen)")


@EXTRAS.add(takes="noise", fits=floats)
def masked(d: Draft) -> None:
    d.pre.append("x = x * (torch.rand_like(x) < 0.8)")


@EXTRAS.add(takes="noise", fits=lambda spec: floats(spec) and not classes(spec))
def mixup(d: Draft) -> None:
    d.pre.append("lam = torch.rand(())")
    d.pre.append("other = torch.randperm(len(x))")
    d.pre.append("x, y = lam * x + (1 - lam) * x[other], lam * y + (1 - lam) * y[other]")


@EXTRAS.add(takes="noise", fits=floats)
def flipped(d: Draft) -> None:
    d.pre.append("if torch.rand(()).item() < 0.5:\n    x = x.flip(-1)")
