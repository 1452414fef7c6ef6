"""Ways to lose the guarantee in a captured step, or in the update of all parameters as one."""

from __future__ import annotations

from sabotage import Sabotage

CAPTURE, ATTACKED, FLAT = "test_capture.py", "test_capture_attacks.py", "test_flat_update.py"
EAGER = f"{CAPTURE}::test_equals_the_eager_run_bit_for_bit"

CAPTURED = (
    Sabotage(
        "every replay draws the same noise",
        "session.py",
        "        self._step.add_(1)\n",
        "        self._step = self._step + 1\n",
        (f"{CAPTURE}::test_noise_alone_is_the_references_stream",),
    ),
    Sabotage(
        "a captured step is charged after its release",
        "capture.py",
        "            self._session.charge()\n            self._release_and_update(flat)\n",
        "            self._release_and_update(flat)\n            self._session.charge()\n",
        (f"{CAPTURE}::test_a_failing_charge_releases_nothing",),
    ),
    Sabotage(
        "a captured step is not charged",
        "capture.py",
        "            self._session.charge()\n",
        "",
        (EAGER,),
    ),
    Sabotage(
        "a replay runs on the batch that was captured",
        "capture.py",
        "                static.copy_(value, non_blocking=True)\n",
        "                pass\n",
        (EAGER,),
    ),
    Sabotage(
        "pads count in a captured step",
        "ledger.py",
        "            slab.mask.copy_(mask, non_blocking=True)",
        "            slab.mask.copy_(mask | refilled_later)",
        (EAGER,),
    ),
    Sabotage(
        "rows of the batch before are in a captured step",
        "ledger.py",
        "        slab.rows.zero_()\n        self._hand_out(slab)\n",
        "        self._hand_out(slab)\n",
        (EAGER,),
    ),
    Sabotage(
        "a captured step goes on in other training modes",
        "capture.py",
        "        return self._session.proofs.modes(), autocast,",
        "        return autocast,",
        (f"{CAPTURE}::test_other_training_modes_run_eagerly_until_proven_then_are_captured",),
    ),
    Sabotage(
        "noise of another size is charged but not drawn",
        "capture.py",
        "        return session.noise_multiplier, key, inside,",
        "        return 1.0, key, inside,",
        (f"{CAPTURE}::test_a_scheduler_and_a_noise_schedule_are_followed",),
    ),
    Sabotage(
        "a captured step runs on memory that was left",
        "capture.py",
        "        if self._fingerprint != fingerprint:\n",
        "        if False:\n",
        (f"{CAPTURE}::test_memory_that_moved_is_followed",),
    ),
    Sabotage(
        "the sum of a failed release stays for the next",
        "capture.py",
        "        except BaseException:  # what may be half done is never done again, nor released later\n"
        "            self._session.abandon()\n",
        "        except BaseException:\n",
        (f"{CAPTURE}::test_a_failing_charge_releases_nothing",),
    ),
    Sabotage(
        "a parameter moved from outside is not updated",
        "flat_update.py",
        "        if followed and self._moved():\n",
        "        if False:\n",
        (f"{FLAT}::test_parameters_moved_from_outside_are_followed",),
    ),
    Sabotage(
        "counters of the optimizer's state stand still",
        "flat_update.py",
        "            copies.copy_(counter)\n",
        "            pass\n",
        (f"{FLAT}::test_equals_the_update_of_each_parameter_bit_for_bit",),
    ),
    Sabotage(
        "a raw gradient of the captured backward goes unnoticed",
        "capture.py",
        "            self._session.check()  # the backward has run in Python: no raw gradient may have come of it\n",
        "            pass\n",
        (f"{ATTACKED}::test_a_parameter_that_was_unfrozen_gets_no_raw_gradient",),
    ),
    Sabotage(
        "a raw gradient of a repeated backward goes unnoticed",
        "capture.py",
        "            if found.graph.runs_python:\n                self._session.check()\n",
        "",
        (f"{ATTACKED}::test_a_parameter_that_was_unfrozen_gets_no_raw_gradient",),
    ),
    Sabotage(
        "what has just changed is built into the release",
        "capture.py",
        "            if not _unchanged(self._last, present):\n",
        "            if False:\n",
        (f"{ATTACKED}::test_a_state_that_is_not_there_yet_is_not_built_into_the_release",),
    ),
    Sabotage(
        "graphs read a mask that was given back",
        "ledger.py",
        "        return _Slab(rows, parts, self._masks[:batch])\n",
        "        return _Slab(rows, parts, self._masks[:batch].clone())\n",
        (f"{ATTACKED}::test_graphs_of_two_physical_sizes_read_the_mask_that_is_written",),
    ),
    Sabotage(
        "a parameter outside the model is trained on raw gradients",
        "optimizer.py",
        "        if any(p.requires_grad or p.grad is not None for p in self._outside):\n",
        "        if False:\n",
        (f"{ATTACKED}::test_a_parameter_outside_the_model_gets_no_raw_gradient",),
    ),
    Sabotage(
        "a model that changes itself is captured",
        "capture.py",
        "                self._steady = before == Fingerprint(self._session.model, ())\n",
        "                self._steady = True\n",
        (f"{ATTACKED}::test_a_model_that_changes_itself_stays_eager",),
    ),
)
