"""The modules of a model that decide, token by token, what is computed."""

from __future__ import annotations

from typing import Any

from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.skipping import Skipping


def deciding(model: Any) -> dict[str, Any]:
    """Those that may be skipped, and those of which a token uses a part, by their paths. Each knows its `num_multiplications` of one token."""
    return {path: module for path, module in model.named_modules() if isinstance(module, (Skipping, ChannelGatedFeedForward))}
