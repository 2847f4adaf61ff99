"""`python -m tests.scripts [NAME ...]`: what mlc makes of each script, as lines of `known.py`.

With SCRIPTS_DEBUG set, tracebacks too.
"""

import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MLC_RATES"] = str(Path(__file__).parents[1] / "rates.json")

import mlc
import torch
from tests.scripts.referee import FIRST, SECOND, SHARP, plain, problems
from tests.scripts.registry import SCRIPTS


def main(names: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for script in SCRIPTS:
        if script.missing or (names and script.name not in names):
            continue
        start = time.process_time()
        try:
            expected = {seed: plain(script, seed) for seed in (FIRST, SECOND)}
        except Exception:
            print(f"the plain {script.name} fails")
            traceback.print_exc(limit=-4)
            continue
        runs, start = time.process_time() - start, time.process_time()
        spread = max(s.spread / max(abs(s.value), 1e-8) for found in expected.values() for s in found.slopes)
        found = list(problems(script, mlc.compile, expected))
        blunt = "" if spread <= SHARP else f"  BLUNT {spread:.0e}"
        took = time.process_time() - start
        print(
            f'    "{script.name}": {(found or ["passes"])[0]!r},',
            f" # eager {runs / 26:.2f} s, compiled {took:.1f} s{blunt}",
            flush=True,
        )
        for more in found[1:]:
            print(f"        # {more}", flush=True)


main(sys.argv[1:])
