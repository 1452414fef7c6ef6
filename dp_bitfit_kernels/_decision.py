"""What a conversion does to each module and each parameter: decided before anything is changed."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Collection

from torch import nn

from . import layers
from ._foreign import PUT_ASIDE, integer_weights, put_aside
from ._hosts import Hosts, below, inside, relative, within
from ._selection import BiasRule, ModuleRule
from ._signal import NO_SIGNAL, Part
from ._survey import Site, Slot, Usage, classes_of
from ._validate import ConversionError, UnsupportedModuleError
from .layers.one_by_one import ONE_BY_ONE, OneByOneLayer
from .report import ConversionReport

_LISTED = 8  # weights that an error names
NEVER_CALLED = "never called on sample_batch: it would only receive noise"


@dataclasses.dataclass
class Plan:
    """What to do to each module and each parameter."""

    report: ConversionReport
    swap: list[tuple[Site, layers.LayerKind, frozenset[str]]]
    trained: list[nn.Parameter]
    still: dict[int, dict[str, tuple[int, int]]] = dataclasses.field(
        default_factory=dict
    )  # id(site) -> own name -> part

    def keep_still(self, tensor: Slot, owners: list[tuple[Site, str]], part: Part) -> None:
        """A part of a trained parameter stays as it is."""
        name = tensor.names[0]
        self.report.trained[name] -= part.stop - part.start
        self.report.partly[name] = f"elements {part.start} to {part.stop} of {part.size}: {NO_SIGNAL}"
        for site, own in owners:
            self.still.setdefault(id(site), {})[own] = (part.start, part.stop)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is asked of a conversion.

    used: what a sample batch uses; None where there is none.
    silent: id of a bias -> the part of it that is left out since no gradient reaches it.
    """

    biases: BiasRule
    whole: ModuleRule
    memory: str
    used: Usage | None
    silent: dict[int, Part]


def decide(
    sites: list[Site],
    tensors: list[Slot],
    wish: Wish,
    unfit: dict[nn.Module, str],
    uncopied: Collection[nn.Module] = (),
) -> Plan:
    """What to do to each; ``unfit``: layers whose rows were found not to be samples, and why; ``uncopied``: modules to
    which copies of what samples share cannot be given."""
    used, silent = wish.used, wish.silent
    _check_statistics(sites)
    covered = wish.whole.covered(classes_of(sites))
    head = {id(site) for site in sites if not covered.isdisjoint(site.names)}
    _refuse_integers([site for site in sites if id(site) in head])
    _refuse_half_of_a_tie(tensors, head, wish.biases)
    aside = put_aside(sites, tensors)
    no_layer = {id(module) for module in (*unfit, *uncopied)}
    hosts = Hosts(sites, unfit, None if used is None else used.called)

    givers = _givers_below(sites, used, no_layer)

    reasons: dict[int, str] = {}  # index of the tensor -> why it is frozen
    wanted: dict[int, list[tuple[Site, str]]] = {}  # index of the tensor -> the owners that give its gradient
    refused: dict[bool, list[tuple[str, str]]] = {False: [], True: []}  # in a head or not -> name, why
    for index, tensor in enumerate(tensors):
        in_head = any(id(site) in head for site, _ in tensor.owners)
        reason = None if in_head else wish.biases.reason(tensor.names, tensor.not_bias)
        if reason is None and id(tensor.parameter) in aside:
            reason = PUT_ASIDE
        if reason is None and used is not None and not used.uses(tensor):
            reason = NEVER_CALLED
        part = None if in_head else silent.get(id(tensor.parameter))
        if reason is None and part is not None and part.whole:
            reason = NO_SIGNAL
        if reason is not None:
            reasons[index] = reason
            continue
        giver = next((site for site, part in givers if all(within(name, part) for name in tensor.names)), None)
        if giver is not None:
            wanted[index] = [(giver, relative(tensor.names[0], giver))]
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
                _warn_of_names(tensor, host)
    _refuse(refused, wish.biases)
    if not wanted:
        raise ConversionError(_nothing_to_train(tensors, reasons))
    alone = _around_shared(hosts, tensors, wanted, refused)
    _refuse(refused, wish.biases)
    for index, owners in wanted.items():
        wanted[index] = _given_by(alone, tensors[index], owners)
    plan = _plan(sites, tensors, wanted, reasons, wish, alone)
    for index, owners in wanted.items():
        part = silent.get(id(tensors[index].parameter))
        if part is not None and not any(id(site) in head for site, _ in tensors[index].owners):
            plan.keep_still(tensors[index], owners, part)
    return plan


def _givers_below(sites: list[Site], used: Usage | None, no_layer: set[int]) -> list[tuple[Site, str]]:
    """Modules that give the parameters of a part below them, and the part's name."""
    found = []
    for site in sites:
        part = None if site.kind is None or site.obstacle else site.kind.gives_below(site.module)
        called = used is None or id(site.module) in used.called
        if part is not None and called and id(site.module) not in no_layer and len(site.names) == 1:
            found.append((site, f"{site.names[0]}.{part}" if site.names[0] else part))
    return found


