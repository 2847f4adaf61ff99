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

from tests.opinfo.case import Verdict, judge, name_of


def operators() -> list[Any]:
    """Operators for which PyTorch states a second derivative in float64 on the CPU."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [o for o in op_db if o.supports_gradgrad and torch.float64 in o.supported_dtypes("cpu")]


def table(verdicts: Iterable[Verdict]) -> str:
    """``docs/legality.md``."""
    rows = sorted(verdicts, key=lambda v: v.op)
    count = Counter(v.verdict for v in rows)
    head = [
        "# Legality of operators",
        "",
        "Written by the sweep of `tests/opinfo` (part of `make test-all`); do not edit.",
        "",
        "Every operator of PyTorch's OpInfo database that states a second derivative in float64, as the loss",
        "of one compiled gradient step; the hypergradient is compared with float64 differences and with the",
        "plain unroll. `mixed`: forward over reverse. `reverse`: reverse over reverse.",
        "",
        f"torch {torch.__version__}: " + ", ".join(f"{count[k]} {k}" for k in sorted(count)) + ".",
        "",
        "| operator | verdict | mode | note |",
        "|---|---|---|---|",
    ]
    body = [f"| `{v.op}` | {v.verdict} | {v.mode} | {v.note.replace('|', '/')} |" for v in rows]
    return "\n".join([*head, *body]) + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--match", default="")
    p.add_argument("--shard", default="0/1")
    p.add_argument("--samples", type=int, default=2)
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
            found.append(judge(op, a.samples))
            v = found[-1]
            print(f"{v.verdict:9} {v.mode:8} {v.seconds:6.2f}s {v.op}: {v.note}", flush=True)
            if a.out:
                with a.out.open("a") as f:
                    f.write(json.dumps(asdict(v)) + "\n")
    print(dict(Counter(v.verdict for v in found)))
    if a.table:
        a.table.write_text(table(found))
    return int(any(v.verdict in ("wrong", "raw") for v in found))


if __name__ == "__main__":
    sys.exit(main())
