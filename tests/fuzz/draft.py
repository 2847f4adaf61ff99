"""A program under construction: lists of lines by the place where they stand, and their rendering as source.

The inner step reads, from top to bottom: `bind` and `pre` (the batch), `zero`, the forward pass, `outs`, the
losses of the examples, `weights` (what changes those), the loss, `terms` (what is added to it), `checks`, `backward`,
`grads` (what changes the gradients), `step`, `post`. Pieces fill these lists; none looks at another's lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.spec import Spec

HEAD = '''"""A generated training program: {title}"""

{imports}

{classes}
def make(seed, near=0.0):
    """Arguments, and the meta-parameters among them, from a seed; ``near``: how far inputs are moved."""
    torch.manual_seed(seed)
{make}
    args = {{{args}}}
    metas = {{{metas}}}
    return args, metas


def train(**args):
    {names} = (args[name] for name in {strings})
{body}
'''

STANDARD = ("import copy", "import torch", "import torch.nn.functional as F", "from torch import nn", "import mlc")


@dataclass
class Draft:
    """Lines by place; see the top of this module."""

    spec: Spec
    imports: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    make: list[str] = field(default_factory=list)
    args: dict[str, str] = field(default_factory=dict)
    metas: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    opt: list[str] = field(default_factory=list)  # in setup or, when it is made outside, in make
    late: list[str] = field(default_factory=list)  # after the optimizer
    loops: list[str] = field(default_factory=list)  # headers, the outermost first
    twice: bool = False  # the loop stands there two times
    index: str | None = None  # a counter that the loop has anyway
    bind: list[str] = field(default_factory=list)
    pre: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=lambda: ["opt.zero_grad()"])
    call: str = "net({x})"
    outs: list[str] = field(default_factory=list)
    example: str = ""  # loss of each example, of {out} and {y}
    weights: list[str] = field(default_factory=list)
    mean: str = "losses.mean()"
    terms: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=lambda: ["loss.backward()"])
    grads: list[str] = field(default_factory=list)
    step: list[str] = field(default_factory=lambda: ["opt.step()"])
    post: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    epoch: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    final: str = "net({x})"
    returns: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    shape: tuple[int, ...] = ()  # of one example
    counting: bool = False
    filled: frozenset[str] = frozenset()  # places that some piece takes
    hyper: dict[str, str] = field(default_factory=dict)  # arguments of the optimizer that are tensors
    scheduled: bool = False  # there is a `sched`
    closure: bool = False  # the optimizer calls the step
    groups: str = ""  # what the optimizer gets, of {net}
    rate: str = "0.1"  # of an update by hand

    def need(self, line: str) -> None:
        """Import, once."""
        if line not in self.imports:
            self.imports.append(line)

    def define(self, text: str) -> None:
        """A class or function at the top of the file, once."""
        if text not in self.classes:
            self.classes.append(text.strip("\n") + "\n\n")

    def meta(self, name: str, value: str) -> str:
        """A learned tensor in the argument `meta`; returns how the loop names it."""
        value = f"({value})" if " " in value.split("(")[0] or ") " in value else value
        self.make.append(f'meta["{name}"] = {value}.requires_grad_()')
        self.metas[name] = f'meta["{name}"]'
        return f'meta["{name}"]'

    def counter(self) -> str:
        """A name for the number of the iteration, counted over all epochs."""
        if self.index is not None:
            return self.index
        self.counting = True
        return "k"

    def loss(self, x: str, y: str, call: str = "net({x})") -> str:
        """The plain mean loss of a model on a batch, as one expression."""
        return self.example.format(out=call.format(x=x), y=y) + ".mean()"

    def forward(self) -> list[str]:
        """The step from the batch to the loss."""
        losses = [f"losses = {self.example.format(out='out', y='y')}", *self.weights]
        return [f"out = {self.call.format(x='x')}", *self.outs, *losses, f"loss = {self.mean}", *self.terms]

    def inner(self) -> list[str]:
        """The whole body of the loop."""
        early = [*self.bind, *self.pre]
        step = [*self.zero, *self.forward(), *self.checks, *self.backward, *self.grads]
        if self.closure:
            step = ["def again():", *indented([*step, "return loss"]), "loss = opt.step(again)"]
        else:
            step += self.step
        return [*early, *step, *self.post, *self.tail, *(["k += 1"] if self.counting else [])]

    def body(self) -> list[str]:
        """The lines of the function."""
        outside = self.spec.place == "outside"
        lines = [*self.setup, *([] if outside else self.opt), *self.late]
        if self.counting:
            lines.append("k = 0")
        loop = list(self.inner())
        for depth, header in enumerate(reversed(self.loops)):
            loop = [header, *indented(loop)]
            if depth == 0 and len(self.loops) > 1:
                loop += self.epoch
        lines += loop * (2 if self.twice else 1)
        if len(self.loops) < 2:
            lines += self.epoch
        return [*lines, *self.after, *self.result()]

    def result(self) -> list[str]:
        """What the function returns."""
        value = f"value = {self.loss('val[0]', 'val[1]', self.final)}"
        if self.spec.result == "tuple":
            return [value, f"return {', '.join(['value', *self.returns.values(), 'value.detach()'])}"]
        if self.spec.result == "dict" or self.returns:
            items = {"loss": "value", **self.returns}
            return [value, "return {" + ", ".join(f'"{k}": {v}' for k, v in items.items()) + "}"]
        return [value, "return value"]

    def source(self) -> str:
        """The file."""
        outside = self.spec.place == "outside" and self.opt
        make = [*self.make, *(self.opt if outside else [])]
        args = dict(self.args)
        if outside:
            args["opt"] = "opt"
            if self.scheduled:
                args["sched"] = "sched"
        return HEAD.format(
            title=self.spec.title,
            imports="\n".join([*STANDARD, *self.imports]),
            classes="\n".join(self.classes),
            make="\n".join(indented(make)),
            args=", ".join(f'"{k}": {v}' for k, v in args.items()),
            metas=", ".join(f"**{v}" if k[-1] in "*." else f'"{k}": {v}' for k, v in self.metas.items()),
            names=", ".join(args),
            strings="(" + ", ".join(f'"{k}"' for k in args) + ")",
            body="\n".join(indented(self.body())),
        )


def indented(lines: list[str]) -> list[str]:
    """One level deeper; a line may itself hold several."""
    return ["    " + part for line in lines for part in line.split("\n")]
