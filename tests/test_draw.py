"""Pictures in every format."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import mlc
from mlc.diagram import diagram_of
from mlc.passes.plan import Plan
from tests import programs

SVG = "{http://www.w3.org/2000/svg}"


def drawn(tmp_path: Path, suffix: str, p: mlc.Program | None = None) -> str:
    path = mlc.draw(p or programs.one_path_stopped(), tmp_path / f"picture{suffix}")
    return path.read_text()


@pytest.mark.parametrize("name", programs.ALL)
def test_svg_is_well_formed_and_nested(name: str, tmp_path: Path) -> None:
    p = programs.ALL[name]()
    root = ET.fromstring(drawn(tmp_path, ".svg", p))
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("rx")]
    metas = sum(r.get("fill") == "#fff8e6" for r in boxes)
    assert len(boxes) == len(p.levels) + metas
    width, height = float(root.get("width")), float(root.get("height"))
    for r in boxes:
        x, y, w, h = (float(r.get(k)) for k in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert all(any(t.startswith(f"{x.name}: ") for t in texts) for x in p.levels)


def test_stops_are_dashed_and_name_their_line(tmp_path: Path) -> None:
    root = ET.fromstring(drawn(tmp_path, ".svg"))
    dashed = [x for x in root.iter(f"{SVG}path") if x.get("stroke-dasharray")]
    assert [x.get("marker-end") for x in dashed] == ["url(#stop)"]
    assert any(re.fullmatch(r"stop, line \d+", t.text) for t in root.iter(f"{SVG}text"))


def test_arrows_have_channels_of_their_own(tmp_path: Path) -> None:
    root = ET.fromstring(drawn(tmp_path, ".svg", programs.three_levels()))
    paths = [x.get("d") for x in root.iter(f"{SVG}path") if x.get("marker-end")]
    spans = []
    for d in paths:
        _, y1, x, y2, _ = (float(n) for n in re.findall(r"[-\d.]+", d))
        spans.append((x, min(y1, y2), max(y1, y2)))
    for i, (x, low, high) in enumerate(spans):
        for other, lo, hi in spans[i + 1 :]:
            assert x != other or high < lo or low > hi
    ends = [m for d in paths for m in (d.split("H")[0], d.rsplit("V")[1].split("H")[0])]
    assert len(set(ends)) == len(ends)


def test_nesting_follows_the_levels() -> None:
    d = diagram_of(programs.three_levels())
    (l1,) = [b for b in d.top.inside if not b.meta]
    assert l1.title == "L1: SGD, 3 steps"
    assert [b.title for b in l1.inside] == ["L2: Adam, 4 steps"]
    assert l1.inside[0].lines[0] == "trains model.weight, model.bias"


def test_mermaid(tmp_path: Path) -> None:
    text = drawn(tmp_path, ".mmd")
    assert text.count("subgraph") == text.count("  end") == 2
    assert 'm0 -->|"value, loss"| L1' in text
    assert re.search(r'm0 -\.->\|"stop, line \d+"\| L1', text)


def test_graphviz(tmp_path: Path) -> None:
    text = drawn(tmp_path, ".dot")
    assert text.count("{") == text.count("}") == 3
    assert re.search(r'm0 -> L1 \[label="stop, line \d+", style=dashed', text)
    pygraphviz = pytest.importorskip("pygraphviz")
    assert len(pygraphviz.AGraph(text).edges()) == 4


def test_html_is_one_page(tmp_path: Path) -> None:
    text = drawn(tmp_path, ".html")
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") == 1
    assert "src=" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    path = mlc.draw(programs.two_levels(), tmp_path / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_png_without_its_renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(mlc.MlcError, match="needs resvg-py"):
        mlc.draw(programs.two_levels(), tmp_path / "picture.png")


def test_a_plan_draws_its_program(tmp_path: Path) -> None:
    program = programs.two_levels()
    plan = mlc.plan(program)
    mlc.draw(plan, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text() == drawn(tmp_path, ".svg", program)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(mlc.PlanError, match="no program to draw"):
        mlc.draw(Plan.load(tmp_path / "plan.json"), tmp_path / "plan.svg")
    mlc.draw(Plan.load(tmp_path / "plan.json", program), tmp_path / "plan.svg")


@pytest.mark.parametrize(("name", "what"), [("picture.gif", r"\.gif"), ("picture", "without suffix")])
def test_unknown_formats_are_named(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(mlc.MlcError, match=what) as e:
        mlc.draw(programs.two_levels(), tmp_path / name)
    assert ".svg" in e.value.advice


def test_only_programs_and_plans_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(mlc.MlcError, match="cannot draw a dict"):
        mlc.draw({}, tmp_path / "picture.svg")
