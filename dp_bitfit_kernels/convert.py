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

from . import _missing, layers, layout
from ._hosts import Hosts, below, inside, relative
from ._selection import BiasRule, ModuleRule, bias_rule, module_rule
from ._survey import Site, Slot, Usage, arguments, survey, undisturbed, usage
from ._validate import BatchLayoutError, ConversionError, UnsupportedModuleError
from .layers.one_by_one import ONE_BY_ONE, OneByOneLayer
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
    add_missing_biases: give Linear, convolution and LayerNorm layers that have no bias one of zeros, so that outputs
        stay what they were; all of them, or those that `biases` selects. Patterns may then name modules
        ("*.v_proj"). Not the layer that turns states into words. The biases stay with `restore_model`.
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
    used = None if sample_batch is None else usage(model, sample_batch, sites, tensors)
    required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    lacking = _missing.candidates(model, sites, tensors) if add_missing_biases else []
    modules = [name for site in sites for name in site.names]
    biased = [name for tensor in tensors for name in tensor.names if tensor.not_bias is None]
    biased += _missing.names_of(lacking)
    names = [*(name for tensor in tensors for name in tensor.names), *_missing.names_of(lacking)]
    if lacking:
        chosen = chosen.widened(names, modules)
    chosen.check(names, biased)
    whole.check(modules)
    added: list[Site] = []
    try:
        if lacking:
            added = _missing.chosen_of(lacking, chosen, None if used is None else used.called)
            _missing.add(added)
            sites, tensors = survey(model)
        plan = _settle(model, sites, tensors, chosen, whole, used, memory, backend, sample_batch)
    except BaseException:
        _missing.remove(added)
        raise
    _train(plan, tensors)
    _records[model] = _Record(dataclasses.replace(plan.report, added=tuple(_missing.names_of(added))), required_grad)
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


def _check_arguments(model: nn.Module, add_missing_biases: object, memory: str, backend: str) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        raise ConversionError(f"{type(model).__name__}: convert the model itself, before it is wrapped or compiled")
    if not isinstance(add_missing_biases, bool):
        raise ConversionError(f"add_missing_biases must be True or False, not {add_missing_biases!r}")
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


def _settle(
    model: nn.Module,
    sites: list[Site],
    tensors: list[Slot],
    chosen: BiasRule,
    whole: ModuleRule,
    used: Usage | None,
    memory: str,
    backend: str,
    sample_batch: Any,
) -> _Plan:
    """Swap the layers in; again, with the modules around them, for those whose rows are not samples of the batch."""
    unfit: list[nn.Module] = []
    while True:
        plan = _decide(sites, tensors, chosen, whole, used, memory, unfit)
        _swap(plan, backend, memory)
        more = [] if used is None else _unheld(model, sample_batch, plan)
        if not more:
            return plan
        unfit += more


def _decide(
    sites: list[Site],
    tensors: list[Slot],
    chosen: BiasRule,
    whole: ModuleRule,
    used: Usage | None,
    memory: str,
    unfit: list[nn.Module],
) -> _Plan:
    _check_statistics(sites)
    head = {id(site) for site in sites if any(whole.covers(name) for name in site.names)}
    no_layer = {id(module) for module in unfit}
    hosts = Hosts(sites, unfit, None if used is None else used.called)

    reasons: dict[int, str] = {}  # index of the tensor -> why it is frozen
    wanted: dict[int, list[tuple[Site, str]]] = {}  # index of the tensor -> the owners that give its gradient
    refused: dict[bool, list[tuple[str, str]]] = {False: [], True: []}  # in a head or not -> name, why
    for index, tensor in enumerate(tensors):
        in_head = any(id(site) in head for site, _ in tensor.owners)
        reason = None if in_head else chosen.reason(tensor.names, tensor.not_bias)
        if reason is None and used is not None and not used.uses(tensor):
            reason = NEVER_CALLED
        if reason is not None:
            reasons[index] = reason
            continue
        wanted[index] = [
            (site, own)
            for site, own in tensor.owners
            if site.gives(own, whole=id(site) in head)
            and id(site.module) not in no_layer
            and (used is None or id(site.module) in used.called)
        ]
        if not wanted[index] or _used_beside(tensor, wanted[index], head if in_head else set()):
            host = hosts.of(tensor)
            if isinstance(host, str):
                refused[in_head].append((tensor.names[0], host))
            else:
                hosts.take(host)
    _refuse(refused, chosen)
    if not wanted:
        raise ConversionError(_nothing_to_train(tensors, reasons))
    alone = hosts.outermost()
    for index, owners in wanted.items():
        wanted[index] = _given_by(alone, tensors[index], owners)
    return _plan(sites, tensors, wanted, reasons, used, memory, alone)


def _used_beside(tensor: Slot, owners: list[tuple[Site, str]], head: set[int]) -> bool:
    """Whether owners that do not give its gradient use a weight too, so that a part of it would miss the ledger."""
    giving = {id(site) for site, _ in owners} & (head or {id(site) for site, _ in owners})
    return bool(tensor.not_bias) and any(id(site) not in giving for site, _ in tensor.owners)


def _given_by(alone: list[Site], tensor: Slot, owners: list[tuple[Site, str]]) -> list[tuple[Site, str]]:
    """Who gives the gradient: the hosts that the parameter lies in, under its name there, and layers outside them."""
    given = [(site, own) for site, own in owners if not any(inside(site, host) for host in alone)]
    for host in alone:
        names = [name for name in tensor.names if below(name, host)]
        if names:
            given.append((host, relative(names[0], host)))
    return given


