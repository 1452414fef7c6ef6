"""PyTorch specification of the ops that keep little for backward, beside those in ``reference``.

What they share: ``grad`` is contiguous [B, R, C] and ``reduce`` says what is summed over in the same visit: 0 nothing
(rows is [0]), 1 dimension 1 (rows [B, C]: features last), 2 dimension 2 (rows [B, R]: channels first). ``rows`` is
the sum of the *rounded* result that is returned beside it, in float32: just what the layer before would have
summed. Arithmetic is float32 (float64 for float64 inputs) and rounded once to the dtype of ``grad`` or ``x``.
Packed elements are in memory order: element i is bit i % 8 of byte i // 8, unused bits are 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._validate import OpError

KINDS = ("gelu", "gelu_tanh", "silu", "quick_gelu")  # the number of an activation is its place here
SLOPE_STEPS = 2.0**23  # codes of slope_pack for each unit of a derivative
SLOPE_OFFSET = 0.5  # derivatives from -0.5 (inclusive) to 1.5 (exclusive)
PLANES = 3  # bits of a level_pack code
_GELU_TANH = math.sqrt(2.0 / math.pi)
_CUBE = 0.044715


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_float(op: str, name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point or not x.is_contiguous():
        raise OpError(f"{op}: {name} must be contiguous and floating point, got {x.dtype} with strides {x.stride()}")


def _check_packed(op: str, name: str, packed: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if packed.dtype != torch.uint8 or tuple(packed.shape) != shape or not packed.is_contiguous():
        raise OpError(f"{op}: {name} must be contiguous uint8 {list(shape)}, got {packed.dtype} {list(packed.shape)}")
    if packed.device != like.device:
        raise OpError(f"{op}: {name} is on {packed.device}, the gradient on {like.device}: move them to one device")


def _check_grad(op: str, grad: Tensor, reduce: int) -> None:
    _check_float(op, "grad", grad)
    if grad.dim() != 3:
        raise OpError(f"{op}: grad must be [B, R, C], got {grad.dim()} dimensions")
    if reduce not in (0, 1, 2):
        raise OpError(f"{op}: reduce must be 0, 1 or 2, got {reduce}")


def bytes_of(count: int) -> int:
    """Bytes that hold ``count`` bits."""
    return (count + 7) // 8


def _sums(result: Tensor, reduce: int) -> Tensor:
    if reduce == 0:
        return result.new_empty((0,), dtype=torch.promote_types(result.dtype, torch.float32))
    return result.sum(reduce, dtype=torch.float64).to(torch.promote_types(result.dtype, torch.float32))


def pack_bits(mask: Tensor) -> Tensor:
    """``mask`` bool, contiguous, n elements -> [ceil(n / 8)] uint8."""
    if mask.dtype != torch.bool or not mask.is_contiguous():
        raise OpError(f"pack_bits: mask must be contiguous bool, got {mask.dtype} with strides {mask.stride()}")
    flat = mask.reshape(-1)
    padded = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded << places).sum(1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """[ceil(n / 8)] uint8 -> [n] bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).reshape(-1)[:count].bool()


def clamp_pack(x: Tensor, low: float, high: float, slope: float) -> tuple[Tensor, Tensor]:
    """Clamp ``x`` (contiguous, any shape) to [low, high] -> y, and a bit for each element strictly between.

    Where slope is not 0, y = slope * x at or below low (LeakyReLU; low is 0). high may be NaN: no upper limit. A NaN is
    between, and stays NaN.
    """
    _check_float("clamp_pack", "x", x)
    wide = _wide(x)
    below, above = wide <= low, wide >= high
    y = torch.where(below, wide * slope if slope else torch.full_like(wide, low), wide)
    if not math.isnan(high):
        y = torch.where(above, torch.full_like(wide, high), y)
    return y.to(x.dtype), pack_bits(~(below | above))


def clamp_pack_(x: Tensor, low: float, high: float, slope: float) -> Tensor:
    """As :func:`clamp_pack`, with y written over ``x``; returns the bits."""
    y, bits = clamp_pack(x, low, high, slope)
    x.copy_(y)
    return bits


def bit_scale(x: Tensor, bits: Tensor, on: float, off: float, reduce: int) -> tuple[Tensor, Tensor]:
    """y = x * on where the bit is set, else x * off; off = 0 *selects* 0, whatever x holds. -> y [B, R, C], rows."""
    _check_grad("bit_scale", x, reduce)
    _check_packed("bit_scale", "bits", bits, (bytes_of(x.numel()),), x)
    mask, wide = unpack_bits(bits, x.numel()).view(x.shape), _wide(x)
    y = torch.where(mask, wide * on, wide * off if off else torch.zeros_like(wide)).to(x.dtype)
    return y, _sums(y, reduce)


