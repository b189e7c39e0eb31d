"""Keys and values of all rows, in storage that we own.

Every layer has one tensor of 2 x slots x heads x columns x head width (keys first, then values), grown in blocks, never concatenated. Rows lie flush right:
the next token of every row goes to the same column, whatever the rows' lengths, and a row that is shorter than the longest begins further right. That way
one step writes one slice, T5's relative bias is one table for all rows, the rotary position is the column minus the row's first one, and no mask is needed
while all rows began together (a mask hides the columns before a row's first one, otherwise). Rows occupy the first places; the last ones move into the gaps
of those that leave. When the columns run out, the ones that no row uses any more are shifted away, or the storage grows.

A row has `width` slots: one, or one for each beam.

Shapes: R rows, W width (slots a row), S = R*W slots, H key/value heads, C columns, L columns in use, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmdistill.decode.part import Part

COLUMN_BLOCK = 64


def places_after(kept: Sequence[int]) -> list[int]:
    """For rows `kept` (ascending) out of a batch: which row goes to each of the first places, so that as few as possible move."""
    num_kept = len(kept)
    movers = [row for row in kept if row >= num_kept]
    staying = {row for row in kept if row < num_kept}
    return [place if place in staying else movers.pop() for place in range(num_kept)]


def prefill_chunks(lengths: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Consecutive prompts of at most so many tokens together, padding counted; one prompt at least."""
    bounds, longest = [0], 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > bounds[-1] and (index + 1 - bounds[-1]) * longest > max_tokens:
            bounds.append(index)
            longest = length
    return (slice(first, last) for first, last in pairwise([*bounds, len(lengths)]))


