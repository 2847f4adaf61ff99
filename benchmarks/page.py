"""How fast the page is: one call's backward stage of a 6-layer transformer in a headless Chromium.

From navigation to the first picture (unpacking included), one frame while panning, opening every group, and a
search; the file's size and the time it takes to write it. Needs chromium and chromedriver (Debian: chromium,
chromium-driver) and selenium.

    python benchmarks/page.py [--quick] [--runs 5] [--out FILE]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _browser
from _measure import machine
from _results import HERE, RESULTS, busy, write
from _w1 import SIX_LAYERS, SMALL, ordinary, problem
from rich.console import Console

import mlc

STEPS = 2
PROMISED = 1.0  # seconds from navigation to the first picture of 6,000 operators

MEASURE = """
    const v = mlcPage.view, took = (f) => { const t = performance.now(); f(); return performance.now() - t; };
    const out = {operators: v.scene.size, edges: v.scene.edges.length / 2, shown: v.layout.shown};
    out.relayout = took(() => v.show(v.scene));
    out.search = took(() => mlcPage.search("op:mm"));
    out.expand_all = took(() => { v.scene.setAll(true); v.show(v.scene); v.fit(); });
    out.shown_expanded = v.layout.shown;
    v.centre(~Math.floor(v.scene.size / 2), 1);
    out.frame = took(() => { for (let i = 0; i < 20; i++) { v.at.y -= 10; v.draw(); } }) / 20;
    v.centre(~Math.floor(v.scene.size / 2), 0.15);
    out.frame_far = took(() => { for (let i = 0; i < 20; i++) { v.at.y -= 2; v.draw(); } }) / 20;
    return out;
"""


def point(path: Path, runs: int) -> dict[str, Any]:
    """Medians over ``runs`` loads, seconds."""
    ready, found = [], []
    with _browser.started() as driver:
        for _ in range(runs + 1):
            ready.append(_browser.opened(driver, path, "#scene=backward") / 1e3)
            found.append(driver.execute_script(MEASURE))
        version = driver.capabilities["browserVersion"]
    counts = {k: found[0][k] for k in ("operators", "edges", "shown", "shown_expanded")}
    seconds = {k: statistics.median(f[k] for f in found[1:]) / 1e3 for k in found[0] if k not in counts}
    return {**counts, "first_load": ready[0], "ready": statistics.median(ready[1:]), "all_ready": ready[1:],
            "seconds": seconds, "browser": version}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one load: does it still run?")
    parser.add_argument("--runs", type=int, help="loads to take the median of (default 5)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/page.json)")
    given = parser.parse_args()
    given.runs = given.runs or (1 if given.quick else 5)
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "page.json"
    return given


def main() -> None:
    args, console = arguments(), Console(width=110)
    if _browser.find() is None:
        console.print("skipped: there is no chromium with chromedriver on this machine")
        return
    load = busy(console)
    shape = SMALL if args.quick else SIX_LAYERS
    plan = mlc.plan(mlc.trace(ordinary, *problem(shape, STEPS, "cpu")))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = mlc.draw(plan, Path(folder) / "page.html")
        wrote = time.perf_counter() - started
        p = point(path, args.runs)
        p |= {"write": wrote, "bytes": path.stat().st_size, "shape": vars(shape), "at_most": PROMISED}
    p["machine"] = machine()
    console.print(
        f"{p['operators']} operators, {p['edges']} edges: ready in {p['ready']:.2f} s (at most {PROMISED:.0f})"
    )
    console.print({k: round(v, 4) for k, v in p["seconds"].items()})
    write(args.out, load, [p])
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
