"""Which rows of a tensor are the samples: found from the model's inputs, proven by one more sample.

A leading dimension that equals the batch size proves nothing (a sequence-first tensor with T = B has it, too, and so
has a table with B rows). It must also follow when the batch grows: so the model is run on its own inputs and one more
row, without gradients. Each converted layer's output must then hold B + 1 samples in one of the ways of
``arrangement``, and what the added row holds must show in its own part alone, nor in a buffer. A loss that the model
itself returns must be a sum or mean over samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _slices, evidence, outputs, totals
from ._nested import tensors_in
from ._survey import evaluating
from ._trial import FAILURES, MIXED, Calls, Run, Trial, another_row
from ._validate import BatchLayoutError
from .arrangement import PLAIN, Arrangement
from .layers import BiasLayer
from .layers.one_by_one import Call, OneByOneLayer
from .layers.own_forward import OwnForwardLayer
from .layers.spread import SpreadLayer


class NoNumbers(BatchLayoutError):
    """No sample of the batch gives numbers in all layers: what the layers hold cannot be told."""


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, breadth first: what ``model.modules()`` gives, in a third of the time. Asked twice a step."""
    found, seen = [model], {model}
    for module in found:  # grows while it is read
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def leading_sizes(args: Any, kwargs: Any) -> set[int]:
    """Leading sizes of all tensor inputs of at least one dimension.

    Raises:
        BatchLayoutError: one is sparse or nested.
    """
    sizes = set()
    for tensor in tensors_in((args, kwargs)):
        if tensor.layout != torch.strided or tensor.is_nested:
            raise BatchLayoutError("a sparse or nested input: its samples are not known; give the model a dense tensor")
        if tensor.dim() > 0:
            sizes.add(tensor.shape[0])
    return sizes


def batch_of(args: Any, kwargs: Any) -> int:
    """B: the one leading size that all tensor inputs share.

    Raises:
        BatchLayoutError: there is no tensor, or the leading sizes differ, or are 0.
    """
    sizes = leading_sizes(args, kwargs)
    if len(sizes) != 1:
        found = "no tensor" if not sizes else f"leading sizes {sorted(sizes)}"
        raise BatchLayoutError(
            f"the batch size cannot be read off the model's inputs ({found}): wrap the step in `with engine.batch(B):`"
        )
    batch = sizes.pop()
    if not batch:
        raise BatchLayoutError(
            "the model's inputs hold no sample (their leading size is 0). Draws of the private loader that are empty "
            "come as a masked batch; leave out empty batches of your own"
        )
    return batch


@dataclasses.dataclass
class Proof:
    """What the runs of one batch proved.

    complete: False where all samples are alike and cannot be changed, or give no numbers, so that not everything could
        be asked.
    """

    complete: bool
    arrangements: dict[BiasLayer, Arrangement]
    calls: dict[OneByOneLayer, tuple[Call, ...]]
    tried: list[OwnForwardLayer]
    shared: set[BiasLayer]

    @property
    def of_these_sizes(self) -> bool:
        """Whether inputs of other sizes have to be asked by themselves."""
        folds = (
            fold for calls in self.calls.values() for call in calls for fold in call.input_folds + call.output_folds
        )
        return any(found.of_these_sizes for found in (*self.arrangements.values(), *folds))

    def unlike_before(self) -> list[str]:
        """Names of layers that were taken for arranged in another way than is proven, or were not known."""
        arranged = [
            layer.layer_name
            for layer, found in self.arrangements.items()
            if layer.arrangement != found or getattr(layer, "same_for_all", False) != (layer in self.shared)
        ]
        return arranged + [alone.layer_name for alone, calls in self.calls.items() if alone.calls != calls]

    def apply(self) -> None:
        """Tell the layers."""
        for layer, arrangement in self.arrangements.items():
            layer.__dict__.pop("same_for_all", None)
            if layer in self.shared:
                layer.__dict__["same_for_all"] = True
            if arrangement is PLAIN:  # as it is by itself: code that was compiled on that stays right
                layer.__dict__.pop("arrangement", None)
            else:
                layer.__dict__["arrangement"] = arrangement
        for alone, calls in self.calls.items():
            alone.__dict__["calls"] = calls
        for own in self.tried:
            own.__dict__["tried"] = True


