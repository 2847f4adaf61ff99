"""The command line: ``mlc run | plan | explain | inspect | draw | check FILE.py[:function]`` and ``mlc bench``.

Results go to standard output, everything else to standard error.  Errors are printed with the line of the
user's code and without a Python traceback, unless ``--debug`` asks for it; the exit code is then 1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import mlc
from mlc.cli.call import called, measured, subject
from mlc.cli.userfile import UserFile, blame, load
from mlc.compiled.report import Report
from mlc.draw import draw as draw_picture
from mlc.errors import MlcError, PlanError
from mlc.passes.planning.options import check_options, planning, sweeping
from mlc.progress import progress
from mlc.training.folders import checkpoints_in
from mlc.view.curve import curve_table, save_curve
from mlc.view.diff import changes, compare
from mlc.view.explain import explained
from mlc.view.listing import difference, listing
from mlc.view.page import Measured
from mlc.view.plan import Plan
from mlc.view.plan import sweep as planned_sweep
from mlc.view.scalingtext import Inner, cluster_of, inner_of, scaling_text
from mlc.view.stagelist import after as stages_after
from mlc.view.stagelist import graphs_after, input_names, known, shown

__all__ = ["app", "main"]

app = typer.Typer(
    help="Exact gradients through the training loop you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_screen = Console(stderr=True, highlight=False, soft_wrap=True)

Target = Annotated[str, typer.Argument(metavar="FILE.py[:function]", help="A file with a compiled function.")]
Memory = Annotated[str | None, typer.Option(help='Budget of a call: bytes, "800MiB", "2GiB" or "min".')]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show Python tracebacks.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")]


def _command(fn: Callable[..., None]) -> Callable[..., None]:
    """Registers a command; its errors are printed, not raised."""

    @functools.wraps(fn)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            fn(*args, debug=debug, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as e:
            if debug:
                raise
            text = str(e) if isinstance(e, MlcError) else blame(e)
            _screen.print("error:", style="bold red", end=" ")
            _screen.print(text, markup=False)
            raise typer.Exit(1) from None

    return app.command(fn.__name__.strip("_"))(run)


@contextlib.contextmanager
def _timed(what: str, verbose: bool, shown: bool = True) -> Iterator[None]:
    """Say how long something took; ``shown``: and that it goes on (not while the user's own code prints)."""
    started = time.perf_counter()
    with progress(what) if shown else contextlib.nullcontext():
        yield
    if verbose:
        _screen.print(f"{what}: {time.perf_counter() - started:.2f} s", style="dim")


def _planned(file: UserFile, memory: str | None, verbose: bool) -> tuple[Any, Plan]:
    """Trace the function on its example arguments and plan it with the options it was compiled with."""
    fn, args, kwargs, options = subject(file)
    options = _with_memory(options, memory)
    with _timed("tracing", verbose), contextlib.redirect_stdout(sys.stderr):
        program = mlc.trace(fn, *args, **kwargs)
    with _timed("planning", verbose):
        plan = mlc.plan(program, **planning(options))
    if verbose:
        for note in program.notes:
            _screen.print(f"note: {note}", markup=False)
    return program, plan


def _with_memory(options: dict[str, Any], memory: str | None) -> dict[str, Any]:
    if memory is None:
        return options
    options = {**options, "memory": int(memory) if memory.isdigit() else memory}
    check_options(options)
    return options


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=_jsonable))


