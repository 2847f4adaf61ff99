"""Extras that watch the training or keep something of it: logs, evaluation, stopping, averages, best states."""

from __future__ import annotations

from tests.fuzz.draft import Draft
from tests.fuzz.extras import EXTRAS, grads, stepping
from tests.fuzz.losses import target
from tests.fuzz.metas import functional
from tests.fuzz.models import MODELS
from tests.fuzz.spec import Spec

# --- logs


@EXTRAS.add("item", takes="log", weight=1.5)
def log_items(d: Draft) -> None:
    d.late.append("log = []")
    d.post.append("log.append(loss.item())")
    d.returns["log"] = "log"


@EXTRAS.add("item", takes="log")
def running_sum(d: Draft) -> None:
    d.late.append("total = 0.0")
    d.post.append("total += loss.item() * len(x)")
    d.returns["total"] = "total"


@EXTRAS.add("item", takes="log")
def rounded(d: Draft) -> None:
    d.late.append("log = []")
    d.post.append("log.append(round(loss.item(), 2))")
    d.returns["log"] = "log"


@EXTRAS.add("item", takes="log losses")
def formatted(d: Draft) -> None:
    d.late.append("log = []")
    d.post.append('log.append(f"loss {loss.item():.3f} of {losses.max().item():8.2e}")')
    d.returns["log"] = "log"


@EXTRAS.add("item", takes="log")
def kept_elsewhere(d: Draft) -> None:
    """The history outlives the call."""
    d.make.append("history = []")
    d.args["history"] = "history"
    d.post.append("history.append(loss.detach().clone())")


@EXTRAS.add("item", takes="log")
def kept_numbers(d: Draft) -> None:
    d.make.append('history = {"loss": []}')
    d.args["history"] = "history"
    d.post.append('history["loss"].append(float(loss.detach()))')


@EXTRAS.add("item", takes="log losses")
def tensors_listed(d: Draft) -> None:
    d.late.append("log = []")
    d.post.append("log.append(losses.detach().tolist())")
    d.returns["log"] = "log"


@EXTRAS.add("item", takes="log losses")
def numpy_log(d: Draft) -> None:
    d.late.append("log = []")
    d.post.append("log.append(losses.detach().numpy().copy())")
    d.returns["log"] = "log"


@EXTRAS.add(takes="log")
def losses_returned(d: Draft) -> None:
    d.late.append("log = []")
    d.post.append("log.append(loss)")
    d.returns["log"] = "torch.stack(log).mean()"


@EXTRAS.add(takes="log")
def model_returned(d: Draft) -> None:
    d.returns["weights"] = "[p.detach().clone() for p in net.parameters()]"


# --- evaluation in between


def evaluation(name: str, context: str, body: list[str], traits: str = "item", result: str = "") -> None:
    def write(d: Draft) -> None:
        d.late.append("score = 0")
        lines = [line.format(out=d.call.format(x="val[0]"), loss=d.loss("val[0]", "val[1]", d.call)) for line in body]
        block = "\n".join(["net.eval()", f"with {context}:", *("    " + line for line in lines), "net.train()"])
        (d.epoch if len(d.loops) > 1 else d.post).append(block)
        if result:
            d.returns["score"] = result

    def fits(spec: Spec) -> bool:
        return functional(spec) and "maml" not in spec.extras and "freezing" not in spec.extras

    EXTRAS.put(name, write, traits, takes="evaluation", fits=fits)


RIGHT = "({out}.argmax(1) == val[0].new_zeros(len(val[0]))).sum().item()"
evaluation("accuracy", "torch.no_grad()", [f"score += {RIGHT}"], result="score")
evaluation("accuracy_inference", "torch.inference_mode()", [f"score += {RIGHT}"], result="score")
evaluation("accuracy_unused", "torch.no_grad()", [f"score += {RIGHT}"])
evaluation("val_loss", "torch.no_grad()", ["score += {loss}.item()"], result="score")
evaluation("val_loss_tensor", "torch.no_grad()", ["score = score + {loss}"], result="score")
evaluation("val_printed", "torch.no_grad()", ['print("%.4f" % float({loss}))'])


@EXTRAS.add("item", takes="evaluation", fits=lambda spec: functional(spec) and "many" in _data(spec))
def evaluated_on_data(d: Draft) -> None:
    """An evaluation loop over the training data, the shuffled loader's too."""
    d.late.append("score = 0.0")
    unpack = d.bind[-1]
    d.after.append(
        f"with torch.no_grad():\n    for item in data:\n        {unpack}\n        score += {d.loss('x', 'y')}.item()"
    )
    d.returns["score"] = "score"


