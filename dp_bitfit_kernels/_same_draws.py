"""Random numbers that do not tell samples apart: for asking whether a model in training mode does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose numbers come from their arguments of other types alone, not from what a tensor holds.
_FREE = (
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "normal_", "uniform_", "bernoulli_"),
    *("exponential_", "geometric_", "log_normal_", "cauchy_", "random_"),
)
_BY_VALUE = {
    **{f"normal.{kind}": ("mean", "std") for kind in ("Tensor_float", "float_Tensor", "Tensor_Tensor")},
    "bernoulli.": ("self",),
    "bernoulli_.Tensor": ("p",),
}
_FREE_OVERLOADS = ("normal.float_float", "bernoulli.p")


class SameDraws(TorchDispatchMode):
    """Draws along the last of two or more dimensions only, the same for all places of the others, whatever the sizes.

    Kernels with a dropout built in run without it. What else a tensor's values govern (a multinomial) and permutations
    are left as they are.

    Reseeds torch's generators: within ``torch.random.fork_rng``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.removeprefix("aten::")
        given = {**{argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}, **kwargs}
        if (overload := f"{name}.{schema.overload_name}") in _BY_VALUE:
            return self._by_value(overload, given)
        if name == "native_dropout":
            return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)
        if "dropout_p" in given:
            return func(**{**given, "dropout_p": 0.0})
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        free = name in _FREE or f"{name}.{schema.overload_name}" in _FREE_OVERLOADS
        if not free or len(tensors) > 1:
            return func(*args, **kwargs)
        self._draws += 1
        torch.manual_seed(self._draws)
        size = tuple(tensors[0].shape) if tensors else tuple(given["size"])
        last = size[-1:] if len(size) > 1 else (1,) * len(size)
        own = {"self": tensors[0].new_empty(last)} if tensors else {"size": last}
        few = func(**{**given, **own, **({"generator": None} if "generator" in given else {})})
        return tensors[0].copy_(few) if name.endswith("_") else few.expand(size).clone()

    def _by_value(self, overload: str, given: dict[str, Any]) -> Tensor:
        """Normals and Bernoulli draws whose parameters are tensors: the same standard draws for all."""
        governing = next(given[own] for own in _BY_VALUE[overload] if isinstance(given.get(own), Tensor))
        self._draws += 1
        torch.manual_seed(self._draws)
        last = governing.shape[-1:] if governing.dim() > 1 else (1,) * governing.dim()
        if overload.startswith("normal"):
            mean, std = given["mean"], given.get("std", 1.0)
            made: Tensor = mean + std * torch.randn(last, dtype=governing.dtype, device=governing.device)
            return made
        target: Tensor = given["self"]
        drawn = (torch.rand(last, device=governing.device) < governing).to(target.dtype)
        return target.copy_(drawn) if overload.startswith("bernoulli_") else drawn
