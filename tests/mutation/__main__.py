"""`python -m tests.mutation [NAME ...]`: plant every fault (or those named), and print what the tests notice.

Stops and goes on at any moment: verdicts are kept in `build/mutation.json` for as long as mlc and the tests stay as
they are. The exit status is 1 where fewer than 95% are killed.
"""

import argparse
import os
import sys

from tests.mutation.faults import FAULTS
from tests.mutation.run import LEAST, judged, report, score


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all of them without")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    unknown = [n for n in given.names if n not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}")
    chosen = {n: FAULTS[n] for n in given.names or FAULTS}
    verdicts = judged(chosen, given.processes, lambda line: print(line, flush=True))
    print(report(verdicts))
    return 0 if score(verdicts) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
