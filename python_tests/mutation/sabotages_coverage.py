"""Rows that are put to the wrong samples, and parameters whose gradient is not their samples'."""

from __future__ import annotations

from sabotage import Sabotage

LAYOUTS, ALONE, OWN = "test_layouts.py", "test_one_by_one.py", "test_own_forward.py"
REFUSALS, PROOFS = "test_one_by_one_refusals.py", "test_proofs.py"
ATTACKED, KEPT = "test_alone_attacks.py", "test_alone_kept.py"
CHECK = f"{LAYOUTS}::TestCheckModel"
UNCOMPARED = ("layout.py", "        calls = _require_same_around(trial, calls)\n", "")
COMPARED = "            if calls is not None and layer.mixin is OneByOneLayer:\n"

COVERAGE = (
    Sabotage(
        "a table whose size fits is taken for a batch",
        "evidence.py",
        "    return way == (MAJOR, 1) or any(_shows(a, b, kept) for a, b, kept in digests)\n",
        "    return True\n",
        (f"{LAYOUTS}::test_the_shape_alone_proves_nothing",),
    ),
    Sabotage(
        "any number of rows a sample is taken",
        "arrangement.py",
        "        return k in self.folds or any(",
        "        return k > 0 or any(",
        (f"{LAYOUTS}::test_packed_tokens_are_refused_even_where_the_numbers_fit",),
    ),
    Sabotage(
        "rows of samples in turn are taken for rows side by side",
        "arrangement.py",
        "    if kind == INNER:\n",
        "    if False:\n",
        (f"{LAYOUTS}::test_by_sample_puts_each_row_to_its_sample",),
    ),
    Sabotage(
        "compiled code keeps what it took the rows for",
        "proofs.py",
        "        if unlike:\n",
        "        if False:\n",
        (f"{LAYOUTS}::test_compiled_with_no_eager_forward_is_refused_and_then_works",),
    ),
    Sabotage(
        "runs that call other layers are compared",
        "evidence.py",
        "        if len(layers) > 1:\n",
        "        if False:\n",
        (f"{LAYOUTS}::test_a_layer_chosen_by_a_batch_mate_is_refused",),
    ),
    Sabotage(
        "all samples share the first one's copy",
        "layers/one_by_one.py",
        "{name: own[name][i] for name in own}",
        "{name: own[name][0] for name in own}",
        (f"{ALONE}::test_rows_are_those_of_the_samples[experts]",),
    ),
    Sabotage(
        "an output that all samples share is one sample's",
        "evidence.py",
        "                raise _not_held(layer, cuts[0].shape, batch)\n",
        "                axis = 0\n",
        (f"{ALONE}::test_rows_are_those_of_the_samples[position table]",),
        also=(("_trial.py", COMPARED, "            if False:\n"), UNCOMPARED),
    ),
    Sabotage(
        "a bias that is not added last is taken for one",
        "layers/own_forward.py",
        "        if difference.numel() and not float(difference.abs().max()) <= room:\n",
        "        if False:\n",
        (f"{OWN}::test_rows_are_those_of_the_samples",),
        also=(
            (
                "layers/own_forward.py",
                "    return all(_passes_its_gradient(",
                "    return True or all(_passes_its_gradient(",
            ),
        ),
    ),
    Sabotage(
        "a forward is tried in evaluation alone",
        "layers/own_forward.py",
        "        for mode in (False, True):\n",
        "        for mode in (False,):\n",
        (f"{OWN}::test_rows_are_those_of_the_samples",),
    ),
    Sabotage(
        "a forward of its own is tried alone, not in the model",
        "_trial.py",
        "            if first and isinstance(layer, OwnForwardLayer) and not layer.adds_its_bias_last(args, kwargs):\n",
        "            if False:\n",
        (f"{OWN}::test_what_was_tried_alone_is_tried_in_the_model",),
    ),
    Sabotage(
        "a module run one sample at a time is not compared with itself",
        "_trial.py",
        COMPARED,
        "            if False:\n",
        (f"{REFUSALS}::test_what_passes_by_other_ways_than_tensors_is_refused[Lengths]",),
        also=(UNCOMPARED,),
    ),
    Sabotage(
        "samples that go through one forward share a random mask",
        "layers/one_by_one.py",
        'randomness="different"',
        'randomness="same"',
        (f"{ALONE}::test_samples_have_masks_of_their_own[True]",),
    ),
    Sabotage(
        "a module is run for all samples at once untried",
        "_trial.py",
        "                tried = _slices.works_at_once(layer, call, given, len(rows))\n",
        "                tried = True\n",
        (f"{ATTACKED}::test_what_vmap_takes_another_way_through_goes_one_by_one[scaled_by_hook]",),
    ),
    Sabotage(
        "vmap is tried by its outputs alone",
        "_slices.py",
        "alike(at_once[0], by_one[0]) and _close(at_once[1], by_one[1])",
        "alike(at_once[0], by_one[0])",
        (f"{ATTACKED}::test_what_vmap_takes_another_way_through_goes_one_by_one[scaled_by_hook]",),
    ),
    Sabotage(
        "a layer shared with a host is served outside of it",
        "_decision.py",
        "        if index is None:\n            return alone\n",
        "        if True:\n            return alone\n",
        (f"{ATTACKED}::test_a_layer_shared_between_a_host_and_what_is_outside[8]",),
    ),
    Sabotage(
        "names of the user's class are hidden",
        "layers/base.py",
        "    theirs |= {",
        "    theirs | {",
        (f"{ATTACKED}::test_attributes_of_the_users_keep_their_meaning[kind]",),
    ),
    Sabotage(
        "a forward of its own is tried by its values alone",
        "layers/own_forward.py",
        "    return all(_passes_its_gradient(",
        "    return True or all(_passes_its_gradient(",
        (f"{OWN}::test_rows_are_those_of_the_samples[partly detached]",),
    ),
    Sabotage(
        "what a module keeps in other objects is not seen",
        "_slices.py",
        "    if kept:\n",
        "    if False:\n",
        (f"{KEPT}::test_what_is_kept_anywhere_is_refused_by_name",),
    ),
    Sabotage(
        "buffers count samples",
        "layers/one_by_one.py",
        "                if value is not None:\n",
        "                if False:\n",
        (f"{KEPT}::test_counters_in_buffers_count_batches[False]",),
    ),
    Sabotage(
        "vmap is tried in evaluation alone",
        "_slices.py",
        "        return same_now and same_then",
        "        return same_then",
        (f"{ATTACKED}::test_what_vmap_takes_another_way_through_goes_one_by_one[scaled_in_training]",),
    ),
    Sabotage(
        "what leaves a module by lists and hooks is not seen",
        "layout.py",
        "        calls = _require_same_around(trial, calls)\n",
        "",
        (f"{KEPT}::test_what_leaves_by_lists_and_hooks_is_seen[True]",),
        also=(("_slices.py", "    if kept:\n", "    if False:\n"),),
    ),
    Sabotage(
        "numbers that a module gives are those of one sample",
        "_slices.py",
        "list(plain_in(first)) == list(plain_in(second))",
        "True",
        (f"{KEPT}::test_outputs_that_are_no_tensors_are_those_of_the_batch[False]",),
        also=(UNCOMPARED,),
    ),
    Sabotage(
        "what a module leaves beside its output is not seen",
        "evidence.py",
        "        if now != self:\n",
        "        if False:\n",
        (f"{REFUSALS}::test_what_passes_by_other_ways_than_tensors_is_refused",),
    ),
    Sabotage(
        "layers go by the proof of another form of call",
        "proofs.py",
        "        elif known is not self._applied:",
        "        elif False:",
        (f"{PROOFS}::test_each_form_of_call_goes_by_its_own_proof",),
    ),
    Sabotage(
        "the layout is asked once for good",
        "proofs.py",
        "        again = opened & (opened - 1) == 0\n",
        "        again = False\n",
        (f"{PROOFS}::test_a_layout_that_changes_with_what_batches_hold_is_asked_again",),
    ),
    Sabotage(
        "the added row is one of the others in all inputs",
        "layout.py",
        "(0, other, MIXED) if other >= 0 else (0, other)",
        "(0, other)",
        (f"{LAYOUTS}::test_mixing_through_one_input_alone_is_seen",),
    ),
    Sabotage(
        "key and value biases of attention get the query's rows",
        "layers/attention.py",
        "None if rows is None else rows[:, start:stop]",
        "None if rows is None else rows[:, : stop - start]",
        (f"{ALONE}::test_rows_are_those_of_the_samples[attention, cross]",),
    ),
    Sabotage(
        "check_model passes whatever it finds",
        "check.py",
        "        if not errors[name] <= allowed:\n",
        "        if False:\n",
        (f"{CHECK}::test_parameters_that_are_read_past_their_layer_are_named",),
    ),
    Sabotage(
        "check_model takes any loss for a sum over samples",
        "check.py",
        "        if not difference <= room:\n",
        "        if False:\n",
        (f"{CHECK}::test_the_reduction_is_asked",),
    ),
    Sabotage(
        "check_model does not ask about padding",
        "check.py",
        "    if padding is not None and not padding <= allowed:\n",
        "    if False:\n",
        (f"{CHECK}::test_padding_that_matters_is_refused",),
    ),
    Sabotage(
        "what a hook of the old kind wrote is missed",
        "layers/base.py",
        "        return bool(self._backward_hooks) and self._is_full_backward_hook is False\n",
        "        return False\n",
        ("test_handover.py::test_a_module_with_an_old_backward_hook_hands_nothing_over",),
    ),
)
