"""Triton backend: the functions of ``reference.py`` and ``reference_backward.py``, same arguments, as GPU kernels.

Importing this package imports Triton; :mod:`dp_bitfit_kernels.backends` does so only when the Triton
backend is asked for, and turns a missing Triton into a ``BackendError``. Arguments are validated above
this layer; what is checked here is only what a kernel could not survive.
"""

from __future__ import annotations

from dp_bitfit_kernels.kernels.activation import slope_pack
from dp_bitfit_kernels.kernels.bias_grad import bias_grad, bias_grad_
from dp_bitfit_kernels.kernels.clip_factors import clip_factors
from dp_bitfit_kernels.kernels.clipped_sum import clipped_sum_
from dp_bitfit_kernels.kernels.noisy_sum import noisy_sum, noisy_sum_
from dp_bitfit_kernels.kernels.norm_grad import group_norm_grad, layer_norm_grad, quantize_norm
from dp_bitfit_kernels.kernels.packed import clamp_pack, clamp_pack_, level_pack, pack_bits
from dp_bitfit_kernels.kernels.random_words import random_words
from dp_bitfit_kernels.kernels.scale import activation_grad, affine_grad, bit_scale, level_scale, slope_scale

__all__ = [
    "activation_grad",
    "affine_grad",
    "bias_grad",
    "bias_grad_",
    "bit_scale",
    "clamp_pack",
    "clamp_pack_",
    "clip_factors",
    "clipped_sum_",
    "group_norm_grad",
    "layer_norm_grad",
    "level_pack",
    "level_scale",
    "noisy_sum",
    "noisy_sum_",
    "pack_bits",
    "quantize_norm",
    "random_words",
    "slope_pack",
    "slope_scale",
]
