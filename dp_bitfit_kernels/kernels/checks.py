"""What must hold before a kernel may touch memory; the messages of the reference, for the same mistakes."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_bitfit_kernels._validate import OpError

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Above this a float64 no longer holds noise_std * z + 0.5 to a small part of one grid cell.
NOISE_STD_LIMIT = 2.0**40
ACTIVATIONS = 4  # gelu, gelu_tanh, silu, quick_gelu
STREAM_WORDS = 2**35  # 2^32 ChaCha20 blocks of eight 64-bit words


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """``tensor`` is contiguous, on the device of ``like``, of ``dtype`` and ``shape``."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise OpError(
            f"{op}: {name} must be contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)} "
            f"with strides {list(tensor.stride())}"
        )
    check_device(op, name, tensor, like)


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """``tensor`` is on the device of ``like``."""
    if tensor.device != like.device:
        raise OpError(f"{op}: {name} is on {tensor.device}, the other arguments on {like.device}: move it there")


def check_grad(op: str, grad: Tensor) -> None:
    """``grad`` is [B, T, p] of a dtype that the kernels load."""
    if grad.dim() != 3:
        raise OpError(f"{op}: grad must be [B, T, p], got {grad.dim()} dimensions")
    if grad.dtype not in GRAD_DTYPES:
        raise OpError(
            f"{op}: grad must be float32, bfloat16 or float16, got {grad.dtype}; backend='reference' takes more"
        )


def check_float(op: str, name: str, x: Tensor) -> None:
    """``x`` is contiguous and of a dtype that the kernels load."""
    if x.dtype not in GRAD_DTYPES or not x.is_contiguous():
        raise OpError(
            f"{op}: {name} must be contiguous and float32, bfloat16 or float16, got {x.dtype} with strides "
            f"{list(x.stride())}; backend='reference' takes more"
        )


def check_reduced(op: str, grad: Tensor, reduce: int) -> None:
    """``grad`` is [B, R, C], contiguous, and ``reduce`` names a dimension to sum over, or 0."""
    check_float(op, "grad", grad)
    if grad.dim() != 3:
        raise OpError(f"{op}: grad must be [B, R, C], got {grad.dim()} dimensions")
    if reduce not in (0, 1, 2):
        raise OpError(f"{op}: reduce must be 0, 1 or 2, got {reduce}")


def check_kind(op: str, kind: int) -> None:
    """``kind`` is the number of an activation."""
    if not 0 <= kind < ACTIVATIONS:
        raise OpError(f"{op}: kind must be 0 to {ACTIVATIONS - 1}, got {kind}")


def check_norm(
    op: str, grad: Tensor, x: Tensor, values: dict[str, Tensor | None], shape: tuple[int, ...], weight: Tensor | None
) -> None:
    """``x`` is as ``grad`` or int8; shift (or None), scale, rstd are float32 of ``shape``, ``weight`` one a feature."""
    if x.shape != grad.shape or not x.is_contiguous() or x.dtype not in (grad.dtype, torch.int8):
        raise OpError(f"{op}: x {x.dtype} {list(x.shape)} does not fit grad {grad.dtype} {list(grad.shape)}")
    check_device(op, "x", x, grad)
    for name, value in values.items():
        if value is not None:
            check_tensor(op, name, value, torch.float32, shape, grad)
    if weight is not None:
        features = grad.shape[2] if op == "layer_norm_grad" else grad.shape[1]
        check_tensor(op, "weight", weight, torch.float32, (features,), grad)


def check_rows(op: str, rows: Tensor) -> None:
    """``rows`` is [B, P] float32 with unit column stride and rows that do not overlap."""
    if rows.dim() != 2 or rows.dtype != torch.float32:
        raise OpError(f"{op}: rows must be float32 [B, P], got {rows.dtype} {list(rows.shape)}")
    batch, width = rows.shape
    if (width > 1 and rows.stride(1) != 1) or (batch > 1 and rows.stride(0) < width):
        raise OpError(f"{op}: rows must have unit column stride and separate rows, got strides {list(rows.stride())}")


def check_stream(op: str, key: Tensor, step: Tensor, stream: int, first: int, count: int) -> None:
    """The words ``first`` to ``first + count`` exist: a ChaCha20 nonce has 2^32 blocks, and its counter never wraps."""
    check_tensor(op, "key", key, torch.int32, (8,), key)
    check_tensor(op, "step", step, torch.int64, (1,), key)
    if not 0 <= stream < 2**32:
        raise OpError(f"{op}: stream must lie in [0, 2^32), got {stream}")
    if first < 0 or count < 0 or first + count > STREAM_WORDS:
        raise OpError(f"{op}: words {first} to {first + count} are outside the 2^32 blocks of a nonce")
