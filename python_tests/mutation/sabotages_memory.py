"""Ways to lose a gradient, or to keep too much, where less is kept for backward."""

from __future__ import annotations

from sabotage import Sabotage

LEAN, HANDOVER, MODELS = "test_lean.py", "test_handover.py", "test_lean_models.py"
SAME = f"{LEAN}::test_outputs_and_gradients_are_those_of_the_module_it_replaces"
AGAIN = f"{HANDOVER}::test_a_gradient_that_is_not_the_summed_one_is_summed_again"
KEPT = f"{LEAN}::test_keeps_no_more_than_promised"

MEMORY = (
    Sabotage(
        "a sum handed over is believed for any gradient",
        "_backward.py",
        "    if sums is None or sums[0] is not grad or sums[1] != grad._version:\n",
        "    if sums is None or sums[1] != grad._version:\n",
        (AGAIN,),
        also=(("_backward.py", "None if ctx.hooks else ctx.node", "ctx.node"),),
    ),
    Sabotage(
        "a sum handed over is believed although its gradient was changed in place",
        "_backward.py",
        "    if sums is None or sums[0] is not grad or sums[1] != grad._version:\n",
        "    if sums is None or sums[0] is not grad:\n",
        (AGAIN,),
        also=(("_backward.py", "None if ctx.hooks else ctx.node", "ctx.node"),),
    ),
    Sabotage(
        "hooks between are not looked for",
        "_backward.py",
        "None if ctx.hooks else ctx.node",
        "ctx.node",
        (AGAIN,),
    ),
    Sabotage(
        "a sum of another backward is believed",
        "_backward.py",
        "    return rows if sums[2] == torch._C._current_graph_task_id() else None\n",
        "    return rows\n",
        (f"{HANDOVER}::test_a_sum_of_another_backward_is_not_used",),
    ),
    Sabotage(
        "a sum handed over stays for the next backward",
        "_backward.py",
        "    sums, ctx.sums = ctx.sums, None\n",
        "    sums = ctx.sums\n",
        (f"{HANDOVER}::test_the_gradient_is_let_go_with_its_layer",),
    ),
    Sabotage(
        "the sum is taken over the wrong dimension of images",
        "_backward.py",
        "        return (x.view(batch, width, -1), 2) if channels_first and dims > 2"
        " else (x.view(batch, -1, width), 1)\n",
        "        return x.view(batch, -1, width), 1\n",
        (f"{HANDOVER}::test_rows_are_taken_over_and_right",),
    ),
    Sabotage(
        "a LeakyReLU loses its slope in the backward",
        "functional_pointwise.py",
        "        ctx.factors = (1.0, slope)\n",
        "        ctx.factors = (1.0, 0.0)\n",
        (SAME,),
    ),
    Sabotage(
        "dropout forgets its scale in the backward",
        "functional_pointwise.py",
        "        ctx.factors = (scale, 0.0)\n",
        "        ctx.factors = (1.0, 0.0)\n",
        (SAME,),
    ),
    Sabotage(
        "dropout draws another mask than torch",
        "functional_pointwise.py",
        "bernoulli_(1.0 - p).bool()",
        "bernoulli_(p).logical_not().bool()",
        (SAME,),
    ),
    Sabotage(
        "a frozen BatchNorm forgets its weight in the backward",
        "functional_norm.py",
        "            scale = scale * weight.to(wide)\n",
        "            pass\n",
        (SAME,),
    ),
    Sabotage(
        "a max pool keeps eight bytes a window",
        "functional_window.py",
        "        ctx.save_for_backward(_looked_up(place, index.sub_(first)))\n",
        "        ctx.save_for_backward(_looked_up(place, index.sub_(first)).long())\n",
        (KEPT,),
    ),
    Sabotage(
        "a convolution keeps its input",
        "functional_window.py",
        "        ctx.save_for_backward(weight)\n",
        "        ctx.save_for_backward(weight)\n        ctx.kept = x\n",
        (KEPT,),
    ),
    Sabotage(
        "a LayerNorm's input gradient forgets the mean",
        "reference_backward.py",
        "    inner = g - g.mean(2, keepdim=True) - n * (g * n).mean(2, keepdim=True)\n"
        "    return (rstd.view(column) * inner).to(grad.dtype), _sums(grad, reduce)\n",
        "    inner = g - n * (g * n).mean(2, keepdim=True)\n"
        "    return (rstd.view(column) * inner).to(grad.dtype), _sums(grad, reduce)\n",
        (SAME,),
    ),
    Sabotage(
        "modules with hooks are swapped all the same",
        "_survey.py",
        "memory in self.kind.keeps_less and not hooked",
        "memory in self.kind.keeps_less",
        (f"{LEAN}::test_modules_with_hooks_are_left_alone",),
    ),
    Sabotage(
        "a second derivative is silently zero",
        "_backward.py",
        "    if torch.is_grad_enabled():\n        raise",
        "    if False:\n        raise",
        (f"{LEAN}::test_a_second_derivative_is_refused_by_name",),
    ),
    Sabotage(
        "compact keeps what exact keeps",
        "layers/activation.py",
        '        if self.memory == "compact" and input.dtype != torch.float64:\n',
        "        if False:\n",
        (f"{MODELS}::test_kept_bytes",),
    ),
)
