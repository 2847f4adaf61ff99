"""Faults in recording and in the compiled function: views, cuts, guards, state, validation, checking."""

from tests.mutation.fault import Fault, table

_SAVED = "tests/compiled/test_saved.py"
_ENTRY = "tests/compiled/test_entry.py"
_COMPILED = "tests/compiled/test_compiled.py"
_VIEWS = "tests/record/test_views.py"
_CUTS = "tests/trace/recorder/test_cuts.py"
_STATE = "tests/numerics/test_state.py::test_everything_ends_as_in_the_loop"

FAULTS: list[Fault] = [
    *table(
        "record.views",
        _VIEWS,
        [
            ("a_permuted_write_is_not_permuted_back", "inverse[d % len(dims)] = i", "inverse[i] = d % len(dims)"),
            (
                "a_slice_is_written_without_its_step",
                "torch.slice_scatter(base, new, dim, start, end, step)",
                "torch.slice_scatter(base, new, dim, start, None if end is None else start + new.shape[dim])",
            ),
            (
                "a_piece_is_written_at_its_number",
                "start = index * size if isinstance(size, int) else sum(size[:index])",
                "start = index",
            ),
        ],
    ),
    *table(
        "trace.recorder.cuts",
        _CUTS,
        [
            (
                "detach_is_no_cut",
                "        if cut is not None or self.hidden(t):\n            return self._stop_at(var, None, cut)\n        s = h.storage",
                "        s = h.storage",
            ),
            (
                "values_under_no_grad_are_no_cut",
                "if var in self.cut_vars:\n            return self._stop_at(var, None, self.cut_vars[var])",
                "pass",
            ),
            (
                "a_cut_on_the_way_into_state_stays_one",
                "        if var not in self._hard:\n            return var\n",
                "        return var\n",
            ),
        ],
    ),
    *table(
        "trace.recorder.writing",
        _CUTS,
        [
            (
                "in_place_updates_are_no_state",
                "            s.updated = True\n            self.writes += 1\n            new",
                "            self.writes += 1\n            new",
            ),
        ],
    ),
    *table(
        "compiled.entry",
        _ENTRY,
        [
            (
                "a_recording_fits_every_call",
                "if list(without(roots.key, entry.ignored)) != entry.key:",
                "if False:",
                "tests/compiled/test_guards.py",
            ),
            (
                "lengths_do_not_count",
                "if found is not None and len(found) != n:",
                "if False:",
                "tests/compiled/test_guards.py",
            ),
            (
                "another_generator_is_the_same",
                "if not all(_stands(x, rec.roots, roots) for x in _by_reference(rec)):",
                "if False:",
            ),
            (
                "refused_memory_moves_generators",
                "return [(None, torch.get_rng_state()), *((g, g.get_state()) for g in entry.recording.generators)]",
                "return [(None, torch.get_rng_state())]",
                _COMPILED,
            ),
        ],
    ),
    *table(
        "compiled.call",
        _SAVED,
        [
            (
                "the_program_need_not_reproduce_the_run",
                "if verify is not None:\n            self._reproduces",
                "if False:\n            self._reproduces",
                "tests/compiled/test_guards.py",
            ),
            (
                "results_lie_in_the_users_memory",
                "outs.append(t.clone() if mine in kept else t)",
                "outs.append(t)",
                "tests/compiled/test_guards.py",
            ),
            ("decisions_are_not_guards", "if not same(run.results[i], outcome):", "if False:", _ENTRY),
        ],
    ),
    *table(
        "compiled.validate",
        "tests/compiled/test_validate.py",
        [
            (
                "infinities_make_everything_equal",
                "float(torch.where(torch.isinf(b), 0, b).abs().max())",
                "float(b.abs().max())",
            ),
            ("nan_may_stand_anywhere", "if not torch.equal(nan_a, nan_b):", "if False:"),
            (
                "a_percent_is_rounding",
                "    torch.float64: 1e-7,\n    torch.float32: 5e-3,\n",
                "    torch.float64: 1e-2,\n    torch.float32: 5e-2,\n",
            ),
        ],
    ),
    *table(
        "compiled.slope",
        "tests/compiled/test_slope.py",
        [
            (
                "a_wrong_slope_is_allowed",
                "_ALLOWED = {torch.float64: 1e-4, torch.float32: 5e-2}",
                "_ALLOWED = {torch.float64: 1e4, torch.float32: 5e2}",
            ),
        ],
    ),
    *table(
        "compiled.commit",
        _STATE,
        [
            (
                "optimizers_are_left_as_they_were",
                "target.state[_parameter(e, e.key[0], build, roots)][e.key[1]] = value",
                "pass",
            ),
            (
                "what_is_left_may_be_shared",
                "if key in owned or not value.is_contiguous() or value.storage_offset() != 0:",
                "if False:",
                "tests/compiled/test_commit.py",
            ),
        ],
    ),
    *table(
        "runtime.interpreter.saved",
        _SAVED,
        [
            ("writes_before_backward_are_not_noticed", "if versions(tensors) != before:", "if False:"),
            ("rebound_data_is_read_anew", "return x.detach() if isinstance(x, Tensor) else x", "return x"),
        ],
    ),
    *table(
        "check.report",
        "tests/check/test_report.py",
        [
            (
                "differences_are_never_wrong",
                "return self.informs or not self.conclusive or self.error <= max(self.tolerance, 5 * self.spread)",
                "return True",
            ),
            (
                "the_worst_pair_of_steps_counts",
                "a, b = min(pairs, key=lambda p: abs(p[0] - p[1]))",
                "a, b = max(pairs, key=lambda p: abs(p[0] - p[1]))",
            ),
            ("a_gradient_that_is_no_number_is_right", "            and not self.wrong\n", ""),
            ("final_states_do_not_count", "            and self.state_err <= exact\n", ""),
        ],
    ),
]
