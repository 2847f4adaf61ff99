"""Faults in derivatives: single rules, adjoints, loops, and which formulas are trusted."""

from tests.mutation.fault import Fault, table

_REVERSE = "tests/passes/autodiff/test_reverse.py"
_FORWARD = "tests/passes/autodiff/test_forward.py"
_LOOPS = "tests/passes/autodiff/test_loops.py"
_ADJOINT = "tests/passes/autodiff/test_adjoint.py"
_LEGALITY = "tests/passes/rules/test_legality.py"

FAULTS: list[Fault] = [
    *table(
        "passes.autodiff.reverse",
        _REVERSE,
        [
            ("root_without_its_half", "(ct, 0.5), (ct.type,))", "(ct, 1.0), (ct.type,))"),
            ("root_at_zero_unguarded", "(quotient, zero, 0), (t,))", "(quotient, zero, 1), (t,))"),
            ("later_cotangent_replaces_earlier", "cts[v] = sum_of(b, v, cts.get(v), ct)", "cts[v] = ct"),
            ("element_of_a_sequence_always_first", "ct if i == at else zero", "ct if i == 0 else zero"),
            ("index_replaces_cotangent_of_a_sequence", "cts[seq] = b.add(cts.get(seq), packed)", "cts[seq] = packed"),
            (
                "only_first_result_carries_a_derivative",
                "for v, d in zip(e.outs, differentiable_outs(e), strict=True) if d)",
                "for v, d in zip(e.outs[:1], differentiable_outs(e), strict=False) if d)",
            ),
            (
                "carries_depend_without_a_fixpoint",
                "        if more == carries:\n            return carries, inside",
                "        if True:\n            return carries, inside",
                _LOOPS,
            ),
            ("stops_of_deeper_levels_hold", "e.op.level > through.depth", "e.op.level > through.depth + 1", _ADJOINT),
        ],
    ),
    *table(
        "passes.autodiff.forward",
        _FORWARD,
        [
            ("forward_root_without_its_half", "(t, 0.5), (t.type,))", "(t, 1.0), (t.type,))"),
            (
                "forward_stop_ignores_who_passes",
                "if isinstance(e.op, Stop) and passes(e):",
                "if isinstance(e.op, Stop):",
            ),
            ("forward_given_tangent_replaces_found", "out[v] = b.add(out.get(v), extra[v])", "out[v] = extra[v]"),
            (
                "forward_sequence_reads_first_element",
                "tan[e.outs[0]] = b.emit(op, (seq,), (seq.type.elem,))[0]",
                "tan[e.outs[0]] = b.emit(Index(0), (seq,), (seq.type.elem,))[0]",
            ),
        ],
    ),
    *table(
        "passes.autodiff.loops",
        _LOOPS,
        [
            ("adjoint_runs_in_the_loops_own_direction", "p.op.trips, not p.op.reverse,", "p.op.trips, p.op.reverse,"),
            (
                "constants_take_the_last_trips_cotangent",
                "b.add(a, r) for a, r in zip(ct_const",
                "r for a, r in zip(ct_const",
            ),
            (
                "cotangents_of_emissions_dropped",
                "given = [i for i, v in enumerate(p.emitted) if v in cts]",
                "given = []",
            ),
            (
                "carries_reach_only_the_end",
                "needed = {*[p.next[i] for i in wanted], *[p.emit[i] for i in given]}",
                "needed = {*[p.next[i] for i in wanted]}",
            ),
            (
                "carries_swap_their_seeds",
                "for i, c in zip(carried, ct_carry, strict=True):\n        seeds[env[p.next[i]]]",
                "for i, c in zip(carried, ct_carry[::-1], strict=True):\n        seeds[env[p.next[i]]]",
            ),
            (
                "tangents_of_sequences_dropped",
                "start.update((env[p.in_seq[i]], t) for i, t in zip(seqs, t_seq, strict=True))",
                "",
                _FORWARD,
            ),
            (
                "tangents_run_forward_only",
                "p.op.trips, p.op.reverse,\n              label=p.op.label, derived=(Origin.TANGENT",
                "p.op.trips, False,\n              label=p.op.label, derived=(Origin.TANGENT",
                _FORWARD,
            ),
        ],
    ),
    *table(
        "passes.autodiff.adjoint",
        _ADJOINT,
        [
            (
                "mixed_product_without_shared_directions",
                "more = {v: t for v, t in directions.items() if v not in fence}",
                "more = {}",
            ),
            ("mixed_product_forgets_seeds", "if seed in active and loss in tangents:", "if False:"),
            (
                "mixed_product_replaces_cotangents",
                "cts[v] = b.add(cts.get(v), t)\n        for loss",
                "cts[v] = t\n        for loss",
            ),
            (
                "mixed_product_forgets_the_weights_beside",
                "if v in active and v not in roots and (v not in inside or v in stopped)",
                "if v in active and v not in roots and v in stopped",
            ),
            (
                "residual_cuts_without_the_owned",
                '        if self.policy.stop == "inner":\n            hard -= self.owned\n        return frozenset(soft | hard | {',
                "        return frozenset(soft | hard | {",
            ),
            ("cuts_owned_by_nobody", "self.owned |= hard", "pass"),
            (
                "hypergradient_passes_every_cut",
                'hard = {e for e in stops if not passes(e, "torch" if self.policy.stop == "torch" else "inner")}',
                "hard = set()",
                _REVERSE,
            ),
            (
                "levels_stop_one_too_early",
                "{e for e in stops if e.op.level is not None and e.op.level <= depth}",
                "{e for e in stops if e.op.level is not None and e.op.level < depth}",
            ),
        ],
    ),
    *table(
        "passes.autodiff.jacobian",
        "tests/passes/autodiff/test_jacobian.py",
        [
            (
                "columns_of_later_outputs_replace_earlier",
                "total = row if total is None else total + row",
                "total = row",
            ),
            (
                "one_hot_columns_start_anew_for_each_parameter",
                "own = torch.arange(start, start + t.numel, device=t.device)",
                "own = torch.arange(0, t.numel, device=t.device)",
            ),
        ],
    ),
    *table(
        "passes.rules.legality",
        _LEGALITY,
        [
            (
                "wrong_forward_formulas_trusted",
                "if op in _FORWARD_WRONG:\n        return False",
                "if op in _FORWARD_WRONG:\n        return True",
            ),
        ],
    ),
    *table(
        "passes.rules.recorded",
        _LEGALITY,
        [
            ("second_order_formulas_off", "twice = e.op in legality.SECOND_ORDER_FORMULA", "twice = False"),
            (
                "rules_remembered_whatever_is_active",
                'key = ("vjp", signature(e), active, given)',
                'key = ("vjp", signature(e), given)',
                "tests/passes/rules/test_recorded.py",
            ),
            (
                "rules_ignore_the_default_dtype",
                "return (equation_key(e, _type_of), torch.get_default_dtype())",
                "return equation_key(e, _type_of)",
                "tests/passes/rules/test_recorded.py",
            ),
        ],
    ),
    *table(
        "passes.autodiff.transpose",
        _LEGALITY,
        [("transposed_rule_forgets_seeds", "seeds[o] = b.add(seeds.get(o), t)", "seeds[o] = o")],
    ),
    *table(
        "passes.rules.norms",
        "tests/passes/rules/test_norms.py::test_a_penalty_inside_training_is_differentiated_right",
        [
            (
                "layer_norm_without_epsilon",
                "    rstd = torch.rsqrt(var + eps)\n    y = centered * rstd\n    if weight is not None:\n        y = y * weight\n    return (y if",
                "    rstd = torch.rsqrt(var + 0.1)\n    y = centered * rstd\n    if weight is not None:\n        y = y * weight\n    return (y if",
            ),
        ],
    ),
]
