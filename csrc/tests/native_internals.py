"""Builds and imports the test-only module; run as a script it only builds."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the module)

NAME = "_dp_bitfit_native_internals"
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native-tests"


def build() -> None:
    """Configure and build through the project's CMakeLists.txt; quick where nothing changed."""
    scripts = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=scripts) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=scripts) or shutil.which("ninja")
    if cmake is None:
        raise FileNotFoundError("cmake was not found")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    options = ["-DDP_BITFIT_TEST_MODULE=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *options],
        [cmake, "--build", str(BUILD), "--target", NAME, "--parallel"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def load() -> ModuleType:
    """The module, built first if it is not there."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    if not any(BUILD.glob(f"{NAME}*.so")):
        build()
    path = next(BUILD.glob(f"{NAME}*.so"))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


if __name__ == "__main__":
    build()
