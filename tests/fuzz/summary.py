"""What a run of many programs found, as one table: verdicts, failures by what they have in common, coverage, speed."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from tests.fuzz.coverage import covered
from tests.fuzz.spec import load
from tests.fuzz.verdict import KINDS, Verdict


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """The summary that is committed."""
    kinds = Counter(v.kind for v in verdicts)
    unexpected = [v for v in verdicts if not v.good]
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for v in unexpected:
        groups[v.signature].append(v)
    failures = [
        {
            "count": len(vs),
            "what": what,
            "seeds": sorted(v.seed for v in vs)[:8],
            "detail": vs[0].detail[:300],
            "line": vs[0].line,
        }
        for what, vs in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    busy = sum(v.seconds for v in verdicts)
    return {
        "programs": len(verdicts),
        "verdicts": {kind: kinds[kind] for kind in KINDS},
        "refused_rightly": sum(v.kind == "refused" and v.good for v in verdicts),
        "coverage": covered([load(v.spec) for v in verdicts if v.spec]),
        "programs_per_hour_and_process": round(3600 * len(verdicts) / busy) if busy else 0,
        "failures": failures,
    }


def shown(found: dict[str, Any]) -> str:
    """The same as text."""
    seen = found["coverage"]
    lines = [
        f"{found['programs']} programs: " + ", ".join(f"{n} {kind}" for kind, n in found["verdicts"].items()),
        f"refused rightly: {found['refused_rightly']}",
        f"{found['programs_per_hour_and_process']} programs per hour and process",
        f"choices {seen['choices']} of {seen['choices_possible']}, pairs {seen['pairs']} of {seen['pairs_possible']}",
    ]
    for f in found["failures"]:
        lines.append(
            f"{f['count']:5} {f['what']}\n        seeds {', '.join(map(str, f['seeds']))}\n        {f['line']}"
        )
    return "\n".join(lines)
