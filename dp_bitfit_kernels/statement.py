"""The privacy statement: what may be published about a run, as plain values."""

from __future__ import annotations

import math
from typing import Any

from ._plan import json_number
from .accounting import Accountant
from .attached import Attached
from .noise import delta_slack, epsilon_slack
from .second_backward import NOT_PROVEN


def statement(
    attached: Attached,
    accountant: Accountant,
    *,
    epsilon: float | None,
    delta: float | None,
    width: int,
    public_size: int | None,
    deterministic: bool,
) -> dict[str, Any]:
    """JSON-ready. ``epsilon`` spent at ``delta``; ``width``: most elements that one release had."""
    session, method, course = attached.session, attached.method, attached.course
    values = {
        "private": True,
        "mechanism": "DP-SGD, Gaussian, rounded to an integer grid",
        "sampling": "Poisson" if session.poisson_sampling else "none: every step at sample rate 1",
        "adjacency": "add or remove one record",
        "epsilon": None if epsilon is None else json_number(epsilon),
        "delta": delta,
        "numerical_slack": _slack(accountant, epsilon, width),
        "accountant": accountant.kind,
        "clipping": method.name,
        "max_grad_norm": method.sensitivity,
        "sensitivity": "proven" if session.again is None else NOT_PROVEN,
        "expected_batch_size": session.expected_batch_size,
        "public_dataset_size": public_size,
        "secure_mode": session.secure_mode,
        "unsafe_deterministic_seed": deterministic,
        "history": accountant.history.to_list(),
    }
    if course is not None:
        values["phases"] = course.statement(session)
    return values


def _slack(accountant: Accountant, epsilon: float | None, width: int) -> dict[str, float] | None:
    """What float64 noise of 64-bit words may add to epsilon and delta: ``noise.delta_slack``'s bound."""
    steps = accountant.history.total_steps
    if epsilon is None or not math.isfinite(epsilon) or not steps:
        return None
    sigma = max(s.noise_multiplier for s in accountant.history.segments)
    return {"epsilon": epsilon_slack(sigma, width, steps), "delta": delta_slack(sigma, width, steps, epsilon)}