def prove(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    batch: int,
    layers: list[BiasLayer],
    shared_inputs: frozenset[int] = frozenset(),
    known: bool = False,
) -> Proof:
    """Run ``model`` four times on B + 1 rows, without gradients, and see where each converted layer holds the samples.

    A row is added behind the samples, and ahead of them (a model may mix forward only, as a causal one does along its
    time); it repeats the first sample in one run and is another in the other. In all, every converted layer must hold
    B + 1 samples; and neither the outputs of the B samples, of the layers or of the model, nor a buffer may notice what
    the added row holds. A loss that the model returns must be a sum or a mean over samples. Where layers are run one
    sample at a time, a fifth run on the B samples tells which dimensions of their inputs and outputs follow.
    The generators' state, the buffers and what modules hold besides are as before afterwards. Samples that are not
    finite somewhere, or huge, are replaced by others, so that none of them hides the layout.

    known: whether there is a proof of such a call already, so that a batch without numbers is better not asked.
    shared_inputs: places among the tensors given of what all samples share, though its leading size may now be B.

    Raises:
        NoNumbers: there is no sample that is finite everywhere.
        BatchLayoutError: naming the layer whose output does not follow the batch or whose rows are not the samples, or
            saying that the model mixes samples, or that it cannot be run with one more row.
    """
    spread: set[BiasLayer] = {m for m in layers if isinstance(m, SpreadLayer) and m.trained}
    trial = Trial(model, args, kwargs, batch, layers, spread, shared_inputs).of_usual()
    samples, sums = range(batch), trial.sums()
    alone = any(isinstance(layer, OneByOneLayer) for layer in layers)

    def runs() -> tuple[list[Run], list[tuple[Run, Run, slice]], Run | None]:
        try:
            behind = [trial.run([*samples, row], first=not n) for n, row in enumerate(added)]
            ahead = [trial.run([row, *samples]) for row in added[:2]] if other is not None else []
            same = trial.run([*samples]) if alone else None
        except FAILURES as error:
            raise BatchLayoutError(
                f"the batch layout cannot be proven: the model fails on {batch + 1} samples, given {batch} "
                f"({type(error).__name__}: {error}). " + (f"{evidence.INSTEAD}" if trial.spread else ""),
                list(trial.spread),
            ) from error
        pairs = [(behind[0], last, slice(0, batch)) for last in behind[1:] or behind]
        pairs += [(a, ahead[-1], slice(1, batch + 1)) for a in ahead[:1]]
        return behind, pairs, same

    other, added = _added(trial)
    behind, pairs, same = runs()
    numbers = all(call.finite for call in behind[0].seen)
    if not numbers and (finite := trial.of_finite()) is not None:
        trial, numbers = finite, True
        other, added = _added(trial)
        behind, pairs, same = runs()
    if not numbers and known:
        raise NoNumbers("no sample of this batch gives finite numbers in all layers")
    shared: set[BiasLayer] = set()
    if any(seen.whole is not None for seen in behind[0].seen):
        fewer = trial.run([*samples]).seen
        shared = evidence.shared([(a.seen, b.seen, kept) for a, b, kept in pairs], fewer)
    if shared:
        trial.spread |= shared
        behind, pairs, same = runs()
    shapes = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]
    try:
        arrangements = evidence.arrangements([(a.seen, b.seen, kept) for a, b, kept in pairs], batch, shapes)
    except BatchLayoutError as error:
        if numbers:
            raise
        raise NoNumbers(f"no sample of this batch gives finite numbers in all layers, so that {error}") from error
    if not numbers and any(found is not PLAIN for found in arrangements.values()):
        layer = next(layer for layer, found in arrangements.items() if found is not PLAIN)
        raise NoNumbers(
            "no sample of this batch gives finite numbers in all layers, so that the rows of a sample are not known in "
            f"layer {layer.layer_name!r}. Begin with a batch of ordinary samples",
            [layer],
        )
    called: list[evidence.Pair] = [(a.called, b.called, kept) for a, b, kept in pairs]
    calls = evidence.calls(called, same.called if same else [], batch, shapes)
    if calls:
        at_once = trial.run([*samples], calls=calls).at_once
        calls = _with(calls, lambda alone, call: (alone, call.form) in at_once)
        calls = _require_same_around(trial, calls)
    outputs.require_not_carried(trial, pairs, added)
    changed = [
        name for name, value in trial.sums().items() if not torch.equal(value.nan_to_num(), sums[name].nan_to_num())
    ]
    if changed:
        raise BatchLayoutError(
            f"parameter {changed[0]!r} is written by the forward itself: it would hold private data without noise, and "
            "it was written by the runs of this proof, too"
        )
    for first, last, _ in pairs:
        for name, value in first.buffers.items():
            if not evidence.same(value, last.buffers[name], 0.0):
                raise BatchLayoutError(
                    f"buffer {name!r} is written from the batch: it would hold private data without noise. Stop the "
                    "model from writing it (eval() of its module does so in most)"
                )
    singles = outputs.require_own(trial, pairs)
    if singles.own and other is not None:
        totals.require_totals(trial, other, singles)
    outputs.require_same_for_more(trial)
    if trial.spread:
        _require_copies_apart(trial, arrangements)
    tried = [layer for layer in arrangements if isinstance(layer, OwnForwardLayer)]
    return Proof(other is not None and numbers, arrangements, calls, tried, shared)


