"""A checkpoint's tensors into a model, strictly: each goes to all its places, and one that is missing, left over or of another form is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def fill(places: Iterable[tuple[str, Tensor]], ties: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy the tensors of a checkpoint, by name, to the places that go by these names; a tied one is in the file under its first name only."""
    empty: dict[str, list[Tensor]] = {}
    for name, place in places:
        empty.setdefault(ties.get(name, name), []).append(place)
    for name, tensor in tensors:
        if name not in empty:
            raise ValueError(f"the checkpoint has a tensor {name!r} that its config.json does not speak of: the folder is damaged, make it again")
        for place in empty.pop(name):
            if place.shape != tensor.shape or (place.dtype == torch.int8) != (tensor.dtype == torch.int8):
                raise ValueError(
                    f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, and by config.json it is {place.dtype} of {tuple(place.shape)}: "
                    "the folder is damaged, make it again"
                )
            place.copy_(tensor)
    if empty:
        raise ValueError(f"the checkpoint lacks {len(empty)} tensors such as {', '.join(sorted(empty)[:5])}: the folder is damaged, make it again")
