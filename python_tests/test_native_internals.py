"""Below the native ops: the planner, and that every vector width gives the same bits."""

from __future__ import annotations

import shutil
from types import ModuleType
from typing import Any

import native_internals
import pytest
import torch
from cases import FLOAT_DTYPES
from torch import Tensor

pytest.importorskip("pybind11")
if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

KEY = [0x03020100 + 0x04040404 * i for i in range(8)]
BITS = torch.arange(-(2**15), 2**15).to(torch.int16)  # every pattern of 16 bits


@pytest.fixture(scope="module")
def internals() -> ModuleType:
    return native_internals.load()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, internals: ModuleType) -> str:
    if request.param not in internals.isas():
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


def reduce(internals: ModuleType, isa: str, grad: Tensor) -> Tensor:
    """Sum of grad [T, p] over T by the loop for its layout."""
    out = torch.full((grad.shape[1],), float("nan"))
    loop, stride = (
        (internals.features_last, grad.stride(0)) if grad.stride(1) == 1 else (internals.channels_first, grad.stride(1))
    )
    kind = FLOAT_DTYPES.index(grad.dtype)
    loop(isa, kind, grad.data_ptr(), grad.shape[0], stride, grad.shape[1], out.data_ptr(), False)
    return out


def test_the_widest_loops_are_chosen(internals: ModuleType) -> None:
    assert internals.chosen_isa() == internals.isas()[-1]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
@pytest.mark.parametrize("steps", [0, 1, 7, 16, 63, 64, 127, 300, 2048, 2050, 5000])
@pytest.mark.parametrize("features", [1, 16, 43])
def test_bias_grad_has_the_same_bits_on_every_width(
    internals: ModuleType, dtype: torch.dtype, layout: str, steps: int, features: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (steps, features) if layout == "features_last" else (features, steps)
    grad = torch.randn(shape, generator=generator).to(dtype)
    grad = grad if layout == "features_last" else grad.t()
    first, *others = (reduce(internals, name, grad) for name in internals.isas())
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
def test_every_16_bit_pattern_becomes_its_float32(
    internals: ModuleType, isa: str, dtype: torch.dtype, layout: str
) -> None:
    """Subnormals, infinities and NaN too: each value is summed with zeros only."""
    values = BITS.view(dtype)
    if layout == "features_last":
        tiles = [reduce(internals, isa, tile.unsqueeze(0)) for tile in values.split(1024)]
        got = torch.cat(tiles)
    else:
        padded = torch.zeros(len(values), 19, dtype=dtype)
        padded[:, 17] = values
        got = reduce(internals, isa, padded.t())
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got[~got.isnan()], values[~values.isnan()].float())


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_sum_of_squares(internals: ModuleType, isa: str, count: int) -> None:
    row = torch.randn(count, generator=torch.Generator().manual_seed(1)) * 1e18
    got = internals.sum_of_squares(isa, row.data_ptr(), count)
    assert got == internals.sum_of_squares("baseline", row.data_ptr(), count)
    assert got == pytest.approx(row.double().square().sum().item(), rel=1e-14)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 123.456, 2.0**30, 2.0**60])
def test_add_rounded(internals: ModuleType, isa: str, factor: float) -> None:
    row = torch.randn(1003, generator=torch.Generator().manual_seed(2))
    row[:8] = torch.tensor([0.5, -0.5, 1.5, -1.5, 0.0, -0.0, 1e-45, 2.0**22])
    total = torch.randint(-(2**40), 2**40, (1003,), generator=torch.Generator().manual_seed(3))
    want = total + (row.double() * factor + 0.5).floor().to(torch.int64)
    internals.add_rounded(isa, total.data_ptr(), row.data_ptr(), 1003, factor)
    assert torch.equal(total, want)