def _added(trial: Trial) -> tuple[int | None, tuple[int, ...]]:
    """A row unlike the first, and the rows that are added, one in each run."""
    other = another_row(trial)
    return other, (0,) if other is None else (0, other, MIXED) if other >= 0 else (0, other)


def _require_copies_apart(trial: Trial, arrangements: dict[BiasLayer, Arrangement]) -> None:
    """Copies of what samples share leave the model's outputs as they are, and each shows in its own sample alone.

    Of the layers' outputs and the model's, those of samples whose copies are changed are as if all were, those of the
    others as if none was. Which are changed follows the binary digits of their number, so that no copy can have gone
    to another sample unseen. Asked in evaluation mode and in the present modes: the runs draw the same random numbers.

    Raises:
        BatchLayoutError: naming the layers with copies.
    """
    count = min(max(trial.batch, 4), 8)
    rows = [n % trial.batch for n in range(count)]
    digits = [tuple(bool(n >> digit & 1) for n in range(count)) for digit in range((count - 1).bit_length())]

    def apart() -> bool:
        none, every = (_by_sample(trial.run(rows, changed=(c,) * count), count, arrangements) for c in (False, True))
        for changed in digits:
            mixed = _by_sample(trial.run(rows, changed=changed), count, arrangements)
            if not len(none) == len(every) == len(mixed):
                return False
            for own in zip(none, every, mixed, strict=True):
                for a, b, found in evidence.at_each_size(own):
                    chosen = torch.tensor(changed, device=a.device).view(-1, *(1,) * (a.dim() - 1))
                    if not evidence.same(torch.where(chosen, b, a), found, 1e-4):
                        return False
        return True

    with evaluating(trial.model):
        copied = trial.run(rows).output
        spread, trial.spread = trial.spread, set()
        plain = trial.run(rows).output
        trial.spread = spread
        right = _slices.alike(plain, copied) and apart()
    if not (right and (not any(m.training for m in trial.model.modules()) or apart())):
        names = ", ".join(sorted(repr(layer.layer_name) for layer in spread))
        raise BatchLayoutError(
            f"what the samples share in layer {names} is not added to each of them by itself, so that its per-sample "
            f"gradient is not known. {evidence.INSTEAD}",
            list(spread),
        )


def _by_sample(run: Run, batch: int, arrangements: dict[BiasLayer, Arrangement]) -> list[Tensor]:
    """[B, ...] float: what the layers and the model gave for each sample."""
    seen = []
    for call in run.seen:
        kind = arrangements[call.layer].kind if call.layer in arrangements else None
        seen += [digest for (way, _), digest in call.digests.items() if way == kind and len(digest) == batch]
    outputs = [t for t in tensors_in(run.output) if t.dim() > 0 and len(t) == batch and t.is_floating_point()]
    return seen + outputs


def _with(calls: Calls, at_once: Callable[[OneByOneLayer, Call], bool]) -> Calls:
    return {
        alone: tuple(dataclasses.replace(call, at_once=at_once(alone, call)) for call in known)
        for alone, known in calls.items()
    }


def _require_same_around(trial: Trial, calls: Calls) -> Calls:
    """The model's outputs are the same when modules are run on each sample by itself, in evaluation mode.

    Else something leaves them that is not in their outputs: a list that is appended to, a hook, a number. Where it is
    so under vmap alone, they go through a loop.

    Raises:
        BatchLayoutError: naming them.
    """
    samples = [*range(trial.batch)]
    with evaluating(trial.model):
        try:
            whole = trial.run(samples).output
        except FAILURES:  # its evaluation is another thing (decoding): only the modules themselves were compared
            return calls

        def runs(tried: Calls) -> bool:
            try:
                return _slices.alike(whole, trial.run(samples, instead=tried).output)
            except FAILURES:
                return False

        if runs(calls):
            return calls
        looped = _with(calls, lambda alone, call: False)
        if runs(looped):
            return looped
        wrong: list[BiasLayer] = [alone for alone in calls if not runs({alone: looped[alone]})]
    wrong = wrong or list(calls)
    raise BatchLayoutError(
        f"the model gives other outputs when layer {wrong[0].layer_name!r} is run one sample at a time: something "
        f"leaves it that is not in its outputs (a list that it appends to, a hook that records). {evidence.INSTEAD}",
        wrong,
    )
