"""What a resumable checkpoint of an engine holds, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import checkpoint
from ._history import History
from ._plan import check_fit, warn_of_lost, warn_of_weaker_noise
from ._validate import CheckpointError
from .attached import Attached
from .sampling import DrawCounter

_FORMAT = "dp-bitfit-checkpoint"


def contents(attached: Attached, history: History, draws: DrawCounter, objects: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a checkpoint.

    With phases it also says which they are and how many releases each had; its parameters are those that the running
    phase or an earlier one trains, and ``releases`` counts all phases.
    """
    session, course, optimizer = attached.session, attached.course, attached.optimizer
    releases = [session.releases] if course is None else course.counts(session)
    payload = {
        "format": _FORMAT,
        "parameters": {n: p.detach().cpu() for n, p in _parameters(attached, len(releases) - 1).items()},
        "optimizer": optimizer.state_dict(),
        "optimizer_class": type(optimizer.original_optimizer).__name__,
        "history": history.to_list(),
        "noise_steps": session.noise_steps,
        "noise_multiplier": session.noise_multiplier,
        "draws": draws.value,
        "releases": sum(releases),
        "objects": {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in objects.items()},
    }
    if course is not None:
        payload["phases"] = [phase.to_dict() for phase in course.phases]
        payload["releases_of_phases"] = releases  # of those that were begun
    return payload


def load(
    path: str, attached: Attached, history: History, draws: DrawCounter, objects: Mapping[str, Any]
) -> dict[str, Any]:
    """See ``PrivacyEngine.load_checkpoint``."""
    course, original = attached.course, attached.optimizer.original_optimizer
    data = checkpoint.read_checkpoint(path)
    if data.get("format") != _FORMAT:
        raise CheckpointError(f"{path!r} is not a checkpoint of a PrivacyEngine")
    _check_phases(path, data, attached)
    releases: list[int] = data.get("releases_of_phases", [data["releases"]])
    parameters = _parameters(attached, len(releases) - 1)
    check_fit(path, data, parameters, type(original).__name__, objects)
    saved = History.from_list(data["history"])
    if course is not None:
        course.check(len(releases) - 1, attached.session)
    try:
        original.load_state_dict(data["optimizer"])
    except ValueError as error:  # raised before it changes anything
        raise CheckpointError(f"{path!r} does not fit the optimizer ({error}); nothing was changed") from error
    asked = attached.session.noise_multiplier
    attached.resume(releases, data["noise_steps"], data["noise_multiplier"])
    for name, parameter in parameters.items():
        parameter.data.copy_(data["parameters"][name])
    history.merge(saved.segments)
    draws.advance_to(data["draws"])
    for name, target in objects.items():
        target.load_state_dict(data["objects"][name])
    result = {k: v for k, v in data["objects"].items() if k not in objects}
    result["releases"] = data["releases"]
    if course is not None:
        result["phase"] = course.index
    if attached.loader is not None:
        result["epoch"], attached.loader.skip_draws = divmod(releases[-1], len(attached.loader))
    warn_of_lost(history.total_steps - saved.total_steps)
    warn_of_weaker_noise(asked, attached.session.noise_multiplier)
    return result


def _check_phases(path: str, data: dict[str, Any], attached: Attached) -> None:
    course, saved = attached.course, data.get("phases")
    mine = None if course is None else [phase.to_dict() for phase in course.phases]
    if saved != mine:
        raise CheckpointError(
            f"{path!r} was saved {_described(saved)}, and this engine runs {_described(mine)}; nothing was changed"
        )
    if course is not None and len(data["releases_of_phases"]) <= course.index:
        raise CheckpointError(
            f"{path!r} was saved in phases[{len(data['releases_of_phases']) - 1}], and this engine is in "
            f"phases[{course.index}], which trains other parameters: load it right after make_private; nothing was "
            "changed"
        )


def _parameters(attached: Attached, phase: int) -> dict[str, nn.Parameter]:
    """What this phase or an earlier one trains; what the run trains, where there are no phases."""
    if attached.course is not None:
        return attached.course.trained(phase)
    return {entry.name: entry.parameter for entry in attached.session.ledger.entries}


def _described(phases: list[dict[str, Any]] | None) -> str:
    if phases is None:
        return "without phases"
    return f"in phases {[tuple(phase.values()) for phase in phases]}"
