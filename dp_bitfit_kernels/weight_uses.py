"""How one call of a layer makes the per-sample gradient of its weight, without making it yet.

The per-sample gradient of a weight W [p, ...] is a sum of T outer products, G_i = sum_t l_it r_it^T: output gradients
and inputs of a linear layer, positions of a convolution, one-hot tokens of an embedding. A *use* keeps the factors of
one call. It gives rows G_i of chosen samples, the factors of their Gram matrices, and sizes that bound rounding errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional_window import CONVOLUTIONS, Window
from .grams import Factors, wide

# Convolutions on a CPU: elements of a sample's gradient up to which the samples go through one call, and positions up
# to which a matrix product beats a convolution.
_SMALL, FEW = 1 << 16, 128
CHAIN = 512  # terms that are added in float32 before the sum goes on from the next ones: what bounds their rounding


class Use(Protocol):
    """One call of a layer whose weight is trained. B samples; the weight as a matrix [p, d]."""

    @property
    def batch(self) -> int: ...

    @property
    def terms(self) -> int:
        """T, the outer products of a sample."""

    @property
    def groups(self) -> int:
        """Parts of the weight that have T outer products each."""

    @property
    def chain(self) -> int:
        """n: every product in an element of a row passes at most n roundings to float32."""

    @property
    def held(self) -> int:
        """Elements a sample that are kept for as long as the use is."""

    @property
    def worth(self) -> int:
        """How many times as many elements rows may have that are kept instead."""

    def rows(self, samples: slice, part: slice) -> Tensor:
        """[b, c, d] float32: rows ``part`` of the weight's gradient of each of these samples."""

    def add_total(self, out: Tensor, keep: Tensor) -> None:
        """Add to ``out`` [p, d] float32 the sum of the rows of the samples that ``keep`` [B] names, made in one go."""

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over t of |l_it| |r_it|, which is M_i, of |l_it| and of |r_it|; each [B] float64."""

    def factors(self, samples: slice) -> Factors | None:
        """What Gram matrices are made of; None where only rows can be had."""


def float32_rows(left: Tensor, right: Tensor) -> bool:
    """Whether rows of such factors are made in float32, not in float64."""
    return all(torch.promote_types(x.dtype, torch.float32) == torch.float32 for x in (left, right))


def lengths(x: Tensor, dim: int) -> Tensor:
    """Upper bounds of the Euclidean norms along ``dim``, float64: above them by at most n 2^-23 and sqrt(n) 2^-61.

    They are taken in float32: n squares and additions, each with a relative error of 2^-24, or 2^-126 where it is
    flushed to zero. Infinite where a square is beyond float32.
    """
    count = x.shape[dim]
    norms: Tensor = torch.linalg.vector_norm(wide(x), dim=dim)
    return norms.double() * (1.0 + (count + 8) * 2.0**-24) + math.sqrt(count) * 2.0**-62


def _kept(x: Tensor, keep: Tensor) -> Tensor:
    """x [B, ...] with zeros for the samples that are not kept, whatever they hold."""
    return torch.where(keep.view(-1, *(1,) * (x.dim() - 1)), x, 0.0)


@dataclass(frozen=True)
class Product:
    """A linear layer, ``left`` [B, T, p] and ``right`` [B, T, d]: rows ``first`` to ``first + p`` of the weight."""

    left: Tensor
    right: Tensor
    first: int = 0

    worth = groups = 1

    @property
    def batch(self) -> int:
        return self.left.shape[0]

    @property
    def terms(self) -> int:
        return self.left.shape[1]

    @property
    def chain(self) -> int:
        return CHAIN + -(-self.terms // CHAIN) + 1  # the same for all texts of up to CHAIN tokens

    @property
    def held(self) -> int:
        return self.terms * (self.left.shape[2] + self.right.shape[2])

    def rows(self, samples: slice, part: slice) -> Tensor:
        start, stop = max(part.start, self.first), min(part.stop, self.first + self.left.shape[2])
        left, right = self.left[samples], self.right[samples]
        whole = (start, stop) == (part.start, part.stop)
        made = left.new_zeros(0) if stop <= start else _outer(left[:, :, start - self.first : stop - self.first], right)
        if whole:
            return made
        out = torch.zeros(
            (left.shape[0], part.stop - part.start, right.shape[2]), dtype=torch.float32, device=left.device
        )
        if stop > start:
            out[:, start - part.start : stop - part.start] = made
        return out

    def add_total(self, out: Tensor, keep: Tensor) -> None:
        left, right = (wide(_kept(x, keep)).flatten(0, 1) for x in (self.left, self.right))
        out[self.first : self.first + left.shape[1]] += left.t() @ right.to(left.dtype)

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        left, right = lengths(self.left, 2), lengths(self.right, 2)
        return (left * right).sum(1), left.sum(1), right.sum(1)

    def factors(self, samples: slice) -> Factors:
        return Factors(wide(self.left[samples]).unsqueeze(1), wide(self.right[samples]).unsqueeze(1), self.first)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left_t right_t^T: [b, T, c], [b, T, d] -> [b, c, d] float32, in sums of at most CHAIN terms."""
    out: Tensor | None = None
    for start in range(0, max(1, left.shape[1]), CHAIN):
        a, b = wide(left[:, start : start + CHAIN]).transpose(1, 2), wide(right[:, start : start + CHAIN])
        if a.dtype != b.dtype:
            a, b = a.double(), b.double()
        made = a * b if b.shape[1] == 1 else torch.bmm(a, b)
        out = made if out is None else out.add_(made)
    assert out is not None
    return out.float()


