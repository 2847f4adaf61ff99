"""Texts that a reviewer reads in a diff: ``UPDATE_GOLDENS=1 pytest`` writes them anew."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens"


def check(name: str, text: str) -> None:
    path = FOLDER / name
    text = text.replace(f"{FOLDER.parents[1]}/", "")  # the same in any clone
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text(), f"{name} changed; if it should, run again with UPDATE_GOLDENS=1 and commit it"
