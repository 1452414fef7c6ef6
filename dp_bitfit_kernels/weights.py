"""Trained weights that are too large for rows of their own: norms first, the clipped sum afterwards (book-keeping).

A sink collects what one batch does with one weight (``weight_uses``). When the batch is absorbed it gives the squared
norm of each sample's gradient; once the clip factors of the whole row are known, it makes the rows a few at a time,
multiplies, rounds each to the integer grid and adds: one more matrix product, no second backward (Bu et al.,
arXiv 2210.00038, book-keeping), and no float sum over samples: the integer sum is as exact as that of biases.

**Norms**, for each weight and shape the cheapest (``plan``):

* ``kept``: rows are made in the backward and stay until they are summed, where they are no larger than what makes them
  (or, of a convolution, than 8 times that: its rows are dear).
* ``tokens``: an embedding's rows are one vector for each token that the sample has; these are kept.
* ``made``: rows are made twice, a few at a time, once for their norm and once for the sum.
* ``ghost``: |G|^2 = sum_{s,t} (l_s . l_t)(r_s . r_t) (Goodfellow 2015; Li et al., arXiv 2110.05679): no row is made.

On a CPU ``made`` and ``ghost`` rows of a layer that is called once, linear or a convolution of small images without
groups, are summed by one op, ``clipped_outer_sum_``, which rounds blocks of a row as it makes them (``_fused``).

**Sensitivity** stays a bound although ``made`` and ``ghost`` rows are not those that the norm was taken of. Let
u = 2^-24, G = sum_t l_t r_t^T exactly for the factors as they are, M = sum_t |l_t| |r_t|, n the roundings
that a product passes on its way into an element (``Use.chain``), gamma_n = n u / (1 - n u). In any order of summation:

1. A computed row G' has |G'_jk - G_jk| <= gamma_n sum_t |l_tj| |r_tk|, and the matrix of these sums has norm at most M
   (the triangle inequality over t). So | |G'| - |G| | <= gamma_n M. Products below float32's normal range, which may be
   flushed to zero, add at most T 2^-125 an element, sqrt(p d) T 2^-125 in norm.
2. ``made``: both times the row lies so near G, so the second one's norm is at most that of the first + 2 gamma_n M.
3. ``ghost``: |N'^2 - |G|^2| <= e M^2, e of ``grams.gram_error``, so |G'| <= sqrt(N'^2 + e M^2) + gamma_n M. (A float32
   Gram cancels: of opposed tokens it has been seen to understate a norm so far that 1.25 R came through.)

The norm given is sqrt(N'^2 + e M^2) + 2 gamma_n M for all of them, so a row enters the sum with integer norm at most
``GRID`` as any other does. It is one formula, ``kept`` rows of linear layers included, with one n for all texts of up
to 512 tokens, since the plan goes by T: were the longest text of a batch to change the room that is left, it would
change the factors of all others. (Images of a batch have one size, which none of them decides: norms of kept rows of
convolutions, and of rows that are kept since the bound would be dear, are those of their bits.) M is computed in
float64 of upper bounds of lengths (which Grams hold, too), and enlarged by 2^-40. Assumed of the libraries: that
products and sums are rounded to float32 or better, in any order. Lower modes (TF32, bfloat16) are switched off around
them. Where, by its shape, the bound would cost more than 1 % of a typical sample's norm (M / |G| near sqrt(T)), Grams
are made in float64 and rows ``kept``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference_weights
from ._precision import full_precision
from ._validate import EngineError
from .backends import Backend
from .clipping import GRID
from .grams import gamma, gram_error, gram_floor, gram_squares, gram_sum, served, side_by_side
from .weight_uses import FEW, Convolution, Lookup, Product, Use, float32_rows

PER_SAMPLE_NORMS = ("mixed", "ghost", "instantiate")
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements of rows or of a Gram matrix that are made at a time
_FRESH = 1 << 15  # elements of a sum that are zeroed and added to at a time
_DEAR = 0.01  # the largest part of a norm that the bound may cost
_LONGEST = 1 << 16  # terms up to which sums of 128 terms, added up, stay below ``Product.chain``
_INFLATED = 1.0 + 2.0**-40


class Workshop:
    """What all sinks of a ledger share: the ops, and constants on the device."""

    def __init__(self, backend: Backend, device: torch.device, norm: str, twice: bool = False):
        self.backend, self.device, self.norm = backend, device, norm
        self.twice = twice  # whether the sum comes by a second backward
        self.at_once = _AT_ONCE.get(device.type, 1 << 20)
        self._one = torch.ones(1, dtype=torch.float64, device=device)
        self._offsets: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def offsets(self, columns: int) -> Tensor:
        """One group of all columns; remembered, for a capture may not copy from the host."""
        if columns not in self._offsets:
            self._offsets[columns] = torch.tensor([0, columns], dtype=torch.int64, device=self.device)
        return self._offsets[columns]

    def squares(self, rows: Tensor) -> Tensor:
        """Squared norms of rows [b, n] float32 -> [b] float64."""
        batch, columns = rows.shape
        if batch not in self._masks:
            self._masks[batch] = torch.ones(batch, dtype=torch.bool, device=self.device)
        arguments = (self.offsets(columns), self._masks[batch], self._one, self._one)
        _, norms = self.backend.clip_factors(rows, *arguments, None, 1.0, None)
        return norms[:, 0].square()

    def add(self, total: Tensor, rows: Tensor, factors: Tensor, fresh: bool = False) -> None:
        """total [n] int64 += sum_i round(factors_i rows_i), rows [b, n] float32, factors [b, 1] float64.

        fresh: nothing is in ``total`` yet.
        """
        columns = rows.shape[1]
        step = _FRESH if fresh and self.device.type == "cpu" else max(1, columns)  # zeroed while it is in the cache
        for start in range(0, columns, step):
            part = slice(start, min(start + step, columns))
            own = total[part].zero_() if fresh else total[part]
            self.backend.clipped_sum_(own, rows[:, part], self.offsets(part.stop - start), factors)

    def add_at(self, total: Tensor, ids: Tensor, vectors: Tensor, factors: Tensor) -> None:
        """total [V, d] int64 at ids [b, T] += round(factors_i vectors_it), vectors [b, T, d] float32, factors [b]."""
        own = self.backend if self.device.type == "cpu" else reference_weights
        own.clipped_index_sum_(total, ids, vectors, factors)


class WeightSink:
    """What one batch does with one trained weight."""

    def __init__(self, workshop: Workshop, name: str, shape: torch.Size, group: int, batch: int):
        self.name, self.group, self.batch = name, group, batch
        self.height, self.width = shape[0], math.prod(shape[1:])
        self._workshop = workshop
        self._open = True
        self._rows: Tensor | None = None  # [B, p * d] float32, where they are kept
        self._row_squares: Tensor | None = None  # [B], of rows that one call made
        self._uses: list[tuple[Use, tuple[int, ...]]] = []  # with the versions of their tensors
        self._tokens: tuple[Tensor, Tensor] | None = None
        self._sizes: Tensor | None = None  # [3, B], of all uses whose sizes were taken
        self._chain, self._terms, self._groups = 0, 0, 1
        self._exact = False  # whether the norms of kept rows are given as they are
        self.calls = 0  # forwards that will come by, as far as they are known
        self._squares: Tensor | None = None  # [B], where they are taken as soon as the gradient comes
        self._weights: Tensor | None = None  # [B], in the second of two backwards
        self._sum: Tensor | None = None  # [p, d] float32, the weighed sum over samples

    @property
    def used(self) -> bool:
        """Whether a backward has reached it."""
        return self._rows is not None or bool(self._uses) or self._squares is not None

    @property
    def balance(self) -> int:
        """Elements that the sum takes, less those that it makes free, counted in float32."""
        rows = 0 if self._rows is None else self._rows.numel()
        return 2 * self.height * self.width - rows - sum(use.held * use.batch for use, _ in self._uses)

    def take(self, use: Use) -> None:
        """A backward came by with the gradient of one call. After the batch it leads nowhere."""
        if not self._open:
            return
        if use.batch != self.batch:
            raise EngineError(f"weight {self.name!r}: a gradient of {use.batch} samples in a batch of {self.batch}")
        if self._weights is not None:
            with full_precision():
                if self._sum is None:
                    self._sum = torch.zeros((self.height, self.width), device=self._workshop.device)
                use.add_total(self._sum, self._weights != 0.0)
            return
        if self._squares is not None:
            raise EngineError(
                f"weight {self.name!r} is used again in a block that is computed again in the backward, which "
                "clipped_sum='second_backward' cannot do: use 'book_keeping'"
            )
        if self._workshop.twice and self.calls == 1:  # nothing is kept between the two backwards
            self._uses.append((use, _versions(use)))
            with full_precision():
                self._squares = self.squares()
            self._uses.clear()
            self._tokens = None
            return
        if self._rows is not None or (not self._uses and self.plan(use) == "kept"):
            with full_precision():
                made = use.rows(slice(0, self.batch), slice(0, self.height)).reshape(self.batch, -1)
                self._exact = self._exact or not isinstance(use, Product) or self._is_dear(use)
                if not self._exact:
                    self._note([use], torch.stack(use.sizes()))
            first = self._rows is None
            self._rows = made if first else self._rows.add_(made)  # type: ignore[union-attr]
            self._row_squares = self._workshop.squares(made) if first else None  # while they are in the cache
            return
        self._uses.append((use, _versions(use)))

    def plan(self, use: Use) -> str:
        """How the norm of a weight with such a use is taken; by its shape alone."""
        asked = self._workshop.norm
        size, terms = self.height * self.width, use.terms
        if isinstance(use, Lookup):
            return "tokens"
        if asked == "instantiate":
            return "kept"
        if asked == "ghost":
            return "ghost"
        if size <= use.worth * use.held or self._is_dear(use):
            return "kept"
        served = self._fused(use) or (isinstance(use, Product) and self._workshop.device.type == "cpu")  # by an op
        dear = 4.0 if self._in_double(terms) else 0.75 if served else 1.25  # an operation on Grams beside one on rows
        return "ghost" if dear * terms * (self.height + use.groups * self.width) < size else "made"

    def _is_dear(self, use: Use) -> bool:
        """Whether the bound costs more than 1 % of a norm where M / |G| is sqrt(T)."""
        return 2.0 * use.chain * 2.0**-24 * math.sqrt(use.terms) > _DEAR

    def _in_double(self, terms: int) -> bool:
        """Whether Grams are made in float64: the bound on float32 ones would cost more than 1 %."""
        return 0.5 * terms * gram_error(self.height, self.width, 1, False) > _DEAR

    def _pieces(self, uses: Sequence[Use]) -> Iterator[tuple[slice, slice]]:
        """(samples, rows of the weight), so that no more than ``at_once`` elements are made at a time."""
        limit = self._workshop.at_once
        if self.height * self.width <= limit or not all(isinstance(use, Product | Lookup) for use in uses):
            step = max(1, limit // max(1, self.height * self.width))
            for i in range(0, self.batch, step):
                yield slice(i, min(i + step, self.batch)), slice(0, self.height)
            return
        step = max(1, limit // max(1, self.width))
        for i in range(self.batch):
            for start in range(0, self.height, step):
                yield slice(i, i + 1), slice(start, min(start + step, self.height))

    def _made(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows [b, c * d], piece by piece, of all uses together."""
        for samples, part in self._pieces([use for use, _ in self._uses]):
            rows: Tensor | None = None
            for use, _ in self._uses:
                made = use.rows(samples, part)
                rows = made if rows is None else rows.add_(made)
            assert rows is not None
            yield samples, part, rows.reshape(rows.shape[0], -1)

    def _check(self) -> None:
        for use, versions in self._uses:
            if _versions(use) != versions:
                raise EngineError(
                    f"weight {self.name!r}: an input or an output gradient of its layer was changed in place after the "
                    "backward: its per-sample gradients are lost"
                )

    def squares(self) -> Tensor:
        """[B] float64: squared norms of the samples' gradients, or upper bounds of those of the rows to be summed.

        To be asked under ``full_precision``, as ``add_clipped``.
        """
        if self._squares is not None:
            return self._squares
        if self._rows is not None:
            made = self._workshop.squares(self._rows) if self._row_squares is None else self._row_squares
            return self._bounded(made)
        if not self._uses:
            return torch.zeros(self.batch, dtype=torch.float64, device=self._workshop.device)
        self._check()
        uses = [use for use, _ in self._uses]
        plans = [self.plan(use) for use in uses]
        if all(plan == "tokens" for plan in plans):
            self._tokens = summed(uses)  # type: ignore[arg-type]
            _, vectors = self._tokens
            return self._workshop.squares(vectors.view(self.batch, -1))
        sizes: Tensor | None = None
        if all(plan in ("ghost", "tokens") for plan in plans) and _of_one_kind(uses):
            found, sizes = self._grams(uses)
        else:
            found = torch.zeros(self.batch, dtype=torch.float64, device=self._workshop.device)
            for samples, _, rows in self._made():
                found[samples] += self._workshop.squares(rows)
        if not self._workshop.twice:
            self._note(uses, sum(torch.stack(use.sizes()) for use in uses) if sizes is None else sizes)
        return self._bounded(found)

    def _bounded(self, found: Tensor) -> Tensor:
        """Upper bounds of the squared norms of rows of all uses, of which ``found`` [B] is a computed one."""
        if self._exact or self._workshop.twice:  # no other rows will be made, or none that a bound could speak of
            return found
        assert self._sizes is not None
        largest, lefts, rights = self._sizes.unbind(0)
        terms, pairs = self._terms, self._groups * self._terms**2
        room = gram_error(self.height, self.width, pairs, self._in_double(terms)) * _INFLATED**2
        per_left, per_right, rest = gram_floor(self.height, self.width, pairs)
        rest += math.sqrt(self.height * self.width) * terms * 2.0**-125
        slack = largest * (2.0 * _INFLATED * gamma(self._chain, 2.0**-24)) + 2.0 * rest
        slack.add_(lefts, alpha=2.0 * _INFLATED * per_left).add_(rights, alpha=2.0 * _INFLATED * per_right)
        norms = found.clamp(min=0.0).addcmul_(largest, largest, value=room).sqrt_().add_(slack)
        # A Gram's element may leave float32 on either side though no length does: -inf is as little a norm as inf. And
        # no element of a row, and no partial sum of one, is larger than M: beyond float32 it counts as not finite.
        squares: Tensor = torch.where((found.abs() < math.inf) & (largest < 2.0**125), norms.square_(), math.inf)
        return squares

    def _note(self, uses: Sequence[Use], sizes: Any) -> None:
        """Sizes [3, B] of these uses together, and what their rounding goes by."""
        self._sizes = sizes if self._sizes is None else self._sizes + sizes
        for use in uses:
            self._chain += use.chain
            self._terms += use.terms
            self._groups = max(self._groups, use.groups)

    def _grams(self, uses: list[Use]) -> tuple[Tensor, Tensor | None]:
        """``gram_sum`` of all samples, a few at a time, and their sizes [3, B] where the Grams tell."""
        terms = sum(use.terms for use in uses)
        each = max(terms * terms, terms * (self.height + self.width) // 4, 1)
        step = max(1, self.batch if _are_there(uses) else self._workshop.at_once // each)
        parts, sizes = [], []
        for start in range(0, self.batch, step):
            samples = slice(start, min(start + step, self.batch))
            factors = [own for use in uses if (own := use.factors(samples)) is not None]
            factors = [own.double() if self._in_double(terms) else own for own in factors]
            if served(factors):
                squares, size = gram_squares(factors[0], self._workshop.backend)
                parts.append(squares)
                sizes.append(size)
            else:
                parts.append(gram_sum(factors, self._workshop.at_once))
        return torch.cat(parts), torch.cat(sizes, 1) if sizes else None

    def add_clipped(self, total: Tensor, factors: Tensor, fresh: bool = False) -> None:
        """Add sum_i round(factors[i] row_i) to ``total`` [p * d] int64, in which nothing is yet where ``fresh``.

        factors: [B, L] float64.
        """
        factor = factors[:, self.group : self.group + 1].contiguous()
        fused = len(self._uses) == 1 and self._weights is None and self._rows is None and self._tokens is None
        fused = fused and self._fused(self._uses[0][0])
        kept = self._weights is None and self._rows is not None
        if fresh and not fused and not kept:
            total.zero_()
        if self._weights is not None:
            if self._sum is not None:
                total.add_((self._sum.double().reshape(-1) * GRID).add_(0.5).floor_().to(torch.int64))
        elif self._rows is not None:
            self._workshop.add(total, self._rows, factor, fresh)
        elif self._tokens is not None:
            ids, vectors = self._tokens
            step = max(1, self._workshop.at_once // max(1, vectors.shape[1] * vectors.shape[2]))
            for start in range(0, self.batch, step):
                samples = slice(start, start + step)
                table = total.view(self.height, self.width)
                self._workshop.add_at(table, ids[samples], vectors[samples], factor[samples, 0])
        elif fused:
            self._add_outer(total, factor[:, 0], fresh)
        elif self._uses:
            for samples, part, rows in self._made():
                self._workshop.add(total[part.start * self.width : part.stop * self.width], rows, factor[samples])
        self.close()

    def _fused(self, use: Use) -> bool:
        """Whether its rows are made and rounded by one op, block by block: on other devices libraries are faster."""
        if self._workshop.device.type != "cpu" or use.terms > _LONGEST:
            return False
        if isinstance(use, Convolution):  # of larger images the windows, copied, are more than its rows are worth
            small = use.groups == 1 and len(use.kernel) <= 2 and use.terms <= FEW
            return small and float32_rows(use.grad, use.input)
        return isinstance(use, Product) and use.left.shape[2] == self.height and float32_rows(use.left, use.right)

    def _add_outer(self, total: Tensor, factor: Tensor, fresh: bool) -> None:
        use = self._uses[0][0]
        # Several samples, so that what is added up is fetched once for all of them.
        several = self._workshop.at_once // max(1, use.terms * (self.height + self.width))
        step = max(1, self.batch if _are_there([use]) else several)
        for start in range(0, max(1, self.batch), step):
            samples = slice(start, start + step)
            own = use.factors(samples)
            assert own is not None
            left, right = (
                x if side_by_side(x) else x.contiguous() for x in (own.left.squeeze(1), own.right.squeeze(1))
            )
            self._workshop.backend.clipped_outer_sum_(total, left, right, factor[samples], fresh and start == 0)

    def weigh(self, weights: Tensor) -> None:
        """A second backward comes, of samples weighed by ``weights`` [B]; what the first one left is forgotten."""
        self._weights, self._rows, self._tokens, self._squares = weights, None, None, None
        self._row_squares = None
        self._uses.clear()

    def close(self) -> None:
        """Forget everything; backwards that come later add nothing."""
        self._open, self._rows, self._tokens, self._sum = False, None, None, None
        self._uses.clear()


def _are_there(uses: Sequence[Use]) -> bool:
    """Whether the factors are those of one linear layer as they lie in memory, none of them copied."""
    (use, *others) = uses
    return not others and isinstance(use, Product) and use.left.dtype == use.right.dtype == torch.float32


def _of_one_kind(uses: Sequence[Use]) -> bool:
    """Whether Grams of all uses can be paired: each has some, in as many groups."""
    factors = [use.factors(slice(0, 1)) for use in uses]
    return len({None if own is None else own.right.shape[1] for own in factors} - {None}) == 1 and None not in factors


def _versions(use: Any) -> tuple[int, ...]:
    own = vars(getattr(use, "of", use)).values()
    return tuple(value._version for value in own if isinstance(value, Tensor))


def summed(uses: list[Lookup]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and the sum of the gradients of each [B, T, d] float32; what is left over is token 0 with zeros.

    T of all uses together. No shape depends on what the tokens are.
    """
    ids = torch.cat([use.ids for use in uses], 1)
    grad = torch.cat([use.grad.float() for use in uses], 1)
    batch, terms = ids.shape
    ordered, order = ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = new.cumsum(1) - 1  # [B, T]
    place = (slot + torch.arange(batch, device=ids.device).unsqueeze(1) * terms).reshape(-1)
    source = (order + torch.arange(batch, device=ids.device).unsqueeze(1) * terms).reshape(-1)
    flat = grad.reshape(batch * terms, grad.shape[2])
    vectors = torch.zeros_like(flat).index_add_(0, place, flat.index_select(0, source))
    tokens = torch.zeros_like(ids).scatter_(1, slot, ordered)
    return tokens, vectors.view(batch, terms, grad.shape[2])
