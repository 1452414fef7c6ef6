"""What a sabotage is, and the tests that most of them must fail."""

from __future__ import annotations

from typing import NamedTuple


class Sabotage(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    native: bool = False
    also: tuple[tuple[str, str, str], ...] = ()  # more changes (file, old, new), where two places guard the same


ENGINE, BAD, RESUME = "test_engine.py", "test_bad_input.py", "test_resume.py"
ORACLE = f"{ENGINE}::test_step_equals_oracle"
GUARANTEES, AUDIT, RESIDUE = "test_guarantees.py", "test_audit.py", "test_residue.py"
ATTACKS = "test_attacks.py"
ONE_RECORD = f"{GUARANTEES}::test_one_record_moves_the_sum_by_at_most_the_bound"
CANARY = f"{AUDIT}::test_a_canary_shows_as_much_as_accounted"