@pytest.mark.parametrize("blocks", [1, 3, 8, 17])
def test_words_and_normals_do_not_depend_on_the_width(internals: ModuleType, isa: str, blocks: int) -> None:
    nonce, first = [7, 8, 9], 2**32 - 20
    want = [w for b in range(blocks) for w in internals.words("baseline", KEY, nonce, first + b, 1)]
    assert internals.words(isa, KEY, nonce, first, blocks) == want
    drawn = [z for b in range(blocks) for z in internals.normals("baseline", KEY, nonce, first + b, 1)]
    assert internals.normals(isa, KEY, nonce, first, blocks) == drawn


@pytest.mark.parametrize("largest", [2**40, 2**50 - 2**46, 2**51, 2**62])
def test_add_noise(internals: ModuleType, isa: str, largest: int) -> None:
    """Sums that a float64 holds exactly, and those that it does not: both are integers until they are scaled."""
    generator = torch.Generator().manual_seed(4)
    total = torch.randint(-largest, largest, (1003,), generator=generator)
    total[:2] = torch.tensor([largest, -largest])
    z = torch.randn(1003, generator=generator, dtype=torch.float64)
    noise_std, scale, out = 2.0**40, 1.0 / 3.0, torch.full((1003,), torch.nan)
    internals.add_noise(isa, out.data_ptr(), total.data_ptr(), z.data_ptr(), 1003, noise_std, scale)
    sums = total + (z * noise_std + 0.5).floor().to(torch.int64)
    assert torch.equal(out, (sums.double() * scale).float())


PLANS = [
    ((16, 128, 1024, 1024, 1, 4), "features_last", 1024, 1, "one tile a sample"),
    ((16, 128, 1030, 1030, 1, 4), "features_last", 1024, 1, "6 columns more join the tile"),
    ((16, 128, 1040, 1040, 1, 4), "features_last", 1024, 2, "16 more make a tile"),
    ((16, 128, 50257, 50257, 1, 4), "features_last", 1024, 50, "a vocabulary; 81 columns in the last tile"),
    ((1, 512, 1024, 1024, 1, 4), "features_last", 512, 2, "a lone sample is cut in two"),
    ((1, 4, 1024, 1024, 1, 4), "features_last", 1024, 1, "... unless it is small"),
    ((1, 90000, 33, 33, 1, 4), "features_last", 32, 1, "... or the other part would be shorter than a vector"),
    ((4, 3136, 64, 1, 3136, 4), "channels_first", 64, 1, "an image"),
    ((4, 1000, 1, 1, 1, 4), "channels_first", 1, 1, "one feature is contiguous along T"),
    ((4, 1000, 1, 3, 1, 4), "features_last", 1, 1, "one feature of a slice"),
    ((4, 100, 20, 40, 2, 4), "strided", 20, 1, "neither is contiguous"),
    ((4, 100, 20, 1, 0, 4), "channels_first", 20, 1, "expanded over features"),
    ((4, 0, 20, 20, 1, 4), "features_last", 20, 1, "nothing to sum"),
]


@pytest.mark.parametrize(("arguments", "layout", "tile", "tiles", "why"), PLANS)
def test_plan(internals: ModuleType, arguments: tuple[int, ...], layout: str, tile: int, tiles: int, why: str) -> None:
    plan: dict[str, Any] = internals.plan_bias_grad(*arguments)
    assert (plan["layout"], plan["tile"], plan["tiles"]) == (layout, tile, tiles), why
    assert plan["grain"] >= 1


def test_tiles_cover_every_column_once_and_none_is_shorter_than_a_vector(internals: ModuleType) -> None:
    for batch in (1, 2):
        for features in [*range(1, 200), *range(1000, 1100), *range(2000, 2120), 4096, 5000, 50257]:
            plan = internals.plan_bias_grad(batch, 10_000, features, features, 1, 2)
            last = features - (plan["tiles"] - 1) * plan["tile"]
            assert 1 <= last < internals.MAX_TILE + 16
            assert last >= min(16, features)
            assert plan["tile"] % 16 == 0 or plan["tiles"] == 1