def _refuse_integers(whole: list[Site]) -> None:
    """Raises UnsupportedModuleError naming quantised weights in modules that are to be trained whole."""
    found = [(site.names[0], own, what) for site in whole for own, what in integer_weights(site.module)]
    if found:
        left_out = ", ".join(f'"!{name}"' for name in dict.fromkeys(name for name, _, _ in found[:_LISTED]))
        more = f"\n  ... and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise UnsupportedModuleError(
            "train_modules asks for quantised weights; integer weights have no gradient:\n"
            + _itemised([(f"{name}.{own}" if name else own, what) for name, own, what in found[:_LISTED]])
            + f"{more}"
            "\ntrain what lies over them, biases and LoRA (presets.lora_and_bitfit()), or leave these modules out: "
            f"train_modules=(..., {left_out}{', ...' if more else ''})"
        )


def _refuse_half_of_a_tie(tensors: list[Slot], head: set[int], biases: BiasRule) -> None:
    """Raises ConversionError for weights of modules trained whole that belong to other modules, too.

    A pattern of `biases` that spells the weight out asks for it wherever it is. Biases are trained wherever they are.
    """
    for tensor in tensors:
        if not tensor.not_bias or biases.reason(tensor.names, tensor.not_bias) is None:
            continue
        inside, outside = (
            [(site.names[0], own) for site, own in tensor.owners if (id(site) in head) is trained]
            for trained in (True, False)
        )
        if inside and outside:
            mine, theirs = (f"{name}.{own}" if name else own for name, own in (inside[0], outside[0]))
            others = ", ".join(repr(name or "*") for name, _ in outside)
            raise ConversionError(
                f"train_modules trains {mine!r}, which is tied to {theirs!r} of a module that it leaves frozen: they "
                f"are one tensor. Name both modules in train_modules, ({inside[0][0]!r}, {others}), or neither"
            )


def _warn_of_names(tensor: Slot, host: Site) -> None:
    for site, _ in tensor.owners:
        if site.kind is not None and site.taken:
            around = host.names[0] or "the whole model"
            warnings.warn(
                f"{site.names[0]}: {site.obstacle}. So {around} is run one sample at a time, which is slower: rename "
                "them",
                stacklevel=5,
            )


def _around_shared(
    hosts: Hosts,
    tensors: list[Slot],
    wanted: dict[int, list[tuple[Site, str]]],
    refused: dict[bool, list[tuple[str, str]]],
) -> list[Site]:
    """The hosts; a layer that is also called outside of the one that it lies in is given one around all its calls.

    Inside a host it sees one sample, outside the batch: it can take the rows of one of them only.
    """
    while True:
        alone = hosts.outermost()
        shared = (index for index, owners in wanted.items() if any(_partly_inside(site, alone) for site, _ in owners))
        index = next(shared, None)
        if index is None:
            return alone
        host = hosts.of(tensors[index])
        if isinstance(host, str):
            refused[False].append((tensors[index].names[0], host))
            return alone
        hosts.take(host)


def _partly_inside(site: Site, hosts: list[Site]) -> bool:
    return not any(inside(site, host) for host in hosts) and any(below(n, host) for n in site.names for host in hosts)


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
    wish: Wish,
    alone: list[Site],
) -> Plan:
    used = wish.used
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
            own_names[id(site)] or site.kind.freezes_statistics or site.keeps_less_in(wish.memory)
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
        partly={},
        never_called=tuple(name for name in idle if not any(below(name, host) for host in alone)),
        one_by_one={site.names[0]: type(site.module).__name__ for site in alone if _host_kind(site) is ONE_BY_ONE},
        total=sum(tensor.parameter.numel() for tensor in tensors),
    )
    return Plan(report, swap, [tensors[index].parameter for index in wanted])


def _host_kind(site: Site) -> layers.LayerKind:
    """How a host is converted: by a kind of its own that gives parameters below it, or one sample at a time."""
    own = site.kind
    return own if own is not None and issubclass(own.mixin, OneByOneLayer) else ONE_BY_ONE


def _group(site: Site, own: str, alone: bool) -> str:
    if site.kind is None or (alone and _host_kind(site) is ONE_BY_ONE):
        return f"{type(site.module).__name__} one sample at a time: {own.rpartition('.')[2]}"
    return f"{site.kind.name}.{own}"


def _itemised(items: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {name}: {why}" for name, why in items)


def _nothing_to_train(tensors: list[Slot], reasons: dict[int, str]) -> str:
    counts = collections.Counter(reasons.values())
    listed = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
    hint = "name a head in train_modules, widen biases, or give layers some with add_missing_biases=True"
    return f"nothing to train among {len(tensors)} parameters ({listed or 'the model has none'}): {hint}"
