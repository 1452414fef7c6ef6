"""Loads the compiled kernels; the only file that knows where they are."""

from __future__ import annotations

import importlib
import importlib.machinery
import warnings
from pathlib import Path

import torch

from . import _ops  # noqa: F401  (the schemas must exist before a module registers kernels for them)

_MODULES = {"cpu": "_C", "cuda": "_C_cuda"}  # device type -> compiled module
_missing: dict[str, str] = {}  # device type -> why its module is not there
_loaded = False


def load() -> None:
    """Import the compiled modules once. That the CPU's was not built is said in one warning; GPUs have Triton instead.
    A module that was built and does not load is an error of the installation and is raised as it comes."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for device_type, name in _MODULES.items():
        if device_type == "cuda" and torch.version.cuda is None:
            _missing[device_type] = f"this torch ({torch.__version__}) is built without CUDA"
        elif _built(name):
            importlib.import_module(f"{__package__}.{name}")
        else:
            tool = "C++17 compiler" if device_type == "cpu" else "CUDA compiler (nvcc)"
            _missing[device_type] = (
                f"the compiled module {name} was not built (no {tool} at installation?); "
                f"reinstall dp-bitfit-kernels where a {tool} is on the path"
            )
    if "cpu" in _missing:
        warnings.warn(_missing["cpu"] + ". Other backends serve instead.", stacklevel=2)


def native_available(device_type: str) -> str | None:
    """None if compiled kernels serve ``device_type``, else the reason why not."""
    load()
    if device_type not in _MODULES:
        return f"there are no compiled kernels for device type {device_type!r}"
    return _missing.get(device_type)


def _built(name: str) -> bool:
    folder = Path(__file__).parent
    return any((folder / (name + suffix)).exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)