def derivative(x: Tensor, kind: int) -> Tensor:
    """Of activation number ``kind``, in the dtype of ``x``."""
    name = KINDS[kind]
    if name == "gelu":
        pdf = torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
        return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))) + x * pdf
    if name == "gelu_tanh":
        tanh = torch.tanh(_GELU_TANH * (x + _CUBE * x * x * x))
        return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * (_GELU_TANH * (1.0 + 3.0 * _CUBE * x * x))
    factor = 1.702 if name == "quick_gelu" else 1.0
    sigmoid = torch.sigmoid(factor * x)
    return sigmoid * (1.0 + factor * x * (1.0 - sigmoid))


def _value(x: Tensor, kind: int) -> Tensor:
    name = KINDS[kind]
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.silu(x) if name == "silu" else x * torch.sigmoid(1.702 * x)


def _check_kind(op: str, kind: int) -> None:
    if not 0 <= kind < len(KINDS):
        raise OpError(f"{op}: kind must be 0 to {len(KINDS) - 1}, got {kind}")


def activation_grad(grad: Tensor, x: Tensor, kind: int, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` [B, R, C] times the derivative of activation ``kind`` at ``x`` (same shape and dtype) -> dx, rows."""
    _check_grad("activation_grad", grad, reduce)
    _check_float("activation_grad", "x", x)
    _check_kind("activation_grad", kind)
    if x.shape != grad.shape or x.dtype != grad.dtype:
        raise OpError(f"activation_grad: x {x.dtype} {list(x.shape)} does not fit grad {grad.dtype} {list(grad.shape)}")
    dx = (_wide(grad) * derivative(_wide(x), kind)).to(grad.dtype)
    return dx, _sums(dx, reduce)


def slope_pack(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Activation ``kind`` of ``x`` float32, contiguous, n elements -> y, and its derivative in 24 bits: codes [3, n].

    Codes are uint8, low byte first: floor((d + 0.5) * 2^23 + 0.5), within 2^-24 of the derivative d, as near as a
    float32 next to 1. Three bytes an element, where keeping x takes four.
    """
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise OpError(f"slope_pack: x must be contiguous float32, got {x.dtype} with strides {x.stride()}")
    _check_kind("slope_pack", kind)
    slope = derivative(x.double().reshape(-1), kind)
    code = ((slope + SLOPE_OFFSET) * SLOPE_STEPS + 0.5).floor().clamp(0, 2**24 - 1).nan_to_num(0.0).to(torch.int64)
    return _value(x, kind), torch.stack([(code >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)])


def slope_scale(grad: Tensor, codes: Tensor, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` float32 [B, R, C] times the derivatives in ``codes`` [3, B * R * C] of slope_pack -> dx, rows."""
    _check_grad("slope_scale", grad, reduce)
    if grad.dtype != torch.float32:
        raise OpError(f"slope_scale: grad must be float32, got {grad.dtype}")
    _check_packed("slope_scale", "codes", codes, (3, grad.numel()), grad)
    low, middle, high = codes.to(torch.int32)
    slope = ((low | middle << 8 | high << 16).float() / SLOPE_STEPS) - SLOPE_OFFSET  # exact
    dx = grad * slope.view(grad.shape)
    return dx, _sums(dx, reduce)


def level_pack(x: Tensor, edges: Tensor) -> Tensor:
    """Number of ``edges`` [7] float32 (ascending) below each element of ``x`` -> bit planes [3, ceil(n / 8)]."""
    _check_float("level_pack", "x", x)
    if edges.dtype != torch.float32 or edges.shape != (2**PLANES - 1,):
        raise OpError(f"level_pack: edges must be float32 [7], got {edges.dtype} {list(edges.shape)}")
    code = (_wide(x).reshape(-1, 1) > edges).sum(1)
    return torch.stack([pack_bits((code >> plane & 1).bool()) for plane in range(PLANES)])


def level_scale(grad: Tensor, planes: Tensor, levels: Tensor, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` [B, R, C] times ``levels`` [8] float32 at the codes in ``planes`` [3, ceil(n / 8)] -> dx, rows."""
    _check_grad("level_scale", grad, reduce)
    _check_packed("level_scale", "planes", planes, (PLANES, bytes_of(grad.numel())), grad)
    if levels.dtype != torch.float32 or levels.shape != (2**PLANES,):
        raise OpError(f"level_scale: levels must be float32 [8], got {levels.dtype} {list(levels.shape)}")
    code = sum(unpack_bits(plane, grad.numel()).long() << bit for bit, plane in enumerate(planes))
    assert isinstance(code, Tensor)
    dx = (_wide(grad) * levels[code].view(grad.shape)).to(grad.dtype)
    return dx, _sums(dx, reduce)


def quantize_norm(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised rows (x - mean) * rstd of ``x`` [M, N] in 8 bits -> codes int8 [M, N], scale [M] float32.

    A row's scale is its largest absolute value / 127 (1 where that is 0 or not finite); code = floor(value / scale +
    0.5) to within one where value / scale is near a half.
    """
    _check_float("quantize_norm", "x", x)
    if x.dim() != 2 or mean.shape != x.shape[:1] or rstd.shape != x.shape[:1]:
        raise OpError(f"quantize_norm: x {list(x.shape)}, mean {list(mean.shape)}, rstd {list(rstd.shape)} do not fit")
    normalised = (_wide(x) - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    if x.shape[1] == 0:
        return x.new_empty(x.shape, dtype=torch.int8), torch.ones_like(rstd, dtype=torch.float32)
    largest = normalised.abs().amax(1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest / 127.0, 1.0)
    codes = (normalised / scale.unsqueeze(1) + 0.5).floor().clamp(-127, 127).nan_to_num(0.0)
    return codes.to(torch.int8), scale.float()


def _normalised(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    wide = x.to(scale.dtype)
    return (wide if shift is None else wide - shift) * scale


def layer_norm_grad(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    reduce: int,
) -> tuple[Tensor, Tensor]:
    """Input gradient of a LayerNorm over C, and in the same visit the sum of ``grad`` over R.

    ``grad`` [B, R, C]; ``x`` [B, R, C] of grad's dtype, or int8; ``shift`` (or None for 0), ``scale`` and ``rstd``
    [B * R] float32 (float64 beside a float64 grad), ``weight`` [C] of any floating dtype or None. With
    n = (x - shift) * scale the normalised input and g = weight * grad:
    dx = rstd * (g - mean_C(g) - n * mean_C(g * n)); rows [B, C] = sum over R of grad, as float32, where reduce is 1.
    """
    _check_grad("layer_norm_grad", grad, reduce)
    batch, length, width = grad.shape
    count = (batch * length,)
    if x.shape != grad.shape or not x.is_contiguous() or reduce == 2:
        raise OpError(f"layer_norm_grad: x {list(x.shape)}, reduce {reduce} do not fit grad {list(grad.shape)}")
    for name, value in (("shift", shift), ("scale", scale), ("rstd", rstd)):
        if value is not None and value.shape != count:
            raise OpError(f"layer_norm_grad: {name} must be [{count[0]}], got {list(value.shape)}")
    if weight is not None and weight.shape != (width,):
        raise OpError(f"layer_norm_grad: weight must be [{width}], got {list(weight.shape)}")
    column = (batch, length, 1)
    n = _normalised(x, None if shift is None else shift.view(column), scale.view(column))
    g = _wide(grad) if weight is None else _wide(grad) * weight.to(scale.dtype)
    inner = g - g.mean(2, keepdim=True) - n * (g * n).mean(2, keepdim=True)
    return (rstd.view(column) * inner).to(grad.dtype), _sums(grad, reduce)


def group_norm_grad(
    grad: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Input gradient of a GroupNorm, and the sum of ``grad`` over positions.

    ``grad`` [B, C, S]; ``x`` as grad, or int8; ``shift`` (or None), ``scale``, ``rstd`` [B, G]; ``weight`` [C] or None.
    As in :func:`layer_norm_grad`, with means over the C / G channels and S positions of a group; rows [B, C].
    """
    _check_grad("group_norm_grad", grad, 2)
    batch, channels, length = grad.shape
    groups = scale.shape[-1]
    if x.shape != grad.shape or not x.is_contiguous():
        raise OpError(f"group_norm_grad: x {list(x.shape)} does not fit grad {list(grad.shape)}")
    if groups == 0 or channels % groups:
        raise OpError(f"group_norm_grad: {channels} channels cannot form {groups} groups")
    for name, value in (("shift", shift), ("scale", scale), ("rstd", rstd)):
        if value is not None and value.shape != (batch, groups):
            raise OpError(f"group_norm_grad: {name} must be [{batch}, {groups}], got {list(value.shape)}")
    if weight is not None and weight.shape != (channels,):
        raise OpError(f"group_norm_grad: weight must be [{channels}], got {list(weight.shape)}")
    shape, column = (batch, groups, channels // groups * length), (batch, groups, 1)
    n = _normalised(x.view(shape), None if shift is None else shift.view(column), scale.view(column))
    g = _wide(grad) if weight is None else _wide(grad) * weight.to(scale.dtype).view(-1, 1)
    g = g.view(shape)
    inner = g - g.mean(2, keepdim=True) - n * (g * n).mean(2, keepdim=True)
    return (rstd.view(column) * inner).to(grad.dtype).view(grad.shape), _sums(grad, 2)


def affine_grad(grad: Tensor, scale: Tensor, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` [B, R, C] times ``scale`` ([C] with reduce 1, [R] with reduce 2) -> dx, and rows: sums of *grad*."""
    _check_grad("affine_grad", grad, reduce)
    if reduce == 0 or scale.shape != (grad.shape[3 - reduce],):
        raise OpError(f"affine_grad: scale {list(scale.shape)}, reduce {reduce} do not fit grad {list(grad.shape)}")
    factor = scale if reduce == 1 else scale.unsqueeze(1)
    return (_wide(grad) * factor.to(_wide(grad).dtype)).to(grad.dtype), _sums(grad, reduce)