def _jsonable(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.tolist() if x.numel() <= 100 else f"tensor {tuple(x.shape)}"
    return str(x)


@_command
def run(target: Target, memory: Memory = None, trace: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the last call for Perfetto or chrome://tracing.")
        ] = None, checkpoint: Annotated[Path | None, typer.Option(
            metavar="DIR", help="Checkpoints of what main() trains by levels; started again it goes on there.")] = None,
        every: Annotated[int | None, typer.Option(metavar="N", help="Steps from checkpoint to checkpoint.")] = None,
        as_json: Json = False, verbose: Verbose = False, debug: Debug = False) -> None:  # fmt: skip
    """Run main(); without one, one call of the function and its gradient."""
    if every is not None and checkpoint is None:
        raise MlcError("--every without --checkpoint", advice="mlc run FILE.py --checkpoint DIR --every 100")
    file = load(target)
    for cf in file.compiled.values():
        cf.options = _with_memory(cf.options, memory)
    alone = file.main is None or file.name is not None
    if alone and checkpoint is not None:
        raise MlcError(
            f"--checkpoint, and {file.path.name} has no main() that trains", advice="def main(): training.run(1000)"
        )
    with contextlib.nullcontext() if trace is None else mlc.recording():
        report = _call(file, memory, as_json) if alone else _saved_main(file, as_json, verbose, checkpoint, every)
    if trace is not None:
        if report is None:
            raise MlcError("nothing was recorded: main() called no compiled function of this file")
        trace.parent.mkdir(parents=True, exist_ok=True)
        report.save_trace(trace)
        _screen.print(f"trace written to {trace}", markup=False)


def _call(file: UserFile, memory: str | None, as_json: bool) -> Report:
    """One call on the example arguments, with the gradient of everything returned."""
    fn, args, kwargs, options = subject(file)
    found = called(mlc.compile(**_with_memory(options, memory))(fn), args, kwargs)
    norms = {n: None if g is None else float(g.norm()) for n, g in found.gradients.items()}
    if as_json:
        _print_json({"outputs": found.values, "gradient_norms": norms, "report": found.report.as_dict()})
        return found.report
    for v in found.values:
        print(f"output {v.item():.6g}" if v.numel() == 1 else f"output {tuple(v.shape)}")
    table = Table("meta-parameter", "|gradient|")
    for n, norm in norms.items():
        table.add_row(n, "no path" if norm is None else f"{norm:.4e}")
    Console(highlight=False).print(table)
    return found.report


def _saved_main(file: UserFile, as_json: bool, verbose: bool, folder: Path | None, every: int | None) -> Report | None:
    """The file's main(), with checkpoints of its trainings where a folder is given."""
    if folder is None:
        return _main(file, as_json, verbose)
    with checkpoints_in(folder, every) as found:
        report = _main(file, as_json, verbose)
    if not found.trainings:
        raise MlcError(
            "main() has run, and nothing was saved: checkpoints are of mlc.Training, and it ran none without a folder "
            "of its own", advice="mlc.Training([...]).run(steps) in main()",
        )  # fmt: skip
    return report


def _main(file: UserFile, as_json: bool, verbose: bool) -> Report | None:
    """The file's main(); returns the report of the last function that was called in it."""
    assert file.main is not None
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with aside, _timed("main()", verbose, shown=False):
        result = file.main()
    found = {k: f.report for k, f in file.compiled.items() if f.report is not None}
    reports = {k: r.as_dict() for k, r in found.items()}
    if as_json:
        _print_json({"result": result, "last_calls": reports})
    elif verbose:
        for name, r in reports.items():
            _screen.print(f"last call of {name}: {r['seconds']:.3f} s, peak {_size(r['peak_bytes'])}", style="dim")
    return next(reversed(found.values()), None)


def _size(n: int) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"


