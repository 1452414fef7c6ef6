"""What runs on one more sample show of a layer: where its output holds the samples.

Two runs differ in what the added row holds. A tensor holds the samples in a certain way if, cut up in that way, the
parts of the samples are the same in both runs. Where a sample has other than one row, the added row's own part must
differ, too, so that a table whose size happens to fit is not taken for a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._nested import form, strangers, tensors_in
from ._validate import BatchLayoutError
from .arrangement import MAJOR, PLAIN, Arrangement, by_sample, candidates
from .layers import BiasLayer
from .layers.embedding import EmbeddingLayer
from .layers.one_by_one import Call, OneByOneLayer

TOLERANCE = 1e-6  # of the largest part
_RUN = 256  # elements that are added in float32: what that loses of one of them is far below the tolerance
INSTEAD = (
    "Leave it frozen, or convert the model with sample_batch=, which runs the module around it one sample at a time"
)


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal shapes, and values equal up to ``tolerance`` of the largest, where both are finite."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    both = a.isfinite() & b.isfinite()
    if not bool(both.any()):
        return True
    return bool(((a - b).abs()[both] <= tolerance * a.abs()[both].max()).all())


def at_each_size(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same, and once more without what one of them holds far beyond the rest (zeros instead), and so on down to
    what is usual: what masks logits would hide all else behind its size, and so would logits hide small numbers."""
    yield list(tensors)
    if not tensors[0].is_floating_point() or not tensors[0].numel():
        return
    sizes = torch.stack([tensor.detach().abs().double() for tensor in tensors]).amax(0)
    left = sizes[(sizes > 0) & sizes.isfinite()]
    if not left.numel():
        return
    smaller = left[left < 0.99 * left.max()]  # a mask is one number, perhaps in most places
    least = 1e4 * float((smaller if smaller.numel() else left).median())
    while float(left.max()) > least:
        limit = max(1e-4 * float(left.max()), least)
        yield [torch.where(sizes > limit, 0.0, tensor) for tensor in tensors]
        left = left[left <= limit]


def _digest(parts: Tensor, signed: bool = False) -> Tensor:
    """[n, ...] -> [n] float64, the sums of moduli; ``signed``: [n, 2], a sum with weights, too, which notices turned
    signs and another order."""
    flat = parts.flatten(1)
    if signed:
        weights = torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64).mul_(2.4).cos_()
        numbers = torch.view_as_real(flat).sum(2) if flat.is_complex() else flat
        wide = numbers.dtype if numbers.dtype == torch.float64 else torch.float32
        weighted = (numbers.to(wide) @ weights.to(wide)).double()
        return torch.stack([_digest(parts), weighted], 1)
    if flat.dtype in (torch.float32, torch.bfloat16, torch.float16):  # a copy in float64 takes ten times as long
        moduli = flat.to(torch.float32).abs()
        runs = moduli.shape[1] // _RUN
        sums: Tensor = moduli[:, : runs * _RUN].unflatten(1, (runs, _RUN)).sum(2).sum(1, dtype=torch.float64)
        sums = sums + moduli[:, runs * _RUN :].sum(1, dtype=torch.float64)
        if bool(sums.isfinite().all()):
            return sums
    moduli = flat.abs() if flat.is_complex() else flat.to(torch.float64).abs()
    return moduli.sum(1, dtype=torch.float64)


def _shows(first: Tensor, last: Tensor, kept: slice) -> bool:
    """Whether the added part, the one outside ``kept``, differs."""
    outside = torch.ones(len(first), dtype=torch.bool, device=first.device)
    outside[kept] = False
    return not _same_parts(first[outside], last[outside], 0.0)


