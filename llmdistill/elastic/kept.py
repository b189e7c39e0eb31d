"""What an elastic checkpoint says of itself: the space, and which sub-network is the chosen one, under `elastic` in config.json.

A stock model class carries the key along and takes no notice of it: an elastic checkpoint loads as the whole model, which is its largest sub-network.
"""

from __future__ import annotations

from typing import Any

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.space import Space

KEY = "elastic"


def keep(model: Any, space: Space, active: Subnet | None = None) -> None:
    """Write them into the model's config, from where models.checkpoint saves them. The chosen one is the largest where none is given."""
    from llmdistill.elastic.measure import shape_of

    chosen = active or space.largest()
    space.check(chosen)
    if shape_of(model) != space.shape:
        raise ValueError("the space was made for a model of other sizes or ranks: make it anew with Axes.space(shape_of(model))")
    setattr(model.config, KEY, {"space": space.to_json(), "active": chosen.to_json()})


def space_of(model: Any) -> Space:
    """The space of an elastic model."""
    return Space.from_json(_kept(model)["space"])


def active_of(model: Any) -> Subnet:
    """The sub-network that was chosen."""
    return Subnet.from_json(_kept(model)["active"])


def is_elastic(model: Any) -> bool:
    """Whether the model has a space."""
    return isinstance(getattr(model.config, KEY, None), dict)


def _kept(model: Any) -> dict[str, Any]:
    if not is_elastic(model):
        raise ValueError("this model is not elastic: its config.json has no `elastic` key; make it so with the elastic stage first")
    return getattr(model.config, KEY)
