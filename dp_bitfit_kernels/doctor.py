"""What this installation has: versions, devices, which backends serve them, why others do not, self-tests."""

from __future__ import annotations

import importlib.metadata
import platform
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, reference
from .backends import Backend

_PACKAGES = ("torch", "numpy", "triton", "dp-accounting", "safetensors", "opacus", "transformers")
# RFC 8439, section 2.3.2: the first eight bytes of block 1 under the key 00 01 .. 1f.
_RFC_NONCE, _RFC_WORD = (0x09000000 | 0x4A000000 << 32, 0), 0x1559_3BD1_E4E7_F110
_NOISE_STD, _SCALE = 2.0**20, 2.0**-20


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    state: str
    sound: bool = True


def examine() -> Iterator[Finding]:
    """All findings, in reading order; a backend that is missing is no fault, one that computes wrongly is."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("dp-bitfit-kernels", *_PACKAGES):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed")
    yield Finding("CUDA of torch", torch.version.cuda or "none: this torch is built for the CPU")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        major, minor = torch.cuda.get_device_capability()
        yield Finding("GPU", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    else:
        yield Finding("GPU", "none that torch can use")
    for device in devices:
        yield Finding(f"auto on {device}", backends.select("auto", device).name)
        for name in backends.NAMES[1:]:
            yield _backend(name, device)
    if "cuda" not in devices:
        reason = backends.unavailable("native", "cuda")
        state = (
            "its kernels are loaded; there is no GPU to test them on" if reason is None else f"not available: {reason}"
        )
        yield Finding("native on cuda", state)


def _backend(name: str, device: str) -> Finding:
    reason = backends.unavailable(name, device)
    subject = f"{name} on {device}"
    if reason is not None:
        return Finding(subject, f"not available: {reason}")
    begun = time.perf_counter()
    try:
        fault = self_test(backends.select(name, device), torch.device(device))
    except Exception as error:  # noqa: BLE001  whatever a broken driver or compiler raises is the finding
        return Finding(subject, f"FAILED: {type(error).__name__}: {error}", sound=False)
    spent = 1e3 * (time.perf_counter() - begun)
    return Finding(subject, f"FAILED: {fault}" if fault else f"ok, self-test in {spent:.0f} ms", sound=fault is None)


def self_test(backend: Backend, device: torch.device) -> str | None:
    """Every op once, against the reference on the CPU; what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for grad in (torch.randn((3, 50, 40), generator=generator), torch.randn((3, 8, 49), generator=generator).mT):
            values = grad.to(dtype)
            rows = backend.bias_grad(values.to(device))
            torch.testing.assert_close(rows.cpu(), reference.bias_grad(values.double()).float(), rtol=1e-5, atol=1e-5)
    rows = torch.randn((5, 3000), generator=generator)
    rows[1, 7], offsets = float("nan"), torch.tensor([0, 1000, 3000])
    one, mask = torch.ones(2, dtype=torch.float64), torch.tensor([True, True, False, True, True])
    clip = (offsets, mask, one, one * 2.0**20, None, 1.0, None)
    factors, _ = backend.clip_factors(rows.to(device), *(a.to(device) if isinstance(a, Tensor) else a for a in clip))
    torch.testing.assert_close(factors.cpu(), reference.clip_factors(rows, *clip)[0], rtol=1e-12, atol=0.0)
    total, expected = torch.zeros(3000, dtype=torch.int64, device=device), torch.zeros(3000, dtype=torch.int64)
    backend.clipped_sum_(total, rows.to(device), offsets.to(device), factors)
    reference.clipped_sum_(expected, rows, offsets, factors.cpu())
    if not torch.equal(total.cpu(), expected):
        return "clipped_sum: an integer sum differs from the reference"
    key = torch.tensor(struct.unpack("<8i", bytes(range(32))), dtype=torch.int32)
    step = torch.tensor([_RFC_NONCE[0]])
    if int(backend.random_words(key.to(device), step.to(device), _RFC_NONCE[1], 8, 1)) != _RFC_WORD:
        return "random_words: not the ChaCha20 of RFC 8439"
    stream = (0, 3, _NOISE_STD, _SCALE)
    release = backend.noisy_sum(total, key.to(device), step.to(device), *stream).cpu().double()
    wanted = reference.noisy_sum(expected, key, step, *stream).double()
    if ((release - wanted).abs() > 1.001 * _SCALE).any():  # one step of the grid
        return "noisy_sum: a release differs from the reference by more than one step of the grid"
    return None