@_command
def plan(target: Annotated[str | None, typer.Argument(metavar="[FILE.py[:function]]", help="See mlc explain.")] = None,
         memory: Memory = None, output: Output = None, text: Annotated[
        bool, typer.Option("--text", help="Print the decisions as text instead of JSON.")] = False,
         diff: Annotated[tuple[Path, Path] | None, typer.Option(
             metavar="A.json B.json", help="Say what changed between two saved plans.")] = None,
         sweep: Annotated[bool, typer.Option(
             "--sweep", help="The whole curve of time and memory (-o curve.csv, .svg or .png).")] = False,
         as_json: Json = False, verbose: Verbose = False, debug: Debug = False) -> None:  # fmt: skip
    """Print what the compiler decided (JSON), save it, or compare two saved plans."""
    if diff is not None:
        a, b = (Plan.load(path) for path in diff)
        if as_json:
            _print_json(changes(a, b))
        else:
            print(compare(a, b).rstrip())
        return
    if target is None:
        raise MlcError("nothing to plan", advice="mlc plan FILE.py, or mlc plan --diff a.json b.json")
    if sweep:
        _swept(load(target), output, as_json)
        return
    _, found = _planned(load(target), memory, verbose)
    if output is not None:
        _saved(found, output)
        _screen.print(f"plan written to {output}", markup=False)
    elif text and not as_json:
        print(found.explain().rstrip())
    else:
        print(found.model_dump_json(indent=2))


def _swept(file: UserFile, output: Path | None, as_json: bool) -> None:
    """Print every point of the curve, and write it."""
    fn, args, kwargs, options = subject(file)
    with progress("sweeping budgets") as say, contextlib.redirect_stdout(sys.stderr):
        say("tracing")
        program = mlc.trace(fn, *args, **kwargs)
        plans = planned_sweep(program, say=say, **sweeping(options))
    if output is not None:
        save_curve(plans, output)
        _screen.print(f"curve written to {output}", markup=False)
    if as_json:
        _print_json([p.model_dump() for p in plans])
    else:
        print(curve_table(plans).rstrip())


