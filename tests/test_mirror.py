"""Tests mirror the tree: `mlc/a/b.py` is tested by `tests/a/test_b.py`; what is not yet is in a list that shrinks."""

from pathlib import Path

ROOT = Path(__file__).parents[1]

# Modules without a test file of their name. A test that is added takes its module off; nothing is put on.
WITHOUT = {
    "check/function", "check/limitations", "check/policy", "check/policyreport",
    "check/precision", "check/recorded", "check/sandbox", "cli/call", "cli/userfile", "compiled/call",
    "compiled/health", "compiled/precise", "compiled/report", "compiled/together", "compiled/underlying", "draw",
    "errors", "implicit/answer", "implicit/calls", "implicit/closed", "implicit/condition", "implicit/conditioned",
    "implicit/function", "implicit/log", "implicit/node", "implicit/reading", "implicit/recorded",
    "implicit/residual", "implicit/system", "implicit/watch", "ir/communication/collectives",
    "ir/communication/sequence", "ir/core", "ir/inplace", "ir/levels/steps", "ir/levels/valuegraph", "ir/literals",
    "ir/lowered/contract", "ir/lowered/decision", "ir/lowered/fx", "ir/lowered/loopview", "ir/lowered/nesting",
    "ir/lowered/precision", "ir/lowered/slots", "ir/lowered/stages", "ir/lowered/storage",
    "ir/opaque/call", "ir/opaque/estimates", "ir/parse", "ir/problem", "ir/program", "ir/trees", "ir/types",
    "linear/cg", "linear/dense", "linear/krylov", "linear/neumann", "linear/nystrom", "linear/solve", "notebook",
    "passes/autodiff/difference", "passes/autodiff/policy", "passes/autodiff/tangents", "passes/autodiff/transpose",
    "passes/autodiff/vmapped", "passes/cost/rates", "passes/cost/storage", "passes/formulas/comparison",
    "passes/formulas/peaks", "passes/formulas/scaled", "passes/formulas/tangentcost", "passes/formulas/tripcounts",
    "passes/lowering/differentiate", "passes/microbatch/batches", "passes/microbatch/dependence",
    "passes/microbatch/layers", "passes/microbatch/losses", "passes/microbatch/part", "passes/microbatch/phases",
    "passes/microbatch/views", "passes/planning/alternatives", "passes/planning/options", "passes/planning/plan",
    "passes/planning/planned", "passes/precision/casts", "passes/precision/effects", "passes/precision/ops",
    "passes/precision/store", "passes/precision/sums", "passes/precision/update", "passes/remat/cut",
    "passes/remat/inlined", "passes/remat/keep", "passes/remat/shrink", "passes/remat/states",
    "passes/responses/again", "passes/responses/asked", "passes/responses/batches", "passes/responses/ending",
    "passes/responses/estimates/evolution", "passes/responses/estimates/forwardgradient",
    "passes/responses/estimates/fullyfirstorder", "passes/responses/estimates/recorded", "passes/responses/fed",
    "passes/responses/firstorder", "passes/responses/implicit", "passes/responses/measured",
    "passes/responses/rewrite", "passes/responses/site", "passes/responses/solving", 
    "passes/responses/truncated", "passes/rolling/exits", "passes/rolling/fold", "passes/rolling/quotients",
    "passes/rolling/scalars", "passes/rules/collectives", "passes/rules/decompositions", "passes/rules/determinants",
    "record/fakes", "record/handles", "record/memories", "record/recorder", "record/regions", "record/retype",
    "record/special", "record/values", "runtime/call", "runtime/circle", "runtime/collectives",
    "runtime/inductor/artefacts", "runtime/inductor/segments", "runtime/inductor/trial", "runtime/inductor/workers",
    "runtime/interpreter/saved", "runtime/interpreter/solve", "runtime/products", "shown", "trace/build",
    "trace/capture", "trace/clone", "trace/communication/collectives", "trace/communication/functions",
    "trace/communication/parallel", "trace/communication/rollcall", "trace/customs", "trace/environment",
    "trace/faketracer", "trace/finish", "trace/gradients/evaluate", "trace/gradients/grads",
    "trace/gradients/hookruns", "trace/gradients/hooks", "trace/gradients/hooksites", "trace/gradients/later",
    "trace/gradients/store", "trace/gradients/taken", "trace/gradients/unroll", "trace/interception",
    "trace/iterables", "trace/levels", "trace/numbers/calls", "trace/numbers/links", "trace/numbers/operands",
    "trace/numbers/placeholders", "trace/numbers/rules", "trace/numbers/text", "trace/observe", "trace/optimizers",
    "trace/patches", "trace/python/batches", "trace/python/changes", "trace/python/follow", "trace/python/found",
    "trace/python/frames", "trace/python/modulepaths", "trace/python/names", "trace/python/places",
    "trace/python/trees", "trace/python/uses", "trace/python/view", "trace/recorder/asdata",
    "trace/recorder/concrete", "trace/recorder/drawing", "trace/recorder/externals", "trace/recorder/observer",
    "trace/recorder/observing", "trace/recorder/packed", "trace/recorder/placing", "trace/recorder/randomness",
    "trace/recorder/reach", "trace/recorder/snapshots", "trace/recorder/specials", "trace/recorder/tracer",
    "trace/recorder/writing", "training/data/drawing", "training/data/feed",
    "training/data/randomness", "training/engine", "training/events", "training/game", "training/interface",
    "training/level", "training/loggers", "training/options", "training/order/blocks", "training/order/loops",
    "training/order/reading", "training/running", "training/state/optimizer",
    "training/state/snapshot", "training/state/start",
    "training/stepping", "view/curve", "view/details", "view/dot", "view/fonts/subset",
    "view/formulatext", "view/layout", "view/modelexplorer", "view/page/content", "view/page/crowds",
    "view/page/scene", "view/plan", "view/stagelist", "view/svg", "view/tables",
}  # fmt: skip

