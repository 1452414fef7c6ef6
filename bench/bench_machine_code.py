"""What the compilers made of the GPU kernels, without a GPU: registers, stack, 16-byte loads, programs side by side.

    python -m bench.bench_machine_code [--save]
    PYTHONPATH=build/triton-3.6.0 python -m bench.bench_machine_code --save      the Triton kernels under that Triton

Loads are counted in the code, the turns of a loop and tails included. This bounds what a kernel can reach (nothing
spills, how many programs share a multiprocessor); what it does reach needs a GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton

from bench import results
from bench.environment import environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))

import test_cuda_compile as of_cuda
import test_triton_compile as of_triton

REGISTERS, THREADS, PROGRAMS = 65_536, 2_048, 32  # of a multiprocessor of compute capability 8.0, 9.0 and 10.0


def _resident(registers: int, threads: int) -> int:
    """Programs that share a multiprocessor: registers come by 8 a thread."""
    each = -(-registers // 8) * 8 * threads
    return min(PROGRAMS, THREADS // threads, REGISTERS // each)


def _row(registers: int, threads: int, stack: int, loads: int) -> dict[str, int]:
    return {
        "registers": registers,
        "stack": stack,
        "threads": threads,
        "loads_of_16_bytes": loads,
        "programs_a_multiprocessor": _resident(registers, threads),
    }


def triton_kernels(architecture: int) -> dict[str, dict[str, int]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for case in of_triton.CASES:
            for number, launch in enumerate(of_triton.record(case, patch)):
                compiled = of_triton.compile_launch(launch, architecture)
                used = of_triton.resources(compiled, Path(folder))
                loads = len(re.findall(of_triton.LOAD16, compiled.asm["ptx"]))
                threads = 32 * compiled.metadata.num_warps
                name = f"{case.op.__name__} {case.name}" + (f" launch {number + 1}" if number else "")
                found[name] = _row(used["REG"], threads, used["STACK"] + used["LOCAL"], loads)
            patch.undo()
    return found


# Threads of a block, as the launches have them.
CUDA_THREADS = {"clip_factors": 1_024, "clipped_sum": 128, "noisy_sum": 128, "plain_release": 128, "random_words": 128}


def cuda_kernels(architecture: int) -> dict[str, dict[str, int]]:
    if not of_cuda.MODULE.exists():
        return {}
    loads, found = of_cuda.wide_loads(f"sm_{architecture}"), {}
    for name, used in of_cuda.usage(f"sm_{architecture}").items():
        threads = next((count for part, count in CUDA_THREADS.items() if part in name), 256)
        short = re.sub(r"^_ZN3dpk4cuda\d+|NS0_\d+|E+v.*$", "", name)
        found[short] = _row(used["REG"], threads, used["STACK"] + used["LOCAL"], loads.get(name, 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    content: dict[str, Any] = {"bench": "machine_code", "environment": environment()}
    for architecture in of_triton.ARCHITECTURES:
        parts = {f"triton {triton.__version__}": triton_kernels(architecture), "cuda": cuda_kernels(architecture)}
        content[f"sm_{architecture}"] = parts
        for part, kernels in parts.items():
            for name, row in kernels.items():
                print(
                    f"sm_{architecture} {part:13s} {name:60s} {row['registers']:4d} registers, {row['stack']} stack, "
                    f"{row['loads_of_16_bytes']:2d} wide loads, {row['programs_a_multiprocessor']:2d} programs"
                )
    if given.save:
        results.write(f"triton-{triton.__version__}.json", content, "machine_code")


if __name__ == "__main__":
    main()
