"""Faults in what runs a plan, and in the IR that it is written in."""

from tests.mutation.fault import Fault, table

_LOOP = "tests/runtime/interpreter/test_loop.py"
_FEEDS = "tests/runtime/interpreter/test_feeds.py"
_INTERPRETER = "tests/runtime/interpreter/test_interpreter.py"
_RESIDUALS = "tests/passes/remat/test_residuals.py"
_HOST = "tests/runtime/interpreter/test_host.py"
_INDUCTOR = "tests/runtime/inductor/test_lowering.py"
_VERIFY = "tests/ir/test_verify.py"

FAULTS: list[Fault] = [
    *table(
        "runtime.interpreter.states",
        _RESIDUALS,
        [
            (
                "replay_order_reversed",
                "steps = list(self._slots.way(trip))",
                "steps = list(self._slots.way(trip))[::-1]",
            ),
            (
                "replays_begin_with_the_first_set",
                "state = self._set(self._slots.held[-1])",
                "state = self._set(self._slots.held[0])",
            ),
            (
                "rebuilt_states_are_those_of_the_next_trip",
                "self._hold(t + 1, list(state))",
                "self._hold(t, list(state))",
            ),
            (
                "written_states_are_not_noticed",
                "check_versions(state, before)\n",
                "pass\n",
                "tests/runtime/interpreter/test_states.py",
            ),
        ],
    ),
    *table(
        "runtime.interpreter.loop",
        _LOOP,
        [
            ("reverse_loops_run_forward", "at = n - 1 - t if op.reverse and n is not None else t", "at = t"),
            (
                "reverse_loops_emit_in_their_own_order",
                "if op.reverse:\n            for s in",
                "if False:\n            for s in",
            ),
            ("open_loops_run_once", "return int(n)", "return 1"),
        ],
    ),
    *table(
        "runtime.interpreter.feeds",
        _FEEDS,
        [
            (
                "replays_draw_new_numbers",
                "for g, s in zip(self.generators, next(replay), strict=True):\n                _restore(g, s)",
                "next(replay)",
            ),
            (
                "generators_stay_where_replays_left_them",
                "for g, s in zip(self.generators, now, strict=True):\n                _restore(g, s)",
                "pass",
            ),
            (
                "a_generator_of_ones_own_is_the_default_one",
                "        return g.get_state()\n    return torch.cuda",
                "        return torch.get_rng_state()\n    return torch.cuda",
            ),
            (
                "numbers_behind_a_batch_are_not_marked",
                "out.extend(self._batch(e, replay, kept, trips))\n                moved = True",
                "out.extend(self._batch(e, replay, kept, trips))",
            ),
            ("written_batches_are_not_noticed", "check_versions(tensors, before)", "pass"),
            (
                "items_of_any_shape_will_do",
                "if [_shape(TensorType.of(t)) for t in found] != [_shape(t) for t in types]:",
                "if False:",
            ),
        ],
    ),
    *table(
        "runtime.interpreter.interpreter",
        _INTERPRETER,
        [
            (
                "operands_are_not_dropped",
                'self.lines.append("    a = [" + ", ".join(self.literal(a) for a in e.args) + "]")\n            if dying:',
                'self.lines.append("    a = [" + ", ".join(self.literal(a) for a in e.args) + "]")\n            if False:',
            ),
            ("keywords_are_not_passed", "for k, v in e.kwargs)\n        call", "for k, v in ())\n        call"),
            ("layouts_are_taken_as_they_come", "if x.stride() != t.stride or x.storage_offset() != 0:", "if False:"),
            (
                "draws_are_contiguous",
                "t = torch.empty_strided(size, stride, dtype=dtype, device=device)\n    op.op",
                "t = torch.empty(size, dtype=dtype, device=device)\n    op.op",
            ),
        ],
    ),
    *table(
        "ir.lowered.reuse",
        "tests/ir/lowered/test_reuse.py",
        [
            (
                "results_are_written_over_what_is_read_later",
                "chosen = _candidate(e, i, last, owner, holders, odd)",
                "chosen = _candidate(e, i, dict.fromkeys(last, i), owner, holders, odd)",
            ),
            (
                "what_is_packed_is_written_over",
                "        return e.inputs\n    if not isinstance(e.op, Loop):",
                "        return ()\n    if not isinstance(e.op, Loop):",
            ),
        ],
    ),
    *table(
        "runtime.interpreter.host",
        _HOST,
        [
            (
                "what_leaves_is_let_go_at_once",
                "self._flight: Flight | None = Flight([t for _, t in moved], lanes)",
                "self._flight: Flight | None = Flight([], lanes)",
            ),
            (
                "expanded_tensors_come_back_small",
                "return out.copy_(back).as_strided(self.size, self.stride)",
                "return back",
            ),
        ],
    ),
    *table(
        "runtime.inductor.trial",
        _INDUCTOR,
        [
            (
                "wrong_kernels_are_believed",
                "return _judged(body, inputs, expected, got, doubtful) if doubtful else None",
                "return None",
            ),
        ],
    ),
    *table(
        "runtime.inductor.segments",
        _INDUCTOR,
        [
            (
                "segments_of_other_literals_are_one",
                '={e.op}{args}{kwargs}")',
                '={e.op}")',
                "tests/ir/test_keys.py " + _INDUCTOR,
            ),
            ("what_is_recomputed_is_merged", "again = numbers[i] in seen and not is_view(e)", "again = False"),
        ],
    ),
    *table(
        "ir.verify",
        _VERIFY,
        [
            (
                "values_may_be_read_before_they_are_made",
                "for v in e.inputs:\n            if v not in defined:",
                "for v in ():\n            if v not in defined:",
            ),
            ("carries_may_change_their_type", '_pairs("carry", ins[:n], outs[:n]) or ', ""),
            (
                "sequences_of_any_length_will_do",
                "if None not in (v.type.length, op.trips) and v.type.length != op.trips:",
                "if False:",
            ),
        ],
    ),
    *table(
        "ir.digest",
        "tests/ir/test_digest.py",
        [
            (
                "literals_do_not_count",
                'parts += [f"{k}={literal_text(v, name, self.objects)}" for k, v in kwargs]',
                "pass",
            ),
            ("loops_of_any_direction_are_one", "{op.trips},{op.reverse}{replay}", "{op.trips}{replay}"),
            ("results_do_not_count", 'self.out.append("return " + ",".join(map(name, r.outputs)))', "pass"),
        ],
    ),
    *table(
        "ir.builder",
        "tests/ir/test_builder.py",
        [
            ("impure_equations_are_merged", "if self._merge and not impure:", "if self._merge:"),
            (
                "a_difference_from_zero_is_its_operand",
                "            if op is _ADD and type(a) is Var and a in self.zeros",
                "            if type(a) is Var and a in self.zeros",
            ),
            (
                "dead_draws_go",
                "if e.impure or any(v in live for v in e.outs):\n            kept",
                "if any(v in live for v in e.outs):\n            kept",
            ),
        ],
    ),
]
