"""Sabotages of trained weights: their norms, the sums made afterwards, what samples share."""

from __future__ import annotations

from sabotage import Sabotage

WEIGHTS, BOUNDS, REFUSED = "test_weights.py", "test_weight_bounds.py", "test_weight_refusals.py"
STEP = f"{WEIGHTS}::test_a_step_equals_the_oracle"
ATTACKS = "test_weight_attacks.py"
LEFT_OUT = f"{BOUNDS}::test_a_sample_left_out_moves_the_release_by_at_most_the_bound"
MIXING = f"{ATTACKS}::test_mixing_behind_masked_scores"

WEIGHTS_ = (
    Sabotage(
        "a ghost norm leaves no room for the rounding of its Grams",
        "weights.py",
        "(found + room * largest.square()).sqrt()",
        "found.clamp(min=0.0).sqrt()",
        (f"{BOUNDS}::test_no_ghost_norm_is_below_the_exact_one",),
    ),
    Sabotage(
        "a Gram of minus infinity counts as nothing",
        "weights.py",
        "torch.where(found.isfinite(), found.clamp(min=0.0), math.inf)",
        "found.clamp(min=0.0)",
        (f"{BOUNDS}::test_a_gram_below_all_numbers_is_no_norm",),
    ),
    Sabotage(
        "rows made anew are believed to be those of the norm",
        "weights.py",
        "(found + room * largest.square()).sqrt() + 2.0 * (error * largest + below)",
        "found.clamp(min=0.0).sqrt()",
        (f"{BOUNDS}::test_norms_bound_what_any_order_of_float32_additions_makes",),
    ),
    Sabotage(
        "the room that is left goes by the plan",
        "weights.py",
        "        room = gram_error(self.height, self.width, pairs, self._in_double(terms))\n",
        "        room = 0.0 if self._rows is not None else gram_error(self.height, self.width, pairs, False)\n",
        (f"{BOUNDS}::test_the_length_of_others_moves_no_factor",),
    ),
    Sabotage(
        "a weight used twice is clipped without its cross terms",
        "grams.py",
        "        for other in factors[number:]:",
        "        for other in factors[number : number + 1]:",
        (f"{STEP}[0.05-twice-ghost-book_keeping]", f"{BOUNDS}::test_grams_of_all_kinds_of_uses_together"),
    ),
    Sabotage(
        "weights without rows stay out of the norm",
        "ledger.py",
        "            extra[:, sink.group] += sink.squares()\n",
        "            sink.squares()\n",
        (f"{STEP}[0.05-linear of tokens-mixed-book_keeping]",),
    ),
    Sabotage(
        "weights without rows are not clipped",
        "weights.py",
        "factor = factors[:, self.group : self.group + 1].contiguous()",
        "factor = factors[:, self.group : self.group + 1].amax(0, keepdim=True).expand(len(factors), 1).contiguous()",
        (f"{STEP}[0.05-linear of tokens-mixed-book_keeping]",),
    ),
    Sabotage(
        "weights without rows get no noise",
        "ledger.py",
        "noisy = self.backend.noisy_sum(total, *arguments, first, noise_std, scale)",
        "noisy = self.backend.noisy_sum(total, *arguments, first, noise_std if first == 0 else 0.0, scale)",
        (f"{REFUSED}::test_noise_reaches_every_element_of_a_weight",),
    ),
    Sabotage(
        "weights without rows share the noise of the rest",
        "ledger.py",
        "noisy = self.backend.noisy_sum(total, *arguments, first, noise_std, scale)",
        "noisy = self.backend.noisy_sum(total, *arguments, 0, noise_std, scale)",
        (f"{REFUSED}::test_noise_reaches_every_element_of_a_weight",),
    ),
    Sabotage(
        "tokens of a sample are clipped one by one",
        "weights.py",
        "    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]\n",
        "",
        (f"{BOUNDS}::test_tokens_are_summed_before_the_norm",),
    ),
    Sabotage(
        "padding tokens are trained",
        "layers/embedding.py",
        "    if padding is not None:\n        grad",
        "    if False:\n        grad",
        (f"{STEP}[0.05-padding-mixed-book_keeping]",),
    ),
    Sabotage(
        "a sum of a dropped draw stays in the weights",
        "ledger.py",
        "                self._sums[number] = None",
        "                pass",
        (f"{REFUSED}::test_a_broken_draw_leaves_nothing_in_the_weights",),
    ),
    Sabotage(
        "sinks of an earlier batch stay open",
        "ledger.py",
        "        for sink in slab.sinks:\n            sink.close()\n",
        "",
        (f"{WEIGHTS}::test_several_backwards_add_up_and_zero_grad_forgets",),
        also=(("ledger.py", "        slab.sinks.clear()\n", "        pass\n"),),
    ),
    Sabotage(
        "what samples share is not asked",
        "layout.py",
        "    if trial.spread:\n        _require_copies_apart(trial, arrangements)\n",
        "",
        (f"{REFUSED}::test_what_samples_share_is_proven_to_reach_each_by_itself",),
    ),
    Sabotage(
        "sums are made within autocast",
        "_precision.py",
        '        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):\n',
        "        if True:\n",
        (f"{ATTACKS}::test_a_step_within_autocast",),
    ),
    Sabotage(
        "copies of every second sample alone are changed",
        "layout.py",
        "for digit in range((count - 1).bit_length())]",
        "for digit in range(1)]",
        (f"{ATTACKS}::test_copies_that_reach_other_samples",),
    ),
    Sabotage(
        "copies are asked in evaluation mode alone",
        "layout.py",
        "(not any(m.training for m in trial.model.modules()) or apart())",
        "True",
        (f"{ATTACKS}::test_copies_that_reach_other_samples",),
    ),
    Sabotage(
        "rows beyond float32 are summed",
        "weights.py",
        "torch.where(largest < 2.0**126, norms.square(), math.inf)",
        "norms.square()",
        (f"{ATTACKS}::test_rows_beyond_float32",),
    ),
    Sabotage(
        "a second backward takes samples that are left out along",
        "weight_uses.py",
        "    return torch.where(keep.view(-1, *(1,) * (x.dim() - 1)), x, 0.0)",
        "    return x",
        (f"{WEIGHTS}::test_a_sample_that_is_not_a_number_changes_nothing",),
    ),
    Sabotage(
        "a second backward is for secure mode, too",
        "engine.py",
        "if twice and self.secure_mode:",
        "if False:",
        (f"{REFUSED}::test_second_backward_is_refused_where_its_sensitivity_is_relied_on",),
    ),
    Sabotage(
        "matrix products in bfloat16 are allowed",
        "_precision.py",
        'mode.fp32_precision = "ieee"',
        "pass",
        (f"{BOUNDS}::test_lower_precisions_are_off_and_put_back",),
    ),
    Sabotage(
        "scores that mix samples hide behind masks",
        "evidence.py",
        "    while float(left.max()) > least:\n",
        "    while False:\n",
        (MIXING,),
    ),
    Sabotage(
        "scores that mix samples hide where most are masked",
        "evidence.py",
        "smaller = left[left < 0.99 * left.max()]",
        "smaller = left",
        (MIXING,),
    ),
    Sabotage(
        "scores that mix samples hide as if they were masks",
        "evidence.py",
        "    yield list(tensors)\n",
        "",
        (MIXING,),
    ),
    Sabotage(
        "rows of scales are those of the batch",
        "functional_weight.py",
        "        return grad, None, rows, *(None,) * 5\n",
        "        return grad, None, rows.sum(0, keepdim=True).expand_as(rows).contiguous(), *(None,) * 5\n",
        (f"{LEFT_OUT}[norms-mixed-False]",),
    ),
    Sabotage(
        "rows of scales are those of the next sample",
        "functional_weight.py",
        "        return grad, None, rows, *(None,) * 5\n",
        "        return grad, None, rows.roll(1, 0), *(None,) * 5\n",
        (f"{STEP}[0.05-norms-mixed-book_keeping]",),
    ),
    Sabotage(
        "rows of scales are those of shifts",
        "functional_weight.py",
        "        product = ctx.normed(",
        "        product = torch.ones_like(inputs) if True else ctx.normed(",
        (f"{STEP}[0.05-norms-mixed-book_keeping]",),
    ),
    Sabotage(
        "rows of scales are summed side by side whatever they are",
        "functional_weight.py",
        "by_sample(product, ctx.kind, ctx.batch)",
        "product.reshape(ctx.batch, -1, ctx.width)",
        (f"{STEP}[0.05-norms, sequence first-mixed-book_keeping]",),
    ),
    Sabotage(
        "rows of scales of a channel are summed side by side whatever they are",
        "functional_weight.py",
        "fold(bias_grad(product, ctx.width, True, ctx.backend), ctx.kind, ctx.batch)",
        "bias_grad(product, ctx.width, True, ctx.backend).view(ctx.batch, -1, ctx.width)[:, 0]",
        (f"{STEP}[0.05-norms of folded images-mixed-book_keeping]",),
    ),
    Sabotage(
        "a gradient that is asked for is taken for the weight",
        "functional_weight.py",
        "    return apply(WeightFunction, output, anchor, inputs.detach(), pending, make, layer)\n",
        "    give = lambda grad, x: sink.take(make(grad, x))  # noqa: E731\n"
        "    return apply(WeightFunction, output, anchor, inputs.detach(), pending, give, layer)\n",
        (f"{ATTACKS}::test_gradients_that_are_asked_for_are_not_the_weights",),
        also=(("functional_weight.py", "    sink.take(pending.pop())\n", "    pending.clear()\n"),),
    ),
)
