"""What an elastic checkpoint says of itself: the space, and which sub-network is the chosen one, under `elastic` in config.json.

Beside them stands the structure that the model had (models/structure.py): a model in which modules were replaced since then is not saved with this space.

A stock model class carries the key along and takes no notice of it: an elastic checkpoint loads as the whole model, which is its largest sub-network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.space import Space

KEY = "elastic"


def keep(model: Any, space: Space, active: Subnet | None = None) -> None:
    """Write them into the model's config, from where models.checkpoint saves them. The chosen one is the largest where none is given."""
    from llmdistill.elastic.measure import shape_of
    from llmdistill.models.structure import structure_of

    chosen = active or space.largest()
    space.check(chosen)
    if shape_of(model) != space.shape:
        raise ValueError("the space was made for a model of other sizes or ranks: make it anew with Axes.space(shape_of(model))")
    setattr(model.config, KEY, {"space": space.to_json(), "active": chosen.to_json(), "structure": structure_of(model)})


def space_of(model: Any) -> Space:
    """The space of an elastic model."""
    return Space.from_json(_kept(getattr(model.config, KEY, None), "this model")["space"])


def active_of(model: Any) -> Subnet:
    """The sub-network that was chosen."""
    return Subnet.from_json(_kept(getattr(model.config, KEY, None), "this model")["active"])


def read(folder: Path) -> tuple[Space, Subnet]:
    """The space of an elastic checkpoint and its chosen sub-network, without loading the model."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is not a checkpoint: {f'it has no {config.name}' if folder.is_dir() else 'there is no such folder'}")
    kept = _kept(json.loads(config.read_text(encoding="utf-8")).get(KEY), str(folder))
    return Space.from_json(kept["space"]), Subnet.from_json(kept["active"])


def is_elastic(model: Any) -> bool:
    """Whether the model has a space."""
    return isinstance(getattr(model.config, KEY, None), dict)


def refusal(student: str, *, verb: str) -> str:
    """Why a stage that changes the weights of the whole does not take an elastic student, and what to do."""
    return (
        f"{student} is elastic, and to {verb} the whole would leave sub-networks that nothing was trained for: extract one "
        f"(the Extract stage, or `llmdistill extract FOLDER OUT --subnet TEXT`) and {verb} that, or {verb} before the elastic stage"
    )


def _kept(value: Any, whose: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{whose} is not elastic: its config.json has no `{KEY}` key; make it so with the elastic stage first")
    return value
