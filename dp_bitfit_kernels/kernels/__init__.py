"""Triton backend: the functions of ``reference.py``, same names and arguments, as GPU kernels.

Importing this package imports Triton; :mod:`dp_bitfit_kernels.backends` does so only when the Triton
backend is asked for, and turns a missing Triton into a ``BackendError``. Arguments are validated above
this layer; what is checked here is only what a kernel could not survive.
"""

from __future__ import annotations

from dp_bitfit_kernels.kernels.bias_grad import bias_grad, bias_grad_
from dp_bitfit_kernels.kernels.clip_factors import clip_factors
from dp_bitfit_kernels.kernels.clipped_sum import clipped_sum_
from dp_bitfit_kernels.kernels.noisy_sum import noisy_sum
from dp_bitfit_kernels.kernels.random_words import random_words

__all__ = ["bias_grad", "bias_grad_", "clip_factors", "clipped_sum_", "noisy_sum", "random_words"]