def _refuse(refused: dict[bool, list[tuple[str, str]]], chosen: BiasRule) -> None:
    if refused[True]:
        raise UnsupportedModuleError(
            "train_modules asks for parameters that cannot be trained whole:\n"
            + _itemised(refused[True])
            + "\nname other modules in train_modules, or freeze these by leaving their module out"
        )
    if refused[False]:
        excluded = ", ".join(f'"!{name}"' for name, _ in refused[False])
        raise UnsupportedModuleError(
            "these biases should be trained, but their per-sample gradient is not known:\n"
            + _itemised(refused[False])
            + f"\nto leave them frozen: biases=({chosen.spelled()}, {excluded})"
        )


def _unheld(model: nn.Module, sample_batch: Any, plan: _Plan) -> list[nn.Module]:
    """Converted layers whose rows are not the samples' on the sample batch; then the swaps of the plan are undone."""
    args, kwargs = arguments(sample_batch)
    sizes = layout.leading_sizes(args, kwargs)
    converted = [site.module for site, kind, _ in plan.swap if issubclass(kind.mixin, layers.BiasLayer)]
    if len(sizes) != 1:  # the engine asks, once its batch is declared
        return []
    try:
        with undisturbed(model):
            model.eval()
            layout.prove(model, args, kwargs, sizes.pop(), converted)  # type: ignore[arg-type]
    except BatchLayoutError as error:
        _undo(plan)
        if not error.layers:
            raise
        return list(error.layers)
    except BaseException:
        _undo(plan)
        raise
    return []


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
    used: Usage | None,
    memory: str,
    alone: list[Site],
) -> _Plan:
    hosts = {id(host) for host in alone}
    own_names: dict[int, set[str]] = collections.defaultdict(set)
    trained, frozen, tied, groups, sizes = {}, {}, {}, {}, {}
    for index, tensor in enumerate(tensors):
        name, numel = tensor.names[0], tensor.parameter.numel()
        tied.update(dict.fromkeys(tensor.names[1:], name))
        if index in wanted:
            for site, own in wanted[index]:
                own_names[id(site)].add(own)
            site, own = wanted[index][0]
            trained[name], groups[name] = numel, _group(site, own, id(site) in hosts)
        else:
            frozen[name], sizes[name] = reasons[index], numel
    swap = []
    for site in sites:
        if id(site) in hosts:
            swap.append((site, _host_kind(site), frozenset(own_names[id(site)])))
        elif site.kind is not None and (
            own_names[id(site)] or site.kind.freezes_statistics or site.keeps_less_in(memory)
        ):
            swap.append((site, site.kind, frozenset(own_names[id(site)])))
    idle = [s.names[0] for s in sites if used is not None and s.biased and id(s.module) not in used.called]
    report = ConversionReport(
        trained=trained,
        frozen=frozen,
        tied=tied,
        groups=groups,
        sizes=sizes,
        layers=dict(collections.Counter(kind.name for _, kind, _ in swap)),
        added=(),
        never_called=tuple(name for name in idle if not any(below(name, host) for host in alone)),
        one_by_one={site.names[0]: type(site.module).__name__ for site in alone if _host_kind(site) is ONE_BY_ONE},
        total=sum(tensor.parameter.numel() for tensor in tensors),
    )
    return _Plan(report, swap, [tensors[index].parameter for index in wanted])


def _host_kind(site: Site) -> layers.LayerKind:
    """How a host is converted: by a kind of its own that gives parameters below it, or one sample at a time."""
    own = site.kind
    return own if own is not None and issubclass(own.mixin, OneByOneLayer) else ONE_BY_ONE


def _group(site: Site, own: str, alone: bool) -> str:
    if site.kind is None or (alone and _host_kind(site) is ONE_BY_ONE):
        return f"{type(site.module).__name__} one sample at a time: {own.rpartition('.')[2]}"
    return f"{site.kind.name}.{own}"


def _swap(plan: _Plan, backend: str, memory: str) -> None:
    try:
        for site, kind, own_names in plan.swap:
            layers.convert_layer(site.module, kind)
            converted: Any = site.module
            converted.backend = backend
            converted.memory = memory
            converted.layer_name = site.names[0]
            converted.__dict__["trained"] = own_names
    except BaseException:
        _undo(plan)
        raise


def _undo(plan: _Plan) -> None:
    for site, _, _ in plan.swap:
        layers.restore_layer(site.module)


def _train(plan: _Plan, tensors: list[Slot]) -> None:
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
        added=(),
        never_called=(),
        one_by_one={
            name: module.converted_from.__name__
            for name, module in model.named_modules()
            if isinstance(module, OneByOneLayer) and module.mixin is OneByOneLayer and module.trained
        },
        total=sum(tensor.parameter.numel() for tensor in tensors),
    )


def _itemised(items: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {name}: {why}" for name, why in items)


def _nothing_to_train(tensors: list[Slot], reasons: dict[int, str]) -> str:
    counts = collections.Counter(reasons.values())
    listed = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
    hint = "name a head in train_modules, or widen biases"
    return f"nothing to train among {len(tensors)} parameters ({listed or 'the model has none'}): {hint}"
