"""Data forms: how the examples `xs`, targets `ys` and numbers `ns` become batches `x, y, n`.

Traits: `list` (has a length and indices), `many` (can be iterated again), `once` (only one time), `index` (sliced by
the number of the step), `draws` (another order or other examples at every pass).
"""

from __future__ import annotations

from tests.fuzz.draft import Draft
from tests.fuzz.piece import Axis

DATA = Axis("data")

LOADER = "from torch.utils.data import DataLoader, TensorDataset"


def listed(name: str, expr: str, unpack: str = "x, y, n = item", traits: str = "list many", define: str = "") -> None:
    """A list made in `make`; `expr` is one item of the positions from k on."""

    def write(d: Draft) -> None:
        b = d.spec.batch
        if define:
            d.need(
                "from collections import namedtuple" if "namedtuple" in define else "from dataclasses import dataclass"
            )
            d.define(define)
        item = expr.format(b=b)
        d.make.append(f"data = [{item} for k in range(0, {d.spec.steps * b}, {b})]")
        d.args["data"] = "data"
        d.bind.append(unpack)

    DATA.put(name, write, traits, weight=2 if name == "tuples" else 1)


cut = "{0}[k : k + {{b}}].clone()"
x, y, n = cut.format("xs"), cut.format("ys"), cut.format("ns")
CLASS = "@dataclass{0}\nclass Batch:\n    x: torch.Tensor\n    y: torch.Tensor\n    n: torch.Tensor"
FIELDS = "x, y, n = item.x, item.y, item.n"
listed("tuples", f"({x}, {y}, {n})")
listed("lists", f"[{x}, {y}, {n}]")
listed("views", "(xs[k : k + {b}], ys[k : k + {b}], ns[k : k + {b}])")
listed("dicts", f'{{{{"x": {x}, "y": {y}, "n": {n}}}}}', 'x, y, n = item["x"], item["y"], item["n"]')
listed("objects", f"Batch({x}, {y}, {n})", FIELDS, define=CLASS.format(""))
listed("slotted", f"Batch({x}, {y}, {n})", FIELDS, define=CLASS.format("(slots=True)"))
listed("named", f"Batch({x}, {y}, {n})", define='Batch = namedtuple("Batch", "x y n")')


@DATA.add("list many", weight=1)
def split(d: Draft) -> None:
    b = d.spec.batch
    d.make.append(f"data = list(zip(xs.split({b}), ys.split({b}), ns.split({b})))")
    d.args["data"] = "data"
    d.bind.append("x, y, n = item")


def loader(name: str, options: str, traits: str) -> None:
    def write(d: Draft) -> None:
        d.need(LOADER)
        line = f"DataLoader(TensorDataset(xs, ys, ns), batch_size={d.spec.batch}{options})"
        if name == "loader_inside":
            d.args |= {"xs": "xs", "ys": "ys", "ns": "ns"}
            d.setup.append(f"data = {line}")
        else:
            d.make.append(f"data = {line}")
            d.args["data"] = "data"
        d.bind.append("x, y, n = item")

    DATA.put(name, write, traits)


loader("loader", "", "many")
loader("loader_last", ", drop_last=True", "many")
loader("loader_shuffled", ", shuffle=True", "many draws")
loader("loader_generator", ", shuffle=True, generator=torch.Generator().manual_seed(seed + 7)", "many draws")
loader("loader_inside", ", shuffle=True", "many draws")

STREAM = """
def stream(xs, ys, ns, size):
    for k in range(0, len(xs), size):
        yield xs[k : k + size], ys[k : k + size], ns[k : k + size]
"""


@DATA.add("once")
def generator(d: Draft) -> None:
    d.define(STREAM)
    d.make.append(f"data = stream(xs, ys, ns, {d.spec.batch})")
    d.args["data"] = "data"
    d.bind.append("x, y, n = item")


@DATA.add("many")
def generator_inside(d: Draft) -> None:
    d.define(STREAM)
    d.args |= {"xs": "xs", "ys": "ys", "ns": "ns"}
    d.bind.append("x, y, n = item")
    d.setup.append(f"data = list(stream(xs, ys, ns, {d.spec.batch}))")


@DATA.add("once")
def iterator(d: Draft) -> None:
    b = d.spec.batch
    d.make.append(f"data = iter(list(zip(xs.split({b}), ys.split({b}), ns.split({b}))))")
    d.args["data"] = "data"
    d.bind.append("x, y, n = item")


def indexed(name: str, take: str, traits: str, setup: str = "") -> None:
    """Rows of the whole tensors, chosen by the number `{i}` of the step."""

    def write(d: Draft) -> None:
        b, total = d.spec.batch, d.spec.batch * d.spec.steps
        d.args |= {"xs": "xs", "ys": "ys", "ns": "ns"}
        d.setup += [setup.format(n=total)] if setup else []
        d.bind.append("take = " + take.format(b=b, n=total))
        d.bind.append("x, y, n = xs[take], ys[take], ns[take]")

    DATA.put(name, write, f"index {traits}")


indexed("sliced", "slice(i * {b}, (i + 1) * {b})", "")
indexed("randperm", "order[i * {b} : (i + 1) * {b}]", "draws", "order = torch.randperm({n})")
indexed("randint", "torch.randint({n}, ({b},))", "draws")
indexed("permuted_list", "order[i * {b} : (i + 1) * {b}]", "draws", "order = torch.randperm({n}).tolist()")
indexed("selected", "torch.arange(i * {b}, (i + 1) * {b})", "")


@DATA.add("index draws")
def arrays(d: Draft) -> None:
    """Random rows of NumPy arrays, as small language models draw their batches."""
    b, total = d.spec.batch, d.spec.batch * d.spec.steps
    d.make.append("store = [t.numpy() for t in (xs, ys, ns)]")
    d.args["store"] = "store"
    d.bind.append(f"take = torch.randint({total}, ({b},))")
    d.bind.append("x, y, n = (torch.stack([torch.as_tensor(a[j]) for j in take.tolist()]) for a in store)")


@DATA.add("index draws")
def sampled(d: Draft) -> None:
    """Rows chosen by Python's own generator."""
    b, total = d.spec.batch, d.spec.batch * d.spec.steps
    d.need("import random")
    d.args |= {"xs": "xs", "ys": "ys", "ns": "ns"}
    d.bind.append(f"take = random.sample(range({total}), {b})")
    d.bind.append("x, y, n = xs[take], ys[take], ns[take]")


@DATA.add("many", fits=lambda spec: spec.steps > 1)
def split_randomly(d: Draft) -> None:
    b, total = d.spec.batch, d.spec.batch * d.spec.steps
    d.need(LOADER.replace("TensorDataset", "TensorDataset, random_split"))
    d.args |= {"xs": "xs", "ys": "ys", "ns": "ns"}
    d.setup.append(f"kept, _ = random_split(TensorDataset(xs, ys, ns), [{total - b}, {b}])")
    d.setup.append(f"data = DataLoader(kept, batch_size={b})")
    d.bind.append("x, y, n = item")
