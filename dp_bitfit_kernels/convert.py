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
from ._decision import Plan, Wish, decide
from ._selection import bias_rule, module_rule
from ._signal import without_signal
from ._survey import Site, Slot, arguments, classes_of, evaluate, survey, undisturbed, usage
from ._validate import BatchLayoutError, ConversionError
from .evidence import INSTEAD
from .layers.one_by_one import OneByOneLayer
from .layers.spread import SpreadLayer
from .report import NOT_A_BIAS, ConversionReport

_BACKENDS = ("auto", "reference", "native", "triton")

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


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

    biases: "all"; "informative", all but those that provably get no gradient (of keys, under softmax attention without
        rotary or relative positions) and would be moved by noise alone; () for none; or fnmatch patterns of full
        parameter names, such as ("encoder.*", "!encoder.LayerNorm.bias"). A pattern with a leading "!" excludes,
        wherever it stands; only exclusions means all but these. A bias is a parameter named `bias`, `*_bias` or
        `bias_*` that is added to features. Relative-position tables, logit scalars and weights are selected only by a
        pattern that ends in the parameter's own name spelled out (`"*.relative_position_bias_table"`; not `"*"`). A
        pattern that matches nothing is an error.
    train_modules: fnmatch patterns of module names, or, behind "class:", of the names of a module's class and of the
        classes it derives from: ("*.lora_*", "class:GroupNorm|LayerNorm"), where "|" stands between alternatives. What
        they match is trained whole, all below it included; this overrides exclusions in `biases`. A leading "!" leaves
        out again what is matched, and all below it; only exclusions means all but these. A weight that is tied to one
        of another module needs both modules named; integer weights, of quantised models, are refused. Ready-made
        choices are in `dpk.presets`.
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
    whole.check(classes_of(sites))
    added: list[Site] = []
    try:
        if lacking:
            added = _missing.chosen_of(lacking, chosen, None if used is None else used.called)
            _missing.add(added)
            sites, tensors = survey(model)
        silent = without_signal(model) if chosen.informative else {}
        wish = Wish(chosen, whole, memory, used, silent)
        plan = _settle(model, sites, tensors, wish, backend, sample_batch)
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
    wish: Wish,
    backend: str,
    sample_batch: Any,
) -> Plan:
    """Swap the layers in; again, with the modules around them, for those whose rows are not samples of the batch."""
    unfit: dict[nn.Module, str] = {}  # and why
    uncopied: set[nn.Module] = set()  # copies of what samples share do not serve in them
    while True:
        plan = decide(sites, tensors, wish, unfit, uncopied)
        _swap(plan, backend, wish.memory)
        more = {} if wish.used is None else _unheld(model, sample_batch, plan)
        if not more:
            return plan
        spread = {site.module for site, kind, _ in plan.swap if issubclass(kind.mixin, SpreadLayer)}
        uncopied |= spread & more.keys()
        unfit.update({module: why for module, why in more.items() if module not in spread})


def _unheld(model: nn.Module, sample_batch: Any, plan: Plan) -> dict[nn.Module, str]:
    """Converted layers whose rows are not the samples' on the sample batch, and why; then the swaps are undone."""
    args, kwargs = arguments(sample_batch)
    sizes = layout.leading_sizes(args, kwargs)
    converted = [site.module for site, kind, _ in plan.swap if issubclass(kind.mixin, layers.BiasLayer)]
    if len(sizes) != 1:  # the engine asks, once its batch is declared
        return {}
    try:
        with undisturbed(model):
            evaluate(model)
            layout.prove(model, args, kwargs, sizes.pop(), converted)  # type: ignore[arg-type]
    except BatchLayoutError as error:
        _undo(plan)
        if not error.layers:
            raise
        return dict.fromkeys(error.layers, str(error).replace(f". {INSTEAD}", ""))
    except BaseException:
        _undo(plan)
        raise
    return {}


def _swap(plan: Plan, backend: str, memory: str) -> None:
    try:
        for site, kind, own_names in plan.swap:
            layers.convert_layer(site.module, kind)
            converted: Any = site.module
            converted.backend = backend
            converted.memory = memory
            converted.layer_name = site.names[0]
            converted.__dict__["trained"] = own_names
            if id(site) in plan.still:
                converted.__dict__["still"] = plan.still[id(site)]
    except BaseException:
        _undo(plan)
        raise


def _undo(plan: Plan) -> None:
    for site, _, _ in plan.swap:
        layers.restore_layer(site.module)


def _train(plan: Plan, tensors: list[Slot]) -> None:
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
        partly={},
        never_called=(),
        one_by_one={
            name: module.converted_from.__name__
            for name, module in model.named_modules()
            if isinstance(module, OneByOneLayer) and module.mixin is OneByOneLayer and module.trained
        },
        total=sum(tensor.parameter.numel() for tensor in tensors),
    )
