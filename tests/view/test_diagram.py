"""Pictures in every format: what they say, and that nothing in them overlaps."""

import itertools
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import mlc
from mlc.view.diagram import Diagram, diagram_of
from mlc.view.fonts import text_width
from mlc.view.layout import clipped
from mlc.view.plan import Plan
from mlc.view.svg import COLORS, DARK, to_svg
from tests import programs
from tests.view.manylevels import many
from tests.view.svgparts import SVG, boxes, font, segments, texts


def drawn(tmp_path: Path, suffix: str, p: mlc.Program | None = None) -> str:
    path = mlc.draw(p or programs.one_path_stopped(), tmp_path / f"picture{suffix}")
    return path.read_text()


def diagrams() -> list[Diagram]:
    planned = [diagram_of(p, mlc.plan(p)) for p in (make() for make in programs.ALL.values())]
    return [*planned, *(diagram_of(many(n, nested)) for n in (3, 12, 30) for nested in (False, True))]


# ---- SVG


def test_nothing_overlaps() -> None:
    for d in diagrams():
        root = ET.fromstring(to_svg(d))
        found, words = boxes(root), texts(root)
        assert {b.what for b in found} == {b.key for b in d.top.all()}
        for a, b in itertools.combinations(found, 2):
            assert not a.touches(b) or a.inside(b) or b.inside(a), (d.title, a, b)
        for a, b in itertools.combinations(words, 2):
            assert not a.touches(b), (d.title, a, b)
        for t in words:
            for b in found:
                assert not t.touches(b) or t.inside(b, 2), (d.title, t, b)


def test_everything_is_inside_the_picture() -> None:
    for d in diagrams():
        root = ET.fromstring(to_svg(d))
        width, height = float(root.get("width")), float(root.get("height"))
        for r in [*boxes(root), *texts(root)]:
            assert 0 <= r.left <= r.right <= width, (d.title, r)
            assert 0 <= r.top <= r.bottom <= height, (d.title, r)


def test_nesting_is_by_boxes() -> None:
    d = diagram_of(programs.three_levels())
    found = {b.what: b for b in boxes(ET.fromstring(to_svg(d)))}
    for box in d.top.all():
        for inner in box.inside:
            assert found[inner.key].inside(found[box.key], 1)


def test_arrows_join_their_rows_and_keep_apart() -> None:
    for d in diagrams():
        root = ET.fromstring(to_svg(d))
        found = {b.what: b for b in boxes(root)}
        lines = [x for x in root.iter(f"{SVG}path") if x.get("data-from")]
        assert len(lines) == len(d.arrows)
        upright = []
        ends = []
        for x in lines:
            (x1, y1, *_), *_, (_, _, x2, y2) = segments(x.get("d"))
            start, end = found[x.get("data-from")], found[x.get("data-to")]
            assert x1 == pytest.approx(start.right, abs=0.2) and start.top < y1 < start.bottom
            assert x2 == pytest.approx(end.right + 7, abs=0.2) and end.top < y2 < end.bottom
            ends += [(start.right, y1), (end.right, y2)]
            (channel,) = {s[0] for s in segments(x.get("d")) if s[0] == s[2]}
            assert channel > max(b.right for b in found.values())
            upright.append((channel, min(y1, y2), max(y1, y2)))
        assert len(set(ends)) == len(ends), "two arrows touch a row at one point"
        for (a, low, high), (b, lo, hi) in itertools.combinations(upright, 2):
            assert a != b or high < lo or low > hi, "two arrows in one channel"


def test_stops_are_dashed_with_their_reason_and_line(tmp_path: Path) -> None:
    root = ET.fromstring(drawn(tmp_path, ".svg"))
    cut = [x.get("class") for x in root.iter(f"{SVG}path") if "cut" in x.get("class", "").split()]
    assert cut == ["flow stop cut"]
    assert any(
        re.fullmatch(r"stop: detach\(\) or no_grad\(\), line \d+", t.text or "") for t in root.iter(f"{SVG}text")
    )


