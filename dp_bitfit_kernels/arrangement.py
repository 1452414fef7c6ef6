"""How the rows of a layer's output belong to samples, and the sum over each sample's rows.

Most layers give one row a sample. Others fold windows or positions into the leading dimension (Swin, OPT), or have
the samples in the second one (XLNet). Which of these holds is proven by ``layout.prove``; here is what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

MAJOR, INNER, SECOND = "major", "inner", "second"


@dataclass(frozen=True)
class Arrangement:
    """Where an output holds its samples.

    kind: "major", [B * k, ...], the k rows of a sample side by side; "inner", [k * B, ...], one row of each sample
        after another; "second", [T, B, ...].
    folds: the k that were proven.
    follows: (input, dimension) of the model's tensors whose sizes k was equal to, and may follow.
    """

    kind: str = MAJOR
    folds: frozenset[int] = frozenset({1})
    follows: frozenset[tuple[int, int]] = frozenset()

    @property
    def of_these_sizes(self) -> bool:
        """Whether it is best asked again for inputs of other sizes: windows of an image, not tokens of a sequence.

        Where k is the size of two dimensions of one input, it may be neither's.
        """
        plain = bool(self.follows) and len({i for i, _ in self.follows}) == len(self.follows)
        return not plain and any(k > 1 for k in self.folds)

    def holds(self, shape: tuple[int, ...], batch: int, inputs: list[tuple[int, ...]]) -> bool:
        """Whether an output of this shape can hold ``batch`` samples as was proven.

        inputs: shapes of the tensors that the model was given, in the order of the proof; empty if not known.
        """
        if len(shape) < 2:
            return False
        if self.kind == SECOND:
            return len(shape) > 2 and shape[1] == batch
        if shape[0] == batch and 1 in self.folds:
            return True
        if batch < 1 or shape[0] % batch:
            return False
        k = shape[0] // batch
        return k in self.folds or any(i < len(inputs) and inputs[i][d : d + 1] == (k,) for i, d in self.follows)


PLAIN = Arrangement()


def candidates(shape: tuple[int, ...], batch: int, channels_first: bool) -> Iterator[tuple[str, int]]:
    """(kind, k) that an output of this shape may have; the plain one first."""
    if len(shape) < 2 or batch < 1:
        return
    if shape[0] and shape[0] % batch == 0:
        k = shape[0] // batch
        yield MAJOR, k
        if k > 1:
            yield INNER, k
    if len(shape) > 2 and shape[1] == batch and not channels_first:
        yield SECOND, 1


def by_sample(x: Tensor, kind: str, batch: int) -> Tensor:
    """x as [B, k, ...]: the rows of each sample; [B, T, ...] where the samples are in the second dimension."""
    if kind == SECOND:
        return x.transpose(0, 1)
    rest = x.shape[1:]
    if kind == INNER:
        return x.reshape(-1, batch, *rest).transpose(0, 1)
    return x.reshape(batch, x.shape[0] // batch if batch else 0, *rest)


def fold(rows: Tensor, kind: str, batch: int) -> Tensor:
    """Sums over T of each row of an output, [B * k, p] -> sums of each sample, [B, p]."""
    return rows if rows.shape[0] == batch else by_sample(rows, kind, batch).sum(1)
