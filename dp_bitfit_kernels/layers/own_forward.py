"""Subclasses with a forward of their own: standardised or padded convolutions, norms of images, cast norms.

Their forward runs as it is, with the bias cut off, and the tap takes the bias's gradient from the output. That is right
where the output is something plus the bias along one known dimension. It is not believed but tried: on a random input,
several changes of the bias must come out as they went in, and the gradient that autograd gives the bias must be the one
that the tap would take. What fails is run one sample at a time instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import map_tensors
from .._validate import BatchLayoutError
from .base import BiasLayer, LayerKind
from .standing_in import standing_in

_TRIALS = 3


class OwnForwardLayer(BiasLayer):
    """The class's own forward; its output ends in the dimension of the bias.

    tried: whether the proof of the layout tried the bias on the inputs that the layer gets in the model.
    """

    tried = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "bias" not in self.trained or self.attachment is None or not self.recording():
            return super().forward(*args, **kwargs)
        if not self.tried:
            raise BatchLayoutError(
                f"layer {self.layer_name!r} has a forward of its own, and no proof has tried its bias in the model: "
                "call the model once in eager mode on a batch that shows its samples in its inputs' leading dimension"
            )
        with standing_in([([(self, "bias")], self.own_bias().detach())]):
            output = super().forward(*args, **kwargs)
        if output.dim() < 2 or output.shape[1 if self.channels_first else -1] != self.own_bias().numel():
            raise BatchLayoutError(
                f"layer {self.layer_name!r}: its output of shape {tuple(output.shape)} has its bias elsewhere than it "
                "was tried"
            )
        return self.tap(output)

    def adds_its_bias_last(self, args: Any, kwargs: Any) -> bool:
        """Whether a change of the bias shows as it is in the output of this very call."""
        bias = self.own_bias().detach()

        def run(value: Tensor, wanted: bool = False) -> Any:
            torch.manual_seed(0)
            own_args, own_kwargs = map_tensors((args, kwargs), partial(_given, wanted=wanted))
            with standing_in([([(self, "bias")], value)]):
                return super(OwnForwardLayer, self).forward(*own_args, **own_kwargs)

        dim = 1 if self.channels_first else -1
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())), _put_back(self):
            return _shows(run, bias, dim, torch.Generator().manual_seed(1))


class OwnForwardChannelsLayer(OwnForwardLayer):
    """The same with the bias along dimension 1."""

    channels_first = True


def _like(shape: tuple[int, ...], module: nn.Module, generator: torch.Generator) -> Tensor:
    weight = next(p for p in module.parameters() if p.is_floating_point())
    return torch.randn(shape, generator=generator).to(device=weight.device, dtype=weight.dtype)


def _inputs(module: Any) -> list[tuple[int, ...]]:
    """Shapes of inputs that the base class would take."""
    if isinstance(module, nn.Linear) or _is_like_linear(module):
        return [(2, 3, module.in_features)]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        return [(2, module.in_channels, *(spread * (size - 1) + 2 * step + 1 for size, step, spread in sizes))]
    if isinstance(module, nn.GroupNorm):
        return [(2, module.num_channels, 3, 4)]
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        (width,) = module.normalized_shape
        return [(2, width, 3, 4), (2, 3, width)] if width != 4 else [(2, width, 3, 5), (2, 3, width)]
    return []


def _is_like_linear(module: Any) -> bool:
    """Linear layers that are none of torch's, as those over quantised weights."""
    return isinstance(getattr(module, "in_features", None), int) and not module._modules


def find(module: nn.Module) -> LayerKind | None:
    """The kind of a module whose class has a forward of its own; None where its bias is not simply added."""
    bias = module._parameters.get("bias")
    shapes = _inputs(module)
    if bias is None or bias.dim() != 1 or not bias.is_floating_point() or not shapes:
        return None
    generator = torch.Generator().manual_seed(0)
    if bias.device.type == "meta":  # values are needed: a small copy with some
        module = copy.deepcopy(module).to_empty(device="cpu")
        for parameter in module.parameters():
            if parameter.is_floating_point():
                nn.init.normal_(parameter, generator=generator)
        bias = module._parameters["bias"]
        assert bias is not None
    for shape in shapes:
        first = len(shape) != 3 or isinstance(module, nn.Conv1d)
        if _is_added(module, bias, _like(shape, module, generator), 1 if first else -1, generator):
            mixin = OwnForwardChannelsLayer if first else OwnForwardLayer
            return LayerKind(
                f"{type(module).__name__.lower()} (own forward)", type(module), mixin, whole_names=("bias",)
            )
    return None


def _is_added(module: nn.Module, bias: Tensor, x: Tensor, dim: int, generator: torch.Generator) -> bool:
    """Whether changes of the bias show in the output as they are, along ``dim``, in evaluation and in training."""

    def run(value: Tensor, wanted: bool = False) -> Any:
        torch.manual_seed(0)
        with standing_in([([(module, "bias")], value)]):
            return type(module).forward(module, _given(x, wanted))

    with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())), _put_back(module):
        for mode in (False, True):
            module.train(mode)
            try:
                if not _shows(run, bias, dim, generator):
                    return False
            except _FAILURES:  # not an input that it takes
                return False
    return True


def _given(x: Tensor, wanted: bool) -> Tensor:
    """A copy that may be changed in place; ``wanted``: whose gradient is asked for."""
    return x.detach().requires_grad_(wanted and x.is_floating_point()).clone()


def _shows(run: Callable[..., Any], bias: Tensor, dim: int, generator: torch.Generator) -> bool:
    """Whether ``run`` of a changed bias differs by the change, along ``dim``."""
    before = run(bias)
    if not isinstance(before, Tensor) or before.dim() < 2 or before.shape[dim] != bias.numel():
        return False
    size = float(before.abs().max()) + 1.0 if before.numel() else 1.0
    half = {bias.dtype, before.dtype} & {torch.float16, torch.bfloat16}  # the output's under autocast
    room = size * (0.05 if half else 1e-4)
    along = [-1 if d == dim % before.dim() else 1 for d in range(before.dim())]
    for _ in range(_TRIALS):
        change = size * torch.randn(bias.shape, generator=generator).to(bias)
        difference = run(bias + change) - before - change.view(along)
        if difference.numel() and not float(difference.abs().max()) <= room:
            return False
    return all(_passes_its_gradient(partial(run, wanted=w), bias, dim, room / size, generator) for w in (False, True))


def _passes_its_gradient(
    run: Callable[[Tensor], Any], bias: Tensor, dim: int, room: float, generator: torch.Generator
) -> bool:
    """Whether autograd gives the bias what the tap takes: the sum of the output's gradient over all else.

    Where the class has no gradient for it at all (one sums over the first of two dimensions), its values have told.
    """
    value = bias.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            output = run(value)
            if not output.requires_grad:
                return False
            seed = torch.randn(output.shape, generator=generator).to(output)
            (found,) = torch.autograd.grad(output, value, seed, allow_unused=True)
    except RuntimeError:
        return True
    summed = seed.float().movedim(dim, -1).flatten(0, -2)
    allowed = room * (float(summed.abs().sum(0).max()) + 1.0)
    return found is not None and float((found - summed.sum(0)).abs().max()) <= allowed


_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Modes and buffers are afterwards as they were."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(m, name, b, b.clone()) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for m, name, buffer, value in buffers:
            m._buffers[name] = buffer.copy_(value)
