"""check_model: the per-sample gradients that an engine would clip, compared with runs of one sample at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, layout, outputs
from ._nested import map_tensors, tensors_in
from ._plan import groups
from ._survey import evaluate, undisturbed
from ._trial import python_generators_kept
from ._validate import BatchLayoutError, EngineError
from .clipping import resolve
from .entries import Entry, find_entries
from .ledger import Ledger

Loss = Callable[[nn.Module, Any], Tensor]
# Of gradients, whose sums over many positions may cancel, and of losses; of other dtypes 3e-2.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}  # rows are float32 throughout
LOSS_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
PER_SAMPLE = "take the loss of each sample (reduction='none', averaged over its own tokens), then their mean"


@dataclasses.dataclass(frozen=True)
class ModelCheck:
    """What `check_model` compared.

    samples:        B.
    worst:          largest difference of a parameter's per-sample gradient from that of the sample alone, as a part of
                    the norm of the sample's whole gradient.
    worst_name:     its parameter.
    errors:         parameter -> its largest difference, measured likewise.
    padding:        the same for samples cut to their own length; None where no attention_mask shows it.
    silent:         parameters that no sample's gradient reached.
    """

    samples: int
    worst: float
    worst_name: str
    errors: dict[str, float]
    padding: float | None
    silent: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples, {len(self.errors)} parameters: per-sample gradients agree with runs of one "
            f"sample at a time, to {self.worst:.1e} of a sample's gradient (worst in {self.worst_name})"
        ]
        if self.padding is not None:
            lines.append(f"cut to its own length, a sample's gradient is the same to {self.padding:.1e}")
        if self.silent:
            lines.append(f"no gradient reached {len(self.silent)} of them, first {self.silent[0]}")
        return "\n".join(lines)


def check_model(
    model: nn.Module,
    sample_batch: Any,
    loss: Loss | None = None,
    *,
    loss_reduction: str = "mean",
    tolerance: float | None = None,
) -> ModelCheck:
    """Compare the engine's per-sample gradients on your own model and loss with runs of one sample at a time.

    Costs B + 6 forwards and B + 1 backwards. Asked are: whether the rows that each layer gives are the samples';
    whether a sample's gradient depends on its batch-mates (statistics or attention across the batch, contrastive
    losses, losses averaged over the tokens of all samples, expert balancing); and, where the batch is a mapping with an
    ``attention_mask`` [B, T], whether it depends on padding. Modules run in evaluation mode for the comparison, so that
    random masks do not differ; the training mode is asked by the proof of the layout alone. The model, its modes,
    buffers, gradients and the generators are afterwards as they were; what was proven of layouts stays known.

    Args:
        model: a model after ``convert_model``, with no engine attached.
        sample_batch: what ``loss`` takes: tensors, or nested containers of tensors, whose leading dimension is B >= 2.
        loss: (model, batch) -> scalar, as in the training loop. None: ``model(**batch).loss``, or of ``model(*batch)``.
        loss_reduction: how the loss reduces over the samples, "mean" or "sum".
        tolerance: largest difference allowed, as a part of the norm of a sample's gradient; None: 1e-3 in float32.

    Raises:
        BatchLayoutError: naming the parameter or module, the size of the fault, and how to mend it.
        EngineError: an engine is attached, or an argument is out of range.
    """
    if loss_reduction not in ("mean", "sum"):
        raise EngineError(f"loss_reduction={loss_reduction!r}: choose 'mean' or 'sum'")
    entries = find_entries(model)
    batch = layout.batch_of((sample_batch,), {})
    if batch < 2:
        raise EngineError(f"sample_batch has {batch} sample(s): at least 2 are needed to see whether they mix")
    trial = _Trial(model, entries, loss or _own_loss, loss_reduction == "mean", batch)
    allowed = TOLERANCES.get(entries[0].parameter.dtype, 3e-2) if tolerance is None else tolerance
    with _gradients_kept(model), undisturbed(model), python_generators_kept():
        rows = trial.engine_rows(sample_batch)
        evaluate(model)
        whole = trial.loss(model, sample_batch).detach()
        alone = [trial.one(_sample(sample_batch, batch, i)) for i in range(batch)]
        trial.require_sum(whole, [value for value, _ in alone])
        singles = torch.stack([row for _, row in alone])
        errors = trial.errors(rows, singles)
        name = max(errors, key=errors.__getitem__)
        if not errors[name] <= allowed:
            raise BatchLayoutError(trial.fault(name, errors[name], rows, singles))
        padding = trial.padding(sample_batch, singles)
    if padding is not None and not padding <= allowed:
        raise BatchLayoutError(
            f"padding matters: cut to its own length, a sample's gradient differs by {padding:.1e} of its norm. Its "
            "row would depend on how long its batch-mates are: pass the attention_mask on, and pool and average over a "
            "sample's own tokens"
        )
    silent = [e.name for e in entries if not bool(singles[:, e.start : e.stop].any())]
    return ModelCheck(batch, errors[name], name, errors, padding, tuple(silent))


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = outputs.loss_in(output)
    if loss is None:
        raise EngineError("the model returns no loss: pass loss=, a function of (model, batch) that returns a scalar")
    return loss


def _sample(batch: Any, size: int, i: int) -> Any:
    return map_tensors(batch, lambda t: t[i : i + 1] if t.dim() and t.shape[0] == size else t)


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


@dataclasses.dataclass
class _Trial:
    model: nn.Module
    entries: list[Entry]
    user_loss: Loss
    mean: bool
    batch: int

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        value = self.user_loss(model, batch)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            raise EngineError("loss must return a scalar tensor, the mean or sum over the samples")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise EngineError(
                "no trained parameter leads to this loss: it is computed under no_grad, from what no gradient passes "
                "(an index, an argmax), or from parts of the model without a trained parameter"
            )
        return value

    def engine_rows(self, batch: Any) -> Tensor:
        """Per-sample gradients [B, P] as an engine takes them, the layout proven before."""
        first = self.entries[0]
        backend = backends.select(first.layers[0][0].backend, first.parameter.device)
        plan = resolve("flat", 1.0).plan(groups(self.entries))
        trained_before = [(layer, layer.trained_before) for e in self.entries for layer, _ in e.layers]
        ledger = Ledger(self.model, self.entries, plan, backend)
        hook = self.model.register_forward_pre_hook(partial(_prove_once, ledger, self.batch, set()), with_kwargs=True)
        try:
            with torch.no_grad():  # the training mode, for its proof alone
                self.loss(self.model, batch)
            evaluate(self.model)
            ledger.open(self.batch)
            self.loss(self.model, batch).backward()
            assert ledger._slab is not None
            rows = ledger._slab.rows.double() * (self.batch if self.mean else 1)
        finally:
            hook.remove()
            ledger.detach()
            for layer, was in trained_before:
                layer.__dict__["trained_before"] = was
        return rows

    def one(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(loss, gradient [P] float64) of one sample, by the ordinary gradient of the whole model."""
        value = self.loss(self.model, batch)
        value.backward()  # not autograd.grad, which reentrant checkpoints refuse
        flat = []
        for p in (entry.parameter for entry in self.entries):
            flat.append((torch.zeros_like(p) if p.grad is None else p.grad).double().flatten())
            p.grad = None
        return value.detach(), torch.cat(flat)

    def require_sum(self, whole: Tensor, singles: list[Tensor]) -> None:
        values = torch.stack(singles).double()
        expected = values.mean() if self.mean else values.sum()
        room = LOSS_TOLERANCES.get(whole.dtype, 3e-2) * max(float(values.abs().max()), float(whole.abs()))
        difference = float((whole.double() - expected).abs())
        if not difference <= room:
            how = "mean" if self.mean else "sum"
            raise BatchLayoutError(
                f"the loss of the batch, {float(whole):.6g}, is not the {how} of the samples' own losses, "
                f"{float(expected):.6g} (a difference of {difference:.1e}): what one sample adds depends on the others."
                f" Check loss_reduction, and {PER_SAMPLE}; losses between samples and statistics over the batch have "
                "no per-sample gradient"
            )

    def errors(self, rows: Tensor, singles: Tensor) -> dict[str, float]:
        """Of each parameter, the largest difference over the samples, as a part of the sample's gradient norm."""
        norms = singles.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        difference = (rows - singles).abs()
        return {
            e.name: float((difference[:, e.start : e.stop].norm(dim=1) / norms).nan_to_num(float("inf")).max())
            for e in self.entries
        }

    def fault(self, name: str, error: float, rows: Tensor, singles: Tensor) -> str:
        entry = next(e for e in self.entries if e.name == name)
        mine, own = rows[:, entry.start : entry.stop], singles[:, entry.start : entry.stop]
        total = float((mine.sum(0) - own.sum(0)).norm() / own.sum(0).norm().clamp_min(1e-30))
        layer = entry.layers[0][0].layer_name
        if not bool(mine.any()) and bool(own.any()):
            why = (
                f"layer {layer!r} gave none: a module around it reads its parameter without calling it. Convert with "
                "sample_batch=, which finds that"
            )
        elif total < 0.1 * error:
            why = (
                f"their sum over the batch is right, so the rows of layer {layer!r} are put to the wrong samples: "
                "leave the parameter frozen, or convert with sample_batch="
            )
        else:
            why = (
                "their sum over the batch differs, too: the gradient of a sample depends on its batch-mates, through "
                f"the model before or after layer {layer!r} or through the loss: {PER_SAMPLE}"
            )
        return (
            f"per-sample gradients of {name!r} differ from those of the samples alone by {error:.1e} of a sample's "
            f"gradient; {why}"
        )

    def padding(self, batch: Any, singles: Tensor) -> float | None:
        """Largest difference that cutting a sample to its own length makes; None where nothing is padded."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.bool().all()):
            return None
        worst = 0.0
        for i, row in enumerate(mask.bool()):
            used = row.nonzero()
            if not len(used):
                continue
            start, stop = int(used[0]), int(used[-1]) + 1
            cut = map_tensors(_sample(batch, self.batch, i), partial(_cut, shape=mask.shape, start=start, stop=stop))
            _, row_cut = self.one(cut)
            worst = max(worst, float((row_cut - singles[i]).norm() / singles[i].norm().clamp_min(1e-30)))
        return worst


def _cut(tensor: Tensor, shape: torch.Size, start: int, stop: int) -> Tensor:
    return tensor[:, start:stop] if tensor.dim() > 1 and tensor.shape[1] == shape[1] else tensor


def _prove_once(ledger: Ledger, batch: int, seen: set[bool], model: nn.Module, args: Any, kwargs: Any) -> None:
    ledger.shapes = [tensor.shape for tensor in tensors_in((args, kwargs))]
    if model.training in seen or batch not in layout.leading_sizes(args, kwargs):
        return
    seen.add(model.training)
    layout.prove(model, args, kwargs, batch, ledger.layers).apply()