@dataclass(frozen=True)
class Convolution:
    """A convolution of ``input`` [B, c, ...] with gradient ``grad`` [B, p, ...] of its output; W [p, c / groups, ...].

    A transposed convolution is one with the roles of the two turned round.
    """

    grad: Tensor
    input: Tensor
    window: Window
    kernel: tuple[int, ...]

    worth = 8

    @property
    def batch(self) -> int:
        return self.grad.shape[0]

    @property
    def terms(self) -> int:
        return math.prod(self.grad.shape[2:])

    @property
    def groups(self) -> int:
        return self.window.groups

    @property
    def chain(self) -> int:
        return self.terms + 1

    @property
    def held(self) -> int:
        return (self.grad.numel() + self.input.numel()) // max(1, self.batch)

    def rows(self, samples: slice, part: slice) -> Tensor:
        grad, input = wide(self.grad[samples]), wide(self.input[samples])
        batch, p, groups = grad.shape[0], grad.shape[1], self.groups
        shape = (p, input.shape[1] // groups, *self.kernel)
        if batch == 0 or grad.numel() == 0:
            return grad.new_zeros((batch, p, math.prod(shape[1:])), dtype=torch.float32)
        small = max(math.prod(shape), p * self.terms) <= _SMALL
        if small or grad.device.type != "cpu":
            # The samples as groups of one convolution: each group's weight gradient is one sample's.
            grad = grad.reshape(1, batch * p, *grad.shape[2:])
            input = input.reshape(1, batch * input.shape[1], *input.shape[2:])
            made = self._weight_grad(grad, input, (batch * p, *shape[1:]), batch * groups)
            return made.reshape(batch, p, -1)[:, part].float()
        flat = groups == 1 and len(shape) == 4 and self.terms <= FEW
        rows = grad.new_empty((batch, p, math.prod(shape[1:])))
        for i in range(batch):
            one, of = grad[i : i + 1], input[i : i + 1]
            if flat:
                torch.mm(one.reshape(p, -1), self._unfolded(of)[0, :, : self.terms].t(), out=rows[i])
            else:
                rows[i] = self._weight_grad(one, of, shape, groups).reshape(p, -1)
        return rows[:, part].float()

    def _unfolded(self, input: Tensor) -> Tensor:
        """input [b, c, H, W] -> [b, c k, T or more], the windows as columns."""
        stride, padding, dilation, _ = self.window
        return F.unfold(input, self.kernel, dilation, padding, stride)

    def _weight_grad(self, grad: Tensor, input: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        stand_in = grad.new_empty(1).expand(shape)  # only its shape is read
        stride, padding, dilation, _ = self.window
        geometry = (stride, padding, dilation, False, [0] * len(self.kernel), groups)
        made: Tensor = torch.ops.aten.convolution_backward(
            grad, input, stand_in, None, *geometry, [False, True, False]
        )[1]
        return made

    def add_total(self, out: Tensor, keep: Tensor) -> None:
        grad, input = wide(_kept(self.grad, keep)), wide(_kept(self.input, keep))
        if grad.numel():
            shape = (grad.shape[1], input.shape[1] // self.groups, *self.kernel)
            out += self._weight_grad(grad, input, shape, self.groups).reshape(out.shape)

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        groups, batch = self.groups, self.batch
        left = lengths(self.grad.reshape(batch, groups, -1, max(1, self.terms)), 2)  # [B, g, T]
        squares = self.input.reshape(batch, groups, -1, *self.input.shape[2:]).double().square().sum(2)
        ones = squares.new_ones((groups, 1, *self.kernel))
        stride, padding, dilation, _ = self.window
        summed = CONVOLUTIONS[len(self.kernel)](squares, ones, None, stride, padding, dilation, groups)
        right = summed.clamp_(min=0).sqrt().flatten(2)[:, :, : left.shape[2]]
        return (left * right).sum((1, 2)), left.sum((1, 2)), right.sum((1, 2))

    def factors(self, samples: slice) -> Factors | None:
        if len(self.kernel) > 2:
            return None
        input, grad, groups = wide(self.input[samples]), self.grad[samples], self.groups
        stride, padding, dilation, kernel = *self.window[:3], self.kernel
        if len(kernel) == 1:
            input, kernel = input.unsqueeze(2), (1, *kernel)
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        taken = F.unfold(input, kernel, dilation, padding, stride)[:, :, : self.terms]  # [b, c k, T]
        left = wide(grad).reshape(grad.shape[0], groups, -1, self.terms).transpose(2, 3)
        return Factors(left, taken.reshape(taken.shape[0], groups, -1, self.terms).transpose(2, 3))


@dataclass(frozen=True)
class Folded:
    """A convolution of the k windows of each sample, which stand side by side in its leading dimension."""

    of: Convolution
    batch: int

    worth = 8

    @property
    def windows(self) -> int:
        return self.of.batch // self.batch

    @property
    def terms(self) -> int:
        return self.of.terms * self.windows

    @property
    def groups(self) -> int:
        return self.of.groups

    @property
    def chain(self) -> int:
        return self.of.chain + self.windows

    @property
    def held(self) -> int:
        return self.of.held * self.windows

    def rows(self, samples: slice, part: slice) -> Tensor:
        k = self.windows
        rows = self.of.rows(slice(samples.start * k, samples.stop * k), part)
        return rows.view(-1, k, *rows.shape[1:]).sum(1)

    def add_total(self, out: Tensor, keep: Tensor) -> None:
        self.of.add_total(out, keep.repeat_interleave(self.windows))

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        product, left, right = (size.view(self.batch, self.windows).sum(1) for size in self.of.sizes())
        return product, left, right

    def factors(self, samples: slice) -> Factors | None:
        return None


@dataclass(frozen=True)
class Lookup:
    """An embedding: token numbers ``ids`` [B, T] and the gradient ``grad`` [B, T, d] of their vectors."""

    ids: Tensor
    grad: Tensor

    worth = groups = 1

    @property
    def batch(self) -> int:
        return self.grad.shape[0]

    @property
    def terms(self) -> int:
        return self.grad.shape[1]

    @property
    def chain(self) -> int:
        return self.terms + 1

    @property
    def held(self) -> int:
        return self.terms * self.grad.shape[2]

    def rows(self, samples: slice, part: slice) -> Tensor:
        ids, grad = self.ids[samples] - part.start, wide(self.grad[samples])
        (batch, terms), count, width = ids.shape, part.stop - part.start, grad.shape[2]
        place = torch.where((ids >= 0) & (ids < count), ids, count)  # one row more, for tokens of other parts
        place = place + torch.arange(batch, device=ids.device).unsqueeze(1) * (count + 1)
        out = grad.new_zeros((batch * (count + 1), width))
        out.index_add_(0, place.reshape(-1), grad.reshape(batch * terms, width))
        return out.view(batch, count + 1, width)[:, :count].float()

    def add_total(self, out: Tensor, keep: Tensor) -> None:
        out.index_add_(0, self.ids.reshape(-1), _kept(self.grad, keep).flatten(0, 1).to(out.dtype))

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        right = lengths(self.grad, 2).sum(1)
        return right, torch.full_like(right, float(self.terms)), right

    def factors(self, samples: slice) -> Factors:
        return Factors(self.ids[samples], wide(self.grad[samples]).unsqueeze(1))
