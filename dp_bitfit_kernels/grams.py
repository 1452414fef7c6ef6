"""Ghost norms: the norm of a sum of outer products G = sum_t l_t r_t^T, without the sum.

|G|^2 = sum over s, t of (l_s . l_t)(r_s . r_t), the sum of the products of two Gram matrices [T, T] (Goodfellow,
arXiv 1510.01799; Li et al., arXiv 2110.05679). Grams of float32 vectors are made in float32, in sums of at most
``BLOCK`` terms, so that their errors have a bound that does not depend on how a library adds; in float64 where T is
large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend

BLOCK = 128


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gamma(count: int, unit: float) -> float:
    """n u / (1 - n u), the relative error of n roundings in a row (Higham 2002, lemma 3.1); infinite beyond that."""
    return count * unit / (1.0 - count * unit) if count * unit < 0.5 else float("inf")


def gram_error(height: int, width: int, pairs: int, double: bool) -> float:
    """e such that the squared norm that ``gram_sum`` gives is off by at most e M^2, M = sum_t |l_t| |r_t|.

    Each of the products in l_s . l_t, p of them, and r_s . r_t, d of them, passes at most BLOCK + p / BLOCK roundings
    to float32 (float64 where ``double``), the product of both one more, the sum over all ``pairs`` of terms,
    T^2 a group, as many to float64; and the moduli of all of these products add up to at most M^2 (Cauchy-Schwarz).
    For what float32 rounds below its normal range see ``gram_floor``.
    """
    chain = sum(min(n, BLOCK) + -(-n // BLOCK) + 1 for n in (height, width)) + 1
    first, second = gamma(chain, 2.0**-53 if double else 2.0**-24), gamma(pairs + 4, 2.0**-53)
    return first + second + first * second


def gram_floor(height: int, width: int, pairs: int) -> tuple[float, float, float]:
    """(a, b, c): underflow can take a sum_t |l_t| + b sum_t |r_t| + c from the norm besides.

    A product below 2^-126 may be flushed to zero: l_s . l_t is off by p 2^-126, which r_s . r_t multiplies, and the
    other way round, and the product of both by 2^-126. Summed over s and t, and the root taken.
    """
    rest = math.sqrt(pairs) * (1.0 + 2.0**-62 * math.sqrt(height * width))
    return 2.0**-62 * math.sqrt(width), 2.0**-62 * math.sqrt(height), 2.0**-62 * rest


@dataclass(frozen=True)
class Factors:
    """Of b samples: ``left`` [b, g, T, p], or tokens [b, T] int64 for one-hot vectors, and ``right`` [b, g, T, d], g
    groups, of which each sees its own part of the weight."""

    left: Tensor
    right: Tensor
    first: int = 0  # row of the weight that column 0 of ``left`` belongs to

    def double(self) -> Factors:
        left = self.left.double() if self.left.dim() == 4 else self.left
        return Factors(left, self.right.double(), self.first)


def served(factors: Sequence[Factors]) -> bool:
    """Whether the op ``ghost_squares`` takes them as they lie; on other devices libraries are faster."""
    if len(factors) != 1:
        return False
    left, right = factors[0].left, factors[0].right
    float32 = left.dtype == right.dtype == torch.float32
    return float32 and right.device.type == "cpu" and side_by_side(left) and side_by_side(right)


def side_by_side(x: Tensor) -> bool:
    """Whether terms or their elements, the last two dimensions, are neighbours in memory, as ops on factors ask."""
    return x.stride(-1) == 1 or x.stride(-2) == 1


def gram_squares(own: Factors, backend: Backend) -> tuple[Tensor, Tensor]:
    """|G_i|^2 -> [b] float64 of what is ``served``, and upper bounds of the sums over t of |l_t| |r_t|, which is M,
    of |l_t| and of |r_t| -> [3, b] float64.

    These come from the diagonals of the Grams: an |l_t|^2 computed in float32 is off by p 2^-24 of itself at most, and
    by p 2^-126 where products are flushed to zero.
    """
    b, g, terms, p = own.left.shape
    d = own.right.shape[3]
    squares, sizes = backend.ghost_squares(own.left.flatten(0, 1), own.right.flatten(0, 1))
    products, lefts, rights = (size.view(b, g).sum(1) * (1.0 + g * terms * 2.0**-52) for size in sizes.unbind(0))
    (up, above), (across, beside) = ((1.0 + (n + 8) * 2.0**-24, math.sqrt(n) * 2.0**-62) for n in (p, d))
    count = g * terms
    sizes = torch.stack(
        [
            products * (up * across) + lefts * (up * beside) + rights * (across * above) + count * above * beside,
            lefts * up + count * above,
            rights * across + count * beside,
        ]
    )
    return squares.view(b, g).sum(1), sizes


def gram_sum(factors: Sequence[Factors], at_once: int) -> Tensor:
    """|G_i|^2 of all uses together -> [b] float64; inf, -inf or NaN where a product of lengths leaves float32 (1e38).

    at_once: elements of a Gram matrix that are made at a time.
    """
    total = factors[0].right.new_zeros(len(factors[0].right), dtype=torch.float64)
    for number, one in enumerate(factors):
        for other in factors[number:]:
            terms = one.right.shape[2]
            width = one.right.shape[0] * one.right.shape[1] * max(1, other.right.shape[2])
            step = max(1, min(at_once // max(1, width), max(32, -(-terms // (2 if terms <= 256 else 4)))))
            part = torch.zeros_like(total)
            for start in range(0, terms, step):
                rows = slice(start, min(start + step, terms))
                columns = slice(start if one is other else 0, other.right.shape[2])  # the Gram of one is symmetric
                products = _gram(one.right[:, :, rows], other.right[:, :, columns]) * _left_gram(
                    one, rows, other, columns
                )
                part = part + products.sum((1, 2, 3), dtype=torch.float64) * 2
                if one is other:
                    part = part - products[..., : rows.stop - start].sum((1, 2, 3), dtype=torch.float64)
            total = total + part
    return total


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """x [b, g, s, n], y [b, g, t, n] -> [b, g, s, t], in sums of at most BLOCK terms."""
    out: Tensor | None = None
    for start in range(0, max(1, x.shape[3]), BLOCK):
        part = x[..., start : start + BLOCK] @ y[..., start : start + BLOCK].transpose(2, 3)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


def _left_gram(one: Factors, rows: slice, other: Factors, columns: slice) -> Tensor:
    """l_s . l_t -> [b, g, s, t], or [] where they are of different rows of the weight."""
    if one.left.dim() == 4 and other.left.dim() == 4:
        start = max(one.first, other.first)
        stop = min(one.first + one.left.shape[3], other.first + other.left.shape[3])
        if stop <= start:
            return one.left.new_zeros(())
        left = one.left[:, :, rows, start - one.first : stop - one.first]
        return _gram(left, other.left[:, :, columns, start - other.first : stop - other.first])
    if one.left.dim() == 2 and other.left.dim() == 2:
        equal = one.left[:, rows].unsqueeze(2) == other.left[:, columns].unsqueeze(1)
        return equal.unsqueeze(1).to(one.right.dtype)
    if one.left.dim() == 2:
        return _picked(one.left[:, rows], other, columns).transpose(2, 3)
    return _picked(other.left[:, columns], one, rows)


def _picked(tokens: Tensor, dense: Factors, terms: slice) -> Tensor:
    """The elements that one-hot vectors pick: tokens [b, s], l [b, t, p] -> [b, 1, t, s]."""
    columns, left = tokens - dense.first, dense.left[:, 0, terms]
    inside = (columns >= 0) & (columns < left.shape[2])
    index = columns.clamp(0, left.shape[2] - 1).unsqueeze(1).expand(-1, left.shape[1], -1)
    return torch.where(inside.unsqueeze(1), left.gather(2, index), 0.0).unsqueeze(1)
