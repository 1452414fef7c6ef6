"""Checkpoints: round trips, refusal of damage and of code, and survival of a kill in mid-write."""

from __future__ import annotations

import builtins
import copy
import os
import pathlib
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import equal, trained, values
from torch import nn

from dp_bitfit_kernels import checkpoint
from dp_bitfit_kernels._validate import CheckpointError
from dp_bitfit_kernels.checkpoint import read_checkpoint, save_biases, write_checkpoint

PAYLOAD: dict[str, Any] = {
    "step": 3,
    "big": 2**80,
    "rate": 0.1,
    "none": None,
    "raw": b"\x00\xff",
    "flag": True,
    "optimizer": {"state": {0: {"exp_avg": torch.arange(4.0)}}, "groups": [{"betas": (0.9, 0.99)}]},
    "ordered": OrderedDict(a=torch.ones(2, dtype=torch.bfloat16)),
    "shape": torch.Size([2, 3]),
    "dtype": torch.float16,
    "set": {1, 2},
    "history": [["a1", 0, 5, 1.0, 0.25]],
}


def test_checkpoint_round_trip(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "c", PAYLOAD)
    read = read_checkpoint(tmp_path / "c")
    assert repr(read) == repr(PAYLOAD)
    assert os.listdir(tmp_path) == ["c"]
    write_checkpoint(tmp_path / "c", {"step": 4})
    assert read_checkpoint(tmp_path / "c") == {"step": 4}


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (lambda x: x, r"payload\['a'\]\[1\]\['b'\] is a builtins.function"),
        (np.float64(1), r"payload\['a'\]\[1\]\['b'\] is a numpy"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_could_not_be_read_back_is_refused_by_place(value: object, place: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=place):
        write_checkpoint(tmp_path / "c", {"a": (0, {"b": value})})
    assert not os.listdir(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c"
    write_checkpoint(path, PAYLOAD)
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    for length in (0, 10, len(checkpoint._MAGIC) + 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint"):
            read_checkpoint(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "missing")


def test_no_code_in_a_checkpoint_is_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    monkeypatch.setattr(checkpoint, "_require_plain", lambda value, place: None)
    write_checkpoint(tmp_path / "c", {"a": Bomb()})
    with pytest.raises(CheckpointError, match="not plain"):
        read_checkpoint(tmp_path / "c")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("fails", ["fsync", "replace", "write"])
def test_a_failed_write_keeps_the_old_file(fails: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained()
    write_checkpoint(tmp_path / "c", {"step": 1})
    save_biases(source, tmp_path / "f")
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr(builtins, "open", broken)
    else:
        monkeypatch.setattr(os, fails, broken)
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
        write_checkpoint(tmp_path / "c", {"step": 2})
    with torch.no_grad():
        source[0].bias.add_(1)
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
        save_biases(source, tmp_path / "f")
    monkeypatch.undo()
    assert old == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def test_data_is_synced_before_it_is_moved_and_the_folder_after(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_sync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def logged_replace(source: str, target: str) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_checkpoint(tmp_path / "c", {"step": 1})
    assert calls == ["file", "replace", "folder"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes and signals")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_killed_in_mid_write_leaves_the_old_checkpoint(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c"
    write_checkpoint(path, PAYLOAD)
    old = path.read_bytes()
    reader, writer = os.pipe()

    def parts() -> Iterator[bytes]:
        yield b"new" * 100_000
        os.write(writer, b"half")
        time.sleep(60)
        yield b"rest"

    child = os.fork()
    if child == 0:
        try:
            checkpoint.write_atomically(path, parts())
        finally:
            os._exit(1)
    assert os.read(reader, 4) == b"half"
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2, "the child was not killed in the middle of a write"
    assert path.read_bytes() == old
    assert repr(read_checkpoint(path)) == repr(PAYLOAD)
    write_checkpoint(path, {"step": 2})
    assert read_checkpoint(path) == {"step": 2}


def test_a_symbolic_link_stays_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_checkpoint(tmp_path / "link", {"step": 1})
    assert (tmp_path / "link").is_symlink()
    assert read_checkpoint(tmp_path / "real") == {"step": 1}


def test_saving_changes_nothing_and_repeats(tmp_path: pathlib.Path) -> None:
    source = trained()
    before = values(source)
    save_biases(source, tmp_path / "a")
    save_biases(copy.deepcopy(source), tmp_path / "b")
    assert equal(before, values(source))
    first, second = (checkpoint._read_biases(tmp_path / name) for name in ("a", "b"))
    assert first[0] == second[0]
    assert equal(list(first[1].values()), list(second[1].values()))
