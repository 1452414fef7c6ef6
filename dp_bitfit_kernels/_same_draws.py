"""Random numbers that do not tell samples apart: for asking whether a model in training mode does."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Draws that are the same along the leading dimension, whatever its size; ``last_only``: along all but the last.

    Kernels with a dropout built in run without it. What else a tensor's values govern (a multinomial) and permutations
    are left as they are.

    Reseeds torch's generators: within ``torch.random.fork_rng``.
    """

    def __init__(self, last_only: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._last_only, self._draws = last_only, 0

    def _drawn(self, size: Sequence[int], device: torch.device) -> tuple[int, ...]:
        """The shape of what is drawn, to be expanded to ``size``; the generator of the device is seeded anew."""
        self._draws += 1
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(self._draws)
        else:
            torch.default_generator.manual_seed(self._draws)
        if len(size) < 2:
            return (1,) * len(size)
        return tuple(size[-1:] if self._last_only else size[1:])

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
        size = tuple(tensors[0].shape) if tensors else tuple(given["size"])
        device = tensors[0].device if tensors else torch.device(given.get("device") or "cpu")
        drawn = self._drawn(size, device)
        own = {"self": tensors[0].new_empty(drawn)} if tensors else {"size": drawn}
        few = func(**{**given, **own, **({"generator": None} if "generator" in given else {})})
        return tensors[0].copy_(few) if name.endswith("_") else few.expand(size).clone()

    def _by_value(self, overload: str, given: dict[str, Any]) -> Tensor:
        """Normals and Bernoulli draws whose parameters are tensors: the same standard draws for all."""
        governing = next(given[own] for own in _BY_VALUE[overload] if isinstance(given.get(own), Tensor))
        size = self._drawn(governing.shape, governing.device)
        if overload.startswith("normal"):
            mean, std = given["mean"], given.get("std", 1.0)
            made: Tensor = mean + std * torch.randn(size, dtype=governing.dtype, device=governing.device)
            return made
        target: Tensor = given["self"]
        drawn = (torch.rand(size, device=governing.device) < governing).to(target.dtype)
        return target.copy_(drawn) if overload.startswith("bernoulli_") else drawn
