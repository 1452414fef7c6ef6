"""Float32 arithmetic in float32, whatever modes the user allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _modes() -> list[Any]:
    backends: Any = torch.backends
    return [backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul, backends.cudnn.conv]


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products and convolutions of float32 without TF32, bfloat16 or autocast; afterwards all is as before."""
    before = [(mode, mode.fp32_precision) for mode in _modes()]
    for mode, _ in before:
        mode.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for mode, precision in before:
            mode.fp32_precision = precision