def _saved(found: Plan, output: Path) -> None:
    if output.suffix != ".json":
        raise PlanError(f"a plan is JSON, not {output.suffix or output.name}", advice="-o plan.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    found.save(output)


@_command
def explain(target: Target, memory: Memory = None, as_json: Json = False, verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also where time and memory go.")] = False,
            debug: Debug = False) -> None:  # fmt: skip
    """Explain the plan: what was chosen for each flow, why, what it costs, the runner-up."""
    program, found = _planned(load(target), memory, verbose)
    if as_json:
        _print_json(explained(found, program, found.formulas))
    else:
        print(found.explain(verbose).rstrip())


@_command
def inspect(target: Target, memory: Memory = None, after: Annotated[
        str | None, typer.Option(metavar="PASS", help=f"The graphs after a pass: {', '.join(known())}.")] = None,
            stage: Annotated[
        str | None, typer.Option(help="Only this stage: program, joint, forward, backward.")] = None,
            diff_passes: Annotated[bool, typer.Option("--diff-passes", help="What each pass changed.")] = False,
            verbose: Verbose = False, debug: Debug = False) -> None:  # fmt: skip
    """Print stage graphs as readable Python: on every line what is kept, recomputed or freed."""
    _, found = _planned(load(target), memory, verbose)
    if diff_passes:
        _print_changes(found, stage)
        return
    for x in stages_after(found, after):
        if stage in (None, x.name):
            print(listing(x, input_names(found, x)))


def _print_changes(found: Plan, stage: str | None) -> None:
    """What each pass changed in the graphs that it took and gave."""
    forms = {name: {x.name: x for x in shown(g)} for name, g in graphs_after(found).items()}
    for (old, before), (new, behind) in itertools.pairwise(forms.items()):
        if not before.keys() & behind.keys():
            print(f"{new} made {' and '.join(behind)} of {' and '.join(before)}")
        for name in before.keys() & behind.keys() if stage is None else {stage} & before.keys() & behind.keys():
            changed = difference(before[name], behind[name], (f"{name} after {old}", f"{name} after {new}"))
            print(changed or f"{new} changed nothing in {name}")


@_command
def draw(target: Target, output: Output = None, memory: Memory = None, layout: Annotated[
        str, typer.Option(help="Of .svg and .png: levels, or dot (Graphviz's).")] = "levels",
         measure: Annotated[bool, typer.Option(
             "--measure", help="Run it too: measured memory and time on the page (.html).")] = False,
         sweep: Annotated[bool, typer.Option("--sweep", help="The time-memory curve on the page (.html).")] = False,
         verbose: Verbose = False, debug: Debug = False) -> None:  # fmt: skip
    """Draw levels and flows: .svg .png .html .dot .mmd or .graph.json by suffix."""
    file = load(target)
    path = output or Path(f"{file.path.stem}.{'html' if measure or sweep else 'svg'}")
    if (measure or sweep) and path.suffix.lower() != ".html":
        raise MlcError(f"{path.name} has no place for what --measure and --sweep find", advice="-o page.html")
    found, was = _plan_and_run(file, memory, verbose) if measure else (_planned(file, memory, verbose)[1], None)
    plans: list[Plan] = []
    if sweep and found.bound is not None:
        with progress("sweeping budgets") as say:
            plans = planned_sweep(found.bound, say=say, **sweeping(subject(file)[3]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(found, path, layout=layout, measured=was, sweep=plans)
    _screen.print(f"drawing written to {path}", markup=False)


def _plan_and_run(file: UserFile, memory: str | None, verbose: bool) -> tuple[Plan, Measured]:
    options = _with_memory(subject(file)[3], memory)
    with _timed("running", verbose):
        cf, was = measured(file, options)
    assert cf.plan is not None
    return cf.plan, was


@_command
def check(target: Target, memory: Memory = None, float32: Annotated[
        bool, typer.Option("--float32", help="Leave types as they are, with tolerances to match.")] = False,
          as_json: Json = False, verbose: Verbose = False, debug: Debug = False) -> None:  # fmt: skip
    """Compare the gradient with the plain unroll and finite differences; exit code 1 if they disagree."""
    file = load(target)
    fn, args, kwargs, options = subject(file)
    cf = mlc.compile(**_with_memory(options, memory))(fn)
    with _timed("checking", verbose):
        report = mlc.check(cf, *args, dtype=torch.float32 if float32 else torch.float64, **kwargs)
    if as_json:
        _print_json(report.as_dict())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)


@_command
def scale(gpus: Annotated[list[int], typer.Option(help="Devices; several times for several rows.")] = [8, 512],  # noqa: B006
          steps: Annotated[list[int], typer.Option(help="Inner steps; likewise.")] = [8, 1000],  # noqa: B006
          parameters: Annotated[float, typer.Option(help="Of the inner model.")] = Inner.parameters,
          layers: int = Inner.layers, width: int = Inner.width,
          tokens: Annotated[int, typer.Option(help="Of a batch on each device.")] = Inner.tokens,
          rate: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Of the cluster: memory=80e9.")]
          = None, debug: Debug = False) -> None:  # fmt: skip
    """Time and memory of a large inner model on many devices, on paper; where the plan changes."""
    print(scaling_text(inner_of(parameters, layers, width, tokens), cluster_of(rate or ()), gpus, steps).rstrip())


@_command
def bench(names: Annotated[list[str] | None, typer.Argument(help="Scripts of benchmarks/ to run.")] = None,
          debug: Debug = False) -> None:  # fmt: skip
    """Run scripts of benchmarks/ by name; without names, list them."""
    scripts = {p.stem: p for p in sorted(Path("benchmarks").glob("[!_]*.py"))}
    if not scripts:
        raise MlcError("there are no benchmarks here", advice="run mlc bench in a clone of the repository")
    for name in names or ():
        if name not in scripts:
            raise MlcError(f"no benchmark {name!r}", advice=f"one of: {', '.join(scripts)}")
    for name in names or ():
        code = subprocess.run([sys.executable, str(scripts[name])], check=False).returncode
        if code:
            raise typer.Exit(code)
    if not names:
        print("\n".join(scripts))


def main() -> None:
    """Entry point of the ``mlc`` script."""
    app()
