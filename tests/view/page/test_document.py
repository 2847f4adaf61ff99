"""The page in a real browser: it draws, opens, searches, says where things come from, and loads nothing."""

import gzip
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlc
from benchmarks import _browser
from benchmarks._w1 import Shape, ordinary, problem
from mlc.view.page import content, html
from tests import programs

EXAMPLE = Path(__file__).parents[3] / "examples" / "reweighting.py"
needs_browser = pytest.mark.skipif(_browser.find() is None, reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("selenium")
    with _browser.started() as driver:
        yield driver


def planned(name: str) -> mlc.Plan:
    return mlc.plan(programs.ALL[name](), flows="mixed")


def page(tmp_path: Path, plan: mlc.Plan) -> Path:
    return mlc.draw(plan, tmp_path / "page.html")


def clean(browser: Any) -> bool:
    entries = browser.get_log("browser")
    assert not entries, entries
    return True


def box(browser: Any, title: str) -> dict[str, Any]:
    """Where a box that is shown stands, in pixels of the canvas."""
    script = """
        const v = mlcPage.view, b = [...v.layout.box.values()].find((b) => b.title === arguments[0]);
        return b && {x: b.x * v.at.scale + v.at.x, y: b.y * v.at.scale + v.at.y, open: Boolean(b.kids?.length)};
    """
    return browser.execute_script(script, title)


def click(browser: Any, title: str) -> None:
    from selenium.webdriver import ActionChains

    at, canvas = box(browser, title), browser.find_element("id", "graph")
    x, y = at["x"] + 8 - canvas.size["width"] / 2, at["y"] + 8 - canvas.size["height"] / 2
    ActionChains(browser).move_to_element_with_offset(canvas, int(x), int(y)).click().perform()


# ---- the file


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, planned("two_levels")).read_text()
    assert text.startswith("<!doctype html>")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert policy.startswith("default-src &#x27;none&#x27;;") and "unsafe" not in policy
    assert not re.search(r"https?:|\bsrc=|\bhref=|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    program = programs.two_levels()
    evil = mlc.Program(
        "</script><script>alert(1)</script>", program.region, program.inputs, program.n_outputs, program.levels,
        program.flows,
    )  # fmt: skip
    text = html(content(evil))
    assert text.count("<script") == text.count("</script>") == 2
    assert "alert(1)" not in text.replace(text[text.index("<title>") : text.index("</title>")], "")
    assert "&lt;script&gt;" in text


def test_data_is_compressed_and_complete(tmp_path: Path) -> None:
    plan = planned("two_levels")
    text = page(tmp_path, plan).read_text()
    data = json.loads(gzip.decompress(b64decode(re.search(r'id="data">([^<]*)<', text).group(1))))
    assert [s["key"] for s in data["scenes"]] == ["levels", "forward", "backward"]
    stages = plan.stages
    for scene, region in zip(data["scenes"][1:], (stages.forward, stages.backward), strict=True):
        operators = sum(not hasattr(e.op, "body") for e in region.walk())
        assert {len(c) for c in scene["columns"].values()} == {operators}
        assert max(scene["edges"]) < operators and max(scene["columns"]["group"]) < len(scene["groups"])
    assert data["peak"] == plan.peak_bytes


def test_derivatives_stand_in_the_module_that_they_come_from() -> None:
    data = content(programs.two_levels(), planned("two_levels"))
    (scene,) = [s for s in data["scenes"] if s["key"] == "backward"]
    modules = {i for i, (_, title, kind, _) in enumerate(scene["groups"]) if (title, kind) == ("weigh", "module")}
    tags = {data["strings"][t] for t, g in zip(scene["columns"]["tag"], scene["columns"]["group"], strict=True)
            if g in modules}  # fmt: skip
    assert "backward" in tags


# ---- in the browser


@needs_browser
def test_it_draws_without_an_error_in_light_and_dark(browser: Any, tmp_path: Path) -> None:
    path = page(tmp_path, planned("three_levels"))
    for scheme, ground in (("light", [255, 255, 255]), ("dark", [13, 17, 23])):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        _browser.opened(browser, path)
        script = "return [...mlcPage.view.context.getImageData(2, 2, 1, 1).data].slice(0, 3)"
        assert browser.execute_script(script) == ground
        assert clean(browser)


@needs_browser
def test_a_level_opens_and_closes(browser: Any, tmp_path: Path) -> None:
    _browser.opened(browser, page(tmp_path, planned("two_levels")))
    assert not box(browser, "loss")["open"]
    before = int(re.search(r"(\d+) boxes", browser.find_element("id", "status").text).group(1))
    click(browser, "loss")
    assert box(browser, "loss")["open"] and box(browser, "weigh") is not None
    assert int(re.search(r"(\d+) boxes", browser.find_element("id", "status").text).group(1)) > before
    click(browser, "loss")
    assert not box(browser, "loss")["open"]
    assert clean(browser)


@needs_browser
def test_search_finds_marks_and_opens(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import Keys

    _browser.opened(browser, page(tmp_path, planned("two_levels")), "#scene=backward")
    search = browser.find_element("id", "search")
    search.send_keys("module:weigh")
    assert re.fullmatch(r"\d+ hits", browser.find_element("id", "hits").text)
    assert browser.execute_script("return mlcPage.view.hits.size") > 0
    search.send_keys(Keys.ENTER)
    assert browser.find_element("id", "hits").text.startswith("1 of ")
    selected = browser.execute_script("return mlcPage.view.selected")
    assert selected < 0, "an operator is selected"
    assert "weigh" in browser.find_element("id", "detail").text
    search.clear()
    search.send_keys("fate:recomputed nothing-like-it")
    assert browser.find_element("id", "hits").text == "0 hits"
    assert clean(browser)


@needs_browser
def test_memory_time_and_curve_are_shown(browser: Any, tmp_path: Path) -> None:
    program = programs.two_levels()
    plan = mlc.plan(program)
    sweep = [plan.model_copy(update={"peak_bytes": k * plan.peak_bytes, "seconds": 1 / k}) for k in (1, 2, 3)]
    budget = plan.model_copy(update={"memory": 2 * plan.peak_bytes}).bind(program)
    path = mlc.draw(budget, tmp_path / "page.html", sweep=[*sweep, budget])
    _browser.opened(browser, path)
    head = browser.find_element("id", "memory-head").text
    assert "predicted peak" in head and "budget" in head and "kept for backward" in head
    assert "forward" in browser.find_element("id", "time-head").text
    assert "ring: this plan" in browser.find_element("id", "curve-head").text
    for chart in ("memory", "time", "curve"):
        colours = """
            const c = document.getElementById(arguments[0] + "-canvas"), d = c.getContext("2d");
            const p = d.getImageData(0, 0, c.width, c.height).data, seen = new Set();
            for (let i = 0; i < p.length; i += 4) seen.add(p[i] << 16 | p[i + 1] << 8 | p[i + 2]);
            return seen.size;
        """
        assert browser.execute_script(colours, chart) > 4, chart
    assert clean(browser)


@needs_browser
def test_the_loss_of_the_example_leads_to_its_line(browser: Any, tmp_path: Path) -> None:
    from mlc.cli.main import _planned
    from mlc.cli.userfile import load

    _, plan = _planned(load(str(EXAMPLE)), None, False)
    _browser.opened(browser, page(tmp_path, plan))
    lines = EXAMPLE.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if ".backward()" in text)
    search = browser.find_element("id", "search")
    search.send_keys(f"line:{line} op:mean")
    search.send_keys("\ue007")
    assert browser.find_element("id", "source").text == lines[line - 1].strip()
    assert f"reweighting.py:{line}" in browser.find_element("id", "detail").text
    assert clean(browser)


@needs_browser
def test_six_thousand_operators(browser: Any, tmp_path: Path) -> None:
    shape = Shape(width=16, layers=9, heads=2, length=16, batch=2, vocabulary=32)
    plan = mlc.plan(mlc.trace(ordinary, *problem(shape, 2, "cpu")), memory="min")
    _browser.opened(browser, page(tmp_path, plan), "#scene=backward")
    size, edges, shown = browser.execute_script(
        "const v = mlcPage.view; return [v.scene.size, v.scene.edges.length / 2, v.layout.shown]"
    )
    assert size > 6000 and edges > size and shown < 200
    browser.find_element("id", "expand").click()
    overlapping = """
        const v = mlcPage.view, bad = [];
        for (const b of v.layout.box.values()) {
          const kids = (b.kids || []).slice().sort((p, q) => p.y - q.y);
          kids.forEach((p, i) => {
            const out = p.x + p.w > b.x + b.w + 0.01 || p.y + p.h > b.y + b.h + 0.01;
            if (out || p.x < b.x || p.y < b.y) bad.push(p.title);
            for (let k = i + 1; k < kids.length && kids[k].y < p.y + p.h - 0.01; k++) {
              const q = kids[k];
              if (p.x < q.x + q.w - 0.01 && q.x < p.x + p.w - 0.01) bad.push([p.title, q.title]);
            }
          });
        }
        return [v.layout.shown, bad.slice(0, 5)];
    """
    shown, bad = browser.execute_script(overlapping)
    assert shown > 6000 and not bad
    assert clean(browser)
