"""Choose what a model trains, swap in the private layers, and take them out again.

Everything is decided before anything is changed: an error leaves the model exactly as it was.
"""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import layers
from ._selection import BiasRule, ModuleRule, bias_rule, module_rule
from ._survey import Site, Slot, called_modules, survey
from ._validate import ConversionError, UnsupportedModuleError
from .report import NOT_A_BIAS, ConversionReport

NEVER_CALLED = "never called on sample_batch: it would only receive noise"
_BACKENDS = ("auto", "reference", "native", "triton")

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclasses.dataclass
class _Plan:
    """What to do to each module and each parameter."""

    report: ConversionReport
    swap: list[tuple[Site, layers.LayerKind, frozenset[str]]]
    trained: list[nn.Parameter]


@dataclasses.dataclass
class _Record:
    """What is remembered of a converted model. It holds names only, or a one-layer model would keep itself alive."""

    report: ConversionReport
    required_grad: dict[str, bool]


_records: weakref.WeakKeyDictionary[nn.Module, _Record] = weakref.WeakKeyDictionary()


def convert_model(
    model: nn.Module,
    *,
    biases: str | Sequence[str] = "all",
    train_modules: str | Sequence[str] = (),
    add_missing_biases: bool = False,
    memory: str = "exact",
    backend: str = "auto",
    sample_batch: Any = None,
) -> nn.Module:
    """Make `model` train only its biases, and modules named whole, through layers that give per-sample gradients.

    In place: parameter objects, state_dict keys, shapes, buffers and hooks stay; the classes of the layers concerned
    change and `requires_grad` is set on every parameter (True exactly on the trained ones, also on biases that were
    frozen before: exclude them by pattern to keep them so). Every `.grad` is dropped. Each parameter ends trained,
    frozen with the reason that `conversion_report` gives, or refused in an error that names it. BatchNorm layers are
    always converted: their running statistics are used and never updated. On any error the model is as it was. Undo
    with `restore_model`.

    biases: "all"; () for none; or fnmatch patterns of full parameter names, such as ("encoder.*",
        "!*.LayerNorm.bias"). A pattern with a leading "!" excludes, wherever it stands; only exclusions means all but
        these. A bias is a parameter named `bias`, `*_bias` or `bias_*` that is added to features. Relative-position
        tables, logit scalars and weights are selected only by a pattern that ends in the parameter's own name spelled
        out (`"*.relative_position_bias_table"`; not `"*"`). A pattern that matches nothing is an error.
    train_modules: fnmatch patterns of module names. What they match is trained whole, all below it included; this
        overrides exclusions in `biases`.
    add_missing_biases: True is not available in this version.
    memory: what the model keeps for backward. "exact": only what the input gradient needs; modules without a bias are
        swapped for this, too (frozen convolutions, ReLU, dropout, GELU, pooling), unless they have hooks or a forward
        of their own. Outputs and gradients are those of the modules they replace. "compact": less still, and no
        longer exact: derivatives of activations as one of eight levels, normalised inputs in 8 bits. The gradient then
        differs from the true one; privacy does not depend on that. "off": as in plain PyTorch.
    backend: "auto", "reference", "native" or "triton", for every converted layer.
    sample_batch: a tensor, a tuple of positional or a mapping of keyword arguments. The model runs on it once (eval
        mode, no gradient; modes, buffers and random state are put back); biased modules that are not called then stay
        frozen.
    """
    _check_arguments(model, add_missing_biases, memory, backend)
    chosen, whole = bias_rule(biases), module_rule(train_modules)
    sites, tensors = survey(model)
    called = None if sample_batch is None else called_modules(model, sample_batch, sites)
    plan = _decide(sites, tensors, chosen, whole, called, memory)
    required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    _apply(plan, tensors, backend, memory)
    _records[model] = _Record(plan.report, required_grad)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What `convert_model` decided for each parameter; `print` it for a table.

    A copy of a converted model (deepcopy, pickle) has no record of the reasons; there the report is rebuilt from
    `requires_grad`.
    """
    if not any(layers.is_converted(module) for module in model.modules()):
        raise ConversionError(f"{type(model).__name__} is not converted: call convert_model first")
    record = _records.get(model)
    return record.report if record is not None else _rebuilt_report(model)


def restore_model(model: nn.Module) -> nn.Module:
    """Turn a converted model, in place, back into ordinary torch modules that need nothing of this package.

    The trained values stay. `requires_grad` becomes what it was before conversion (in a copy of a converted model,
    which has no record of that, it stays as it is).
    """
    converted = [module for module in model.modules() if layers.is_converted(module)]
    if not converted:
        raise ConversionError(f"{type(model).__name__} is not converted: there is nothing to restore")
    for name, module in model.named_modules():
        if getattr(module, "attachment", None) is not None and layers.is_converted(module):
            raise ConversionError(f"a PrivacyEngine is attached to {name or type(module).__name__!r}: detach it first")
    for module in converted:
        layers.restore_layer(module)
    record = _records.pop(model, None)
    if record is not None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(record.required_grad.get(name, parameter.requires_grad))
    return model


def _check_arguments(model: nn.Module, add_missing_biases: bool, memory: str, backend: str) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        raise ConversionError(f"{type(model).__name__}: convert the model itself, before it is wrapped or compiled")
    if add_missing_biases:
        raise ConversionError("add_missing_biases=True is not available in this version: leave it False")
    if memory not in ("exact", "compact", "off"):
        raise ConversionError(f'memory must be "exact", "compact" or "off", not {memory!r}')
    if backend not in _BACKENDS:
        raise ConversionError(f"backend must be one of {', '.join(_BACKENDS)}, not {backend!r}")
    for name, module in model.named_modules():
        if layers.is_converted(module):
            where = f" (its module {name!r} is)" if name else ""
            raise ConversionError(f"{type(model).__name__} is already converted{where}: call restore_model first")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConversionError(f"{name!r} has no shape yet: run the model once before convert_model")


def _decide(
    sites: list[Site],
    tensors: list[Slot],
    chosen: BiasRule,
    whole: ModuleRule,
    called: set[int] | None,
    memory: str,
) -> _Plan:
    everything = [name for tensor in tensors for name in tensor.names]
    chosen.check(everything, [name for tensor in tensors for name in tensor.names if tensor.not_bias is None])
    whole.check([name for site in sites for name in site.names])
    _check_statistics(sites)
    head = {id(site) for site in sites if any(whole.covers(name) for name in site.names)}

    reasons: dict[int, str] = {}  # index of the tensor -> why it is frozen
    wanted: dict[int, list[tuple[Site, str]]] = {}  # index of the tensor -> the owners that give its gradient
    refused: list[tuple[str, str]] = []
    refused_whole: list[tuple[str, str]] = []
    for index, tensor in enumerate(tensors):
        in_head = any(id(site) in head for site, _ in tensor.owners)
        reason = None if in_head else chosen.reason(tensor.names, tensor.not_bias)
        if reason is not None:
            reasons[index] = reason
            continue
        owners = [(site, own) for site, own in tensor.owners if site.gives(own, whole=id(site) in head)]
        why = _refusal(tensor, owners, head if in_head else set())
        if why:
            (refused_whole if in_head else refused).append((tensor.names[0], why))
        elif called is not None and not any(id(site.module) in called for site, _ in owners):
            reasons[index] = NEVER_CALLED
        else:
            wanted[index] = owners
    if refused_whole:
        raise UnsupportedModuleError(
            "train_modules asks for parameters that cannot be trained whole in this version:\n"
            + _itemised(refused_whole)
            + "\nname other modules in train_modules, or freeze these by leaving their module out"
        )
    if refused:
        excluded = ", ".join(f'"!{name}"' for name, _ in refused)
        raise UnsupportedModuleError(
            "these biases should be trained, but their per-sample gradient is not known:\n"
            + _itemised(refused)
            + f"\nto leave them frozen: biases=({chosen.spelled()}, {excluded})"
        )
    if not wanted:
        raise ConversionError(_nothing_to_train(tensors, reasons))
    return _plan(sites, tensors, wanted, reasons, called, memory)


def _refusal(tensor: Slot, owners: list[tuple[Site, str]], head: set[int]) -> str:
    """Why a parameter that should be trained cannot be; empty if it can."""
    giving = {id(site) for site, _ in owners} & (head or {id(site) for site, _ in owners})
    rest = [site.names[0] for site, _ in tensor.owners if id(site) not in giving]
    if owners and rest and tensor.not_bias:  # the rest uses it too, in a way that would add gradient beside the ledger
        return f"a weight tied to one in {', '.join(map(repr, rest))}, which does not train it"
    if not owners:
        site, own = next(((s, o) for s, o in tensor.owners if id(s) in head), tensor.owners[0])
        kind = site.kind
        untrainable = f"{kind.name} layers cannot train their {own}" if kind is not None else ""
        return f"{type(site.module).__name__}: {site.obstacle or untrainable}"
    if not tensor.parameter.is_floating_point():
        return f"its dtype is {tensor.parameter.dtype}: only real floating-point parameters can be trained"
    if tensor.parameter.is_inference():
        return "it was made under torch.inference_mode, so it can never require a gradient"
    return ""


def _check_statistics(sites: list[Site]) -> None:
    """Statistics of a private batch must neither mix its samples nor stay in a buffer, trained bias or not."""
    faults = []
    for site in sites:
        if site.kind is not None and not site.obstacle:
            continue
        batchnorm = nn.modules.batchnorm
        mixes = isinstance(site.module, batchnorm._BatchNorm)
        keeps = isinstance(site.module, batchnorm._NormBase) and site.module.running_mean is not None
        if mixes or keeps:
            faults.append((site.names[0], f"{type(site.module).__name__}: {site.obstacle}"))
    if faults:
        raise UnsupportedModuleError(
            "these modules take statistics over the batch, which mixes or records its samples, and cannot be frozen:\n"
            + _itemised(faults)
            + "\nreplace them (GroupNorm needs no statistics) or use plain BatchNorm with running statistics"
        )


def _plan(
    sites: list[Site],
    tensors: list[Slot],
    wanted: dict[int, list[tuple[Site, str]]],
    reasons: dict[int, str],
    called: set[int] | None,
    memory: str,
) -> _Plan:
    own_names: dict[int, set[str]] = collections.defaultdict(set)
    trained, frozen, tied, groups, sizes = {}, {}, {}, {}, {}
    for index, tensor in enumerate(tensors):
        name, numel = tensor.names[0], tensor.parameter.numel()
        tied.update(dict.fromkeys(tensor.names[1:], name))
        if index in wanted:
            for site, own in wanted[index]:
                own_names[id(site)].add(own)
            site, own = wanted[index][0]
            assert site.kind is not None
            trained[name], groups[name] = numel, f"{site.kind.name}.{own}"
        else:
            frozen[name], sizes[name] = reasons[index], numel
    swap = []
    for site in sites:
        if site.kind is not None and (
            own_names[id(site)] or site.kind.freezes_statistics or site.keeps_less_in(memory)
        ):
            swap.append((site, site.kind, frozenset(own_names[id(site)])))
    idle = [site.names[0] for site in sites if called is not None and site.biased and id(site.module) not in called]
    report = ConversionReport(
        trained=trained,
        frozen=frozen,
        tied=tied,
        groups=groups,
        sizes=sizes,
        layers=dict(collections.Counter(kind.name for _, kind, _ in swap)),
        never_called=tuple(idle),
        total=sum(tensor.parameter.numel() for tensor in tensors),
    )
    return _Plan(report, swap, [tensors[index].parameter for index in wanted])


def _apply(plan: _Plan, tensors: list[Slot], backend: str, memory: str) -> None:
    done: list[nn.Module] = []
    try:
        for site, kind, own_names in plan.swap:
            layers.convert_layer(site.module, kind)
            done.append(site.module)
            converted: Any = site.module
            converted.backend = backend
            converted.memory = memory
            converted.layer_name = site.names[0]
            converted.__dict__["trained"] = own_names
    except BaseException:
        for module in done:
            layers.restore_layer(module)
        raise
    trained = {id(parameter) for parameter in plan.trained}
    for tensor in tensors:
        tensor.parameter.grad = None  # an optimizer would still apply it
        tensor.parameter.requires_grad_(id(tensor.parameter) in trained)


def _rebuilt_report(model: nn.Module) -> ConversionReport:
    _, tensors = survey(model)
    trained = [tensor for tensor in tensors if tensor.parameter.requires_grad]
    frozen = [tensor for tensor in tensors if not tensor.parameter.requires_grad]
    converted = [module for module in model.modules() if layers.is_converted(module)]
    return ConversionReport(
        trained={tensor.names[0]: tensor.parameter.numel() for tensor in trained},
        frozen={
            tensor.names[0]: NOT_A_BIAS if tensor.not_bias == NOT_A_BIAS else "requires_grad is False"
            for tensor in frozen
        },
        tied={alias: tensor.names[0] for tensor in tensors for alias in tensor.names[1:]},
        groups={tensor.names[0]: tensor.owners[0][1] for tensor in trained},
        sizes={tensor.names[0]: tensor.parameter.numel() for tensor in frozen},
        layers=dict(collections.Counter(type(module).__name__ for module in converted)),
        never_called=(),
        total=sum(tensor.parameter.numel() for tensor in tensors),
    )


def _itemised(items: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {name}: {why}" for name, why in items)


def _nothing_to_train(tensors: list[Slot], reasons: dict[int, str]) -> str:
    counts = collections.Counter(reasons.values())
    listed = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
    hint = "name a head in train_modules, or widen biases"
    return f"nothing to train among {len(tensors)} parameters ({listed or 'the model has none'}): {hint}"
