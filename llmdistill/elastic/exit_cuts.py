"""The exits of a sub-network: those of the whole that lie between two of its layers, at its width.

An exit after layer k of the whole reads, in a sub-network, what the layers that stay of the first k have made. Where several exits come to lie after the same
layer, the last of them stays; one before the first layer that stays or after the last is none.

No torch at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.space import Space
from llmdistill.models.exit_settings import ExitSettings


def exits_within(settings: ExitSettings, space: Space, subnet: Subnet) -> tuple[ExitSettings, list[int], list[int]] | None:
    """A sub-network's exits, uncalibrated, and which of the whole's they are, of the decoder and of the encoder; None where it has none."""
    places, encoder_places = _kept(settings.layers, space, subnet, -1), _kept(settings.encoder_layers, space, subnet, 0)
    if not places and not encoder_places:
        return None
    layers = {"layers": tuple(places), "encoder_layers": tuple(encoder_places)}
    within = replace(settings, **layers, calibration=None, subnet_calibrations={})
    return within, list(places.values()), list(encoder_places.values())


def _kept(layers: Sequence[int], space: Space, subnet: Subnet, stack: int) -> dict[int, int]:
    """After how many of the layers that stay -> the place among the whole's exits."""
    stays, depth = space.stacks[stack].kept_layers(subnet.stacks[stack].depth), subnet.stacks[stack].depth
    below = {sum(number < layer for number in stays): place for place, layer in enumerate(layers)}
    return {position: place for position, place in below.items() if 0 < position < depth}
