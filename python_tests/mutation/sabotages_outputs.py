"""Sabotages of what is asked of a model's outputs."""

from __future__ import annotations

from sabotage import ENGINE, Sabotage

OUTPUTS_, WEIGHTS = "test_outputs.py", "test_weight_attacks.py"
MIXING = f"{OUTPUTS_}::test_mixing_shows_in_every_layout_of_the_outputs"
# One sample more, or fewer, shows much of what another sample shows: left out where the latter is sabotaged.
FEWER = ("outputs.py", "    if not right:\n", "    if False:\n")

OUTPUTS = (
    Sabotage(
        "samples may mix",
        "outputs.py",
        "        elif not own:\n",
        "        elif False:\n",
        (f"{ENGINE}::test_samples_must_stay_apart",),
        also=(FEWER,),
    ),
    Sabotage(
        "outputs that are not batch-first are not asked",
        "outputs.py",
        "        elif not own:\n",
        "        elif not own and shape[0] == count:\n",
        (MIXING,),
        also=(FEWER,),
    ),
    Sabotage(
        "what an object holds is not asked",
        "_nested.py",
        "        known.add(id(value))\n",
        "        return\n",
        (MIXING,),
    ),
    Sabotage(
        "samples may mix in lists",
        "outputs.py",
        "and key not in range(count)[kept] for key",
        "for key",
        (MIXING,),
        also=(FEWER,),
    ),
    Sabotage(
        "a single number is a total",
        "outputs.py",
        "    if not bool(losses[1:3].isfinite().all()):\n",
        "    if True:\n",
        (f"{OUTPUTS_}::test_a_loss_is_a_mean_over_samples_wherever_it_is",),
        also=(FEWER,),
    ),
    Sabotage(
        "a loss is not asked where all samples are alike",
        "outputs.py",
        "if other > 0 else [-1]",
        "if other > 0 else []",
        (f"{OUTPUTS_}::test_a_loss_that_is_no_mean_is_seen_where_all_samples_are_alike",),
    ),
    Sabotage(
        "a total may go with any power of the number of samples",
        "outputs.py",
        "two is None or four is None or _totals_agree(two, four)",
        "True",
        (f"{OUTPUTS_}::test_a_total_goes_with_the_samples_or_not_at_all",),
    ),
    Sabotage(
        "a head that starts at zero hides what mixes before it",
        "evidence.py",
        "if x.is_floating_point()] if asked else []",
        "if x.is_floating_point()] if False else []",
        (f"{OUTPUTS_}::test_a_head_that_starts_at_zero_hides_nothing",),
    ),
    Sabotage(
        "random numbers end the question in training",
        "_same_draws.py",
        "        if torch.Tag.nondeterministic_seeded not in func.tags:\n",
        "        if True:\n",
        (f"{OUTPUTS_}::test_random_numbers_hide_no_other_samples_in_training",),
    ),
    Sabotage(
        "halves of a batch are not asked by themselves",
        "outputs.py",
        "for rows in (samples[:half], samples[half:]) if half else ():",
        "for rows in ():",
        (f"{WEIGHTS}::test_a_model_that_scales_by_the_largest_of_the_batch",),
    ),
    Sabotage(
        "models that divide by the number of samples are trained",
        "outputs.py",
        "    if not right:\n",
        "    if False:\n",
        (f"{WEIGHTS}::test_a_model_that_divides_by_the_batch",),
    ),
    Sabotage(
        "models that divide by the number of samples in training alone are trained",
        "outputs.py",
        "    if right and any(module.training for module in trial.model.modules()):\n",
        "    if False:\n",
        (f"{WEIGHTS}::test_a_model_that_divides_by_the_batch",),
    ),
)
