"""What a model keeps for its backward pass, by kind of module, before conversion and after it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import _allocator, layers
from ._nested import dense_in, map_tensors, tensors_in
from ._survey import arguments, call, undisturbed
from ._validate import BatchLayoutError, ConversionError
from .convert import convert_model, restore_model
from .layout import leading_sizes

# Beside the model, an element that is trained has a release, an optimizer state of two and an integer sum; and one
# float32 for each sample.
_STATE_BYTES = 28
_ROW_BYTES = 4
_ENOUGH = 8  # samples, to measure what each one adds


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One way to run the model on the sample batch.

    kept:  kind of module -> bytes that autograd keeps for the backward, each storage once, under who kept it first.
    held:  bytes that the allocator has handed out more after the forward than before it, the output included: what is
           kept beside autograd would show here.
    fixed, per_sample: bytes of the largest instant of forward and backward, as fixed + B * per_sample; model, gradients
           and optimizer state included. None where the batch has one sample only, the device has no such measure, or
           what was measured makes no line.
    """

    kept: dict[str, int]
    held: int
    fixed: float | None
    per_sample: float | None

    @property
    def total(self) -> int:
        """Bytes of ``kept``."""
        return sum(self.kept.values())

    def largest_batch(self, memory: int) -> int:
        """Samples of one physical batch that fit into ``memory`` bytes, by the line through two measured sizes."""
        if not isinstance(memory, int | float):
            raise ConversionError(f"largest_batch: memory must be a number of bytes, not {memory!r}")
        if self.fixed is None or self.per_sample is None:
            raise ConversionError(
                "memory_report: what one sample adds could not be measured: give a sample_batch of two samples or more"
            )
        return max(0, int((memory - self.fixed) // self.per_sample))


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """``before``: plain autograd with the same parameters trained. ``after``: the converted model. ``left``: module
    kinds that were not swapped and keep something still -> why."""

    batch: int
    before: Footprint
    after: Footprint
    left: dict[str, str]

    @property
    def ratio(self) -> float:
        """Bytes kept after conversion, as a part of those before."""
        return self.after.total / self.before.total if self.before.total else 1.0

    def __str__(self) -> str:
        kinds = sorted({*self.before.kept, *self.after.kept}, key=lambda k: -self.before.kept.get(k, 0))
        lines = [f"kept for the backward of {self.batch} samples, MiB", ""]
        lines.append(f"{'kind':<50}{'plain':>12}{'converted':>12}")
        for kind in kinds:
            lines.append(_row(kind, self.before.kept.get(kind, 0), self.after.kept.get(kind, 0)))
        lines.append(_row("all", self.before.total, self.after.total) + f"   x {self.ratio:.3f}")
        lines.append(_row("all, by the allocator (output included)", self.before.held, self.after.held))
        if self.left:
            lines += ["", "left as they are"]
            lines += [f"  {kind:<48}{self.after.kept[kind] / 2**20:>12.2f}   {why}" for kind, why in self.left.items()]
        if self.after.per_sample is not None and self.before.per_sample is not None:
            lines += ["", "largest batch by the two sizes measured, model and optimizer state included"]
            for gib in (8, 16, 24, 40, 80):
                sizes = (f.largest_batch(gib * 2**30) for f in (self.before, self.after))
                lines.append(f"  in {gib:>3} GiB{'':<38}" + "".join(f"{size:>12,}" for size in sizes))
        return "\n".join(lines)

    def save_png(self, path: str | Path) -> None:
        """Bars of both footprints, by kind (needs matplotlib)."""
        from matplotlib.figure import Figure

        kinds = sorted({*self.before.kept, *self.after.kept}, key=lambda k: -self.before.kept.get(k, 0))
        figure = Figure(figsize=(8, 2.6), layout="constrained")
        axis = figure.subplots()
        for row, (label, footprint) in enumerate((("plain", self.before), ("converted", self.after))):
            start = 0.0
            for number, kind in enumerate(kinds):
                size = footprint.kept.get(kind, 0) / 2**20
                label_once = kind if row == 0 else f"_{kind}"  # an underscore keeps it out of the legend
                axis.barh(
                    label, size, left=start, color=f"C{number % 10}", hatch="/" * (number // 10), label=label_once
                )
                start += size
            axis.text(start, row, f" {start:,.1f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel(f"MiB kept for the backward of {self.batch} samples")
        axis.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path, dpi=120)


def _row(label: str, before: int, after: int) -> str:
    return f"  {label:<48}{before / 2**20:>12.2f}{after / 2**20:>12.2f}"


def memory_report(model: nn.Module, sample_batch: Any, *, memory: str = "exact") -> MemoryReport:
    """Run `model` on `sample_batch` as plain PyTorch and as converted, and say what each keeps for its backward.

    A converted model is compared with itself unswapped; any other is converted with `memory` for as long as this takes.
    Parameters, gradients, modes, buffers and torch's random state are afterwards as they were. BatchNorm runs by its
    statistics on both sides. `sample_batch`: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ConversionError: an engine is attached, the output wants no gradient, or the model cannot be converted.
        BatchLayoutError: the inputs do not share one leading size.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"memory_report: model must be a torch.nn.Module, not {type(model).__name__}")
    converted = any(layers.is_converted(module) for module in model.modules())
    if any(getattr(module, "attachment", None) is not None for module in model.modules()):
        raise ConversionError("memory_report: a PrivacyEngine is attached; call its detach() first, or ask before")
    sizes = leading_sizes(*arguments(sample_batch))
    if len(sizes) != 1:
        raise BatchLayoutError(
            "memory_report: sample_batch must be a tensor, or a tuple or mapping of the model's arguments, whose "
            f"tensors share their leading size, the number of samples (found {sorted(sizes) or 'no tensor'})"
        )
    batch = sizes.pop()
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    sample_batch = map_tensors(sample_batch, torch.Tensor.detach)
    try:
        for parameter, _ in grads:
            parameter.grad = None  # a backward would add into it
        if not converted:
            convert_model(model, memory=memory)
        with undisturbed(model):
            with _unswapped(model):
                before = _footprint(model, sample_batch, batch)
            after = _footprint(model, sample_batch, batch)
            left = _left(model, before, after)
    finally:
        if not converted and any(layers.is_converted(module) for module in model.modules()):
            restore_model(model)
        for parameter, grad in grads:
            parameter.grad = grad
    return MemoryReport(batch, before, after, left)


@contextlib.contextmanager
def _unswapped(model: nn.Module) -> Iterator[None]:
    """Every converted module with its own class; BatchNorm by its statistics."""
    swapped = [(module, type(module)) for module in model.modules() if isinstance(module, layers.ConvertedLayer)]
    modes = [(m, m.training) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    try:
        for module, _ in swapped:
            module.__class__ = module.converted_from  # type: ignore[assignment]
        for normalisation, _ in modes:
            normalisation.training = False
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cls
        for normalisation, mode in modes:
            normalisation.training = mode


def _own_class(module: nn.Module) -> str:
    cls = module.converted_from if isinstance(module, layers.ConvertedLayer) else type(module)
    return cls.__name__ if not any(True for _ in module.children()) else f"functional calls in {cls.__name__}"


def _footprint(model: nn.Module, sample_batch: Any, batch: int) -> Footprint:
    kept = _kept(model, sample_batch)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if next(model.parameters()).device.type not in ("cpu", "cuda"):
        return Footprint(kept, 0, None, None)
    held = _held(model, sample_batch)
    if batch < 2:
        return Footprint(kept, held, None, None)
    # Of few samples the largest instant may be one that grows otherwise (a workspace): they are repeated.
    large = max(batch, _ENOUGH)
    peak, smaller = (_peak(model, _samples(sample_batch, batch, count)) for count in (large, large // 2))
    per_sample = (peak - smaller) / (large - large // 2)
    if per_sample * batch < sum(kept.values()):  # what autograd keeps is there at the end of the forward
        return Footprint(kept, held, None, None)
    model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    fixed = peak - large * per_sample + model_bytes + _STATE_BYTES * trained
    return Footprint(kept, held, fixed, per_sample + _ROW_BYTES * trained)


def _samples(sample_batch: Any, batch: int, count: int) -> Any:
    """The first ``count`` samples, over and over again if there are fewer."""
    rows = [row % batch for row in range(count)]
    return map_tensors(sample_batch, lambda t: t[rows] if t.dim() > 0 and t.shape[0] == batch else t)


def _kept(model: nn.Module, sample_batch: Any) -> dict[str, int]:
    """Bytes by kind of module, as autograd shows what it saves."""
    held = chain(model.parameters(), model.buffers(), tensors_in(sample_batch))
    given = {t.untyped_storage().data_ptr() for t in chain.from_iterable(map(dense_in, held))}
    running: list[str] = ["outside"]
    found: Counter[str] = Counter()

    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(_own_class(module))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    def note(tensor: Tensor) -> Tensor:
        for own in dense_in(tensor):
            storage = own.untyped_storage()
            if own.numel() and storage.data_ptr() not in given:
                given.add(storage.data_ptr())
                found[running[-1]] += storage.nbytes()
        return tensor

    handles = [module.register_forward_pre_hook(enter, prepend=True) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
            output = call(model, sample_batch)
        _loss(output)
    finally:
        for handle in handles:
            handle.remove()
    return dict(found.most_common())


def _loss(output: Any) -> Tensor:
    """A scalar that leads to all of the output."""
    parts = [t.sum() for t in tensors_in(output) if t.requires_grad]
    if not parts:
        raise ConversionError("memory_report: nothing of the model's output wants a gradient on this sample_batch")
    return functools.reduce(torch.add, parts)


def _held(model: nn.Module, sample_batch: Any) -> int:
    """Bytes held after a forward, above what was there."""

    def forward() -> Any:
        with torch.enable_grad():
            return call(model, sample_batch)

    return _added(forward)[0]


def _peak(model: nn.Module, sample_batch: Any) -> int:
    """The most bytes at any instant of forward and backward, above what was there."""

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        # Not backward(): hooks of parameters that step an optimizer would run, and gradients of inputs be filled.
        with torch.enable_grad():
            torch.autograd.grad(_loss(call(model, sample_batch)), trained, allow_unused=True)

    return _added(step)[1]


def _added(step: Callable[[], Any]) -> tuple[int, int]:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        step()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = step()
        held, peak = torch.cuda.memory_allocated() - start, torch.cuda.max_memory_allocated() - start
        del result
        return held, peak
    found = _allocator.peak_bytes(lambda: step)
    return found.after - found.resident, found.peak - found.resident


def _left(model: nn.Module, before: Footprint, after: Footprint) -> dict[str, str]:
    """Why what still keeps something was not swapped, or keeps as much as it did."""
    reasons = {
        _own_class(m): "its weight is trained"
        for m in model.modules()
        if isinstance(m, layers.ConvertedLayer)
        and any(p.requires_grad for own, p in m.named_parameters(recurse=False) if own != "bias")
    }
    for module in model.modules():
        kind = _own_class(module)
        if kind not in after.kept or kind in reasons:
            continue
        if isinstance(module, layers.ConvertedLayer):
            if getattr(module, "inplace", False) and isinstance(module, nn.SiLU):
                reasons[kind] = "in place it overwrites what its gradient needs"
            elif "padding" in vars(module) and getattr(module, "padding_mode", "zeros") != "zeros":
                reasons[kind] = "this padding has no form that keeps less"
            elif module.keeps_little and after.kept[kind] >= before.kept.get(kind, 0):
                reasons[kind] = "with these settings it has no form that keeps less"
            continue
        if kind.startswith("functional"):
            reasons[kind] = "functions cannot be swapped, modules can"
        elif layers.lookup(module) is None:
            reasons[kind] = "no form is known that keeps less"
        else:
            hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            reasons[kind] = "it has hooks" if hooked else "it keeps what the input gradient needs"
    return {kind: reasons[kind] for kind in after.kept if kind in reasons}
