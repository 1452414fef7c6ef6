"""Sabotages of what is asked of a model's outputs."""

from __future__ import annotations

from sabotage import ENGINE, Sabotage

OUTPUTS_, ATTACKS, WEIGHTS = "test_outputs.py", "test_outputs_attacks.py", "test_weight_attacks.py"
STATE = "test_outputs_state.py"
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
        "    items = list(_items(value))\n",
        "    items = list(_items(value)) if isinstance(value, Mapping | Collection) else []\n",
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
        "totals.py",
        "    if not bool(losses[1:3].isfinite().all()):\n",
        "    if True:\n",
        (f"{OUTPUTS_}::test_a_loss_is_a_mean_over_samples_wherever_it_is",),
        also=(FEWER,),
    ),
    Sabotage(
        "a loss is not asked where all samples are alike",
        "totals.py",
        "if other > 0 else [0, -1]",
        "if other > 0 else [0]",
        (f"{OUTPUTS_}::test_a_loss_that_is_no_mean_is_seen_where_all_samples_are_alike",),
    ),
    Sabotage(
        "a total may go with any power of the number of samples",
        "outputs.py",
        "_totals_agree(trial, draws, torch.float32, True) or _totals_agree(trial, draws, torch.float64, False)",
        "True",
        (f"{OUTPUTS_}::test_a_total_goes_with_the_samples_or_not_at_all",),
    ),
    Sabotage(
        "a head that starts at zero hides what mixes before it",
        "evidence.py",
        "x.is_floating_point()] if asked else []",
        "x.is_floating_point()] if False else []",
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
    Sabotage(
        "a loss is asked of two samples alone",
        "totals.py",
        "    if other > 0:\n",
        "    if False:\n",
        (f"{ATTACKS}::test_losses_that_more_than_two_samples_show",),
        also=(FEWER,),
    ),
    Sabotage(
        "a rare class is not asked for its weight",
        "totals.py",
        "            labels += [",
        "            [",
        (f"{ATTACKS}::test_a_class_that_is_rare_shows_its_weight",),
        also=(FEWER,),
    ),
    Sabotage(
        "half precision hides what a loss mixes",
        "_trial.py",
        "        wide = exact is not None and (exact == torch.float64 or self.half)",
        "        wide = False",
        (f"{ATTACKS}::test_half_precision_hides_no_mixing_and_no_mean_is_taken_for_it",),
    ),
    Sabotage(
        "of collections, lists alone are looked into",
        "_nested.py",
        "    elif isinstance(value, Collection) and not",
        "    elif isinstance(value, list | tuple) and not",
        (f"{ATTACKS}::test_tensors_are_found_wherever_they_are",),
    ),
    Sabotage(
        "what a tensor is governed by ends the question in training",
        "_same_draws.py",
        "in _BY_VALUE:\n            return",
        "in ():\n            return",
        (f"{ATTACKS}::test_draws_by_values_hide_no_other_samples_in_training",),
    ),
    Sabotage(
        "zeros hide signs and order",
        "evidence.py",
        "        return torch.stack([_digest(parts), weighted], 1)\n",
        "        return _digest(parts)\n",
        (f"{ATTACKS}::test_zeros_hide_neither_signs_nor_order_nor_ids",),
    ),
    Sabotage(
        "what modules keep from the batch is not told",
        "outputs.py",
        "    if not written:\n",
        "    if True:\n",
        (f"{STATE}::test_tensors_that_modules_keep_from_the_batch_are_named_and_put_back",),
    ),
    Sabotage(
        "the proof's runs count as steps",
        "_trial.py",
        "                if not hold:\n",
        "                if False:\n",
        (f"{STATE}::test_a_counter_of_steps_is_no_mixing_and_stays_what_it_was",),
    ),
    Sabotage(
        "what one batch held shows in the next",
        "outputs.py",
        "trial.after([*samples, row], samples)",
        "trial.after(samples, samples)",
        (f"{STATE}::test_what_one_batch_held_may_not_show_in_the_next",),
    ),
    Sabotage(
        "the forward writes parameters",
        "layout.py",
        "    if changed:\n",
        "    if False:\n",
        (f"{STATE}::test_what_one_batch_held_may_not_show_in_the_next",),
    ),
    Sabotage(
        "half of what a forward built is taken away",
        "_attributes.py",
        "                if now.get(key, _ABSENT) is not value:\n",
        "                if False:\n",
        (f"{STATE}::test_what_is_built_at_the_first_forward_is_built_and_in_its_own_dtype",),
    ),
    Sabotage(
        "caches are filled in float32",
        "_trial.py",
        "        if wide and len(rows) not in self._sizes:",
        "        if False:",
        (f"{STATE}::test_what_is_built_at_the_first_forward_is_built_and_in_its_own_dtype",),
        also=(
            (
                "_attributes.py",
                "        for collection, items in self._items:\n",
                "        for collection, items in ():\n",
            ),
        ),
    ),
    Sabotage(
        "inputs that once were for all samples are so for good",
        "proofs.py",
        "        return frozenset(place for place, size in sizes.items() if (place, size, *dims) in self._shared)\n",
        "        return frozenset(place for place, *_ in self._shared)\n",
        (f"{STATE}::test_a_mask_for_all_is_not_taken_for_one_in_a_later_batch",),
    ),
    Sabotage(
        "a loss that mixes is told of like a metric",
        "totals.py",
        "                    if place in singles.losses:\n",
        "                    if False:\n",
        (f"{OUTPUTS_}::test_a_loss_is_a_mean_over_samples_wherever_it_is",),
        also=(FEWER,),
    ),
)
