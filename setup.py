"""Calls CMake for the compiled modules; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SCRIPTS = str(Path(sys.executable).parent)  # the environment's own cmake and ninja, activated or not


class CMakeBuild(build_ext):
    """Builds every extension through CMakeLists.txt; where CMake finds no compiler, the install is pure Python.

    CMAKE_ARGS in the environment is passed on: -DCMAKE_CUDA_ARCHITECTURES=90, -DDP_BITFIT_NO_CUDA=ON.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake = shutil.which("cmake", path=SCRIPTS) or shutil.which("cmake")
        ninja = shutil.which("ninja", path=SCRIPTS) or shutil.which("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        build = ROOT / "build" / ("cmake-ninja" if ninja else "cmake")
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DDP_BITFIT_OUTPUT_DIRECTORY={target.parent}"]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            if cmake is None:
                raise FileNotFoundError("cmake was not found")
            subprocess.run([cmake, "-S", ROOT, "-B", build, *generator, *options], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"{ext.name} is left out, the PyTorch and Triton backends serve instead: {error}")
            target.unlink(missing_ok=True)
            return
        name = target.name.split(".")[0]
        if name == "_C_cuda" and "DP_BITFIT_CUDA:INTERNAL=ON" not in (build / "CMakeCache.txt").read_text():
            self.warn("_C_cuda is left out: no CUDA compiler was found, or none was wanted; Triton serves GPUs instead")
            target.unlink(missing_ok=True)
            return
        subprocess.run([cmake, "--build", build, "--target", name, "--parallel"], check=True)


setup(
    ext_modules=[
        Extension(f"dp_bitfit_kernels.{name}", sources=[], py_limited_api=True, optional=True)
        for name in ("_C", "_C_cuda")
    ],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
