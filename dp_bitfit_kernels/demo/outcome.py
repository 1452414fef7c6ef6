"""What a run of the demonstration is told, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a run does. `seed` sets glyphs, initial weights and split; private noise and sampling have no seed."""

    epsilons: tuple[float, ...] = (1.0, 3.0, 8.0)
    seed: int = 0
    epochs: int = 15
    batch_size: int = 375
    private_rate: float = 0.1
    max_grad_norm: float = 2.0
    plain_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    glyphs: int = 15_000
    pretrain_epochs: int = 2
    channels: int = 64
    hidden: int = 512


@dataclass(frozen=True)
class Row:
    """One line of the result: a method, the epsilon it really spent (None: no privacy), its test accuracy."""

    method: str
    epsilon: float | None
    accuracy: float
    seconds: float
    learning_rate: float | None = None


@dataclass(frozen=True)
class Outcome:
    """All of a run.

    `before_digits_only` is the accuracy before fine-tuning with letters ruled out as answers: what is gained beyond it
    is more than unlearning letters. `reloaded` is that of a fresh network with the saved biases of the largest epsilon.
    """

    settings: Settings
    delta: float
    trained: int
    total: int
    before: Row
    before_digits_only: float
    private: list[Row]
    plain: Row
    plain_all: list[Row]
    saved: Path
    saved_statement: dict[str, Any]
    reloaded: float
    figure: Path
    seconds: float
    closed: list[float] = field(default_factory=list)

    @property
    def percent_trained(self) -> float:
        return 100 * self.trained / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a result file; the privacy statement is shortened to what it promises."""
        plain = asdict(self)
        plain["saved"], plain["figure"] = self.saved.name, self.figure.name
        plain["saved_statement"] = {k: v for k, v in self.saved_statement.items() if k != "history"}
        return plain
