"""Files: the trained biases with their privacy statement, and the engine's resumable checkpoint.

Both are written to a temporary file beside the target, synced, and moved into place, so that a process killed at any
moment leaves either the old file or the new one. Both carry a SHA-256, so that damage is an error, never a wrong
value.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import secrets
import struct
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import layers
from ._nested import dense_in
from ._validate import CheckpointError
from .convert import conversion_report

BIASES_FORMAT = "dp_bitfit_kernels.biases"
FORMAT_VERSION = 1
_MAGIC = b"dp_bitfit_kernels checkpoint\n"
_HEAD = struct.Struct("<IQ32s")  # format version, bytes of the body, SHA-256 of the body
_SAMPLED = 64  # elements of each frozen tensor that enter the base-weights fingerprint
_STATISTICS = ("running_mean", "running_var")

Path = str | os.PathLike[str]


def save_biases(model: nn.Module, path: Path, *, delta: float | None = None) -> None:
    """Write the trained parameters of a converted model, and nothing else of it, as a safetensors file.

    The file names each tied parameter once and holds the privacy statement of the attached engine (epsilon at
    `delta`), or that there is none; fingerprints of the architecture and of the frozen weights; and a digest of all
    of this.

    Raises:
        CheckpointError: a trained value is not finite, or the file cannot be written. An older file then stays as it
        was.
    """
    model = _unwrapped(model)
    report = conversion_report(model)
    phased = _of_phases(model)
    also = {name for name, p in model.named_parameters() if p.requires_grad or id(p) in phased}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in report.trained and name not in also:
            continue
        if parameter.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save")
        tensors[name] = parameter.detach().to("cpu").contiguous().clone()
        _require_finite(name, tensors[name], "nothing was written")
    aliases: dict[str, list[str]] = {}
    for alias, name in report.tied.items():
        if name in tensors:
            aliases.setdefault(name, []).append(alias)
    metadata = {
        "format": BIASES_FORMAT,
        "format_version": str(FORMAT_VERSION),
        "privacy": json.dumps(_privacy_statement(model, delta), sort_keys=True),
        "tied": json.dumps(aliases, sort_keys=True),
        "architecture": _architecture(model),
        "base_weights": _base_weights(model, {*tensors, *(a for names in aliases.values() for a in names)}),
    }
    metadata["digest"] = _digest(metadata, tensors)
    write_atomically(path, [_safetensors_torch().save(tensors, metadata)])


def load_biases(model: nn.Module, path: Path, *, strict: bool = True) -> dict[str, Any]:
    """Put saved biases into a model and return their privacy statement.

    The model may be converted, restored or never converted. Its architecture must be the one that was saved, and with
    `strict` its frozen weights too: the fingerprint reads a few elements of each in bfloat16, so float32 and bfloat16
    copies agree.

    Args:
        strict: False skips the check of the frozen weights, and only that.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, not finite or does not fit. The model is then untouched.
    """
    model = _unwrapped(model)
    metadata, tensors = _read_biases(path)
    targets = _targets(model, path, json.loads(metadata["tied"]), tensors)
    if metadata["architecture"] != _architecture(model):
        raise CheckpointError(
            f"{path}: saved from another architecture than this {type(model).__name__}: names or shapes differ"
        )
    covered = {name for names in targets.values() for name in names}
    if strict and metadata["base_weights"] != _base_weights(model, covered):
        raise CheckpointError(
            f"{path}: trained on other frozen weights than those of this {type(model).__name__}: "
            "load the base model that was fine-tuned, or pass strict=False"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, names in targets.items():
        for target in names:
            parameter = parameters[target]
            value = tensors[name].to(parameter.dtype)
            _require_finite(f"{target} as {parameter.dtype}", value, "the model is untouched")
            seen = new.setdefault(id(parameter), (parameter, value))
            if not torch.equal(seen[1], value):
                raise CheckpointError(f"{path}: holds two different values for {target!r}, which this model ties")
    with torch.no_grad():
        for parameter, value in new.values():
            parameter.copy_(value)
    statement: dict[str, Any] = json.loads(metadata["privacy"])
    return statement


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write a resumable checkpoint of tensors and plain containers, atomically.

    Raises:
        CheckpointError: a value could not be read back safely (its place in `payload` is named), or the file cannot
        be written.
    """
    _require_plain(payload, "payload")
    body = io.BytesIO()
    torch.save(payload, body)
    view = body.getbuffer()
    write_atomically(path, [_MAGIC, _HEAD.pack(FORMAT_VERSION, len(view), hashlib.sha256(view).digest()), view])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, tensors on the CPU. No code in the file is run.

    Raises:
        CheckpointError: the file is missing, foreign, of another version, or differs in any byte from what was written.
    """
    data = memoryview(_read(path))
    start = len(_MAGIC) + _HEAD.size
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise CheckpointError(f"{path}: not a checkpoint of this package")
    if len(data) < start:
        raise CheckpointError(f"{path}: damaged: cut off after {len(data)} bytes")
    version, length, digest = _HEAD.unpack(data[len(_MAGIC) : start])
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}; this version of the package reads {FORMAT_VERSION}")
    body = data[start:]
    if len(body) != length:
        raise CheckpointError(f"{path}: damaged: {len(body)} bytes of content instead of {length}")
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path}: damaged: its SHA-256 does not match")
    try:
        payload: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds objects that are not plain data, which are never loaded") from error
    return payload


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replace the file at `path` by `parts`, whole or not at all, and return once it is on disk."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: cannot be written: {error}") from error
        raise


def _sync_folder(folder: str) -> None:
    if os.name == "nt":  # no handle on a folder there; the rename itself is durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_biases(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a bias file that is whole, ours and finite."""
    data = _read(path)
    safetensors = _safetensors_torch()
    try:
        tensors: dict[str, Tensor] = dict(sorted(safetensors.load(data).items()))
        (length,) = struct.unpack_from("<Q", data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (importlib.import_module("safetensors").SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file: {error}") from error
    if metadata.get("format") != BIASES_FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not one that save_biases wrote")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        version = metadata.get("format_version")
        raise CheckpointError(f"{path}: format version {version}; this version of the package reads {FORMAT_VERSION}")
    if metadata.pop("digest", None) != _digest(metadata, tensors):
        raise CheckpointError(f"{path}: damaged: its digest does not match its content")
    for name, tensor in tensors.items():
        _require_finite(name, tensor, f"{path}: the model is untouched")
    return metadata, tensors


def _targets(
    model: nn.Module, path: Path, aliases: dict[str, list[str]], tensors: dict[str, Tensor]
) -> dict[str, list[str]]:
    """For each saved name, the names in the model that take its value: itself and what it was tied to."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    targets: dict[str, list[str]] = {}
    faults = []
    for name, tensor in tensors.items():
        targets[name] = [known for known in (name, *aliases.get(name, [])) if known in shapes]
        if not targets[name]:
            faults.append(f"{name} is not in the model")
        for target in targets[name]:
            if shapes[target] != tensor.shape:
                faults.append(f"{target} has shape {tuple(shapes[target])}, saved {tuple(tensor.shape)}")
    if faults:
        listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise CheckpointError(f"{path}: does not fit this {type(model).__name__}: {listed}")
    return targets


def _of_phases(model: nn.Module) -> set[int]:
    """Identities of what any phase trains: a copy of the model has no record of it but its layers'."""
    found = [m for m in model.modules() if isinstance(m, layers.BiasLayer)]
    return {id(layer.trained_parameter(own)) for layer in found for own in layer.in_phases}


def _privacy_statement(model: nn.Module, delta: float | None) -> dict[str, Any]:
    for module in model.modules():
        attachment: Any = getattr(module, "attachment", None) if layers.is_converted(module) else None
        if callable(getattr(attachment, "privacy_statement", None)):
            statement: dict[str, Any] = attachment.privacy_statement(delta)
            return statement
    return {"private": False, "reason": "no privacy engine was attached when this file was written"}


def _architecture(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of all parameters; neither dtype, device nor conversion enters."""
    listed = sorted((name, list(p.shape)) for name, p in model.named_parameters(remove_duplicate=False))
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _base_weights(model: nn.Module, trained: set[str]) -> str:
    """SHA-256 over evenly spaced elements, in bfloat16, of each frozen parameter and normalisation statistic."""
    digest = hashlib.sha256()
    frozen = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False) if name not in trained}
    frozen.update((name, b) for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in _STATISTICS)
    for name, tensor in ((name, part) for name, whole in sorted(frozen.items()) for part in dense_in(whole)):
        count = tensor.numel()
        places = sorted({place * count // _SAMPLED for place in range(_SAMPLED)} if count else set())
        sample = tensor.flatten()[torch.tensor(places, dtype=torch.int64, device=tensor.device)]
        if tensor.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + b"\0" + sample.to("cpu", torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_finite(name: str, tensor: Tensor, so: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: holds NaN or infinity; {so}")


def _require_plain(value: Any, place: str) -> None:
    """Refuse what torch.load(weights_only=True) would not give back."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_plain(key, f"key {key!r} of {place}")
            _require_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _require_plain(item, f"{place}[{index}]")
    elif type(value) not in (type(None), bool, int, float, str, bytes, Tensor, nn.Parameter, torch.Size, torch.dtype):
        raise CheckpointError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}: "
            "a checkpoint holds only tensors, numbers, strings and plain containers of these"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel or torch.compile, whose names carry no prefix."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _safetensors_torch() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise CheckpointError("bias files need the package safetensors: pip install safetensors") from error
