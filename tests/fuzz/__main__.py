"""`python -m tests.fuzz`: run, show, judge and shrink generated programs; see docs/fuzzing.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
os.environ.setdefault("MLC_RATES", str(ROOT / "tests" / "rates.json"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz import known  # noqa: E402
from tests.fuzz.generate import source_of, spec_of  # noqa: E402
from tests.fuzz.judge import judged  # noqa: E402
from tests.fuzz.pool import read, run  # noqa: E402
from tests.fuzz.shrink import shrunk  # noqa: E402
from tests.fuzz.spec import Spec, load  # noqa: E402
from tests.fuzz.summary import shown, summary  # noqa: E402


def which(text: str) -> Spec:
    """A spec from a seed or from its JSON."""
    return load(text) if text.startswith("{") else spec_of(int(text))


def run_many(o: argparse.Namespace) -> int:
    """Judge many programs, resuming where the file ends."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / o.file
    done = {v.seed for v in read(path)}
    seeds = [s for s in range(o.start, o.start + o.n) if s not in done]
    with path.open("a") as out:
        for i, v in enumerate(
            run(seeds, processes=o.processes, limit=o.limit, thorough=o.thorough, folder=BUILD / "programs")
        ):
            out.write(v.dump() + "\n")
            out.flush()
            if not v.good:
                print(f"[{i + 1}/{len(seeds)}] seed {v.seed}: {v.signature}", file=sys.stderr)
    found = summary([v for v in read(path) if o.start <= v.seed < o.start + o.n])
    (ROOT / o.summary).write_text(json.dumps(found, indent=1) + "\n")
    print(shown(found))
    return 0


def show(o: argparse.Namespace) -> int:
    """The source of a program."""
    print(source_of(which(o.program)))
    return 0


def judge(o: argparse.Namespace) -> int:
    """The verdict of a program."""
    v = judged(which(o.program), folder=BUILD / "programs", depth=2 * o.all)
    print(f"{v.kind} {v.oracle} {v.seconds:.1f} s\n{v.detail}\n{v.line}\n{' '.join(v.notes)}")
    return 0 if v.good else 1


def shrink(o: argparse.Namespace) -> int:
    """The smallest program that fails alike."""
    spec = which(o.program)
    first = judged(spec, folder=BUILD / "programs", depth=2 * o.all)
    small, v = shrunk(spec, first, depth=2 * o.all)
    print(
        f"{source_of(small)}\n# {v.signature}\n# {v.detail}\n# {v.line}\n"
        f"# again: python -m tests.fuzz judge '{small.dump()}'"
    )
    return 0


def faults(o: argparse.Namespace) -> int:
    """How many programs see each planted fault."""
    from tests.fuzz.faults import score

    print(json.dumps(score(o.n), indent=1))
    return 0


def renew(o: argparse.Namespace) -> int:
    """Write the list of known failures of the default suite anew."""
    known.write(known.found())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, does: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=does.__doc__)
        made.set_defaults(does=does)
        return made

    many = command("run", run_many)
    many.add_argument("-n", type=int, default=10_000)
    many.add_argument("--start", type=int, default=0)
    many.add_argument("--processes", type=int, default=2)
    many.add_argument("--limit", type=float, default=60.0)
    many.add_argument("--thorough", type=int, default=10)
    many.add_argument("--file", default="verdicts.jsonl")
    many.add_argument("--summary", default="tests/fuzz/summary.json")
    command("show", show).add_argument("program", help="a seed, or a spec as JSON")
    for name, does in (("judge", judge), ("shrink", shrink)):
        one = command(name, does)
        one.add_argument("program", help="a seed, or a spec as JSON")
        one.add_argument("--all", action="store_true", help="other plans and metamorphic relations too")
    command("faults", faults).add_argument("-n", type=int, default=40)
    command("known", renew)
    o = parser.parse_args()
    return int(o.does(o))


if __name__ == "__main__":
    sys.exit(main())
