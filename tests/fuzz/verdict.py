"""What was found about a program: ok, refused, wrong, raw, slow, vague or broken."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field

KINDS = ("ok", "refused", "wrong", "raw", "slow", "vague", "broken")


@dataclass
class Verdict:
    """A verdict.

    Attributes:
        seed: The program's.
        kind: "refused" (an MlcError), "wrong" (a number), "raw" (any other exception), "slow" (out of time), "vague"
            (the referee itself is not sharp) or "broken" (plain PyTorch does not run it: the generator's fault).
        oracle: Which check said so.
        detail: What differs, or the message.
        line: Of the program's text, where mlc names one.
        expected: For a refusal: the reason in the table of refusals, or "".
        seconds: Of the processor, that the judgement took.
        spec: The program, as JSON.
    """

    seed: int
    kind: str
    oracle: str = ""
    detail: str = ""
    line: str = ""
    expected: str = ""
    seconds: float = 0.0
    spec: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is to be mended."""
        return self.kind in ("ok", "vague") or (self.kind == "refused" and bool(self.expected))

    @property
    def signature(self) -> str:
        """The same for programs that fail alike: numbers, names and lines left out."""
        first = self.detail.split("\n")[0]
        if self.kind == "wrong":
            first = first.split(";")[0]
            first = ("(zero)" if "(zero)" in first else "") if first.startswith("along") else first
        return f"{self.kind} {self.oracle}: {re.sub(r'[-+]?[0-9.]+(e[-+]?[0-9]+)?', '#', first)[:110]}"

    def dump(self) -> str:
        """JSON, one line."""
        return json.dumps(asdict(self))
