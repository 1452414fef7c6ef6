"""peft's prompt tuning and P-tuning: virtual tokens that are made once and repeated for all samples of a batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._validate import BatchLayoutError
from ..functional import SpreadFunction, apply
from .base import LayerKind, register_lazy
from .below import LayerWithBelow
from .standing_in import standing_in

_ONCE_FOR_ALL = ("PROMPT_TUNING", "P_TUNING")  # peft's names; in prefix tuning each sample has its own indices


class PromptLayer(LayerWithBelow):
    """A model of peft that makes each sample's virtual tokens by its own copy of what they are made of."""

    keeps_name = True
    holds_samples = False
    stands_for = ("forward", "get_prompt")

    def get_prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """[B, T, d], the tokens of each sample."""
        if self.attachment is None or not self.recording():
            return self.made(batch_size, *args, **kwargs)
        batch = next(iter(self.leaves.values())).shape[0]
        if batch_size != batch:
            raise BatchLayoutError(
                f"{type(self).__name__} asks for the prompts of {batch_size} samples in a batch of {batch}: call it on "
                "inputs whose leading dimension is the batch, [B, T]"
            )
        copies = {
            name: apply(SpreadFunction, self.get_parameter(name).detach(), leaf) for name, leaf in self.leaves.items()
        }

        def one(own: Mapping[str, Tensor]) -> Tensor:
            with standing_in([(self.places(name), tensor) for name, tensor in own.items()]):
                tokens: Tensor = self.made(1, *args, **kwargs)[0]
            return tokens

        if any(isinstance(module, nn.RNNBase) for module in self.get_submodule("prompt_encoder").modules()):
            return torch.stack([one({name: copy[i] for name, copy in copies.items()}) for i in range(batch)])
        return torch.func.vmap(one, randomness="different")(copies)

    def made(self, *args: Any, **kwargs: Any) -> Any:
        """As the class makes them."""
        return super().get_prompt(*args, **kwargs)  # type: ignore[misc]


def _encoder(module: nn.Module) -> str | None:
    """The name of what makes the tokens, where it makes them once for all samples."""
    model: Any = module
    config = model.peft_config.get(model.active_adapter)
    if config is None or config.peft_type.name not in _ONCE_FOR_ALL or config.inference_mode:
        return None
    return f"prompt_encoder.{model.active_adapter}"


def _find(cls: type) -> LayerKind | None:
    base = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    if base is None or not issubclass(cls, base) or cls.get_prompt is not base.get_prompt:  # type: ignore[attr-defined]
        return None
    return LayerKind("peft", base, PromptLayer, bias_names=(), whole_names=(), gives_below=_encoder)


register_lazy(_find)
