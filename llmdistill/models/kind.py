"""What a module must offer so that config.json can name it in place of a stock one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, Self, TypeAlias

from torch import nn

Settings: TypeAlias = "Mapping[str, str | int | float | bool | list[int] | list[float]]"
"""A kind's settings: plain JSON values, enough to build the module empty; its numbers come from the safetensors."""


class Kind(Protocol):
    """A module class (an nn.Module) that replaces a submodule of the stock model.

    Tensors whose dtype is part of the format (int8 weights, float32 scales) are created with that dtype, the others with the replaced module's: loading
    keeps the first and casts the second. Everything that must be saved is a parameter or a persistent buffer.
    """

    kind: ClassVar[str]

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """The module, still empty, in place of `replaced`, which gives sizes, bias, dtype and device. ValueError where they do not fit."""
        ...

    def settings(self) -> Settings:
        """What from_settings needs to build it again."""
        ...
