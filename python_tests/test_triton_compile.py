"""Every Triton kernel compiled for GPUs without one: vector loads, no spills, no stack, no contraction.

What is compiled is what would be launched: each op is called with tensors on the meta device while its kernels are
replaced by recorders, and the recorded arguments are specialised as Triton does at a launch.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dp_bitfit_kernels import kernels  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

ARCHITECTURES = (80, 90, 100)
MODULES = (
    *("activation", "bias_grad", "clip_factors", "clipped_sum", "noisy_sum", "norm_grad", "packed", "random_words"),
    "scale",
)
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
LOAD16 = r"ld\.global[.\w]*\.v(4\.[bf]32|2\.[bf]64)"
STORE16 = r"st\.global[.\w]*\.v(4\.[bf]32|2\.[bf]64)"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def channels_first(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    b, t, p = shape
    return meta(b, p, t, dtype=dtype).transpose(1, 2)


def clip_arguments(batch: int, width: int, groups: int, gamma: float | None) -> tuple[Any, ...]:
    return (
        meta(batch, width),
        meta(groups + 1, dtype=torch.int64),
        meta(batch, dtype=torch.bool),
        meta(groups, dtype=torch.float64),
        meta(groups, dtype=torch.float64),
        None if gamma is None else meta(batch, groups, dtype=torch.float64),
        1.0,
        gamma,
    )


def sum_arguments(batch: int, width: int, groups: int) -> tuple[Any, ...]:
    return (
        meta(width, dtype=torch.int64),
        meta(batch, width),
        meta(groups + 1, dtype=torch.int64),
        meta(batch, groups, dtype=torch.float64),
    )


def stream(first: int) -> tuple[Any, ...]:
    return meta(8, dtype=torch.int32), meta(1, dtype=torch.int64), 0, first


@dataclass(frozen=True)
class Case:
    """One call of an op and what the code of its first kernel must show."""

    name: str
    op: Callable[..., Any]
    arguments: tuple[Any, ...]
    loads16: int  # 16-byte loads of a thread, at least
    registers: int  # at most, of any kernel of the op: how many programs share a multiprocessor
    stores16: int = 0
    erf: bool = False  # the toolkit's, whose polynomials are written with fma: the same ones on every card


BF16, F16 = torch.bfloat16, torch.float16
TEXT, IMAGE, ODD_IMAGE = (64, 512, 768), (64, 256, 3136), (64, 512, 49)
U8, I8 = torch.uint8, torch.int8


def bits(shape: tuple[int, ...], *planes: int) -> torch.Tensor:
    return meta(*planes, (math.prod(shape) + 7) // 8, dtype=U8)


def scale_arguments(shape: tuple[int, ...], dtype: torch.dtype, *others: Any) -> tuple[Any, ...]:
    return meta(*shape, dtype=dtype), *others


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, kept: torch.dtype, reduce: int) -> tuple[Any, ...]:
    row = meta(shape[0] * shape[1])
    shift = None if kept == I8 else row
    return meta(*shape, dtype=dtype), meta(*shape, dtype=kept), shift, row, row, meta(shape[2]), reduce


def group_norm(shape: tuple[int, ...], dtype: torch.dtype, kept: torch.dtype) -> tuple[Any, ...]:
    group = meta(shape[0], 32)
    shift = None if kept == I8 else group
    return meta(*shape, dtype=dtype), meta(*shape, dtype=kept), shift, group, group, meta(shape[1])


def quantize(rows: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return meta(rows, width, dtype=dtype), meta(rows), meta(rows)


F32 = torch.float32
BACKWARD_CASES = (
    Case("text", kernels.pack_bits, (meta(*TEXT, dtype=torch.bool),), 0, 64),
    Case("text_bf16", kernels.clamp_pack, (meta(*TEXT, dtype=BF16), 0.0, 6.0, 0.0), 2, 64, 2),
    Case("image_float32", kernels.clamp_pack_, (meta(*IMAGE), 0.0, 6.0, 0.0), 4, 64, 4),
    Case("text_bf16", kernels.level_pack, (meta(*TEXT, dtype=BF16), meta(7)), 2, 64),
    Case("text_bf16", kernels.bit_scale, scale_arguments(TEXT, BF16, bits(TEXT), 1.0, 0.0, 1), 2, 96, 2),
    Case("text_float32", kernels.bit_scale, scale_arguments(TEXT, F32, bits(TEXT), 1.0, 0.0, 1), 4, 96, 4),
    Case("text_unsummed", kernels.bit_scale, scale_arguments(TEXT, BF16, bits(TEXT), 1.0, 0.0, 0), 1, 64, 1),
    Case("image_bf16", kernels.bit_scale, scale_arguments(IMAGE, BF16, bits(IMAGE), 1.0, 0.0, 2), 2, 96, 2),
    Case("image_7x7", kernels.bit_scale, scale_arguments(ODD_IMAGE, BF16, bits(ODD_IMAGE), 1.0, 0.0, 2), 0, 168),
    *(
        Case(f"text_{k}", kernels.activation_grad, (*(meta(*TEXT, dtype=BF16),) * 2, k, 1), 4, 128, 2, erf=k == 0)
        for k in range(4)
    ),
    Case("image_silu", kernels.activation_grad, (*(meta(*IMAGE, dtype=BF16),) * 2, 2, 2), 4, 128, 2),
    *(Case(f"text_{k}", kernels.slope_pack, (meta(*TEXT), k), 2, 96, 2, erf=k == 0) for k in range(4)),
    Case("text", kernels.slope_scale, scale_arguments(TEXT, F32, meta(3, math.prod(TEXT), dtype=U8), 1), 4, 112, 4),
    Case("text_bf16", kernels.level_scale, scale_arguments(TEXT, BF16, bits(TEXT, 3), meta(8), 1), 2, 128, 2),
    Case("image_bf16", kernels.affine_grad, scale_arguments(IMAGE, BF16, meta(256), 2), 2, 96, 2),
    Case("text_float32", kernels.affine_grad, scale_arguments(TEXT, F32, meta(768), 1), 4, 96, 4),
    Case("text_bf16", kernels.layer_norm_grad, layer_norm(TEXT, BF16, BF16, 1), 4, 128, 2),
    Case("text_float32", kernels.layer_norm_grad, layer_norm(TEXT, F32, F32, 1), 8, 128, 4),
    Case("text_int8", kernels.layer_norm_grad, layer_norm(TEXT, BF16, I8, 0), 2, 128, 2),
    Case("wide_bf16", kernels.layer_norm_grad, layer_norm((8, 512, 8192), BF16, BF16, 1), 4, 128, 2),
    Case("beyond_registers", kernels.layer_norm_grad, layer_norm((8, 512, 20_480), BF16, BF16, 1), 4, 168, 2),
    Case("image_bf16", kernels.group_norm_grad, group_norm(IMAGE, BF16, BF16), 4, 168, 2),
    Case("image_int8", kernels.group_norm_grad, group_norm(IMAGE, BF16, I8), 2, 168, 2),
    Case("image_7x7", kernels.group_norm_grad, group_norm(ODD_IMAGE, BF16, BF16), 0, 128),
    Case("text_bf16", kernels.quantize_norm, quantize(64 * 512, 768, BF16), 2, 96),
    Case("image_bf16", kernels.quantize_norm, quantize(64 * 32, 8 * 3136, BF16), 2, 128),
)
CASES = (
    Case("text_bf16", kernels.bias_grad, (meta(64, 512, 768, dtype=BF16),), 4, 80),
    Case("text_float32", kernels.bias_grad, (meta(64, 512, 768),), 8, 80),
    Case("two_stages", kernels.bias_grad, (meta(1, 1_000_000, 768, dtype=F16),), 4, 80),
    Case("p_200", kernels.bias_grad_, (meta(32, 200), meta(32, 12, 200, dtype=BF16)), 4, 80),
    Case("one_row", kernels.bias_grad_, (meta(32, 768), meta(32, 1, 768, dtype=BF16)), 3, 64, 2),
    Case("image_bf16", kernels.bias_grad, (channels_first(64, 3136, 64, dtype=BF16),), 4, 80),
    Case("image_float32", kernels.bias_grad, (channels_first(64, 196, 256, dtype=torch.float32),), 8, 80),
    Case("image_7x7", kernels.bias_grad, (channels_first(64, 49, 512, dtype=BF16),), 0, 192),
    Case("every_second", kernels.bias_grad, (meta(8, 512, 1536)[..., ::2],), 0, 192),
    Case(
        "beyond_2^31",
        kernels.bias_grad,
        (meta(8, 2**22, 1024, dtype=BF16).as_strided((8, 2**22, 768), (2**32, 1024, 1)),),
        4,
        96,
    ),
    Case("one_group", kernels.clip_factors, clip_arguments(64, 300_000, 1, None), 4, 64),
    Case("layers", kernels.clip_factors, clip_arguments(64, 300_000, 200, 0.01), 4, 128),
    Case("one_group", kernels.clipped_sum_, sum_arguments(64, 300_000, 1), 8, 80, 2),
    Case("layers", kernels.clipped_sum_, sum_arguments(64, 300_000, 200), 4, 168, 2),
    Case("aligned", kernels.noisy_sum, (meta(300_000, dtype=torch.int64), *stream(0), 1.0, 1.0), 4, 80, 2),
    Case("slice", kernels.noisy_sum, (meta(1001, dtype=torch.int64), *stream(2**32 + 3), 1.0, 1.0), 0, 80),
    Case("odd_first", kernels.random_words, (*stream(9), 100), 0, 64),
    Case("words", kernels.random_words, (*stream(0), 67_349), 0, 64),
    *BACKWARD_CASES,
)


@dataclass(frozen=True)
class Launch:
    """Arguments of one recorded launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def record(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of one call."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert 0 < grid[0] < 2**31

            def launch(*args: Any, **kwargs: Any) -> None:
                names = self.kernel.arg_names
                options = {k: v for k, v in kwargs.items() if k not in names}
                given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
                launches.append(Launch(self.kernel, given, options))

            return launch

    for name in MODULES:
        module = importlib.import_module(f"dp_bitfit_kernels.kernels.{name}")
        for attribute, value in inspect.getmembers(module):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, Recorder(value))
    case.op(*case.arguments)
    return launches