def _data(spec: Spec) -> frozenset[str]:
    from tests.fuzz.data import DATA

    return DATA[spec.data].traits


# --- numbers that decide


@EXTRAS.add("guard", takes="stop")
def stop_early(d: Draft) -> None:
    d.post.append("if loss.item() < 0.05:\n    break")


@EXTRAS.add("guard", takes="stop")
def stop_patience(d: Draft) -> None:
    d.late.append('best, bad = float("inf"), 0')
    d.post.append("if loss.item() < best:\n    best, bad = loss.item(), 0\nelse:\n    bad += 1\nif bad > 1:\n    break")


@EXTRAS.add("guard", takes="checks")
def finite(d: Draft) -> None:
    d.checks.append("if not torch.isfinite(loss):\n    raise FloatingPointError('the loss')")


@EXTRAS.add("guard", takes="checks", fits=lambda spec: not ({"while_", "steps_while"} & {spec.loop}))
def skip_large(d: Draft) -> None:
    d.checks.append("if loss.item() > 1e3:\n    continue")


@EXTRAS.add("guard", takes="state", fits=grads)
def best_state(d: Draft) -> None:
    d.late.append('best = float("inf")')
    d.post.append("if loss.item() < best:\n    best, kept = loss.item(), copy.deepcopy(net.state_dict())")
    d.after.append("net.load_state_dict(kept)")


# --- states and averages


@EXTRAS.add(takes="state", fits=grads)
def state_back(d: Draft) -> None:
    """Half of the way is undone by a state dict from before the loop."""
    d.late.append("kept = {n: t.clone() for n, t in net.state_dict().items()}")
    d.after.append(
        "now = net.state_dict()\n"
        "net.load_state_dict({n: (t + kept[n]) / 2 if t.is_floating_point() else t for n, t in now.items()})"
    )


@EXTRAS.add(takes="state", fits=lambda spec: stepping(spec) and "log_lr" not in spec.metas)
def optimizer_reloaded(d: Draft) -> None:
    d.epoch.append("opt.load_state_dict(copy.deepcopy(opt.state_dict()))")


def started(spec: Spec) -> bool:
    """Copies by `deepcopy` or `detach().clone()` are copies of values: no learned initial weights here."""
    return grads(spec) and "init" not in spec.metas


def average(name: str, setup: str, post: str, after: str = "", final: str = "avg({x})") -> None:
    def write(d: Draft) -> None:
        d.late.append(setup)
        d.post.append(post)
        d.after += [after] if after else []
        d.final = final

    EXTRAS.put(name, write, takes="average", fits=started)


PAIRS = "for a, p in zip(avg.parameters(), net.parameters()):\n"
FROZEN = "avg = copy.deepcopy(net).requires_grad_(False)"
average("ema", FROZEN, "with torch.no_grad():\n    " + PAIRS + "        a.mul_(0.8).add_(p, alpha=0.2)")
average("ema_lerp", FROZEN, "with torch.no_grad():\n    " + PAIRS + "        a.lerp_(p, 0.3)")
average("ema_copy", FROZEN, "with torch.no_grad():\n    " + PAIRS + "        a.copy_(0.8 * a + 0.2 * p)")
average("ema_data", FROZEN, PAIRS + "    a.data.mul_(0.8).add_(p.data, alpha=0.2)")
average("ema_data_copy", FROZEN, PAIRS + "    a.data.copy_(0.8 * a.data + 0.2 * p.data)")
average("ema_data_set", FROZEN, PAIRS + "    a.data = 0.8 * a.data + 0.2 * p.data")
average(
    "swa",
    "avg = torch.optim.swa_utils.AveragedModel(net)",
    "avg.update_parameters(net)",
)
average(
    "ema_averaged",
    "avg = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))",
    "avg.update_parameters(net)",
)


@EXTRAS.add(takes="average", fits=started)
def ema_dict(d: Draft) -> None:
    d.need("from torch.func import functional_call")
    d.late.append("avg = {n: p.detach().clone() for n, p in net.named_parameters()}")
    d.post.append(
        "with torch.no_grad():\n    for n, p in net.named_parameters():\n        avg[n].mul_(0.8).add_(0.2 * p)"
    )
    d.final = "functional_call(net, avg, ({x},))"


@EXTRAS.add(takes="average", fits=started)
def lookahead(d: Draft) -> None:
    k = d.counter()
    d.late.append("slow = [p.detach().clone() for p in net.parameters()]")
    d.post.append(
        f"if {k} % 2 == 1:\n    with torch.no_grad():\n        for s, p in zip(slow, net.parameters()):\n"
        "            s.add_(p - s, alpha=0.5)\n            p.copy_(s)"
    )


