"""Tensors whose dtype is their format, kept from `model.to(dtype)`: a bfloat16 scale that went through float16 is another scale."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def keeping_dtypes(change: Callable[[Tensor], Tensor], bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What nn.Module._apply is to do with a module's tensors: move all of them, and cast the bias only."""

    def of(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        return changed if tensor is bias_O or changed.dtype == tensor.dtype else tensor.to(changed.device)

    return of
