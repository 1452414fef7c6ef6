"""The append-only record of releases, in memory and on disk."""

from __future__ import annotations

import json
import math
import os
import warnings
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._validate import AccountingError, CheckpointError, EngineError

_HEADER = {"format": "dp_bitfit_kernels.history", "version": 1}


@dataclass(frozen=True)
class Segment:
    """`count` consecutive releases of one run with equal parameters; release `first` of the run is its first."""

    run: str  # 64 random bits in hexadecimal, one value for each process that charges
    first: int
    count: int
    noise_multiplier: float
    sample_rate: float


def check_charge(noise_multiplier: float, sample_rate: float) -> tuple[float, float]:
    """Both as floats, or an AccountingError that names the one at fault."""
    for name, value in (("noise_multiplier", noise_multiplier), ("sample_rate", sample_rate)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AccountingError(f"{name} must be a finite number, got {value!r}")
    if noise_multiplier < 0:
        raise AccountingError(f"noise_multiplier cannot be negative, got {noise_multiplier!r}")
    if not 0 < sample_rate <= 1:
        raise AccountingError(f"sample_rate must lie in (0, 1], got {sample_rate!r}")
    return float(noise_multiplier), float(sample_rate)


class History:
    """Run-length record of releases. It only grows.

    path: a JSON-lines file. It is read and continued if it exists; each charge is one line, on disk before `charge`
    returns. The file is locked: a second History on it, in any process, is refused until this one is closed.

    A fork or a copy charges under a run name of its own, so that `merge` never takes its releases for another's.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._segments: list[Segment] = []
        self._total = 0
        self._file: _HistoryFile | None = None
        self._start_run()
        if path is not None:
            self._file = _HistoryFile(Path(path))
            try:
                for segment in self._file.read():
                    self._append(segment)
                _check_overlap(self._segments, str(path))
            except BaseException:
                self._file.close()
                raise

    def _start_run(self) -> None:
        self._run = os.urandom(8).hex()
        self._next = 0
        self._pid = os.getpid()

    @property
    def segments(self) -> list[Segment]:
        return list(self._segments)

    @property
    def total_steps(self) -> int:
        return self._total

    @property
    def path(self) -> Path | None:
        return None if self._file is None else self._file.path

    def charge(self, noise_multiplier: float, sample_rate: float) -> None:
        """Record one release; with a file, return only once it is on disk."""
        noise_multiplier, sample_rate = check_charge(noise_multiplier, sample_rate)
        if os.getpid() != self._pid:
            self._start_run()
        segment = Segment(self._run, self._next, 1, noise_multiplier, sample_rate)
        self._next += 1  # first: a number is never used twice, even if writing it fails half-way
        if self._file is not None:
            self._file.append([segment])
        self._append(segment)

    def merge(self, other: Iterable[Segment]) -> None:
        """Add the releases of `other` that are not here yet. A release is known by its run and its number there."""
        new = _missing(self._segments, list(other))
        if not new:
            return
        if self._file is not None:
            self._file.append(new)
        for segment in new:
            self._append(segment)

    def _append(self, segment: Segment) -> None:
        self._total += segment.count
        if self._segments:
            last = self._segments[-1]
            same = (last.run, last.noise_multiplier, last.sample_rate) == (
                segment.run,
                segment.noise_multiplier,
                segment.sample_rate,
            )
            if same and last.first + last.count == segment.first:
                joined = last.count + segment.count
                self._segments[-1] = Segment(last.run, last.first, joined, last.noise_multiplier, last.sample_rate)
                return
        self._segments.append(segment)

    def to_list(self) -> list[dict[str, Any]]:
        """The segments as JSON values."""
        return [_to_json(segment) for segment in self._segments]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> History:
        """A History in memory that continues the segments of `to_list`; CheckpointError if they are not such."""
        history = cls()
        for segment in _missing([], [_from_json(value, "history") for value in values]):
            history._append(segment)
        return history

    def close(self) -> None:
        """Release the file and its lock. A History with a closed file cannot charge."""
        if self._file is not None:
            self._file.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        return self.__copy__()

    def __copy__(self) -> History:
        copy = History()
        copy._segments, copy._total, copy._file = list(self._segments), self._total, self._file
        return copy

    def __reduce__(self) -> Any:
        if self._file is not None:
            raise EngineError("a History with a file cannot be pickled: two processes would write it; use to_list()")
        return (History.from_list, (self.to_list(),))


class _HistoryFile:
    """A header line, then one line a charge. The lock belongs to the open file and dies with the process."""

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError as error:
            raise EngineError(
                "a history file needs POSIX file locks, which this system lacks; leave history=None"
            ) from error
        self.path = path
        created = not path.exists()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"history file {path} cannot be opened for appending: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise EngineError(
                f"history file {path} is in use by another engine or process: close that one, or give each its own"
            ) from error
        except OSError as error:
            self.close()
            raise EngineError(f"history file {path} cannot be locked ({error.strerror}): use a local disk") from error
        if created:
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # else the file's name itself might not survive a crash
            finally:
                os.close(directory)

    def read(self) -> list[Segment]:
        """All charges so far; mends a last line that a crash tore."""
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            data = file.read()
        body, newline, torn = data.rpartition(b"\n")
        lines = body.split(b"\n") if newline else []
        header = json.dumps(_HEADER).encode()
        if not lines:
            if not header.startswith(torn):
                raise CheckpointError(f"{self.path} is not a history file; it was left as it is")
            self._cut(0)
            self._write([json.dumps(_HEADER)])
            return []
        if lines[0] != header:
            raise CheckpointError(
                f"{self.path} is not a history file of version {_HEADER['version']}; it was left as it is"
            )
        segments = [_parse(line, f"{self.path}, line {number}") for number, line in enumerate(lines[1:], start=2)]
        if torn:
            segments += self._mend(len(data) - len(torn), torn, segments)
        return segments

    def _mend(self, keep: int, torn: bytes, segments: list[Segment]) -> list[Segment]:
        """Replace a torn last line by a whole one.

        `charge` had not returned, so nothing was released under that line; it is counted all the same, as the line
        says or, where it says too little, as one more release like the last.
        """
        mended: list[Segment] = []
        try:
            mended = [_parse(torn, str(self.path))]
        except CheckpointError:
            warnings.warn(
                f"the last line of history file {self.path} was torn by a crash; it is counted as one more release "
                "like the one before",
                RuntimeWarning,
                stacklevel=5,
            )
            if segments:
                last = segments[-1]
                mended = [Segment(os.urandom(8).hex(), 0, 1, last.noise_multiplier, last.sample_rate)]
        self._cut(keep)
        self.append(mended)
        return mended

    def _cut(self, length: int) -> None:
        os.ftruncate(self._fd, length)
        os.fsync(self._fd)

    def append(self, segments: list[Segment]) -> None:
        if segments:
            self._write([json.dumps(_to_json(segment)) for segment in segments])

    def _write(self, lines: list[str]) -> None:
        if self._fd < 0:
            raise EngineError(f"history file {self.path} is closed: no release can be recorded")
        data = "".join(line + "\n" for line in lines).encode()
        try:
            while data:  # all in one call as a rule, so that lines of a forked process cannot fall into the middle
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            self.close()  # the last line may be torn now: nothing may follow it
            raise CheckpointError(
                f"history file {self.path} cannot be written ({error.strerror}): nothing more can be released; "
                "make room and open it anew"
            ) from error

    def close(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _to_json(segment: Segment) -> dict[str, Any]:
    return {
        "run": segment.run,
        "first": segment.first,
        "count": segment.count,
        "noise_multiplier": segment.noise_multiplier,
        "sample_rate": segment.sample_rate,
    }


def _parse(line: bytes, where: str) -> Segment:
    try:
        value = json.loads(line)
    except ValueError as error:  # also bytes that are no UTF-8
        raise CheckpointError(f"{where} is damaged: {line[:80]!r}") from error
    return _from_json(value, where)


def _from_json(value: object, where: str) -> Segment:
    if not isinstance(value, dict) or set(value) != set(Segment.__dataclass_fields__):
        raise CheckpointError(f"{where}: not a record of releases: {str(value)[:80]}")
    run, first, count = value["run"], value["first"], value["count"]
    numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in (first, count))
    if not isinstance(run, str) or not numbers or first < 0 or count < 1:
        raise CheckpointError(f"{where}: impossible run, first or count: {str(value)[:120]}")
    try:
        noise_multiplier, sample_rate = check_charge(value["noise_multiplier"], value["sample_rate"])
    except AccountingError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return Segment(run, first, count, noise_multiplier, sample_rate)


def _missing(known: list[Segment], others: list[Segment]) -> list[Segment]:
    """The parts of `others` whose (run, number) is not in `known` nor earlier in `others`, in the order of `others`.

    One release recorded with two different parameters is damage, and refused.
    """
    by_run: dict[str, list[Segment]] = {}  # each list ascending and without overlaps
    for segment in sorted(known, key=_first):
        by_run.setdefault(segment.run, []).append(segment)
    result: list[Segment] = []
    for other in others:
        have = by_run.setdefault(other.run, [])
        start = position = other.first
        end = start + other.count
        index = max(0, bisect_right(have, start, key=_first) - 1)
        added = []
        while index < len(have) and have[index].first < end:
            segment = have[index]
            index += 1
            stop = segment.first + segment.count
            if stop <= start:
                continue
            if (segment.noise_multiplier, segment.sample_rate) != (other.noise_multiplier, other.sample_rate):
                raise CheckpointError(
                    f"histories disagree on release {max(start, segment.first)} of run {other.run}: "
                    "one of them is damaged or forged"
                )
            if segment.first > position:
                added.append(_part(other, position, segment.first))
            position = max(position, stop)
        if position < end:
            added.append(_part(other, position, end))
        for part in added:
            insort(have, part, key=_first)
        result.extend(added)
    return result


def _first(segment: Segment) -> int:
    return segment.first


def _part(segment: Segment, start: int, stop: int) -> Segment:
    return Segment(segment.run, start, stop - start, segment.noise_multiplier, segment.sample_rate)


def _check_overlap(segments: list[Segment], where: str) -> None:
    """A release written twice (or with two parameters) means the file was edited: refuse rather than guess."""
    seen: dict[str, int] = {}
    for segment in sorted(segments, key=lambda s: (s.run, s.first)):
        if segment.first < seen.get(segment.run, 0):
            raise CheckpointError(f"{where}: release {segment.first} of run {segment.run} is recorded twice")
        seen[segment.run] = segment.first + segment.count
