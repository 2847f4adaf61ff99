"""Programs of the default suite that fail today, with what is wrong: a list that may only shrink.

The suite fails when a program fails that is not listed, when a listed one fails in another way, and when a listed one
passes. `python -m tests.fuzz known` writes the list anew; a reviewer sees in the diff which way it went.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.fuzz.generate import spec_of
from tests.fuzz.judge import judged
from tests.fuzz.verdict import Verdict

FILE = Path(__file__).parent / "known.json"
DEFAULT = 200  # programs of the suite
FAST = 10  # of these run by default, the others with the slow tests


def listed() -> dict[int, str]:
    """Signatures of the known failures, by seed."""
    return {int(seed): entry["what"] for seed, entry in json.loads(FILE.read_text()).items()} if FILE.exists() else {}


def found(number: int = DEFAULT) -> list[Verdict]:
    """Verdicts of the default suite that are not good."""
    return [v for v in (judged(spec_of(seed), depth=int(seed % 100 == 50)) for seed in range(number)) if not v.good]


def write(verdicts: list[Verdict]) -> None:
    """Make these the known ones."""
    entries = {
        str(v.seed): {"what": v.signature, "detail": v.detail[:300], "line": v.line, "program": json.loads(v.spec)}
        for v in verdicts
    }
    FILE.write_text(json.dumps(entries, indent=1) + "\n")
