"""Some rows of a batch, and of each its last few tokens: what goes through a layer when rows stop at different layers (exiting.py).

Tokens lie one after the other, a row's oldest first, without padding: a linear, a norm and the feed-forward take them so. Attention wants rows of equal length;
there the tokens are padded at the front to the longest row's, so that the newest of every row are in one place, and what stands in the padding is thrown away.

Shapes: R rows of the part, Q tokens of its longest, N tokens without padding, L columns in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows, ascending, and how many of each one's last tokens, 1 or more, the newest in `column`."""

    rows: Sequence[int]
    counts: Sequence[int]
    column: int
    num_all_rows: int
    device: torch.device

    @property
    def has_all_rows(self) -> bool:
        """Whether no row of the batch is missing."""
        return len(self.rows) == self.num_all_rows

    @cached_property
    def num_queries(self) -> int:
        """Q."""
        return max(self.counts)

    @property
    def is_plain(self) -> bool:
        """Whether this is one token of every row."""
        return self.has_all_rows and self.num_queries == 1

    @cached_property
    def is_even(self) -> bool:
        """Whether all rows have equally many tokens."""
        return min(self.counts) == self.num_queries

    @cached_property
    def rows_R(self) -> Tensor:
        return torch.tensor(self.rows, device=self.device)

    @cached_property
    def rows_N(self) -> Tensor:
        """The row of each token."""
        if self.num_queries == 1:
            return self.rows_R
        return torch.tensor([row for row, count in zip(self.rows, self.counts, strict=True) for _ in range(count)], device=self.device)

    @cached_property
    def columns_N(self) -> Tensor:
        """The column of each token."""
        columns = [column for count in self.counts for column in range(self.column - count + 1, self.column + 1)]
        return torch.tensor(columns, device=self.device)

    @cached_property
    def newest_R(self) -> Tensor:
        """Where each row's newest token is among all."""
        return torch.tensor(self.counts, device=self.device).cumsum(0) - 1

    @cached_property
    def _places_N(self) -> Tensor:
        """Where each token is among the padded ones."""
        num_queries = self.num_queries
        places = [place * num_queries + column for place, count in enumerate(self.counts) for column in range(num_queries - count, num_queries)]
        return torch.tensor(places, device=self.device)

    def newest(self) -> Part:
        """The newest token of each of these rows."""
        return Part(rows=self.rows, counts=[1] * len(self.rows), column=self.column, num_all_rows=self.num_all_rows, device=self.device)

    def of_newest(self, x: Tensor) -> Tensor:
        """(N, ...) -> (R, ...)."""
        return x if self.num_queries == 1 else x[self.newest_R]

    def padded(self, x: Tensor) -> Tensor:
        """(N, ...) -> (R*Q, ...)."""
        if self.is_even:
            return x
        padded = x.new_zeros(len(self.rows) * self.num_queries, *x.shape[1:])
        padded[self._places_N] = x
        return padded

    def unpadded(self, x: Tensor) -> Tensor:
        """(R*Q, ...) -> (N, ...)."""
        return x if self.is_even else x[self._places_N]

    def later_QL(self, num_columns: int, dtype: torch.dtype) -> Tensor | None:
        """Minus infinity for columns after a token's own, 0 up to there; None where all tokens are the newest."""
        if self.num_queries == 1:
            return None
        later_QL = torch.full((self.num_queries, num_columns), -torch.inf, dtype=dtype, device=self.device)
        return later_QL.triu_(num_columns - self.num_queries + 1)