def _same_parts(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """As ``same``, and what is no number in one is none in the other: else a NaN would pass for any number."""
    return bool(torch.equal(a.isfinite(), b.isfinite())) and same(a, b, tolerance)


@dataclasses.dataclass
class Seen:
    """One call of a converted layer in a run: its output, cut into samples in each way that its shape allows, and what
    it was given, where its weight is trained: behind a weight that starts at zero nothing else shows that."""

    layer: BiasLayer
    shape: tuple[int, ...]
    digests: dict[tuple[str, int], Tensor]  # (kind, rows of a sample) -> [n] float64
    whole: Tensor | None = None  # [1] float64, of a layer whose output the samples may share
    given: list[dict[tuple[str, int], Tensor]] = dataclasses.field(default_factory=list)

    @property
    def finite(self) -> bool:
        return all(bool(digest.isfinite().all()) for digest in self.digests.values())

    @staticmethod
    def of(layer: BiasLayer, given: Any, output: Tensor, samples: int) -> Seen:
        def cut(x: Tensor, signed: bool = False) -> dict[tuple[str, int], Tensor]:
            x = x[:, None] if signed and x.dim() == 1 else x  # ids
            ways = candidates(x.shape, samples, layer.channels_first)
            return {(kind, k): _digest(by_sample(x, kind, samples), signed) for kind, k in ways}

        shared = isinstance(layer, EmbeddingLayer) and (output.dim() == 2 or (output.dim() == 3 and len(output) == 1))
        whole = _digest(output.reshape(1, -1)) if shared else None
        asked = any(name.rpartition(".")[2].endswith("weight") for name in layer.trained)
        ids = isinstance(layer, EmbeddingLayer)
        inputs = [cut(x, signed=True) for x in tensors_in(given) if ids or x.is_floating_point()] if asked else []
        return Seen(layer, tuple(output.shape), cut(output), whole, inputs)


Pair = tuple[Sequence[Any], Sequence[Any], slice]  # two runs' calls, and the rows that hold the samples in both


def arrangements(pairs: Sequence[Pair], batch: int, shapes: list[tuple[int, ...]]) -> dict[BiasLayer, Arrangement]:
    """The arrangement of every layer called.

    Args:
        pairs: of ``Seen``; the runs of a pair differ in the added row.
        shapes: of the tensors that the model was given.

    Raises:
        BatchLayoutError: naming the layers that hold the samples in no way that is known.
    """
    found: dict[BiasLayer, Arrangement] = {}
    shapeless: dict[str, BiasLayer] = {}  # what is wrong, and where
    mixing: dict[str, BiasLayer] = {}
    for own in _side_by_side(pairs):
        seen: Seen = own[0][0]
        name = f"{seen.layer.layer_name!r} gives shape {seen.shape} for {batch + 1} samples"
        ways = [way for way in seen.digests if all(way in run.digests for pair in own for run in pair)]
        if not ways:
            shapeless[name] = seen.layer
            continue
        held = [way for way in ways if _held(way, own, pairs)]
        if not held:
            (mixing if (MAJOR, 1) in ways else shapeless)[name] = seen.layer
            continue
        before = found.get(seen.layer)
        joined = _joined(before, held[0], shapes)
        if joined is None:
            shapeless[f"{name}, and holds them in another way than in an earlier call"] = seen.layer
        else:
            found[seen.layer] = joined
    if shapeless:
        raise BatchLayoutError(
            "the rows of a sample are not known in layer "
            + "; layer ".join(shapeless)
            + f". Tables without a batch dimension and tokens packed by what they hold have none. {INSTEAD}",
            list(dict.fromkeys([*shapeless.values(), *mixing.values()])),
        )
    if mixing:
        raise BatchLayoutError(
            f"layer {next(iter(mixing))}: the row of a sample changes with another of the batch: the model mixes "
            "samples or reorders them before this layer, so that its rows are not the samples",
            list(dict.fromkeys(mixing.values())),
        )
    return found


def shared(pairs: Sequence[Pair], fewer: Sequence[Seen]) -> set[BiasLayer]:
    """Embeddings whose output is [T, d] or [1, T, d], the same whatever and however many the samples, in each call.

    fewer: the same calls on one sample less.
    """
    found: dict[BiasLayer, bool] = {}
    for small, own in zip(fewer, _side_by_side(pairs), strict=False):
        runs: list[Seen] = [small, *(run for pair in own for run in pair)]
        alike = all(run.shape == runs[0].shape and run.whole is not None for run in runs)
        alike = alike and all(same(run.whole, runs[0].whole, 0.0) for run in runs)  # type: ignore[arg-type]
        layer = runs[0].layer
        found[layer] = found.get(layer, True) and alike
    return {layer for layer, alike in found.items() if alike}


def _side_by_side(pairs: Sequence[Pair]) -> list[tuple[tuple[Any, Any], ...]]:
    """Call by call, what each run of each pair showed.

    Raises:
        BatchLayoutError: the runs did not call the same layers in the same order.
    """
    runs = [run for first, last, _ in pairs for run in (first, last)]
    for calls in itertools.zip_longest(*runs):
        layers = {None if call is None else call.layer for call in calls}
        if len(layers) > 1:
            layer = next(layer for layer in layers if layer is not None)
            raise BatchLayoutError(
                f"layer {layer.layer_name!r} is called or not by what the samples hold (tokens routed to experts?): "
                f"its rows are not known. {INSTEAD}",
                [layer],
            )
    paired = [list(zip(first, last, strict=True)) for first, last, _ in pairs]
    return list(zip(*paired, strict=True))


def _held(way: tuple[str, int], own: Sequence[tuple[Seen, Seen]], pairs: Sequence[Pair]) -> bool:
    digests = [(a.digests[way], b.digests[way], kept) for (a, b), (_, _, kept) in zip(own, pairs, strict=True)]
    given = [
        (x[way], y[way], kept)
        for (a, b), (_, _, kept) in zip(own, pairs, strict=True)
        for x, y in zip(a.given, b.given, strict=False)
        if way in x and way in y
    ]
    if not all(_same_parts(a[kept], b[kept], TOLERANCE) for a, b, kept in digests + given):
        return False
    return way == (MAJOR, 1) or any(_shows(a, b, kept) for a, b, kept in digests)


def _joined(before: Arrangement | None, way: tuple[str, int], shapes: list[tuple[int, ...]]) -> Arrangement | None:
    kind, k = way
    if before is None and way == (MAJOR, 1):
        return PLAIN
    if before is not None and before.kind != kind:
        return None
    # Of sequences, [B, T] or [B, T, C]; sizes of images say nothing of windows.
    sequences = [(i, shape) for i, shape in enumerate(shapes) if len(shape) <= 3]
    places = {(i, d) for i, shape in sequences for d, size in enumerate(shape) if d and size == k > 1}
    folds = frozenset({k}) | (before.folds if before is not None else frozenset())
    follows = frozenset(places) | (before.follows if before is not None else frozenset())
    return before if before is PLAIN and k == 1 else Arrangement(kind, folds, follows)


_OF_MODULES = ("_parameters", "_buffers", "_modules", "leaves")


@dataclasses.dataclass
class Watch:
    """What a layer that is run one sample at a time must leave as it is, beside its output."""

    given: list[int]  # ids of the tensors in its arguments
    held: dict[tuple[int, str], list[int]]  # (id of a module, attribute) -> ids of the tensors in it
    alive: list[Tensor] = dataclasses.field(compare=False)  # an id means its tensor only as long as that lives

    @staticmethod
    def of(layer: OneByOneLayer, arguments: Any) -> Watch:
        given = list(tensors_in(arguments))
        held = {
            (id(module), name): list(tensors_in(value))
            for module in layer.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor | list | tuple | dict) and name not in _OF_MODULES
        }
        ids = {place: [id(tensor) for tensor in tensors] for place, tensors in held.items() if tensors}
        return Watch([id(t) for t in given], ids, [*given, *(t for tensors in held.values() for t in tensors)])

    def check(self, layer: OneByOneLayer, arguments: Any) -> None:
        now = Watch.of(layer, arguments)
        if now != self:
            what = "writes into its arguments" if now.given != self.given else "keeps tensors as attributes"
            raise BatchLayoutError(
                f"layer {layer.layer_name!r} is run one sample at a time, but {what}, where others may look for the "
                f"whole batch. {INSTEAD}",
                [layer],
            )


