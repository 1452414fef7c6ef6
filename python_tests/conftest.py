"""Fixtures that several files share."""

from __future__ import annotations

import pytest
from lanes import LANES, Lane, make_lane
from recorded import RecordedGraph

from dp_bitfit_kernels import capture, entries


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Graphs on the CPU; the class counts how many were recorded."""
    monkeypatch.setitem(capture.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "captures", 0)
    return RecordedGraph


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small weights have no rows in the ledger."""
    monkeypatch.setattr(entries, "LARGEST_ROWS", 0)


@pytest.fixture(params=LANES, scope="module")
def lane(request: pytest.FixtureRequest) -> Lane:
    """Each backend on its device."""
    return make_lane(request.param)
