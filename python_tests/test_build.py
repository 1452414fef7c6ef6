"""What the compiled modules are linked to and made of: one file for every CPython >= 3.10, torch >= 2.11 and x86-64."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dp_bitfit_kernels
from dp_bitfit_kernels import _extension

PACKAGE = Path(dp_bitfit_kernels.__file__).parent
ROOT = PACKAGE.parent
MODULES = {name: PACKAGE / f"{name}.abi3.so" for name in ("_C", "_C_cuda")}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Path:
    if not MODULES[request.param].exists():
        pytest.skip(f"{request.param} was not built")
    return MODULES[request.param]


def output_of(module: Path, tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments, str(module)], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiler_gives_a_compiled_module() -> None:
    """So that the native lane is never skipped for a build that failed silently."""
    assert _extension.native_available("cpu") is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_nvcc_gives_a_cuda_module_that_a_cpu_only_torch_leaves_alone() -> None:
    assert MODULES["_C_cuda"].exists()
    if torch.version.cuda is None:
        assert "without CUDA" in str(_extension.native_available("cuda"))
        assert "dp_bitfit_kernels._C_cuda" not in sys.modules


def test_only_the_stable_interfaces_are_used(module: Path) -> None:
    """Of torch the C functions of its stable ABI (aoti_torch_*, torch_*), and none of its C++."""
    undefined = [
        line.split()[-1].split("@")[0] for line in output_of(module, "nm", "-D", "--undefined-only").splitlines()
    ]
    torch_cpp = [name for name in undefined if re.match(r"_Z\w*(2at|3c10|5torch|5caffe2)", name)]
    assert not torch_cpp
    foreign = [name for name in undefined if "torch" in name and not name.startswith(("aoti_torch_", "torch_"))]
    assert not foreign
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert {name for name in undefined if name.startswith(("Py", "_Py"))} == {
        "PyModule_AddStringConstant",
        "PyModule_Create2",
    }


def test_links_to_nothing_of_this_machine(module: Path) -> None:
    dynamic = output_of(module, "readelf", "-d")
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert ("libtorch_cuda.so" in needed) == (module == MODULES["_C_cuda"])
    assert not [name for name in needed if "cudart" in name]  # linked in: a wheel needs the driver only
    assert not [name for name in needed if "python" in name or name in ("libc10.so", "libtorch.so")]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert str(ROOT).encode() not in module.read_bytes()


@pytest.mark.slow
def test_wide_registers_are_used_by_the_wide_kernels_only() -> None:
    """The module loads and runs on any x86-64: no function outside namespaces avx2, avx512 names an AVX register."""
    module = MODULES["_C"]
    if not module.exists():
        pytest.skip("_C was not built")
    if "x86-64" not in output_of(module, "readelf", "-h").lower():
        pytest.skip("not an x86-64 build")
    function, users, widest = "", set(), set()
    for line in output_of(module, "objdump", "-d", "--no-show-raw-insn").splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
        elif "%ymm" in line or "%zmm" in line or re.search(r"\tv[a-z0-9]+ .*%xmm", line):
            users.add(function)
            if "%zmm" in line:
                widest.add(function)
    assert users - widest and widest, "the avx2 or the avx512 kernels are missing"
    assert not [name for name in users if "4avx2" not in name and "6avx512" not in name]
    assert not [name for name in widest if "6avx512" not in name]


def test_no_build_file_asks_for_this_machines_processor() -> None:
    for name in ("CMakeLists.txt", "setup.py", "Makefile"):
        path = ROOT / name
        if not path.exists():
            pytest.skip("installed without its sources")
        flags = re.sub(r"#.*", "", path.read_text())
        assert "march=native" not in flags
        assert "ffast-math" not in flags


def test_without_compiled_modules_the_package_works_and_says_so_once(tmp_path: Path) -> None:
    """A copy without binaries: one warning, the reference serves, the native backend gives its reason."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from dp_bitfit_kernels import BackendError, _extension, backends
    names = [backends.select("auto", "cpu").name for _ in range(2)]
    rows = backends.select("auto", "cpu").bias_grad(torch.ones(2, 3, 4))
ours = [str(w.message) for w in caught if "was not built" in str(w.message)]
assert len(ours) == 1, ours
assert names == ["reference", "reference"], names
assert rows.tolist() == [[3.0] * 4] * 2
assert "was not built" in _extension.native_available("cpu")
try:
    backends.select("native", "cpu")
except BackendError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "BackendError"
