"""The mutation suite: each known sabotage must turn a test red (see mutation/sabotages.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MUTATION = Path(__file__).parent / "mutation"
sys.path.insert(0, str(MUTATION))

from sabotages import SABOTAGES  # noqa: E402

pytestmark = pytest.mark.mutation


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, object]]:
    """Every sabotage's outcome, by name; one driver a core."""
    names, drivers = [s.name for s in SABOTAGES], min(os.cpu_count() or 1, 4)
    running = [
        subprocess.Popen(
            [sys.executable, str(MUTATION / "driver.py"), *names[first::drivers]], stdout=subprocess.PIPE, text=True
        )
        for first in range(drivers)
    ]
    lines = [line for process in running for line in process.communicate(timeout=1500)[0].splitlines()]
    assert all(process.returncode == 0 for process in running)
    return {outcome["name"]: outcome for outcome in map(json.loads, lines)}


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", [s.name for s in SABOTAGES])
def test_sabotage_turns_a_test_red(name, outcomes):
    outcome = outcomes[name]
    assert outcome["code"] == 1, f"pytest's exit status was {outcome['code']}, not 1:\n{outcome['tail']}"


def test_names_are_unique_and_sources_found():
    package = Path(__file__).parent.parent / "dp_bitfit_kernels"
    assert len({s.name for s in SABOTAGES}) == len(SABOTAGES)
    for sabotage in SABOTAGES:
        for file, old, _ in ((sabotage.file, sabotage.old, sabotage.new), *sabotage.also):
            assert (package / file).read_text().count(old) == 1, sabotage.name
