"""Parameters that are trained though they should not be, or in part only."""

from __future__ import annotations

from sabotage import Sabotage

PRESETS, PEFT, INTEGERS = "test_presets.py", "test_peft.py", "test_integer_weights.py"

SELECTION = (
    Sabotage(
        "half of a tie is trained",
        "_decision.py",
        "        if inside and outside:\n",
        "        if False:\n",
        (f"{PRESETS}::TestTies",),
    ),
    Sabotage(
        "a module trained whole loses its integer weights without a word",
        "_foreign.py",
        "        if not numbers or (own.is_floating_point() and own.dtype.itemsize == 1):  # float8\n",
        "        if False:\n",
        (f"{INTEGERS}::test_they_are_refused_by_name",),
    ),
    Sabotage(
        "a norm trained whole takes the statistics of its batch",
        "layers/one_by_one.py",
        "            self.training = False\n",
        "            self.training = True\n",
        (f"{PRESETS}::TestPresets::test_the_scale_of_a_norm_is_trained_under_running_statistics",),
    ),
    Sabotage(
        "exclusions of train_modules are taken for matches",
        "_selection.py",
        "                left.add(name)\n",
        "                covered.add(name)\n",
        (f"{PRESETS}::TestPatterns::test_classes_alternatives_exclusions",),
    ),
    Sabotage(
        "what peft puts aside is trained by noise",
        "_decision.py",
        "            reason = PUT_ASIDE\n",
        "            reason = None\n",
        (f"{PEFT}::test_what_modules_to_save_stands_in_for_stays_frozen",),
    ),
    Sabotage(
        "prompts go to other samples",
        "layers/prompts.py",
        '        return torch.func.vmap(one, randomness="different")(copies)\n',
        '        return torch.func.vmap(one, randomness="different")(copies).flip(0)\n',
        (f"{PEFT}::test_a_noiseless_step_is_that_of_the_oracle[prompt tuning and biases]",),
    ),
)