def test_flows_carry_choice_and_cost() -> None:
    program = programs.two_levels()
    plan = mlc.plan(program)
    choice = plan.decisions[0].model_copy(
        update={"subject": "L1", "choice": "mixed", "seconds": 0.25, "bytes": 1 << 20}
    )
    plan = plan.model_copy(update={"decisions": (choice,)}).bind(program)
    labels = {a.label for a in diagram_of(program, plan).arrows}
    assert "gradient · mixed · 250.0 ms, 1.0 MiB" in labels
    assert {a.label for a in diagram_of(program).arrows} == {"value", "gradient", "response"}


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def light(c: str) -> float:
        parts = [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    x, y = sorted((light(a), light(b)))
    return (y + 0.05) / (x + 0.05)


def test_colours_are_legible_and_never_alone() -> None:
    for kind in COLORS:
        assert contrast(COLORS[kind], "#ffffff") >= 4.5
        assert contrast(DARK[kind], "#0d1117") >= 4.5
    text = to_svg(diagram_of(programs.one_path_stopped()))
    widths = re.findall(r"\.(value|response|gradient|stop)\{stroke:#\w+;stroke-width:([\d.]+)\}", text)
    assert len({w for _, w in widths}) == len(COLORS)
    assert "prefers-color-scheme:dark" in text


# ---- many levels


@pytest.mark.parametrize("nested", [False, True])
def test_thirty_levels_are_collapsed(nested: bool) -> None:
    d = diagram_of(many(30, nested))
    keys = [b.key for b in d.top.all()]
    assert sum(b.kind == "level" for b in d.top.all()) == 12
    (more,) = [b for b in d.top.all() if b.kind == "more"]
    assert more.title == "18 more levels"
    for a in d.arrows:
        assert a.source in keys and a.target in keys
    assert len(diagram_of(many(30, nested), most=30).top.all()) > 60


def test_levels_of_a_chain_nest() -> None:
    d = diagram_of(programs.three_levels())
    (l1,) = [b for b in d.top.inside if b.kind == "level"]
    assert (l1.title, l1.note) == ("L1", "SGD · 3 steps · carries 2 state values")
    (l2,) = [b for b in l1.inside if b.kind == "level"]
    assert l2.note == "Adam · 4 steps · carries 6 state values"
    assert l2.inside[0].title == "model.weight, model.bias"


# ---- text


def test_widths_are_those_of_the_font() -> None:
    for text in ("Levels L0", "θ*(λ) · implicit", "Ärger ≤ 3 → 4", "model.0.weight, b and 3 more"):
        for bold in (False, True):
            assert text_width(text, 1000, bold) == pytest.approx(font(bold).getlength(text), abs=1.5)


def test_long_names_are_shortened() -> None:
    text = clipped("a.very.long.name" * 9, 13, 100)
    assert text.endswith("…") and 80 < text_width(text, 13) <= 100
    assert clipped("short", 13, 100) == "short"


# ---- other formats


def test_png_has_its_labels_without_any_font_of_the_system(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    image = pytest.importorskip("PIL.Image")
    path = mlc.draw(programs.two_levels(), tmp_path / "picture.png")
    with image.open(path) as picture:
        title = picture.convert("L").crop((0, 0, 200, 70))
    assert title.getextrema()[0] < 80, "the title is not there"


def test_png_without_its_renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(mlc.MlcError, match="needs resvg-py"):
        mlc.draw(programs.two_levels(), tmp_path / "picture.png")


def test_graphviz_reads_what_we_write(tmp_path: Path) -> None:
    text = drawn(tmp_path, ".dot")
    pygraphviz = pytest.importorskip("pygraphviz")
    assert len(pygraphviz.AGraph(text).edges()) == 4


def test_a_plan_draws_its_program(tmp_path: Path) -> None:
    program = programs.two_levels()
    plan = mlc.plan(program)
    mlc.draw(plan, tmp_path / "plan.svg")
    assert "predicted peak" in (tmp_path / "plan.svg").read_text()
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


# ---- layout by Graphviz


def test_dot_lays_out_nested_levels_with_labels_on_arrows(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    p = programs.three_levels()
    path = mlc.draw(mlc.plan(p), tmp_path / "three.svg", layout="dot")
    root = ET.fromstring(path.read_text())
    classes = [g.get("class") for g in root.iter(f"{SVG}g")]
    d = diagram_of(p, mlc.plan(p))
    assert classes.count("cluster") == len(p.levels) and classes.count("edge") == len(d.arrows)
    words = {t.text for t in root.iter(f"{SVG}text")}
    assert {a.label for a in d.arrows} <= words and any("·" in w for w in words if w)
    png = mlc.draw(p, tmp_path / "three.png", layout="dot").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_dot_without_pygraphviz_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(mlc.MlcError, match="pygraphviz") as e:
        mlc.draw(programs.two_levels(), tmp_path / "two.svg", layout="dot")
    assert "mlc[draw]" in e.value.advice


def test_layouts_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(mlc.MlcError, match="no layout 'circle'"):
        mlc.draw(programs.two_levels(), tmp_path / "two.svg", layout="circle")
    with pytest.raises(mlc.MlcError, match=r"not two\.html"):
        mlc.draw(programs.two_levels(), tmp_path / "two.html", layout="dot")
