"""The history of charges: exact unions, copies and forks, and the file that outlives a crash."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_bitfit_kernels import _history
from dp_bitfit_kernels._history import History, Segment
from dp_bitfit_kernels._validate import CheckpointError, EngineError
from dp_bitfit_kernels.accounting import Accountant


def charged(history: History, *pairs: tuple[float, float]) -> History:
    for noise, rate in pairs:
        history.charge(noise, rate)
    return history


def releases(segments: list[Segment]) -> dict[tuple[str, int], tuple[float, float]]:
    """Every release by (run, number); fails on one that is recorded twice."""
    result: dict[tuple[str, int], tuple[float, float]] = {}
    for s in segments:
        for number in range(s.first, s.first + s.count):
            assert (s.run, number) not in result
            result[s.run, number] = (s.noise_multiplier, s.sample_rate)
    return result


def test_equal_releases_are_run_length_coded() -> None:
    history = charged(History(), (1.0, 0.1), (1.0, 0.1), (2.0, 0.1), (1.0, 0.1))
    assert [(s.first, s.count) for s in history.segments] == [(0, 2), (2, 1), (3, 1)]
    assert history.total_steps == 4
    assert len({s.run for s in history.segments}) == 1


def test_resume_keeps_the_history_and_epsilon_never_falls() -> None:
    """Save, lose, load an old and then a new checkpoint: nothing that was released is forgotten or counted twice."""
    accountant = Accountant()
    spent = [0.0]
    for _ in range(3):
        charged(accountant.history, *[(1.0, 0.05)] * 5)
        spent.append(accountant.get_epsilon(1e-5))
    old = json.loads(json.dumps(accountant.history.to_list()))
    charged(accountant.history, *[(1.0, 0.05)] * 4)
    new = json.loads(json.dumps(accountant.history.to_list()))

    resumed = Accountant(history=History.from_list(old))
    assert resumed.get_epsilon(1e-5) == spent[-1]
    charged(resumed.history, *[(1.0, 0.05)] * 2)
    spent.append(resumed.get_epsilon(1e-5))
    for values, total in ((old, 17), (new, 21), (old, 21), (new, 21)):
        resumed.history.merge(History.from_list(values).segments)
        assert resumed.history.total_steps == total
        spent.append(resumed.get_epsilon(1e-5))
    assert spent == sorted(spent)
    assert spent[-1] == Accountant().get_epsilon(1e-5, ((1.0, 0.05, 21),))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12), st.integers(1, 8)), max_size=5), max_size=4)
)
def test_merge_is_the_exact_union(histories: list[list[tuple[str, int, int]]]) -> None:
    """Whatever pieces of runs are merged in whatever order, each (run, number) is there exactly once."""
    merged = History()
    expected: set[tuple[str, int]] = set()
    for pieces in histories:
        # noise changes inside a run, so that segments cannot all be joined
        segments = [Segment(r, i, 1, 1.0 + i // 4, 0.1) for r, first, n in pieces for i in range(first, first + n)]
        merged.merge(segments)
        expected |= {(s.run, s.first) for s in segments}
        assert set(releases(merged.segments)) == expected
        assert merged.total_steps == len(expected)
    long = [Segment(r, f, n, 3.0, 0.1) for pieces in histories for r, f, n in pieces]
    other = History()
    other.merge(long)
    assert set(releases(other.segments)) == {(s.run, i) for s in long for i in range(s.first, s.first + s.count)}


def test_histories_that_contradict_each_other_are_refused() -> None:
    history = charged(History(), (1.0, 0.1), (1.0, 0.1))
    (segment,) = history.segments
    forged = Segment(segment.run, 1, 5, 50.0, 0.1)
    with pytest.raises(CheckpointError, match="release 1 of run"):
        history.merge([forged])
    assert history.segments == [segment]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "x",
        {"run": "a", "first": 0, "count": 1, "noise_multiplier": 1.0},
        {"run": "a", "first": 0, "count": 0, "noise_multiplier": 1.0, "sample_rate": 0.1},
        {"run": "a", "first": -1, "count": 1, "noise_multiplier": 1.0, "sample_rate": 0.1},
        {"run": "a", "first": 0, "count": 1, "noise_multiplier": -1.0, "sample_rate": 0.1},
        {"run": "a", "first": 0, "count": 1, "noise_multiplier": math.nan, "sample_rate": 0.1},
        {"run": "a", "first": 0, "count": 1, "noise_multiplier": 1.0, "sample_rate": 7},
        {"run": 1, "first": 0, "count": 1, "noise_multiplier": 1.0, "sample_rate": 0.1},
    ],
)
def test_records_that_make_no_sense_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        History.from_list([value])


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_a_copy_charges_under_its_own_run(clone: Any) -> None:
    history = charged(History(), (1.0, 0.1))
    twin = clone(history)
    assert twin.segments == history.segments
    charged(history, (1.0, 0.1))
    charged(twin, (1.0, 0.1))
    history.merge(twin.segments)
    assert history.total_steps == 3


def in_a_child(work: Callable[[], None]) -> int:
    """Wait status of a forked child that does `work`; 0 only if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def test_a_forked_process_charges_under_its_own_run(tmp_path: Path) -> None:
    history = charged(History(tmp_path / "h"), (1.0, 0.1))
    assert in_a_child(lambda: history.charge(1.0, 0.1)) == 0
    charged(history, (1.0, 0.1))
    history.close()
    assert len(releases(History(tmp_path / "h").segments)) == 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_a_charge_is_on_disk_before_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(len(path.read_text()) if path.exists() else 0)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    history = History(path)
    for n in range(1, 4):
        before = len(synced)
        history.charge(1.0, 0.1)
        assert len(lines(path)) == 1 + n
        assert len(synced) > before
        assert synced[-1] == len(path.read_text())  # synced after the last byte was written