@EXTRAS.add(takes="average", fits=started)
def mean_teacher(d: Draft) -> None:
    """A frozen average that teaches: its value enters the loss, through state."""
    d.late.append(FROZEN)
    d.terms.append("loss = loss + 0.3 * (net(x) - avg(x)).square().mean()")
    d.post.append("with torch.no_grad():\n    " + PAIRS + "        a.mul_(0.8).add_(p, alpha=0.2)")


# --- players


CRITIC = "critic = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))"


def players(name: str, lines: list[str], after: list[str], traits: str = "") -> None:
    """A critic that learns to tell outputs from targets, and whom the model tries to please."""

    def write(d: Draft) -> None:
        d.make += [CRITIC]
        d.args["critic"] = "critic"
        d.late.append("critic_opt = torch.optim.SGD(critic.parameters(), lr=0.1)")
        keep = "retain_graph=True" if "input" in d.filled else ""
        d.pre += [line.replace("{keep}", keep) for line in lines]
        d.terms.append("loss = loss - 0.2 * F.logsigmoid(critic(out)).mean()")
        d.post += after

    def fits(spec: Spec) -> bool:
        return grads(spec) and target(spec.loss) != "class" and "frozen" not in MODELS[spec.model].traits

    EXTRAS.put(name, write, traits, takes="players freeze", fits=fits)


PLAY = "(F.softplus(-critic(y)).mean() + F.softplus(critic({0})).mean()).backward({1})"
players(
    "players_cut",
    ["critic_opt.zero_grad()", "drawn = net(x).detach()  # cut", PLAY.format("drawn", ""), "critic_opt.step()"],
    [],
    "cut",
)
players(
    "players",
    ["critic_opt.zero_grad()", PLAY.format("net(x)", "{keep}"), "critic_opt.step()"],
    [],
)
players(
    "players_toggled",
    [
        "critic.requires_grad_(True)",
        "net.requires_grad_(False)",
        "critic_opt.zero_grad()",
        PLAY.format("net(x)", "{keep}"),
        "critic_opt.step()",
        "critic.requires_grad_(False)",
        "net.requires_grad_(True)",
    ],
    [],
)


# --- what else stands in loops


@EXTRAS.add(takes="call", fits=lambda spec: functional(spec) and "maml" not in spec.extras)
def checkpointed(d: Draft) -> None:
    d.need("from torch.utils.checkpoint import checkpoint")
    d.call = "checkpoint(net, {x}, use_reentrant=False)"


@EXTRAS.add(takes="call", fits=lambda spec: target(spec.loss) == "class")
def masked_rows(d: Draft) -> None:
    """A size that follows from the data."""
    d.terms.append("loss = loss + 0.1 * out[y == 1].square().sum()")


@EXTRAS.add(takes="call mean")
def hardest(d: Draft) -> None:
    d.weights.append("losses = losses.topk(2).values")


@EXTRAS.add(takes="call", fits=lambda spec: target(spec.loss) == "class")
def counted(d: Draft) -> None:
    d.weights.append("losses = losses / torch.bincount(y, minlength=3)[y]")


@EXTRAS.add("item", takes="save")
def saved(d: Draft) -> None:
    d.need("import io")
    d.post.append("torch.save(net.state_dict(), io.BytesIO())")


@EXTRAS.add(takes="step backward", fits=stepping)
def scaler_off(d: Draft) -> None:
    d.setup.append('scaler = torch.amp.GradScaler("cpu", enabled=False)')
    d.backward = ["scaler.scale(loss).backward()"]
    d.step = ["scaler.step(opt)", "scaler.update()"]


@EXTRAS.add(takes="grads", fits=grads)
def clip_learned(d: Draft) -> None:
    limit = d.meta("limit", "torch.tensor(0.3)")
    d.grads.append(
        "with torch.no_grad():\n    own = [p for p in net.parameters() if p.grad is not None]\n"
        "    total = sum((p.grad**2).sum() for p in own).sqrt()\n"
        f"    for p in own:\n        p.grad.mul_(torch.clamp({limit} / total, max=1.0))"
    )


@EXTRAS.add(takes="average", fits=started)
def ema_learned(d: Draft) -> None:
    rate = d.meta("decay", "torch.tensor(0.7)")
    d.late.append(FROZEN)
    d.post.append("with torch.no_grad():\n    " + PAIRS + f"        a.copy_({rate} * a + (1 - {rate}) * p)")
    d.final = "avg({x})"


@EXTRAS.add(takes="frozen_norm", fits=lambda spec: "bn" in MODELS[spec.model].traits)
def norm_frozen(d: Draft) -> None:
    d.late.append("for part in net.modules():\n    if 'BatchNorm' in type(part).__name__:\n        part.eval()")
