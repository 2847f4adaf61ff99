"""Faults in costs, predicted memory, formulas and the search for a plan."""

from tests.mutation.fault import Fault, table

_EQUATIONS = "tests/passes/cost/test_equations.py"
_MEMORY = "tests/passes/cost/test_memory.py"
_SEARCH = "tests/passes/planning/test_search.py"
_SLOTS = (
    "tests/passes/planning/test_planner.py::test_the_schedule_reaches_every_trip_within_its_slots "
    "tests/passes/remat/test_residuals.py"
)

FAULTS: list[Fault] = [
    *table(
        "passes.cost.equations",
        _EQUATIONS,
        [
            ("loops_cost_one_trip", "once = self._body(op.body) * op.count", "once = self._body(op.body)"),
            (
                "replays_cost_nothing",
                "return once + self._body(op.replay.body) * replayed_steps(op.count, op.replay.slots)",
                "return once",
            ),
            ("traffic_is_always_near", "(r.near if moved <= r.cache else r.far), work", "r.near, work"),
            ("starting_an_operator_costs_nothing", "(r.start + seconds) * r.strain)", "seconds * r.strain)"),
            ("views_fuse", "and not flops(e) and not schema_of(e.op).view:", "and not flops(e):"),
        ],
    ),
    *table(
        "passes.cost.memory",
        _MEMORY,
        [
            ("emissions_are_held_once", "before = (n - 1) * sum(each.values())", "before = sum(each.values())"),
            (
                "a_loop_frees_no_carries",
                "during = book.live - sum(size for _, size in freed_carries(book, e, i, loop)) + loop.peak",
                "during = book.live + loop.peak",
            ),
            ("scratch_is_not_counted", "return book.live + workspace(e)", "return book.live"),
            (
                "owned_inputs_are_not_counted",
                "resident(v.type)) for v in owned}, self.same)",
                "resident(v.type)) for v in ()}, self.same)",
            ),
            ("sparse_states_are_one_set", "(most - 1) * sets + (n > 1)", "(n > 1)"),
        ],
    ),
    *table(
        "passes.cost.storage",
        _MEMORY,
        [
            (
                "values_live_to_the_end",
                "if self.last.get(v, i) == i and root in self.holders:",
                "if v not in self.last and root in self.holders:",
            ),
            ("views_have_memory_of_their_own", "size is None else shared_with(e, k)", "size is None else None"),
        ],
    ),
    *table(
        "passes.cost.facts",
        "tests/passes/cost/test_facts.py tests/view/test_listing.py",
        [
            (
                "views_are_freed",
                'if _shares(e):\n        return Fate("view"',
                'if False:\n        return Fate("view"',
                "tests/passes/cost/test_facts.py::test_every_fate_of_a_stage",
            ),
            (
                "what_is_kept_is_freed",
                "if i < peak < until:",
                "if False:",
                "tests/passes/cost/test_facts.py::test_every_fate_of_a_stage",
            ),
        ],
    ),
    *table(
        "passes.cost.timeline",
        "tests/passes/cost/test_facts.py::test_the_timeline_of_a_body_peaks_where_liveness_does",
        [
            (
                "timeline_without_its_scratch_and_results",
                "book.enter(e, i, own_bytes(e))\n                live",
                "live",
            ),
        ],
    ),
    *table(
        "ir.lowered.slots",
        _SLOTS,
        [
            ("strides_do_not_grow", "self.stride *= 2", "self.stride += 1", _MEMORY + "::test_sets_that_are_held"),
            ("replays_keep_nothing_on_the_way", "keep = free > 0 and after < trip", "keep = False and after < trip"),
            ("replays_begin_at_the_first_state", "start = self.held[-1]", "start = self.held[0]"),
        ],
    ),
    *table(
        "passes.planning.search",
        _SEARCH,
        [
            ("memory_is_worth_less_time", "_WORTH = 0.8", "_WORTH = 0.3"),
            (
                "fronts_keep_what_is_beaten",
                "if not out or c.peak < out[-1].peak:",
                "if not out or c.peak <= out[-1].peak:",
            ),
            (
                "the_last_that_fits_is_taken",
                "        if fits(ladder[middle]):\n            high = middle",
                "        if fits(ladder[middle]):\n            low = middle",
            ),
            ("budgets_are_ignored", "return (budget is None or c.peak <= budget) and", "return"),
        ],
    ),
    *table(
        "passes.formulas.formulas",
        "tests/passes/formulas/test_formulas.py::test_a_formula_is_what_its_own_graphs_cost_at_other_counts",
        [
            (
                "formulas_count_loops_once",
                "loops.append((n * once[0], n * once[1]))",
                "loops.append((once[0], once[1]))",
            ),
            ("formulas_forget_replays", "loops.append((times * again[0], times * again[1]))", "pass"),
        ],
    ),
    *table(
        "passes.formulas.breakeven",
        "tests/passes/formulas/test_breakeven.py",
        [
            (
                "break_even_one_too_late",
                "at = high if own_forward else low",
                "at = high + 1 if own_forward else low + 1",
            ),
            ("break_even_ignores_the_budget", "return budget is None or cost[1] <= budget", "return True"),
        ],
    ),
]
