"""Known ways to lose the guarantee, each as a change of the source that some test must notice.

``old`` must occur exactly once in ``file``. ``tests`` is what pytest is given; at least one of these tests must fail.
``native`` keeps the compiled backend; by default the reference runs, so that its source can be sabotaged.
"""

from __future__ import annotations

from typing import NamedTuple


class Sabotage(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    native: bool = False
    also: tuple[tuple[str, str, str], ...] = ()  # more changes (file, old, new), where two places guard the same


ENGINE, BAD, RESUME = "test_engine.py", "test_bad_input.py", "test_resume.py"
ORACLE = f"{ENGINE}::test_step_equals_oracle"
GUARANTEES, AUDIT, RESIDUE = "test_guarantees.py", "test_audit.py", "test_residue.py"
ONE_RECORD = f"{GUARANTEES}::test_one_record_moves_the_sum_by_at_most_the_bound"
CANARY = f"{AUDIT}::test_a_canary_shows_as_much_as_accounted"

NO_FRESH_DRAW = (
    ("session.py", "            self.ledger.total.zero_()  # an interrupt", "            pass  # an interrupt"),
    (
        "session.py",
        "        self.ledger.total.zero_()\n        self.ledger.open(batch)",
        "        self.ledger.open(batch)",
    ),
)

SABOTAGES = (
    Sabotage(
        "clipping is off",
        "reference.py",
        "torch.maximum(norms, bounds) if gamma is None",
        "bounds.expand_as(norms) if gamma is None",
        (ORACLE,),
    ),
    Sabotage("gamma is forgotten", "reference.py", "else norms + gamma", "else norms", (ORACLE, "test_reference.py")),
    Sabotage(
        "the mean is clipped, not the samples",
        "session.py",
        "(batch if self.mean_reduction else 1.0) / self.loss_scale",
        "1.0 / self.loss_scale",
        (ORACLE,),
    ),
    Sabotage(
        "the loss scale stays in the norm",
        "session.py",
        "(batch if self.mean_reduction else 1.0) / self.loss_scale",
        "(batch if self.mean_reduction else 1.0)",
        (f"{BAD}::test_static_loss_scale_changes_nothing",),
    ),
    Sabotage(
        "a NaN row is multiplied, not selected",
        "reference.py",
        "keep = mask & norms.isfinite().all(1)",
        "keep = mask",
        (f"{BAD}::test_bad_sample_counts_as_masked_bit_for_bit",),
    ),
    Sabotage(
        "the ticket's mask is ignored",
        "ledger.py",
        "slab.mask.copy_(mask)",
        "slab.mask.fill_(True)",
        (f"{RESUME}::test_empty_draw_without_noise_changes_nothing",),
    ),
    Sabotage(
        "rounding has no allowance on the grid",
        "clipping.py",
        "room = grid - math.sqrt(elements) / 2.0",
        "room = grid",
        ("test_clipping.py::test_integer_norm_is_at_most_the_grid",),
    ),
    Sabotage(
        "every layer gets the whole bound",
        "clipping.py",
        "shares = [1.0 / math.sqrt(len(sizes))] * len(sizes)",
        "shares = [1.0] * len(sizes)",
        (ORACLE, "test_clipping.py::test_per_layer_bounds_hold_layer_by_layer"),
    ),
    Sabotage(
        "norms are taken before the sum over T",
        "functional.py",
        "return view.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32))",
        "return view[:, 0].to(torch.promote_types(grad.dtype, torch.float32))",
        ("test_layers.py::test_gradcheck_without_engine", "test_layers.py::test_compile_fullgraph"),
    ),
    Sabotage(
        "one token stands for all",
        "reference.py",
        "return grad.sum(1, dtype=torch.float64).to(dtype)",
        "return grad[:, :1].sum(1, dtype=torch.float64).to(dtype)",
        ("test_layers.py::test_rows_equal_one_sample_autograd",),
    ),
    Sabotage(
        "a private bias gets its raw gradient, too",
        "functional.py",
        "            return grad, None, rows, None, None",
        "            return grad, rows.sum(0).to(ctx.dtype).view(ctx.shape), rows, None, None",
        (ORACLE,),
    ),
    Sabotage(
        "a raw gradient beside the ledger goes unnoticed",
        "session.py",
        "        if raw:\n",
        "        if False:\n",
        (f"{BAD}::test_bias_used_outside_its_layer_is_caught",),
    ),
    Sabotage(
        "create_graph empties the ledger",
        "functional.py",
        "        if ctx.private:\n            _refuse_graph()\n",
        "",
        (f"{ENGINE}::test_create_graph_refused",),
    ),
    Sabotage(
        "rows of the last batch stay in the ledger",
        "ledger.py",
        "        else:\n            slab.rows.zero_()\n        slab.contributions.clear()",
        "        slab.contributions.clear()",
        (f"{RESUME}", f"{BAD}::test_breaking_out_of_a_draw_leaves_no_residue"),
    ),
    Sabotage(
        "a dropped draw leaves its sum behind",
        "ledger.py",
        "        self.close()\n        self.total.zero_()",
        "        self.close()",
        (f"{BAD}::test_breaking_out_of_a_draw_leaves_no_residue",),
        also=NO_FRESH_DRAW,
    ),
    Sabotage(
        "a released sum is released again",
        "session.py",
        "        ledger.total.zero_()\n",
        "",
        (f"{RESUME}::test_a_released_sum_is_gone",),
    ),
    Sabotage(
        "noise is halved",
        "session.py",
        "STREAM_NOISE, 0, sigma * GRID, scale)",
        "STREAM_NOISE, 0, sigma * GRID / 2, scale)",
        (CANARY,),
    ),
    Sabotage(
        "noise is repeated at each step",
        "session.py",
        "        self._step.add_(1)\n",
        "",
        (CANARY, f"{RESUME}::test_charged_steps_equal_noise_draws_and_releases"),
    ),
    Sabotage(
        "noise of one pair is shared by its two elements",
        "reference.py",
        "z.bitwise_xor_(x)",
        "z.bitwise_or_(x)",
        ("test_reference_noise.py::test_key_stream_is_rfc_8439",),
    ),
    Sabotage(
        "each part of a draw is released with its own noise",
        "session.py",
        "        return ticket.final\n",
        "        return True\n",
        (f"{RESUME}::test_charged_steps_equal_noise_draws_and_releases",),
    ),
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
        "        self.accountant.charge(sigma, self._charge_rate)\n",
        "",
        (f"{RESUME}::test_charged_steps_equal_noise_draws_and_releases",),
    ),
    Sabotage(
        "a step is charged after its noise",
        "session.py",
        "        release_into(ledger.entries, flat)\n",
        "        self.accountant.charge(sigma, self._charge_rate)\n        release_into(ledger.entries, flat)\n",
        (f"{RESUME}::test_charged_steps_equal_noise_draws_and_releases",),
    ),
    Sabotage(
        "the accountant hears of more noise than there is",
        "session.py",
        "self.accountant.charge(sigma, self._charge_rate)",
        "self.accountant.charge(sigma * 1.1, self._charge_rate)",
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
        "a second forward counts a sample twice",
        "session.py",
        "            if self._forwards:\n",
        "            if False:\n",
        (f"{ENGINE}::test_second_forward_without_ticket_refused",),
    ),
    Sabotage(
        "the layout is guessed from one batch",
        "session.py",
        "        if not self._proven and batch != self._proven_for:\n",
        "        if False:\n",
        (f"{ENGINE}::test_wrong_layout_refused_by_name",),
    ),
    Sabotage(
        "a wrong leading dimension passes",
        "layout.py",
        "output.shape[0] != batch + 1",
        "output.shape[0] < 0",
        (f"{ENGINE}::test_wrong_layout_refused_by_name",),
    ),
    Sabotage(
        "samples may mix",
        "layout.py",
        "if bool(((a - b).abs()[finite] > 1e-4 * size).any()):",
        "if False:",
        (f"{ENGINE}::test_samples_must_stay_apart",),
    ),
    Sabotage(
        "BatchNorm learns from private batches",
        "layers/norm.py",
        "self.plain_bias(), False, 0.0, self.eps",
        "self.plain_bias(), self.training, 0.1, self.eps",
        ("test_layers.py::test_outputs_are_the_originals",),
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
        "the key follows from torch's seed",
        "noise.py",
        "self._key = os.urandom(KEY_BYTES)",
        "self._key = torch.randint(0, 256, (KEY_BYTES,), dtype=torch.uint8).numpy().tobytes()",
        ("test_noise.py::test_torch_seed_changes_nothing", f"{RESUME}::test_resume_never_repeats_noise"),
    ),
    Sabotage(
        "a forked child keeps the key",
        "noise.py",
        "if self._owner != (os.getpid(), _fork_generation):",
        "if False:",
        ("test_noise.py::test_forked_children_draw_keys_of_their_own",),
    ),
    Sabotage(
        "a seeded run claims a finite epsilon",
        "engine.py",
        "if self._keys.deterministic and",
        "if False and",
        (f"{BAD}::test_unsafe_seed_makes_every_statement_infinite",),
    ),
    Sabotage(
        "the sampler draws from the noise's stream",
        "noise.py",
        "STREAM_SAMPLER = 1",
        "STREAM_SAMPLER = 0",
        (f"{GUARANTEES}::test_the_sampler_has_a_stream_of_its_own",),
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
        "engine.py",
        "self.accountant.history.merge(history.segments)",
        "self.accountant.history = history",
        (f"{RESUME}::test_older_checkpoint_never_shortens_the_history",),
    ),
    Sabotage(
        "a checkpoint holds the unreleased sum",
        "engine.py",
        '        if session.draw is not None or session.ledger.dirty:\n            raise EngineError(f"{what}',
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
        "a second session repeats the noise of the first",
        "engine.py",
        "        session.skip_noise(self._noise_steps)\n",
        "",
        (f"{RESIDUE}::test_a_second_session_of_an_engine_never_repeats_noise",),
    ),
    Sabotage(
        "a detached loader's draws are charged at another rate",
        "engine.py",
        "            if self._session is not session:",
        "            if False:",
        (f"{RESIDUE}::test_the_loader_of_a_detached_session_is_refused",),
    ),
    Sabotage(
        "an earlier batch writes into the open rows",
        "ledger.py",
        "                leaf.grad = None\n",
        "                pass\n",
        (f"{RESIDUE}::test_the_graph_of_an_earlier_batch_adds_nothing",),
    ),
    Sabotage(
        "a failed release leaves its sum behind",
        "optimizer.py",
        "            self._session.abandon()\n            raise\n",
        "            raise\n",
        (f"{RESIDUE}::test_a_release_that_fails_leaves_no_sum_behind",),
        also=NO_FRESH_DRAW,
    ),
    Sabotage(
        "norms are understated by one percent",
        "reference.py",
        "norms = squares.sqrt() * scale",
        "norms = squares.sqrt() * (0.99 * scale)",
        (ONE_RECORD,),
    ),
    Sabotage(
        "the allowance for rounding has the wrong sign",
        "clipping.py",
        "_MARGIN = 1.0 - 2.0**-16",
        "_MARGIN = 1.0 + 2.0**-16",
        (ONE_RECORD,),
    ),
    Sabotage(
        "one trained element is outside the norm",
        "reference.py",
        "return squares.sum(1, keepdim=True)",
        "return squares[:, :-1].sum(1, keepdim=True)",
        (ONE_RECORD,),
    ),
    Sabotage(
        "a custom factor is not cut at the bound",
        "clipping.py",
        "torch.minimum(values.clamp(min=0.0), plan.sensitivity / norms)",
        "values.clamp(min=0.0)",
        (f"{GUARANTEES}::test_bound_holds_for_every_clipping_method",),
    ),
    Sabotage(
        "the rows are rounded to bfloat16 before they are summed, not before their norm",
        "reference.py",
        "scaled = part.to(torch.float64) * column_factor",
        "scaled = part.bfloat16().to(torch.float64) * column_factor",
        (ONE_RECORD,),
    ),
    Sabotage(
        "noise is that of one layer's bound",
        "session.py",
        "STREAM_NOISE, 0, sigma * GRID, scale)",
        "STREAM_NOISE, 0, sigma * GRID * ledger.plan.bounds[0] / ledger.plan.sensitivity, scale)",
        (f"{AUDIT}::test_every_way_to_clip_and_reduce_shows_the_same",),
    ),
    Sabotage(
        "noise is three percent short",
        "session.py",
        "STREAM_NOISE, 0, sigma * GRID, scale)",
        "STREAM_NOISE, 0, sigma * GRID * 0.97, scale)",
        (CANARY,),
    ),
    Sabotage(
        "half of the coordinates get no noise",
        "reference.py",
        "noisy = part + noise.to(torch.int64)",
        "noisy = part + noise.to(torch.int64) * (torch.arange(len(part)) % 2)",
        (f"{GUARANTEES}::test_only_trained_parameters_move_and_all_of_them",),
    ),
    Sabotage(
        "two tensors share their noise",
        "reference.py",
        "stream, first + begin, part.shape[0]).mul_",
        "stream, first, (part.shape[0] + 1) // 2).repeat(2)[: part.shape[0]].mul_",
        (CANARY,),
    ),
    Sabotage(
        "noise is rounded to half precision",
        "reference.py",
        "noisy = part + noise.to(torch.int64)",
        "noisy = part + noise.bfloat16().to(torch.int64)",
        (f"{AUDIT}::test_low_bits_of_a_release_do_not_tell_its_sum",),
    ),
    Sabotage(
        "a sum of zero gets no noise",
        "session.py",
        "STREAM_NOISE, 0, sigma * GRID, scale)",
        "STREAM_NOISE, 0, sigma * GRID if ledger.total.any() else 0.0, scale)",
        (f"{GUARANTEES}::test_only_trained_parameters_move_and_all_of_them",),
    ),
    Sabotage(
        "an overflowing record skips the step",
        "session.py",
        "        ticket, self.ticket = self.ticket, None\n        self._declared = False\n",
        "        ticket, self.ticket = self.ticket, None\n        self._declared = False\n"
        "        if not self.ledger._slab.rows.isfinite().all():\n            return self.abandon()\n",
        (f"{GUARANTEES}::test_an_overflowing_record_neither_skips_a_step_nor_moves_the_scale",),
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
        "a mean is undone with the rows that count",
        "session.py",
        "(batch if self.mean_reduction else 1.0) / self.loss_scale",
        "(int(self.ledger._slab.mask.sum()) if self.mean_reduction else 1.0) / self.loss_scale",
        (f"{GUARANTEES}::test_a_record_without_gradient_changes_no_bit",),
    ),
    Sabotage(
        "a given expected batch size is replaced by the loader's",
        "engine.py",
        "        if expected_batch_size is None:\n",
        "        if True:\n",
        (f"{GUARANTEES}::test_one_record_more_changes_neither_rate_nor_denominator",),
    ),
    Sabotage(
        "the release stays readable as a gradient",
        "optimizer.py",
        "            self._session.clear_grads()\n",
        "            pass\n",
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
        "a contribution is left out of the norm",
        "ledger.py",
        "self._grid, extra, scale, plan.gamma",
        "self._grid, None, scale, plan.gamma",
        ("test_ledger.py",),
    ),
)
