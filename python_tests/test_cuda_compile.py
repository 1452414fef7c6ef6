"""What nvcc made of the CUDA kernels, read off the module: no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import dp_bitfit_kernels

MODULE = Path(dp_bitfit_kernels.__file__).parent / "_C_cuda.abi3.so"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

pytestmark = pytest.mark.skipif(not MODULE.exists(), reason="_C_cuda was not built (no CUDA compiler)")

# Most registers of a thread: how many blocks share a multiprocessor.
REGISTERS = {
    "bias_grad_features_last_kernel": 64,  # four blocks of 256
    "bias_grad_channels_first_kernel": 64,
    "clip_factors_kernel": 64,  # one block of 1,024
    "clipped_sum_kernelILi1ELb0": 128,
    "clipped_sum_kernelILi4ELb0": 128,
    "clipped_sum_kernelILi1ELb1": 96,
    "clipped_sum_kernelILi4ELb1": 96,
    "noisy_sum_kernel": 64,
    "plain_release_kernel": 64,
    "random_words_kernel": 64,
    "scale_features_last_kernel": 80,
    "scale_channels_first_kernel": 80,
    "ENS0_10ActivationE": 128,  # erf, exp and a division, of eight elements side by side
    "pack_bits_kernel": 64,
    "clamp_pack_kernel": 64,
    "level_pack_kernel": 64,
    "slope_pack_kernel": 64,
    "layer_norm_grad_kernel": 128,  # one block of 512
    "group_norm_grad_kernel": 64,
    "quantize_norm_kernel": 64,
}
# 16-byte loads of global memory, at least.
WIDE_LOADS = {
    "bias_grad_features_last_kernelINS0_7Float32ELi4": 4,
    "bias_grad_features_last_kernelINS0_8BFloat16ELi8": 4,
    "bias_grad_features_last_kernelINS0_7Float16ELi8": 4,
    "bias_grad_channels_first_kernelINS0_7Float32ELi4": 4,
    "bias_grad_channels_first_kernelINS0_8BFloat16ELi8": 4,
    "bias_grad_channels_first_kernelINS0_7Float16ELi8": 4,
    "clip_factors_kernel": 4,
    "clipped_sum_kernelILi4ELb0": 4,
    "clipped_sum_kernelILi4ELb1": 8,
    "noisy_sum_kernelILb1": 4,
    "scale_features_last_kernelINS0_7Float32ELi4": 2,
    "scale_features_last_kernelINS0_8BFloat16ELi8": 2,
    "scale_channels_first_kernelINS0_8BFloat16ELi8": 2,
    "Li8ENS0_10ActivationE": 4,
    "clamp_pack_kernelINS0_7Float32ELi4": 2,
    "clamp_pack_kernelINS0_8BFloat16ELi8": 1,
    "level_pack_kernelINS0_8BFloat16ELi8": 1,
    "slope_pack_kernelILi4": 1,
    "layer_norm_grad_kernelINS0_7Float32ES2_Li4": 8,
    "layer_norm_grad_kernelINS0_8BFloat16ES2_Li8": 4,
    "layer_norm_grad_kernelINS0_8BFloat16EaLi8": 2,
    "group_norm_grad_kernelINS0_8BFloat16ES2_Li8": 4,
    "quantize_norm_kernelINS0_8BFloat16ELi8": 2,
}


@cache
def dump(*arguments: str) -> str:
    bundled = None
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        pass
    tool = shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    return subprocess.run([tool, *arguments, str(MODULE)], check=True, capture_output=True, text=True).stdout


def usage(architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack and local memory by kernel."""
    found: dict[str, dict[str, int]] = {}
    current, name = "", ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (\w+)", line):
            current = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif current == architecture and "REG:" in line:
            found[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found


def wide_loads(architecture: str) -> dict[str, int]:
    """16-byte loads of global memory in the machine code, by kernel."""
    found: dict[str, int] = {}
    name = ""
    for line in dump("-arch", architecture, "--dump-sass").splitlines():
        if match := re.search(r"Function : (\w+)", line):
            name = match[1]
            found[name] = 0
        elif re.search(r"\bLDG\.\S*128", line):
            found[name] += 1
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture: str) -> None:
    kernels = usage(architecture)
    if not kernels:
        pytest.skip(f"built without {architecture}")
    for expected in REGISTERS:
        assert any(expected in name for name in kernels), expected
    for name, used in kernels.items():
        assert used["STACK"] == 0, name
        assert used["LOCAL"] == 0, name
        assert used["REG"] <= max(limit for part, limit in REGISTERS.items() if part in name), (name, used)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_are_sixteen_bytes_wide(architecture: str) -> None:
    if not usage(architecture):
        pytest.skip(f"built without {architecture}")
    loads = wide_loads(architecture)
    for part, least in WIDE_LOADS.items():
        found = [count for name, count in loads.items() if part in name]
        assert found and min(found) >= least, (part, found)


def test_newer_cards_find_ptx() -> None:
    assert "sm_100" not in usage("sm_100") or "arch = sm_100" in dump("--list-ptx")
    assert "PTX file" in dump("--list-ptx")