# Test files of no module's name: each is about something that several modules do together.
TOGETHER = {
    "compiled/test_containers", "compiled/test_guards", "compiled/test_held", "compiled/test_saved",
    "compiled/test_wrong_in_pytorch", "implicit/test_compiled", "implicit/test_compiled_refusals",
    "implicit/test_errors", "implicit/test_fixed_point",
    "implicit/test_libraries", "ir/test_communication", "passes/autodiff/test_random",
    "passes/precision/test_numbers", "test_benchmarks", "test_docs",
    "test_docstrings", "test_examples", "test_goldens", "test_kills", "test_layout", "test_mirror", "test_share",
    "training/test_data",
    "training/test_graphs", "training/test_order", "training/test_resume", "training/test_run",
    "training/test_steps",
}  # fmt: skip

MODULES = {p.relative_to(ROOT / "mlc").with_suffix("") for p in (ROOT / "mlc").rglob("*.py") if p.stem[:2] != "__"}


def file_of(module: Path) -> Path:
    return ROOT / "tests" / module.parent / f"test_{module.name}.py"


def test_every_module_has_a_test_of_its_name_or_is_listed() -> None:
    without = {m.as_posix() for m in MODULES if not file_of(m).exists()}
    assert without - WITHOUT == set(), "new modules need a test of their name"
    assert WITHOUT - without == set(), "these have one now, or are gone: take them off the list"


def test_every_test_file_of_a_room_is_of_a_module_or_listed() -> None:
    rooms = {m.parent for m in MODULES}
    found = {p.relative_to(ROOT / "tests").with_suffix("") for p in (ROOT / "tests").rglob("test_*.py")}
    odd = {p.as_posix() for p in found if p.parent in rooms and p.parent / p.name.removeprefix("test_") not in MODULES}
    assert odd == TOGETHER
