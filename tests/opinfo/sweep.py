"""The operator sweep: every operator of PyTorch's OpInfo database through one compiled gradient step.

    python -m tests.opinfo.sweep [--match REGEX] [--shard I/N] [--out FILE.jsonl] [--table docs/legality.md]

One line per operator.  With N shards run N processes with one shard each; ``--table`` with ``--merge FILES``
writes the table from their results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.opinfo.case import RANKS, Verdict, judge, name_of


def operators() -> list[Any]:
    """Operators for which PyTorch states a second derivative in float64 on the CPU."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [o for o in op_db if o.supports_gradgrad and torch.float64 in o.supported_dtypes("cpu")]


# Why what is refused is refused, by what the refusal says.
REASONS = {
    "linalg_lstsq": "the size of its residuals follows from the rank; use `torch.linalg.pinv` or `solve`",
    "repeat_interleave": "the size follows from the repeats; give `output_size` or use `index_select`",
    "size that depends on": "a program has one size for all values; use `torch.where` or a mask",
    "in chunks computes its gradient": "PyTorch's derivative of that gradient is silently wrong; do not chunk",
    "PyTorch gets the derivative of": "PyTorch's first derivative is wrong, and so is the loop's own gradient",
    "tensor is used": "sparse tensors have no functional form that PyTorch can differentiate twice on fake tensors",
    "_to_dense": "sparse tensors have no functional form that PyTorch can differentiate twice on fake tensors",
}


def table(verdicts: Iterable[Verdict]) -> str:
    """``docs/legality.md``."""
    found: dict[str, dict[int, Verdict]] = {}
    for v in verdicts:
        by = found.setdefault(v.op, {})
        by[v.order] = max(by.get(v.order, v), v, key=lambda x: RANKS.index(x.verdict))
    head = [
        "# Legality of operators",
        "",
        "Written by the sweep of `tests/opinfo` (part of `make test-all`); do not edit.",
        "",
        "Every operator of PyTorch's OpInfo database that states a second derivative in float64, in the loss of one",
        "compiled gradient step; the hypergradient (second order) is compared with float64 differences and with the",
        "plain unroll. For the third order the loss is a penalty on the operator's own gradient. Samples are spread",
        "over the database's; then come some with other keywords, words and flags. `mixed`: forward over reverse.",
        "`reverse`: reverse over reverse. `unusable`: there is nothing to compare (the derivative is zero or undefined",
        "there, or PyTorch has no derivative of one order less).",
        "",
    ]
    for order, title in ((2, "second"), (3, "third")):
        count = Counter(v[order].verdict for v in found.values() if order in v)
        if count:
            words = ", ".join(f"{n} {k}" for k, n in sorted(count.items()))
            head += [f"torch {torch.__version__}, {title} order: {words}.", ""]
    body = ["| operator | second | third | mode | note |", "|---|---|---|---|---|"]
    for op, by in sorted(found.items()):
        mode = " / ".join(dict.fromkeys(v.mode for v in by.values() if v.mode))
        note = "; ".join(dict.fromkeys(v.note.replace("|", "/") for v in by.values() if v.note))
        body.append(f"| `{op}` | {_word(by, 2)} | {_word(by, 3)} | {mode} | {note} |")
    return "\n".join([*head, *_refusals(found), *body]) + "\n"


def _word(by: dict[int, Verdict], order: int) -> str:
    return by[order].verdict if order in by else ""


def _refusals(found: dict[str, dict[int, Verdict]]) -> list[str]:
    """Every refused operator with its reason."""
    out = ["## Refused", ""]
    for op, by in sorted(found.items()):
        note = next((v.note for v in by.values() if v.verdict == "refused"), "")
        if note:
            out.append(f"- `{op}`: {reason(note)}")
    return [*out, "", "## All", ""]


def reason(note: str) -> str:
    """Why an operator is refused; a refusal without a known reason is a fault."""
    return next((why for part, why in REASONS.items() if part in note), f"unexplained: {note}")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--match", default="")
    p.add_argument("--shard", default="0/1")
    p.add_argument("--samples", type=int, default=2)
    p.add_argument("--orders", type=int, nargs="*", default=[2, 3])
    p.add_argument("--variants", type=int, default=6)
    p.add_argument("--out", type=Path)
    p.add_argument("--merge", type=Path, nargs="*")
    p.add_argument("--table", type=Path)
    a = p.parse_args()
    if a.merge:
        found = [Verdict(**json.loads(x)) for f in a.merge for x in f.read_text().splitlines()]
    else:
        i, n = map(int, a.shard.split("/"))
        found = []
        for op in [o for o in operators() if re.search(a.match, name_of(o))][i::n]:
            for order in a.orders:
                v = judge(op, a.samples, order=order, variants=a.variants)
                found.append(v)
                print(f"{order} {v.verdict:9} {v.mode:8} {v.seconds:6.2f}s {v.op}: {v.note}", flush=True)
                if a.out:
                    with a.out.open("a") as f:
                        f.write(json.dumps(asdict(v)) + "\n")
    print(dict(Counter(v.verdict for v in found)))
    if a.table:
        a.table.write_text(table(found))
    return int(any(v.verdict in ("wrong", "raw") for v in found))


if __name__ == "__main__":
    sys.exit(main())