@dataclasses.dataclass
class Called:
    """One call of a layer that is run one sample at a time: its tensors, cut into samples along each dimension."""

    layer: OneByOneLayer
    inputs: list[_Cut]
    outputs: list[_Cut]
    strange: list[str]  # what it was given, or gave, that cannot be cut
    form: tuple[Any, ...]

    @staticmethod
    def of(layer: OneByOneLayer, given: Any, output: Any, samples: int) -> Called:
        inputs, outputs = ([_Cut.of(t, samples) for t in tensors_in(value)] for value in (given, output))
        return Called(layer, inputs, outputs, [*strangers(given), *strangers(output)], form(given))


@dataclasses.dataclass
class _Cut:
    shape: tuple[int, ...]
    digests: dict[int, Tensor]  # dimension -> [n] float64
    whole: Tensor  # [1] float64

    @staticmethod
    def of(tensor: Tensor, samples: int) -> _Cut:
        whole = tensor.detach()
        axes = [axis for axis, size in enumerate(whole.shape) if size and size % samples == 0]
        cuts = {axis: _digest(by_sample(whole.movedim(axis, 0), MAJOR, samples)) for axis in axes}
        return _Cut(tuple(whole.shape), cuts, _digest(whole.reshape(1, -1)))


def _fold(cut: _Cut, axis: int | None, batch: int, shapes: list[tuple[int, ...]]) -> Arrangement:
    found = _joined(None, (MAJOR, 1 if axis is None else cut.shape[axis] // batch), shapes)
    assert found is not None
    return found


def calls(
    pairs: Sequence[Pair], fewer: Sequence[Called], batch: int, shapes: list[tuple[int, ...]]
) -> dict[OneByOneLayer, tuple[Call, ...]]:
    """The ways in which every layer that is run one sample at a time is called.

    Args:
        pairs: of ``Called`` on B + 1 samples.
        fewer: the same calls on B samples.
        shapes: of the tensors that the model was given.

    Raises:
        BatchLayoutError: naming a layer whose tensors hold the samples in no way that is known.
    """
    found: dict[OneByOneLayer, dict[tuple[Any, ...], Call]] = {}
    slices = [kept for _, _, kept in pairs]
    faults: list[BatchLayoutError] = []
    for small, own in zip(fewer, _side_by_side(pairs), strict=False):
        layer = small.layer
        if small.strange:
            raise BatchLayoutError(
                f"layer {layer.layer_name!r} is run one sample at a time, but takes or gives a {small.strange[0]}, "
                "which cannot be cut into samples (a cache? call the model with use_cache=False)",
                [layer],
            )
        runs = [small, *(call for pair in own for call in pair)]
        outputs = []
        try:
            if len({(len(run.inputs), len(run.outputs)) for run in runs}) > 1:
                raise BatchLayoutError(
                    f"layer {layer.layer_name!r} is run one sample at a time, but takes or gives another number of "
                    f"tensors from call to call (layers that are dropped by chance?). {INSTEAD}",
                    [layer],
                )
            inputs = tuple(_axis(layer, c, slices, batch) for c in zip(*(run.inputs for run in runs), strict=True))
            for cuts in zip(*(run.outputs for run in runs), strict=True):
                axis = _axis(layer, cuts, slices, batch)
                if axis is None:  # who takes it may count on one for all samples
                    raise _not_held(layer, cuts[0].shape, batch)
                outputs.append(axis)
        except BatchLayoutError as error:
            faults.append(error)
            continue
        known = found.setdefault(layer, {})
        input_folds, output_folds = (
            tuple(_fold(cut, axis, batch, shapes) for cut, axis in zip(cuts, axes, strict=True))
            for cuts, axes in ((small.inputs, inputs), (small.outputs, outputs))
        )
        call = Call(small.form, inputs, tuple(outputs), input_folds, output_folds)
        if known.setdefault(call.form, call) != call:
            raise BatchLayoutError(
                f"layer {layer.layer_name!r} is run one sample at a time, and is called with samples in different "
                "dimensions of its tensors",
                [layer],
            )
    if faults:
        raise BatchLayoutError(str(faults[0]), list(dict.fromkeys(layer for fault in faults for layer in fault.layers)))
    return {layer: tuple(known.values()) for layer, known in found.items()}


def _axis(layer: OneByOneLayer, cuts: Sequence[_Cut], slices: list[slice], batch: int) -> int | None:
    """The dimension that holds the samples, sample-major; None for a tensor that all samples share."""
    small, *large = cuts
    pairs = list(zip(large[::2], large[1::2], slices, strict=True))
    if all(cut.shape == small.shape for cut in large):
        if all(same(a.whole, b.whole, TOLERANCE) for a, b, _ in pairs):
            return None
    elif all(len(cut.shape) == len(small.shape) for cut in large):
        moved = [d for d, size in enumerate(small.shape) if any(cut.shape[d] != size for cut in large)]
        if len(moved) == 1 and small.shape[moved[0]] % batch == 0:
            axis = moved[0]
            grown = small.shape[axis] // batch * (batch + 1)
            follows = all(cut.shape[axis] == grown and axis in cut.digests for cut in large)
            if follows and all(same(a.digests[axis][kept], b.digests[axis][kept], TOLERANCE) for a, b, kept in pairs):
                return axis
    raise _not_held(layer, small.shape, batch)


def _not_held(layer: OneByOneLayer, shape: tuple[int, ...], batch: int) -> BatchLayoutError:
    loss = "" if shape else " A loss? Call the model without labels, use_cache=False, and take the loss outside."
    return BatchLayoutError(
        f"layer {layer.layer_name!r} is run one sample at a time, but a tensor of shape {shape} that it takes or gives "
        f"(for {batch} samples) holds them in no way that is known, or mixes them.{loss} {INSTEAD}",
        [layer],
    )