class SlotStore:
    """The tensors of all layers, with room for so many slots and columns."""

    def __init__(self, layer_shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype, device: torch.device) -> None:
        """`layer_shapes`: heads and head width of each layer."""
        # Zeros, not whatever was in memory: a hidden column gets weight 0, and 0 times NaN would not be 0.
        self.layers = [torch.zeros(2, 0, num_heads, 0, width, dtype=dtype, device=device) for num_heads, width in layer_shapes]
        self.num_slots = 0
        self.num_columns = 0

    def reserve(self, num_slots: int, num_columns: int, *, used_slots: int, used_columns: int) -> None:
        """Makes room, keeping what is in the first `used_slots` and `used_columns`."""
        if num_slots <= self.num_slots and num_columns <= self.num_columns:
            return
        num_slots = max(num_slots, self.num_slots)
        num_columns = max(-(-num_columns // COLUMN_BLOCK) * COLUMN_BLOCK, self.num_columns)
        for index, old in enumerate(self.layers):
            new = old.new_zeros(2, num_slots, old.shape[2], num_columns, old.shape[4])
            kept = old[:, :used_slots, :, :used_columns]
            new[:, : kept.shape[1], :, : kept.shape[3]] = kept
            self.layers[index] = new
        self.num_slots, self.num_columns = num_slots, num_columns

    def rearrange(self, order: Sequence[int], *, width: int, num_columns: int) -> None:
        """Place i of the rows gets what was in place order[i]."""
        moves = [(source, place) for place, source in enumerate(order) if source != place]
        for source, place in moves:
            for layer in self.layers:
                rows = layer.view(2, self.num_slots // width, width, *layer.shape[2:])
                rows[:, place, :, :, :num_columns] = rows[:, source, :, :, :num_columns]


@dataclass(frozen=True)
class Window:
    """What one step sees of the self-attention cache; lists have one entry a layer."""

    written: list[Tensor]  # (2, S, H, D): the next column, to be filled
    keys: list[Tensor]  # (S*H, D, L)
    values: list[Tensor]  # (S*H, L, D)
    hidden: Tensor | None  # (R, 1, L): minus infinity before a row's first column, 0 from there on; None where every row sees all columns
    columns: slice  # those in use

    @property
    def num_columns(self) -> int:
        """L."""
        return self.columns.stop - self.columns.start


class KVCache:
    """Self-attention keys and values of the rows of one batch."""

    def __init__(self, layer_shapes: Sequence[tuple[int, int]], *, width: int, num_state: int = 0, dtype: torch.dtype, device: torch.device) -> None:
        """`num_state`: further numbers, an even number, that are kept of every column; they are the last of the store's layers, halved as keys and values."""
        assert num_state % 2 == 0
        shapes = [*layer_shapes, (1, num_state // 2)] if num_state else layer_shapes
        self.store = SlotStore(shapes, dtype=dtype, device=device)
        self.width = width
        self.column = 0  # where the next token of every row goes
        self.starts: list[int] = []  # the first column of each row
        self._hidden_RC: Tensor | None = None
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []
        self._views_key: tuple[int, int, int] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def first_column(self) -> int:
        """The first column that any row uses."""
        return min(self.starts, default=self.column)

    def admit(self, prefix_lengths: Sequence[int]) -> slice:
        """Opens rows whose first `prefix_length` columns are about to be filled by the caller; their slots."""
        missing = max(prefix_lengths) - self.column
        if not self.starts:
            self.column = max(prefix_lengths)
        elif missing > 0:
            self._shift(missing)
        first_slot = self.num_rows * self.width
        last_slot = first_slot + len(prefix_lengths) * self.width
        # Slots double, so that rows that arrive one by one do not copy the whole cache each.
        num_slots = last_slot if last_slot <= self.store.num_slots else max(last_slot, 2 * self.store.num_slots)
        self.store.reserve(num_slots, self.column + 1, used_slots=first_slot, used_columns=self.column)
        self.starts += [self.column - length for length in prefix_lengths]
        self._hidden_RC = None
        return slice(first_slot, last_slot)

    def rearrange(self, order: Sequence[int]) -> None:
        """Keeps the rows `order`, in that order (see places_after)."""
        self.store.rearrange(order, width=self.width, num_columns=self.column)
        self.starts = [self.starts[row] for row in order]
        self._hidden_RC = None
        if not self.starts:
            self.column = 0

    def reorder_slots(self, sources_S: Tensor, first_column: int) -> None:
        """Slot i gets slot sources[i]'s columns from `first_column` on (the beams of a row share those before)."""
        for layer in self.store.layers:
            columns = layer[:, : len(sources_S), :, first_column : self.column]
            columns.copy_(columns.index_select(1, sources_S))

    def window(self) -> Window:
        """Views on all columns in use and the one to be written now; makes room for it."""
        first, num_slots = self.first_column, self.num_rows * self.width
        if self.column == self.store.num_columns:
            if first >= self.column - first + COLUMN_BLOCK:
                self._shift(-first)
                first = 0
            else:
                self.store.reserve(0, self.column + 1, used_slots=num_slots, used_columns=self.column)
                self._hidden_RC = None
        column, end = self.column, self.column + 1
        written, keys, values = [], [], []
        for slots, keys_NDC, values_NCD in self._all_columns(num_slots):
            written.append(slots.select(3, column))
            keys.append(keys_NDC[:, :, first:end])
            values.append(values_NCD[:, first:end])
        return Window(written, keys, values, self._hidden(first, end), slice(first, end))

    def of_rows(self, index: int, part: Part, window: Window) -> tuple[Tensor, Tensor]:
        """Keys (R*H, D, L) and values (R*H, L, D) of layer `index` for the rows of a part; copies, where rows are missing. For one slot a row."""
        if part.has_all_rows:
            return window.keys[index], window.values[index]
        keys, values = self.store.layers[index][:, part.rows_R, :, window.columns].flatten(1, 2)
        return keys.transpose(1, 2), values

    def move_right(self, row: int, by: int) -> None:
        """Drops a row's last `by` columns: the others move to where the next token is written after. For one slot a row."""
        start = self.starts[row]
        for layer in self.store.layers:
            layer[:, row, :, start + by : self.column] = layer[:, row, :, start : self.column - by].clone()
        self.starts[row] = start + by
        self._hidden_RC = None

    def _all_columns(self, num_slots: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer: the slots in use, and keys (S*H, D, C) and values (S*H, C, D) in them; views that stay until slots or storage change."""
        key = (num_slots, self.store.num_slots, self.store.num_columns)
        if self._views_key != key:
            self._views_key, self._views = key, []
            for layer in self.store.layers:
                used = layer[:, :num_slots]
                keys, values = layer.flatten(1, 2)[:, : num_slots * layer.shape[2]].unbind(0)
                self._views.append((used, keys.transpose(1, 2), values))
        return self._views

    def advance(self) -> None:
        """The column that `window` gave was written."""
        self.column += 1

    def _hidden(self, first: int, end: int) -> Float[Tensor, "R 1 L"] | None:
        if all(start == first for start in self.starts):
            return None
        if self._hidden_RC is None:
            layer = self.store.layers[0]
            starts_R1 = torch.tensor(self.starts, device=layer.device)[:, None]
            before_RC = torch.arange(self.store.num_columns, device=layer.device) < starts_R1
            self._hidden_RC = torch.zeros(before_RC.shape, dtype=layer.dtype, device=layer.device).masked_fill_(before_RC, -torch.inf)
        return self._hidden_RC[:, None, first:end]

    def _shift(self, by: int) -> None:
        """Moves all columns in use by so many places."""
        first, num_slots = self.first_column, self.num_rows * self.width
        self.store.reserve(0, self.column + by + 1, used_slots=num_slots, used_columns=self.column)
        for layer in self.store.layers:
            columns = layer[:, :num_slots, :, first : self.column].clone()
            layer[:, :num_slots, :, first + by : self.column + by] = columns
        self.starts = [start + by for start in self.starts]
        self.column += by
        self._hidden_RC = None
