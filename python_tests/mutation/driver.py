"""Runs every sabotage in a forked child: the changed source is loaded in place of the file, then pytest runs the tests.

Prints one JSON line a sabotage. PyTorch and pytest are imported once, before the first fork; the package is not.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy  # noqa: F401 - imported once for all children, as are the next slow ones
import pytest
import scipy.stats  # noqa: F401
import torch
import torch._dynamo  # the first optimizer would import it in every child

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
PACKAGE = TESTS.parent / "dp_bitfit_kernels"
sys.path[:0] = [str(HERE), str(TESTS), str(TESTS.parent)]

from sabotage import Sabotage  # noqa: E402
from sabotages import SABOTAGES  # noqa: E402


class _Loader(importlib.machinery.SourceFileLoader):
    changes: tuple[tuple[str, str], ...] = ()

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        source = Path(self.path).read_text(encoding="utf-8")
        for old, new in self.changes:
            if source.count(old) != 1:
                raise SystemExit(f"{self.path}: {old!r} occurs {source.count(old)} times")
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: dict[str, tuple[tuple[str, str], ...]]):
        self.changes = changes

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname not in self.changes:
            return None
        file = PACKAGE.parent.joinpath(*fullname.split(".")).with_suffix(".py")
        loader = _Loader(fullname, str(file))
        loader.changes = self.changes[fullname]
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


def module_of(file: str) -> str:
    return "dp_bitfit_kernels." + file.removesuffix(".py").replace("/", ".")


def run_child(sabotage: Sabotage) -> None:
    changes: dict[str, tuple[tuple[str, str], ...]] = {}
    for file, old, new in ((sabotage.file, sabotage.old, sabotage.new), *sabotage.also):
        changes[module_of(file)] = (*changes.get(module_of(file), ()), (old, new))
    if not sabotage.native:
        reason = "def native_available(device_type: str) -> str | None:\n"
        changes["dp_bitfit_kernels._extension"] = ((reason, reason + "    return 'left out by the mutation suite'\n"),)
    sys.meta_path.insert(0, _Finder(changes))
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(str(TESTS / test) for test in sabotage.tests)]
    os._exit(int(pytest.main(arguments)))


def outcome(sabotage: Sabotage) -> dict[str, object]:
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            with contextlib.suppress(SystemExit):
                run_child(sabotage)
            os._exit(99)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    code = os.waitstatus_to_exitcode(status)
    return {"name": sabotage.name, "code": code, "seconds": time.perf_counter() - start, "tail": text[-1500:]}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for sabotage in SABOTAGES:
        if not names or sabotage.name in names:
            print(json.dumps(outcome(sabotage)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
