"""Every script: the plain one is sharp enough to be a referee, and mlc does what it does."""

import re

import mlc
import pytest
from tests.scripts.known import KNOWN
from tests.scripts.referee import FIRST, SECOND, Plain, differences_between, plain, play, problems, quiet
from tests.scripts.registry import SCRIPTS
from tests.scripts.script import Script

BY_NAME = {script.name: script for script in SCRIPTS}
FOUND: dict[tuple[str, int], Plain] = {}


def expected(script: Script) -> dict[int, Plain]:
    """The plain script at both seeds, run once for all tests of this module."""
    for seed in (FIRST, SECOND):
        if (script.name, seed) not in FOUND:
            FOUND[script.name, seed] = plain(script, seed)
    return {seed: FOUND[script.name, seed] for seed in (FIRST, SECOND)}


def cases() -> list[object]:
    return [
        pytest.param(
            script,
            id=script.name,
            marks=[
                *([pytest.mark.slow] if script.slow else []),
                *([pytest.mark.skip(reason=f"needs {', '.join(script.missing)}")] if script.missing else []),
            ],
        )
        for script in SCRIPTS
    ]


@pytest.mark.parametrize("script", cases())
def test_the_plain_script_is_a_sharp_referee(script: Script) -> None:
    for seed, found in expected(script).items():
        assert found.outcome.loss.isfinite()
        for slope in found.slopes:
            assert slope.value != 0
            assert slope.sharp, f"seed {seed}: {slope.value:.6e} with a spread of {slope.spread:.1e}"
    with quiet():
        again = play(script, script.main, FIRST)
    assert not differences_between(again.left, FOUND[script.name, FIRST].outcome.left, 0.0)
    assert again.printed == FOUND[script.name, FIRST].outcome.printed


@pytest.mark.parametrize("script", cases())
def test_one_line_was_changed_at_most(script: Script) -> None:
    changed = re.findall(r"# was: ", script.source)
    assert len(changed) <= 1
    ordinary = script.ordinary()
    with quiet():
        assert play(ordinary, ordinary.main, FIRST).loss.isfinite()


@pytest.mark.parametrize("script", cases())
def test_compiled_it_does_what_it_does(script: Script) -> None:
    found = list(problems(script, mlc.compile, expected(script)))
    known = KNOWN.get(script.name)
    if known is None:
        assert not found, "\n".join(found)
    else:
        assert found, f"passes now: take {script.name} out of known.py"
        assert found[0].startswith(known), f"known was: {known}\nnow: " + "\n".join(found)


def test_known_names_scripts() -> None:
    assert KNOWN.keys() <= BY_NAME.keys()