def test_a_killed_process_loses_no_release(path: Path) -> None:
    def work() -> None:
        accountant = Accountant(path=path)
        for _ in range(5):
            accountant.charge(1.5, 0.25)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_a_child(work)) == signal.SIGKILL
    accountant = Accountant(path=path)  # the lock died with the process
    assert accountant.history.total_steps == 5
    accountant.charge(1.5, 0.25)
    assert accountant.get_epsilon(1e-5) == Accountant().get_epsilon(1e-5, ((1.5, 0.25, 6),))


def test_a_file_is_continued_exactly(path: Path) -> None:
    first = charged(History(path), (1.0, 0.1), (0.1 + 0.2, 1000 / 67349))
    segments = first.segments
    first.close()
    second = charged(History(path), (1.0, 0.1))
    assert second.segments[:2] == segments
    assert second.segments[2].run != segments[0].run
    second.merge([Segment("ab", 0, 7, 2.0, 0.5), segments[0]])
    second.close()
    assert History(path).total_steps == 10


def test_a_file_torn_anywhere_counts_every_release(path: Path) -> None:
    charged(History(path), (1.0, 0.1), (2.0, 0.2), (3.0, 0.3)).close()
    whole = path.read_bytes()
    header, *records = whole.splitlines(keepends=True)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        read = whole[:end].count(b"\n") - 1  # whole records
        torn = whole[:end].rpartition(b"\n")[2] if end > len(header) else b""
        parseable = torn + b"\n" in records
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = History(path)
        assert any("torn" in str(w.message) for w in caught) == (bool(torn) and not parseable)
        # The very first record has none before it to be counted like; no noise was drawn for it either.
        total = max(read, 0) + (bool(torn) and (parseable or read > 0))
        assert history.total_steps == total
        history.charge(1.0, 0.1)
        history.close()
        again = History(path)
        assert again.total_steps == total + 1  # mended for good
        again.close()


@pytest.mark.parametrize("damage", [b"garbage\n", b'{"run": "a"}\n', b"\xff\xfe\n", b"\n"])
def test_a_damaged_middle_is_refused_and_left_alone(path: Path, damage: bytes) -> None:
    charged(History(path), (1.0, 0.1), (1.0, 0.1)).close()
    data = path.read_bytes().splitlines(keepends=True)
    broken = b"".join([*data[:2], damage, *data[2:]])
    path.write_bytes(broken)
    with pytest.raises(CheckpointError, match="line 3"):
        History(path)
    assert path.read_bytes() == broken


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"\x00" * 20, b'{"format": "other", "version": 1}\n', b"\n"])
def test_a_foreign_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a history file"):
        History(path)
    assert path.read_bytes() == content


def test_an_edited_file_that_counts_a_release_twice_is_refused(path: Path) -> None:
    charged(History(path), (1.0, 0.1), (1.0, 0.1)).close()
    data = path.read_bytes()
    path.write_bytes(data + data.splitlines(keepends=True)[-1])
    with pytest.raises(CheckpointError, match="twice"):
        History(path)


def test_a_file_has_one_writer(path: Path) -> None:
    history = charged(History(path), (1.0, 0.1))
    with pytest.raises(EngineError, match="in use"):
        History(path)

    def second() -> None:
        with pytest.raises(EngineError, match="in use by another engine or process"):
            History(path)

    assert in_a_child(second) == 0
    history.close()
    with pytest.raises(EngineError, match="closed"):
        history.charge(1.0, 0.1)
    assert charged(History(path), (1.0, 0.1)).total_steps == 2


def test_a_history_with_a_file_is_not_pickled(path: Path) -> None:
    with pytest.raises(EngineError, match="pickled"):
        pickle.dumps(History(path))


def test_a_full_disk_stops_the_releases_and_keeps_the_file_readable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = charged(History(path), (1.0, 0.1), (1.0, 0.1))
    real = os.write
    calls: list[int] = []

    def write(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) == 1:
            return real(fd, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_history.os, "write", write)
    with pytest.raises(CheckpointError, match="No space left"):
        history.charge(1.0, 0.1)
    monkeypatch.setattr(_history.os, "write", real)
    with pytest.raises(EngineError, match="closed"):
        history.charge(1.0, 0.1)
    with pytest.warns(RuntimeWarning, match="torn"):
        assert History(path).total_steps == 3


def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        History(tmp_path / "missing" / "history.jsonl")