def compile_launch(launch: Launch, architecture: int) -> Any:
    """The kernel as a launch on a card of ``architecture`` would compile it."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for parameter in launch.kernel.params:
        value, place = launch.arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr:
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            hints[place] = [["tt.divisibility", 16]]
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        else:
            assert isinstance(value, int), f"{parameter.name}: a Python float would be rounded to float32"
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                if value == 1:
                    signature[parameter.name], constants[place] = "constexpr", 1
                elif value % 16 == 0:
                    hints[place] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a thread, by the toolkit's own report."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    (usage,) = re.findall(r"REG:\d+.*", report)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op.__name__}-{case.name}")
def test_compiles(
    case: Case, architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    launches = record(case, monkeypatch)
    assert launches
    for number, launch in enumerate(launches):
        assert launch.options["enable_fp_fusion"] is False
        compiled = compile_launch(launch, architecture)
        ptx, usage = compiled.asm["ptx"], resources(compiled, tmp_path)
        name = launch.kernel.fn.__name__
        record_property(f"{name}_{number}", usage)
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"{name}: {usage}"
        assert usage["REG"] <= case.registers, f"{name}: {usage}"
        fused = r"\b(cos|sin|lg2)\.approx" if case.erf else r"\bfma\.|\b(cos|sin|lg2)\.approx"
        assert not re.search(fused, ptx), f"{name}: contracted or approximate arithmetic"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: an atomic update"
        if number == 0:
            assert len(re.findall(LOAD16, ptx)) >= case.loads16, name
            assert len(re.findall(STORE16, ptx)) >= case.stores16, name


def test_two_stages_are_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second stage sums the partial sums of the first."""
    case = next(c for c in CASES if c.name == "two_stages")
    first, second = record(case, monkeypatch)
    assert second.arguments["p_grad"] is first.arguments["p_out"]
    assert first.arguments["splits"] > 1 and second.arguments["splits"] == 1


def test_noise_constants_are_whole_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No coefficient went through float32 on its way into the code."""
    module = importlib.import_module("dp_bitfit_kernels.kernels.noisy_sum")
    case = next(c for c in CASES if c.op is kernels.noisy_sum)
    (launch,) = record(case, monkeypatch)
    ptx = compile_launch(launch, 90).asm["ptx"]
    constants = [v.value for v in vars(module).values() if isinstance(v, triton.language.constexpr)]
    assert len(constants) == 26
    for constant in constants:
        # A sign may have moved into a subtraction, a >= may have become a >.
        digits = {f"0d{struct.pack('>d', sign * constant).hex().upper()}" for sign in (1.0, -1.0)}
        if isinstance(constant, int):
            digits = {str(constant), str(constant - 1)}
        assert any(d in ptx for d in digits), constant
