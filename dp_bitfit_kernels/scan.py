"""What would be trained of a model that is only named: built on the meta device, without weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._validate import ConversionError
from .convert import conversion_report, convert_model
from .report import ConversionReport


def scan(model: str, **options: Any) -> ConversionReport:
    """The conversion report of a model by its name, path or class.

    Args:
        model: a class of transformers ("BertForMaskedLM", in its default configuration), a folder or name that
            transformers finds a configuration under, "timm:resnet50", or "package.module:Class", which is called
            without arguments.
        options: of ``convert_model``.

    Raises:
        ConversionError: the model cannot be found or built, or not be converted as asked.
    """
    try:
        with torch.device("meta"):
            network = _build(model)
    except _FAILURES as error:
        raise ConversionError(f"scan: {model!r} cannot be built: {type(error).__name__}: {error}") from error
    return conversion_report(convert_model(network, **options))


def report_of(model: str, as_json: bool, **options: Any) -> str:
    """The report as a table, or as JSON."""
    report = scan(model, **options)
    return json.dumps(report.to_dict(), indent=1) if as_json else str(report)


# What a constructor may raise: it wants arguments, reads values that the meta device does not have, needs a file.
_FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError, OSError)


def _build(model: str) -> nn.Module:
    if model.startswith("timm:"):
        network: Any = _library("timm").create_model(model.removeprefix("timm:"))
    elif ":" in model and not Path(model).exists():
        module, _, name = model.partition(":")
        network = getattr(importlib.import_module(module), name)()
    else:
        network = _of_transformers(model)
    if not isinstance(network, nn.Module):
        raise ConversionError(f"scan: {model!r} is a {type(network).__name__}, not a torch.nn.Module")
    return network


def _of_transformers(model: str) -> Any:
    transformers = _library("transformers")
    kind = getattr(transformers, model, None) if model.isidentifier() else None
    if kind is not None:
        if getattr(kind, "config_class", None) is None:
            raise ConversionError(f"scan: transformers.{model} is no model class with a configuration of its own")
        return kind(kind.config_class())
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"scan: {model!r} is no class of transformers, no folder with a configuration and no name that can be "
            f"found ({str(error).splitlines()[0]})"
        ) from error
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)(config)
    return transformers.AutoModel.from_config(config)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConversionError(f"scan: this model needs {name}: pip install {name} ({error})") from error
