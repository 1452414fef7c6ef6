"""Sabotages by which a release has too little noise, noise that is used twice, or what an earlier one left behind."""

from __future__ import annotations

from sabotage import ATTACKS, AUDIT, BAD, CANARY, GUARANTEES, RESIDUE, RESUME, Sabotage

NO_FRESH_DRAW = (
    ("session.py", "            self.ledger.forget()  # an interrupt", "            pass  # an interrupt"),
    (
        "session.py",
        "        self.ledger.forget()\n        self._open(batch)",
        "        self._open(batch)",
    ),
)

NOISE = (
    Sabotage(
        "noise is halved",
        "ledger.py",
        "*arguments, first, noise_std, scale)",
        "*arguments, first, noise_std / 2, scale)",
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
        "the sampler draws from the noise's stream",
        "noise.py",
        "STREAM_SAMPLER = 1",
        "STREAM_SAMPLER = 0",
        (f"{GUARANTEES}::test_the_sampler_has_a_stream_of_its_own",),
    ),
    Sabotage(
        "a second session repeats the noise of the first",
        "attached.py",
        "        session.skip_noise(self._noise_steps)\n",
        "",
        (f"{RESIDUE}::test_a_second_session_of_an_engine_never_repeats_noise",),
    ),
    Sabotage(
        "an earlier batch writes into the open rows",
        "ledger.py",
        "                leaf.grad = None\n",
        "                pass\n",
        (f"{RESIDUE}::test_the_graph_of_an_earlier_batch_adds_nothing",),
    ),
    Sabotage(
        "noise is that of one layer's bound",
        "ledger.py",
        "*arguments, first, noise_std, scale)",
        "*arguments, first, noise_std * self.plan.bounds[0] / self.plan.sensitivity, scale)",
        (f"{AUDIT}::test_every_way_to_clip_and_reduce_shows_the_same",),
    ),
    Sabotage(
        "noise is three percent short",
        "ledger.py",
        "*arguments, first, noise_std, scale)",
        "*arguments, first, noise_std * 0.97, scale)",
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
        "ledger.py",
        "*arguments, first, noise_std, scale)",
        "*arguments, first, noise_std if total.any() else 0.0, scale)",
        (f"{GUARANTEES}::test_only_trained_parameters_move_and_all_of_them",),
    ),
    Sabotage(
        "a released sum is released again",
        "ledger.py",
        "        self.forget()\n        for still",
        "        for still",
        (f"{RESUME}::test_a_released_sum_is_gone",),
    ),
    Sabotage(
        "rows of the last batch stay in the ledger",
        "ledger.py",
        "        elif not refilled_later:\n            slab.rows.zero_()\n        slab.contributions.clear()",
        "        slab.contributions.clear()",
        (f"{RESUME}", f"{BAD}::test_breaking_out_of_a_draw_leaves_no_residue"),
    ),
    Sabotage(
        "a dropped draw leaves its sum behind",
        "ledger.py",
        "        self.close()\n        self.forget()",
        "        self.close()",
        (f"{BAD}::test_breaking_out_of_a_draw_leaves_no_residue",),
        also=NO_FRESH_DRAW,
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
        "a copied engine keeps the key",
        "engine.py",
        "    def __copy__(self) -> PrivacyEngine:\n",
        "    def _unused(self) -> PrivacyEngine:\n",
        (f"{ATTACKS}::test_a_shallow_copy_of_an_engine_draws_its_own_noise",),
    ),
)
