"""Generated programs under all oracles, and the generator itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import known
from tests.fuzz.faults import FAULTS, forget
from tests.fuzz.generate import source_of, spec_of, valid
from tests.fuzz.judge import judged
from tests.fuzz.program import loaded, quiet, start
from tests.fuzz.refusals import reason
from tests.fuzz.shrink import shrunk, simpler
from tests.fuzz.slopes import slopes
from tests.fuzz.spec import Spec, load
from tests.fuzz.verdict import Verdict

SIZE = 10
CHUNKS = [
    pytest.param(first, marks=() if first < known.FAST else pytest.mark.slow, id=f"{first}-{first + SIZE - 1}")
    for first in range(0, known.DEFAULT, SIZE)
]


@pytest.mark.parametrize("first", CHUNKS)
def test_programs(first: int, tmp_path: Path) -> None:
    """Nothing fails but what is known to, and what is known to fails in the way that is known."""
    listed = known.listed()
    wrong = []
    for seed in range(first, first + SIZE):
        v = judged(spec_of(seed), folder=tmp_path, depth=int(seed % 100 == 50))
        if seed not in listed and not v.good:
            wrong.append(f"seed {seed} fails: {v.signature}\n    {v.detail}\n    {v.line}\n    {v.spec}")
        elif seed in listed and v.good:
            wrong.append(f"seed {seed} passes: take it off the list (python -m tests.fuzz known)")
        elif seed in listed and v.kind != listed[seed].split()[0]:
            wrong.append(f"seed {seed} was known as {listed[seed]!r}, is now {v.signature!r}")
    assert not wrong, "\n".join(wrong)


FOUND = json.loads((Path(__file__).parent / "found.json").read_text())


@pytest.mark.parametrize("program", FOUND, ids=lambda p: str(p["seed"]))
def test_what_was_found_stays_mended(program: dict[str, Any], tmp_path: Path) -> None:
    """The smallest programs of faults that long runs found."""
    v = judged(load(json.dumps(program)), folder=tmp_path, depth=1)
    assert v.good, f"{v.signature}\n{v.detail}\n{v.line}"


def test_specs_are_valid_and_read_back() -> None:
    for seed in range(500):
        spec = spec_of(seed)
        assert valid(spec), spec
        assert load(spec.dump()) == spec
        assert spec_of(seed) == spec
        assert source_of(spec) == source_of(load(spec.dump()))


def test_programs_run_in_plain_pytorch_the_same_way_twice(tmp_path: Path) -> None:
    with quiet():
        for seed in range(1000, 1060):
            program = loaded(spec_of(seed), tmp_path)
            values = []
            for _ in range(2):
                args, metas = program.fresh(0)
                out = program.train(**args)
                assert metas
                values.append(str(out))
            assert values[0] == values[1], seed


def test_differences_are_sharp(tmp_path: Path) -> None:
    """The referee is worth something only where its two best step sizes agree."""
    vague = []
    with quiet():
        for seed in range(2000, 2030):
            program = loaded(spec_of(seed), tmp_path)
            start(0)
            for slope in slopes(program, 0, frozen="cut" in program.traits, number=1):
                if slope.spread > 1e-4 * abs(slope.value) + 1e-8:
                    vague.append((seed, slope.value, slope.spread))
    assert len(vague) <= 2, vague


def test_the_shrinker_keeps_what_fails() -> None:
    def judge(spec: Spec, **_: object) -> Verdict:
        bad = "clip_norm" in spec.extras and "bias" in spec.metas
        return Verdict(spec.seed, "wrong" if bad else "ok", "gradient", "along bias")

    spec = Spec(1, model="gru", update="adam", data="dicts", metas=("ridge", "bias"), extras=("jitter", "clip_norm"))
    small, verdict = shrunk(spec, judge(spec), judge=judge)
    assert verdict.kind == "wrong"
    assert small == Spec(1, metas=("bias",), extras=("clip_norm",), steps=1, batch=2)
    assert all(s != small for s in simpler(small))


def test_a_refusal_is_right_only_for_a_reason_in_the_table() -> None:
    cut = "meta-parameter meta.sigma has no path to the result: it is cut by detach() or no_grad() here"
    assert reason(cut, lambda names: names <= {"sigma"})
    assert not reason(cut, lambda names: False)
    assert not reason("a backward hook is put on a tensor after a gradient was taken", lambda names: names <= {"sigma"})


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_place(name: str) -> None:
    with FAULTS[name]():
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("forward_sign", 8), ("sum_forgets", 8), ("stops_ignored", 4)])
def test_a_planted_fault_is_seen(name: str, seed: int, tmp_path: Path) -> None:
    forget()
    try:
        with FAULTS[name]():
            assert judged(spec_of(seed), folder=tmp_path).kind not in ("ok", "vague")
    finally:
        forget()
