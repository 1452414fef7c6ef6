"""Below the native ops that keep little for backward: every vector width gives the same bits."""

from __future__ import annotations

import shutil
from types import ModuleType
from typing import Any

import native_internals
import pytest
import torch
from backward_cases import KINDS, NAN, activation_inputs, inside
from cases import FLOAT_DTYPES
from torch import Tensor

pytest.importorskip("pybind11")
if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

COUNTS = (1, 15, 16, 33, 1000, 3001)


@pytest.fixture(scope="module")
def internals() -> ModuleType:
    return native_internals.load()


def results(internals: ModuleType, loop: str, out: dict[str, Tensor], *arguments: Any) -> None:
    """Runs the loop of every width. Tensors go by address; a name in ``out`` stands for a fresh copy of its tensor."""
    first: dict[str, Tensor] | None = None
    for isa in internals.isas():
        fresh = {name: value.clone() for name, value in out.items()}
        tensors = [fresh[a] if isinstance(a, str) else a for a in arguments]
        value = getattr(internals, loop)(isa, *(t.data_ptr() if isinstance(t, Tensor) else t for t in tensors))
        fresh["returned"] = torch.tensor([NAN if value is None else value])
        first = first or fresh
        for name, tensor in fresh.items():
            as_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (first[name], tensor))
            assert torch.equal(*as_bytes), f"{loop}: {name} of {isa}"


def normal(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Aligned to no more than an item, with every kind of odd value where it is long."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3.0
    if count > 500:
        values[::97] *= 1e-6  # subnormal as float16
        values[5:400:13] *= 3e4  # beyond float16
    return inside(values.to(dtype), 1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_same_bits_of_elements(internals: ModuleType, dtype: torch.dtype, count: int) -> None:
    kind, x, weights = FLOAT_DTYPES.index(dtype), normal(count, dtype), normal(count, seed=1)
    bits = torch.randint(0, 256, (3, count // 8 + 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    y, plane, planes = torch.zeros_like(x), torch.zeros(count // 8 + 1).byte(), torch.zeros(3, count // 8 + 1).byte()
    for limits in ((0.0, NAN, 0.0), (-0.1, 0.1, 0.0), (0.0, NAN, 0.01)):
        results(internals, "clamp_pack", {"y": y, "bits": plane}, kind, x, count, *limits, "y", "bits")
    for first in (0, 3):
        for on, off in ((1.0, 0.0), (1.1, 0.0), (1.0, 0.01)):
            results(internals, "bit_scale", {"y": y}, kind, x, bits, first, count, on, off, "y")
        arguments = (kind, x, bits, bits.shape[1], first, count, normal(8, seed=3), "y")
        results(internals, "level_scale", {"y": y}, *arguments)
    edges = torch.linspace(-3.0, 3.0, 7)
    results(internals, "level_pack", {"planes": planes}, kind, x, edges, count, "planes", planes.shape[1])
    results(internals, "scale_by", {"y": y}, kind, x, weights, count, "y")
    results(internals, "scale_all", {"y": y}, kind, x, 1.7, count, "y")
    results(internals, "pack_bits", {"bits": plane}, x.view(torch.uint8), count, "bits")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_same_bits_of_activations(internals: ModuleType, kind: int, count: int) -> None:
    x = activation_inputs(count, torch.Generator().manual_seed(0))
    y, codes = torch.zeros(count), torch.zeros(3, count, dtype=torch.uint8)
    results(internals, "slope_pack", {"y": y, "codes": codes}, kind, x, count, "y", "codes", count)
    codes = torch.randint(0, 256, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    results(internals, "slope_scale", {"y": y}, normal(count), codes, count, count, "y")
    for place, dtype in enumerate(FLOAT_DTYPES):
        grad, at, dx = normal(count, dtype), x.to(dtype), torch.zeros(count, dtype=dtype)
        results(internals, "activation_grad", {"dx": dx}, place, kind, grad, at, count, "dx")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_same_bits_of_norms(
    internals: ModuleType, dtype: torch.dtype, count: int, packed: bool, weighted: bool
) -> None:
    kind, grad, x = FLOAT_DTYPES.index(dtype), normal(count, dtype), normal(count, dtype, 1)
    if packed:
        x = x.float().clamp(-99.0, 99.0).to(torch.int8)
    dx, sums = torch.zeros_like(grad), torch.zeros(count)
    weight: Any = normal(count, seed=2) if weighted else 0
    norm = (0.3, 0.7, 1.3)
    results(internals, "layer_norm_row", {"dx": dx}, kind, packed, grad, x, count, *norm, weight, "dx")
    for channels in (1, 3):
        steps = count // channels
        arguments = (kind, packed, grad, x, channels, steps, *norm, weight, "sums", "dx")
        results(internals, "group_norm_group", {"dx": dx, "sums": sums}, *arguments)
    if not packed and not weighted:
        codes = torch.zeros(count, dtype=torch.int8)
        results(internals, "quantize_row", {"codes": codes}, kind, x, count, 0.3, 1.3, "codes")
        for rows in (1, 3, 9):
            arguments = (kind, grad, rows, count // rows, "sums", False)
            results(internals, "add_rows", {"sums": torch.ones(count + 16)}, *arguments)
