"""Sabotages of what goes from one phase of a run to the next."""

from __future__ import annotations

from sabotage import Sabotage

TRAIN, STATE, RESUME, REFUSE = (f"test_phases{part}.py" for part in ("", "_state", "_resume", "_refusals"))

PHASES = (
    Sabotage(
        "noise is calibrated for the first phase only",
        "phases.py",
        "return sum(phase.epochs for phase in phases)",
        "return phases[0].epochs",
        (f"{TRAIN}::test_noise_is_calibrated_over_all_phases",),
    ),
    Sabotage(
        "the second phase repeats the noise of the first",
        "attached.py",
        "= before.noise_steps, before.noise_multiplier",
        "= 0, before.noise_multiplier",
        (f"{TRAIN}::test_noise_goes_on_where_it_was",),
    ),
    Sabotage(
        "a noise multiplier that was set is forgotten by the next phase",
        "attached.py",
        'self._noise_steps, self._settings["noise_multiplier"] = before.noise_steps, before.noise_multiplier',
        "self._noise_steps = before.noise_steps",
        (f"{TRAIN}::test_a_noise_multiplier_that_was_set_goes_on",),
    ),
    Sabotage(
        "the state of the biases is dropped by the next phase",
        "optimizer.py",
        "if id(p) in own and id(p) not in kept}",
        "if id(p) in own}",
        (f"{STATE}::test_state_of_what_stays_trained_is_kept_and_the_rest_freed",),
    ),
    Sabotage(
        "the state of the weights stays",
        "optimizer.py",
        "if id(p) in own and id(p) not in kept}",
        "if False}",
        (f"{STATE}::test_state_of_what_stays_trained_is_kept_and_the_rest_freed",),
    ),
    Sabotage(
        "rows of the phase before stay as long as a loss",
        "phases.py",
        "        session.ledger.free()\n",
        "",
        (f"{STATE}::test_rows_and_sum_of_the_phase_before_are_freed",),
    ),
    Sabotage(
        "a checkpoint lacks what an earlier phase trained",
        "phases.py",
        "self._chosen[: until + 1]",
        "self._chosen[until : until + 1]",
        (f"{RESUME}::test_a_checkpoint_of_the_second_phase_holds_the_weights_of_the_first",),
    ),
    Sabotage(
        "a checkpoint of other phases is taken",
        "resume.py",
        "    if saved != mine:\n",
        "    if False:\n",
        (f"{RESUME}::test_a_checkpoint_of_other_phases_changes_nothing",),
    ),
    Sabotage(
        "a later phase takes its rows by the bound of the first",
        "phases.py",
        "        method = self.methods[index]\n",
        "        method = self.methods[0]\n",
        (f"{TRAIN}::test_a_bound_for_each_phase",),
    ),
    Sabotage(
        "a file of biases lacks what an earlier phase trained",
        "checkpoint.py",
        "if p.requires_grad or id(p) in phased}",
        "if p.requires_grad}",
        (f"{RESUME}::test_a_file_of_biases_holds_what_any_phase_trained",),
    ),
    Sabotage(
        "a captured step goes on with the graphs of the phase before",
        "phases.py",
        "        if holder is not None:\n",
        "        if False:\n",
        (f"{STATE}::test_a_captured_step_begins_anew",),
    ),
    Sabotage(
        "a drawn batch may be left by a change of phases",
        "attached.py",
        "        session.leave_batch()\n",
        "",
        (f"{REFUSE}::test_a_drawn_batch_that_is_left_by_the_change",),
    ),
    Sabotage(
        "an error while entering leaves the next phase's choice",
        "phases.py",
        "            self._switch(self._chosen[self.index])\n            session.revive()\n",
        "            session.revive()\n",
        (f"{REFUSE}::test_an_error_while_entering_leaves_the_phase_as_it_was",),
    ),
)
