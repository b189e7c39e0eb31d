"""What a compression method is: frozen settings, and `apply`, which changes a model in place and says what it did.

No torch at import, here and in every file that holds settings: pipelines hold methods, and `--help` must answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from llmdistill.core.stage import JsonScalar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What became of one layer. `kind` is the structure's name of the new module, or "kept" with the reason in `note`."""

    path: str
    kind: str
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    """rank, rank_share (of full rank), relative_error (of the outputs on the calibration rows), bits, ...: whatever the method knows."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a method did to a model."""

    figures: Mapping[str, JsonScalar]
    """For the lineage and the manifest, with units in the names."""
    layers: tuple[Layer, ...]
    held_out_loss: float | None = None
    """Of the model as it is now, in nats, where the method has measured it."""


class Method(Protocol):
    """One technique. It replaces modules with `model.set_submodule`; the structure in config.json is read off the model when it is saved."""

    kind: ClassVar[str]
    quantizes: ClassVar[bool]
    """Whether weights are integers afterwards: these methods come last, since nothing trains or factorises an integer."""

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Change the model. ValueError before any work where it cannot: what was found, and the remedy."""
        ...
