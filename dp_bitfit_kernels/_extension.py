"""Loads the compiled kernels; the only file that knows where they are."""

from __future__ import annotations

import importlib
import importlib.machinery
import warnings
from pathlib import Path

from . import _ops  # noqa: F401  (the schemas must exist before a module registers kernels for them)

_MODULES = {"cpu": "_C"}  # device type -> compiled module
_missing: dict[str, str] = {}  # device type -> why its module is not there
_loaded = False


def load() -> None:
    """Import the compiled modules once. A module that was not built is noted, with one warning for all of them;
    one that was built and does not load is an error of the installation and is raised as it comes."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for device_type, name in _MODULES.items():
        if _built(name):
            importlib.import_module(f"{__package__}.{name}")
        else:
            _missing[device_type] = (
                f"the compiled module {name} was not built (no C++ compiler at installation?); "
                "reinstall dp-bitfit-kernels where a C++17 compiler is on the path"
            )
    if _missing:
        warnings.warn("; ".join(_missing.values()) + ". Other backends serve instead.", stacklevel=2)


def native_available(device_type: str) -> str | None:
    """None if compiled kernels serve ``device_type``, else the reason why not."""
    load()
    if device_type not in _MODULES:
        return f"there are no compiled kernels for device type {device_type!r}"
    return _missing.get(device_type)


def _built(name: str) -> bool:
    folder = Path(__file__).parent
    return any((folder / (name + suffix)).exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)
