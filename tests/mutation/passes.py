"""Faults in passes: value numbering, rolling, what is kept and made again, micro-batches, levels."""

from tests.mutation.fault import Fault, table

_NUMBERING = "tests/passes/remat/test_numbering.py"
_RESIDUALS = "tests/passes/remat/test_residuals.py"
_SEGMENTS = "tests/passes/remat/test_segments.py"
_ROLL = "tests/passes/rolling/test_roll.py"
_INDEPENDENCE = "tests/passes/microbatch/test_independence.py"
_RULES = "tests/passes/microbatch/test_rules.py"

FAULTS: list[Fault] = [
    *table(
        "ir.keys",
        _NUMBERING,
        [
            ("value_numbering_ignores_keywords", "    if not kwargs:\n", "    if True:\n"),
            (
                "literals_of_equal_value_are_one",
                "return (t, repr(a)) if t is float or t is complex else (t, a)",
                "return a",
                "tests/ir/test_keys.py",
            ),
        ],
    ),
    *table(
        "passes.remat.numbering",
        _NUMBERING,
        [
            ("two_draws_are_one_value", "key = object() if e.impure else equation_key", "key = equation_key"),
        ],
    ),
    *table(
        "passes.remat.residuals",
        _RESIDUALS,
        [
            ("residual_pairs_ignore_the_loop", " and f.op.label == a.op.label", ""),
            ("residual_pairs_ignore_the_direction", " and f.op.reverse != a.op.reverse", ""),
            (
                "residuals_are_handed_over_crosswise",
                "env = dict(zip(twins, inputs, strict=True))",
                "env = dict(zip(twins, inputs[::-1], strict=True))",
            ),
            ("residuals_are_kept_at_any_price", "return price * resident(v.type) * count", "return 0.0"),
        ],
    ),
    *table(
        "passes.remat.states",
        _RESIDUALS,
        [
            ("as_many_states_as_trips_are_replayed", "op.trips <= slots", "op.trips < slots"),
        ],
    ),
    *table(
        "passes.remat.segments",
        _SEGMENTS,
        [
            ("rematerialisation_ignores_how_often_a_body_runs", "+ self.seconds * trade.times", "+ self.seconds"),
        ],
    ),
    *table(
        "passes.remat.mincut",
        "tests/passes/remat/test_mincut.py",
        [
            ("the_dearer_of_keeping_and_making_is_chosen", "price <= seconds  # type", "price >= seconds  # type"),
            (
                "making_again_does_not_need_its_operands",
                "net.edge(maker, node[u], None)",
                "net.edge(maker, node[u], 0.0)",
            ),
        ],
    ),
    *table(
        "passes.remat.prune",
        "tests/passes/remat/test_prune.py",
        [
            (
                "pruning_looks_one_trip_back",
                "more = carries | {i for i in range(nc) if ins[i] in used}\n",
                "more = carries\n",
            ),
            ("pruning_keeps_every_sequence", "if ins[i] in used or (op.trips is None", "if True or (op.trips is None"),
        ],
    ),
    *table(
        "passes.remat.schedule",
        "tests/passes/remat/test_schedule.py",
        [
            ("draws_are_reordered", "if any(e.impure for e in region.eqns) or not any", "if not any"),
            (
                "operands_are_made_last_first",
                "for v in e.inputs if v in where}, reverse=True)",
                "for v in e.inputs if v in where})",
            ),
        ],
    ),
    *table(
        "passes.rolling.fold",
        _ROLL,
        [
            (
                "constants_are_compared_at_two_trips",
                "if all(v is column[0] for v in column):",
                "if column[1] is column[0]:",
            ),
            (
                "carries_are_compared_at_one_trip",
                "for k in range(1, len(column)))\n            return at",
                "for k in range(1, 2))\n            return at",
            ),
            ("visits_do_not_advance", "replace(e.op, steps=steps if any(steps) else ())", "replace(e.op, steps=())"),
            (
                "values_of_any_trip_are_those_of_the_last",
                'final[v] = ("emit", emits.index(mine), k)',
                'final[v] = ("emit", emits.index(mine), last)',
            ),
        ],
    ),
    *table(
        "passes.rolling.scalars",
        _ROLL,
        [
            (
                "numbers_that_differ_are_one",
                '    return [*scaled, e.with_(op=aten(base, "Tensor"), args=(e.args[0], scaled[-1].outs[0]), kwargs=())]',
                '    return [*scaled, e.with_(op=aten(base, "Tensor"), args=(e.args[0], b), kwargs=())]',
                "tests/ir/test_keys.py " + _ROLL,
            ),
        ],
    ),
    *table(
        "passes.rolling.liveness",
        _ROLL,
        [
            (
                "trips_are_cleaned_unevenly",
                "if used is not None and keys[i] is not None:",
                "if False:",
                "tests/passes/rolling/test_liveness.py",
            ),
        ],
    ),
    *table(
        "passes.rolling.apart",
        "tests/passes/rolling/test_apart.py",
        [
            (
                "activations_move_what_their_operator_saved",
                "if v in made and not isinstance(made[v].op, (Alias, Stop, Grad, Loop))",
                "if False",
            ),
        ],
    ),
    *table(
        "passes.microbatch.rules",
        _RULES,
        [
            (
                "means_of_parts_add_up",
                "return _reduce(s) or s.all(SUM, divide=PARTS)",
                "return _reduce(s) or s.all(SUM)",
            ),
            (
                "reductions_keep_examples_apart",
                "return None if c.dim in dims else s.all(_kept(s, c, dims))",
                "return s.all(_kept(s, c, dims))",
            ),
            ("products_of_sums_are_sums", "return s.all(SUM) if len(sums) == 1 else None", "return s.all(SUM)"),
            (
                "unknown_operators_keep_examples_apart",
                "return found or (pointwise if torch.Tag.pointwise in op.tags else None)",
                "return found or pointwise",
                _INDEPENDENCE,
            ),
            (
                "softmax_over_examples_keeps_them_apart",
                "return None if any(d % rank == c.dim for d in dims) else s.all(c)",
                "return s.all(c)",
                _RULES,
            ),
        ],
    ),
    *table(
        "passes.microbatch.part",
        _INDEPENDENCE,
        [
            (
                "sums_keep_the_last_part",
                'add = [Eqn(aten("add", "Tensor"), (carry, part)',
                'add = [Eqn(aten("add", "Tensor"), (part, part)',
            ),
            ("parts_are_cut_in_the_wrong_place", "(v, dim, i * step, (i + 1) * step)", "(v, dim, 0, step)"),
        ],
    ),
    *table(
        "passes.microbatch.losses",
        "tests/passes/microbatch/test_rules.py",
        [
            (
                "mean_losses_of_parts_add_up",
                'return s.all(SUM, divide=PARTS if s.get("reduction") == _MEAN else None)',
                "return s.all(SUM)",
            ),
            (
                "likelihoods_are_divided_part_by_part",
                'set={"reduction": _SUM}, divide=total if mean else None, early=early)',
                "divide=PARTS if mean else None, early=early)",
            ),
        ],
    ),
    *table(
        "passes.levels.flows",
        "tests/passes/levels/test_flows.py",
        [
            ("every_flow_carries", "carries = any(hit(free, part) for part in where)", "carries = True"),
            ("levels_do_not_nest", "out.add((a, b))", "pass"),
        ],
    ),
]
