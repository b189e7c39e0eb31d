"""Running a sub-network inside the big model, without copying weights.

    with with_subnet(model, subnet):
        model(...), the losses, an Engine made here: all see the small network

    activate(model, subnet); deactivate(model)        the same, to stay

How: a module's weight is looked up as an attribute, and an attribute of the object itself comes before a registered parameter of the same name. So for the
time being each linear, norm and table has as its `weight` a view of the first rows and columns of its parameter, each stack has a shorter list of layers, and
numbers such as n_heads are those of the sub-network. All modules stay what they are; `parameters()` and `state_dict()` still give the whole parameters, to
which the gradients of the views flow: zero outside the prefixes, and none for layers that are left out. So the optimizer, DDP and the training state need not
know.

The largest sub-network has nothing to cut, and is the plain model. One in place gives bitwise what its extraction gives as long as prefixes of rows end where a
vector register does: at multiples of 8 in float32 (measured with MKL on AVX-512, as are the 2,800 products of odd sizes, of which 1 in 15 differs). At other
widths the library adds up in another order where there are gaps between rows, and the two agree to rounding. Axes makes multiples of 8.

What to know: an Engine must be used where it was made, since it holds modules and not weights. Views are of the parameters as they were when it began: move or
cast the model before (`to`), not within. Sharded parameters (FSDP, ZeRO) have no prefixes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmdistill.elastic.cuts import Plan, plan
from llmdistill.elastic.kept import space_of
from llmdistill.elastic.space import Subnet

_STATE = "_llmdistill_subnet"
_NOTHING = object()


@contextlib.contextmanager
def with_subnet(model: Any, subnet: Subnet) -> Iterator[None]:
    """The model is this sub-network within, and afterwards what it was before, be that another sub-network."""
    before = running(model)
    activate(model, subnet)
    try:
        yield
    finally:
        _restore(model, before)


@contextlib.contextmanager
def whole(model: Any) -> Iterator[None]:
    """The model is whole within: for saving it, or measuring it, whatever runs in it."""
    before = running(model)
    deactivate(model)
    try:
        yield
    finally:
        _restore(model, before)


def activate(model: Any, subnet: Subnet) -> None:
    """Make the model this sub-network, in place of the one that it may be now."""
    space = space_of(model)
    space.check(subnet)
    deactivate(model)
    vars(model)[_STATE] = (subnet, _apply(plan(model, space, subnet)))


def deactivate(model: Any) -> None:
    """Make the model whole again."""
    _, hidden = vars(model).pop(_STATE, (None, []))
    _show(hidden)


def running(model: Any) -> Subnet | None:
    """The sub-network that the model is at present, or None where it is whole."""
    return vars(model).get(_STATE, (None, None))[0]


def _restore(model: Any, before: Subnet | None) -> None:
    if before is None:
        deactivate(model)
    else:
        activate(model, before)


@contextlib.contextmanager
def applied(made: Plan) -> Iterator[None]:
    """A plan in place within, for plans that are no sub-network of a space. The model must be whole."""
    hidden = _apply(made)
    try:
        yield
    finally:
        _show(hidden)


def _apply(made: Plan) -> list[tuple[Any, str, Any]]:
    """Put the plan in place; what is hidden by it."""
    hidden: list[tuple[Any, str, Any]] = []
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whoever switches these off now may train later
            for cut in made.cuts:
                _hide(hidden, cut.module, cut.name, cut.view())
        for change in made.changes:
            _hide(hidden, change.owner, change.name, change.value)
        for stack, layers in made.kept:
            _hide(hidden, stack.holder, stack.attribute, nn.ModuleList(layers))
    except BaseException:
        _show(hidden)
        raise
    return hidden


def _hide(hidden: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any) -> None:
    """Set the attribute on the object itself, past nn.Module's registration, and note what stood there."""
    hidden.append((owner, name, vars(owner).get(name, _NOTHING)))
    vars(owner)[name] = value


def _show(hidden: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in reversed(hidden):
        if value is _NOTHING:
            del vars(owner)[name]
        else:
            vars(owner)[name] = value
