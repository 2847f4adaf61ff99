"""Which share of its cases a parametrised test runs by default: all of them run in `make test-all`.

The default suite is for every change and takes minutes, so that tests with many dear cases run one in ``n`` of them
here.  Which ones does not follow the order of the table (a stride would always take the same flag of a product of
parameters), but the checksum of the case's name: the same at every run, on every machine.
"""

import zlib
from collections.abc import Iterable

__all__ = ["SHARE", "left_out"]

# One case in so many, by file and test.
SHARE = {
    "compiled/test_containers": {"test_every_call_leaves_what_the_loop_leaves": 2},
    "compiled/test_held": {"test_edited_lists": 4, "test_generators_and_iterators_of_the_users": 2},
    "distributed/test_collectives": {"test_right": 2},
    "distributed/test_loops": {"test_two_processes_with_sgd": 2},
    "distributed/test_parallel": {"test_as_eager": 2},
    "fuzz/test_fuzz": {"test_what_was_found_stays_mended": 18},
    "implicit/test_compiled": {"test_inside_an_inner_gradient": 2},
    "numerics/test_activations": {"test_differences": 5},
    "numerics/test_checkpointed": {"test_every_call_is_the_loop": 4},
    "numerics/test_custom": {"test_compiled": 2},
    "numerics/test_data": {"test_compiled": 3},
    "numerics/test_decides": {"test_every_call_is_the_loop": 2},
    "numerics/test_forward": {
        "test_a_custom_function_falls_back": 5,
        "test_a_level_in_reverse": 6,
        "test_every_optimizer": 6,
        "test_five_hyperparameters": 9,
        "test_programs_of_other_modules": 16,
    },
    "numerics/test_guards": {"test_every_call_is_the_loop": 3},
    "numerics/test_hooks": {"test_compiled": 2},
    "numerics/test_hyperparameters": {"test_compiled": 2},
    "numerics/test_manual": {"test_compiled": 2},
    "numerics/test_modules": {"test_compiled": 3},
    "numerics/test_offload": {"test_drawn_batches": 3, "test_loops_in_loops": 9, "test_models_and_optimizers": 6},
    "numerics/test_optimizers": {"test_compiled": 10, "test_reference": 10},
    "numerics/test_packed": {"test_differences_with_these_and_with_other_lengths": 6},
    "numerics/test_rate_zero": {"test_a_warm_up_from_zero": 4},
    "numerics/test_responses_levels": {
        "test_a_gradient_of_the_loop_goes_through_a_response": 3,
        "test_mixtures_agree_with_the_unroll_of_two_paths": 7,
    },
    "numerics/test_state_passes": {"test_the_gradient_is_that_of_differences": 2},
    "opinfo/test_opinfo": {"test_operator": 6, "test_third_derivative": 6},
    "passes/cost/test_timeline": {
        "test_adjoints_that_compute_gradients_again": 10,
        "test_memory_is_as_predicted_at_every_boundary": 2,
    },
    "passes/formulas/test_formulas": {
        "test_a_formula_is_what_its_own_graphs_cost_at_other_counts": 2,
        "test_a_formula_is_what_planning_there_predicts": 5,
    },
    "passes/microbatch/test_split": {
        "test_batches_whose_examples_meet_are_refused": 6,
        "test_parts_give_what_the_whole_batch_gives": 8,
    },
    "passes/planning/test_planner": {
        "test_a_high_price_keeps_nothing_of_a_step": 3,
        "test_a_middle_price_keeps_at_most_the_gradient_of_a_step": 3,
        "test_every_lever_is_exact": 14,
    },
    "passes/precision/test_numbers": {"test_cosine_and_norm": 9},
    "passes/rules/test_losses": {"test_two_steps_with_the_loss_squared": 3},
    "passes/rules/test_norms": {"test_a_penalty_inside_training_is_differentiated_right": 2},
    "runtime/interpreter/test_host": {
        "test_memory_does_not_grow_with_the_trips_and_is_predicted": 3,
        "test_memory_of_loops_in_loops_is_predicted": 2,
        "test_values_are_the_same_to_the_last_bit": 9,
    },
    "scripts/test_scripts": {"test_compiled_it_does_what_it_does": 12, "test_the_plain_script_is_a_sharp_referee": 3},
    "test_benchmarks": {"test_make_bench_runs_only_scripts_with_help": 6},
    "test_examples": {
        "test_example_agrees_with_the_plain_unroll": 4,
        "test_example_args_are_the_same_every_time_and_main_needs_none": 7,
        "test_training_agrees_with_the_plain_unroll": 3,
    },
    "trace/python/test_state": {"test_random_graphs": 5},
    "training/test_resume": {
        "test_a_cold_start_goes_back_to_where_the_first_run_began": 2,
        "test_a_state_continues_bit_for_bit_in_the_middle_of_an_epoch": 3,
        "test_a_state_that_does_not_fit_changes_nothing": 3,
    },
    "training/test_run": {"test_arguments_that_make_no_sense": 2},
    "view/test_listing": {"test_every_pass_prints_as_python": 2},
    "zoo/test_zoo": {"test_hypergradient_is_that_of_the_plain_unroll": 9},
}


def left_out(names: Iterable[str]) -> set[str]:
    """The names (``tests/file.py::test[case]``) that the default suite leaves to `make test-all`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("[")[0], []).append(name)
    out: set[str] = set()
    for test, cases in groups.items():
        file, _, function = test.partition("::")
        share = SHARE.get(file.removeprefix("tests/").removesuffix(".py"), {}).get(function, 1)
        kept = -(-len(cases) // share)
        out.update(sorted(cases, key=lambda name: zlib.crc32(name.encode()))[kept:])
    return out
