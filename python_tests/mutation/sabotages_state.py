"""Sabotages of sampling, of what is charged, and of what outlives a step."""

from __future__ import annotations

from sabotage import AUDIT, BAD, ENGINE, GUARANTEES, ORACLE, RESIDUE, RESUME, Sabotage

STATE = (
    Sabotage(
        "the sum is divided by the realised batch",
        "session.py",
        "(GRID * self.expected_batch_size)",
        "(GRID * (self.ledger._slab.rows.shape[0] if self.ledger._slab else 1))",
        (ORACLE,),
    ),
    Sabotage(
        "a step is not charged",
        "session.py",
        "        self.accountant.charge(0.0 if self.keys.deterministic else sigma, self._charge_rate)\n",
        "",
        (f"{RESUME}::test_charged_steps_equal_noise_draws_and_releases",),
    ),
    Sabotage(
        "a step is charged after its noise",
        "session.py",
        "        self.charge()\n        return self.noisy_sum()\n",
        "        release = self.noisy_sum()\n        self.charge()\n        return release\n",
        (f"{RESUME}::test_history_is_on_disk_before_the_noise",),
    ),
    Sabotage(
        "the accountant hears of more noise than there is",
        "session.py",
        "else sigma, self._charge_rate)",
        "else sigma * 1.1, self._charge_rate)",
        (f"{RESUME}::test_noise_schedule_is_charged_as_used",),
    ),
    Sabotage(
        "any batch is amplified",
        "session.py",
        "        if ticket is None:\n            self._charge_rate = 1.0\n",
        "        if ticket is None:\n            self._charge_rate = self.sample_rate\n",
        (f"{ENGINE}::test_ticketless_step_is_charged_at_rate_one",),
    ),
    Sabotage(
        "two engines share a model",
        "ledger.py",
        "            if layer.attachment is not None:\n",
        "            if False:\n",
        (f"{ENGINE}::test_two_engines_refused",),
    ),
    Sabotage(
        "the optimizer may lack a trained parameter",
        "optimizer.py",
        "    if missing:\n",
        "    if False:\n",
        (f"{BAD}::test_optimizer_that_lacks_a_parameter",),
    ),
    Sabotage(
        "closures run",
        "optimizer.py",
        "        if closure is not None:\n",
        "        if False:\n",
        (f"{ENGINE}::test_closure_refused",),
    ),
    Sabotage(
        "a seeded run claims a finite epsilon",
        "session.py",
        "0.0 if self.keys.deterministic else sigma,",
        "sigma,",
        (f"{BAD}::test_unsafe_seed_makes_every_statement_infinite",),
    ),
    Sabotage(
        "an empty draw is left out",
        "sampling.py",
        "            for indices, ticket in self.loader.draw():\n",
        "            for indices, ticket in self.loader.draw():\n"
        "                if ticket.mask is not None and not ticket.mask.any():\n                    continue\n",
        (f"{RESUME}::test_empty_draws_are_released_and_charged",),
    ),
    Sabotage(
        "a large draw is truncated",
        "sampling.py",
        "parts = max(1, -(-len(indices) // limit))",
        "parts = 1; indices = indices[:limit]",
        ("test_sampling.py::test_splitting_neither_truncates_nor_repeats",),
    ),
    Sabotage(
        "the sample rate is rounded up",
        "sampling.py",
        "found.append(np.flatnonzero(unsigned < np.uint64(limit))",
        "found.append(np.flatnonzero(unsigned <= np.uint64(limit))",
        ("test_sampling.py::test_realised_rate_never_exceeds_q",),
    ),
    Sabotage(
        "an older checkpoint shortens the history",
        "resume.py",
        "history.merge(saved.segments)",
        "history.__dict__.update(saved.__dict__)",
        (f"{RESUME}::test_older_checkpoint_never_shortens_the_history",),
    ),
    Sabotage(
        "a checkpoint holds the unreleased sum",
        "attached.py",
        '        if session.draw is not None or session.dirty:\n            raise EngineError(f"{what}',
        '        if False:\n            raise EngineError(f"{what}',
        (f"{RESUME}::test_no_checkpoint_in_the_middle_of_a_draw",),
    ),
    Sabotage(
        "secure mode takes a seed",
        "engine.py",
        "        if secure_mode and unsafe_deterministic_seed is not None:\n",
        "        if False:\n",
        (f"{BAD}::test_secure_mode_refuses_unsafe_options",),
    ),
    Sabotage(
        "a detached loader's draws are charged at another rate",
        "attached.py",
        "        if self.session.ended:",
        "        if False:",
        (f"{RESIDUE}::test_the_loader_of_a_detached_session_is_refused",),
    ),
    Sabotage(
        "the step path looks at the rows",
        "session.py",
        "        ticket, self.ticket = self.ticket, None\n        self._declared = False\n",
        "        ticket, self.ticket = self.ticket, None\n        self._declared = False\n"
        "        self.anomaly = bool(self.ledger._slab.rows.abs().max() > 1e6)\n",
        (f"{GUARANTEES}::test_operations_shapes_and_charges_do_not_depend_on_the_data",),
    ),
    Sabotage(
        "a given expected batch size is replaced by the loader's",
        "_plan.py",
        "    if expected_batch_size is None:\n        if sample_rate is not None:\n",
        "    if True:\n        if False:\n",
        (f"{GUARANTEES}::test_one_record_more_changes_neither_rate_nor_denominator",),
    ),
    Sabotage(
        "the release stays readable as a gradient",
        "optimizer.py",
        "                entry.parameter.grad = None\n",
        "                pass\n",
        (f"{GUARANTEES}::test_no_gradient_is_readable_before_the_release_and_no_sum_after_it",),
    ),
    Sabotage(
        "records are drawn twice as often as charged",
        "sampling.py",
        "        indices = inclusion(self._words, self._n, self.sample_rate, number).tolist()",
        "        indices = inclusion(self._words, self._n, min(1.0, 2 * self.sample_rate), number).tolist()",
        (f"{AUDIT}::test_a_whole_run_is_distinguished_as_well_as_accounted",),
    ),
    Sabotage(
        "secure mode lets batches be left out",
        "session.py",
        "        if self.secure_mode:\n",
        "        if False:\n",
        (f"{BAD}::test_secure_mode_lets_no_batch_be_left_out",),
    ),
    Sabotage(
        "a parameter that was frozen is released all the same",
        "session.py",
        "        if frozen:\n",
        "        if False:\n",
        (f"{BAD}::test_a_parameter_frozen_after_the_start_is_refused",),
    ),
)
