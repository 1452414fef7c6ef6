"""What layers share that give rows of parameters of the modules below them, too."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from .base import BiasLayer
from .standing_in import Places


class LayerWithBelow(BiasLayer):
    """A layer whose ``trained`` are names relative to it, of its own parameters and of those below.

    Attributes:
        leaves: name -> leaf [B, p] of the open batch.
    """

    leaves: Mapping[str, Tensor] = MappingProxyType({})

    def open_batch(self) -> int | None:
        own: dict[str, Tensor] = self.__dict__.get("leaves", {})
        return next((leaf.shape[0] for leaf in own.values()), super().open_batch())

    def set_leaf(self, name: str, leaf: Tensor) -> None:
        self.__dict__.setdefault("leaves", {})[name] = leaf

    def drop_leaves(self) -> None:
        self.__dict__.pop("leaves", None)
        self.__dict__.pop("weight_sinks", None)

    def trained_parameter(self, name: str) -> nn.Parameter | None:
        owner, _, own = name.rpartition(".")
        return self.get_submodule(owner)._parameters.get(own)

    def places(self, name: str) -> Places:
        """Every place below this module that holds the parameter."""
        parameter = self.trained_parameter(name)
        return [(m, own) for m in self.modules() for own, held in m._parameters.items() if held is parameter]
