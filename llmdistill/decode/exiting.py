"""Rows of a batch that leave at layers of their own, token by token, with keys and values that stay right.

One step takes the newest token of every row through the layers up to the first exit. There each is judged; those that leave say their token from there, and the
others go on together as a smaller batch, to the next exit, and so on. What a token leaves behind is its state: it waits at its exit, and the layers above have
no keys and values of it yet. When a later token of the same row passes that exit, the waiting ones are given to the layers above with it:

    deferred     all of them go through these layers in one pass, as tokens of a prompt would, and wait again where the later one leaves. The keys and values
                 are those of the full model for these tokens (Bae et al. 2023, "Fast and Robust Early-Exiting", section 3.2, synchronised parallel decoding,
                 here for each row by itself and for any number of exits).
    propagated   the layers' key and value projections are applied to the states as they were left, and nothing else (CALM, section 3.4).

No row waits for another, and no token is computed that no later token needs: a row that ends while its last tokens wait never pays for them.

At any time the tokens of a row that wait at an exit are consecutive, and those that wait at a lower exit are newer: a token that goes past an exit takes
along all that wait there. So a count for each exit and row says which they are. The states lie in the cache as one more layer, and move as its columns do.

Drafting for speculative decoding (engine.py) is the same: a draft leaves at a given exit whatever its confidence, and the token that verifies goes past
all exits and takes the drafts along; then every one of them is said.

Shapes: R rows, N tokens of a part (part.py), M model width, K tokens of an exit's vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.decode.part import Part
from llmdistill.models.exit_settings import NEVER, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from llmdistill.decode.causal import CausalDecoder
    from llmdistill.decode.exit_heads import ExitHeads
    from llmdistill.decode.t5 import T5Decoder


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a row's newest token leaves."""

    threshold: float = NEVER
    draft: int | None = None
    """The exit at which it leaves whatever its confidence."""
    verify: bool = False
    """It goes past all exits, and all tokens that come along are said."""

    def may_leave(self, place: int) -> bool:
        """Whether it could leave at this exit."""
        return self.draft == place or (self.draft is None and not self.verify and self.threshold < NEVER)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one depth says. A row that verifies comes once for each of its tokens, the oldest first."""

    rows: Sequence[int]
    logits: Tensor
    """(tokens, V), or (tokens, K) over `vocabulary`."""
    vocabulary: Sequence[int] | None
    num_layers: int


class ExitingBatch:
    """The rows that decode together, each with one slot."""

    def __init__(self, decoder: T5Decoder | CausalDecoder, heads: ExitHeads) -> None:
        self.heads, self.num_layers, self.device = heads, decoder.num_layers, decoder.device
        self.head = decoder.head
        self.batch: Any = decoder.new_batch(1)
        self.waiting: list[list[int]] = [[] for _ in heads.settings.layers]  # of each exit and row: how many tokens

    def admit(self, prompts: Sequence[Sequence[int]], thresholds: Sequence[float]) -> list[int]:
        """Takes prompts into new rows after the present ones; the token that each row's first step begins with.

        They go the whole depth, except where an encoder has exits and a prompt is surer there than its threshold."""
        for at_exit in self.waiting:
            at_exit += [0] * len(prompts)
        return self.batch.admit(prompts, thresholds)

    @property
    def encoder_depths(self) -> Sequence[int]:
        """How many layers of the encoder each row's prompt went through; nothing of a model without one."""
        return getattr(self.batch, "encoder_depths", ())

    def rearrange(self, order: Sequence[int]) -> None:
        """Keeps the rows `order`, in that order."""
        self.batch.rearrange(order)
        self.waiting = [[at_exit[row] for row in order] for at_exit in self.waiting]

    def take_back(self, row: int, num_tokens: int) -> None:
        """Forgets the last tokens of a row none of whose tokens wait."""
        if not num_tokens:
            return
        assert not any(at_exit[row] for at_exit in self.waiting)
        cache = self.batch.cache
        if cache.num_rows == 1:
            cache.column -= num_tokens
        else:
            cache.move_right(row, num_tokens)

    def step(self, tokens: Sequence[int], rules: Sequence[Rule]) -> list[Said]:
        """What is said after each row's newest token; every row is said at one depth."""
        rows, counts = list(range(len(tokens))), [1] * len(tokens)
        hidden_NM, view = self.batch.embed(tokens), self.batch.look()
        said: list[Said] = []
        first = 0
        for place, last in enumerate([*self.heads.settings.layers, self.num_layers]):
            part = self._part(rows, counts)
            hidden_NM, before_RM = self._layers(range(first, last), hidden_NM, part, view)
            if last == self.num_layers:
                said.append(self._say(hidden_NM, part, rules))
                break
            stays, news = self._leave(place, part.of_newest(hidden_NM), before_RM, rows, rules)
            if news is not None:
                self._keep_waiting(place, hidden_NM, part, stays)
                said.append(news)
                if not any(stays):
                    break
                hidden_NM = hidden_NM[torch.tensor([stay for stay, count in zip(stays, counts, strict=True) for _ in range(count)], device=self.device)]
                rows, counts = ([value for value, stay in zip(values, stays, strict=True) if stay] for values in (rows, counts))
            hidden_NM, counts = self._fetch_waiting(place, hidden_NM, rows, counts)
            first = last
        self.batch.cache.advance()
        return said

    def _part(self, rows: Sequence[int], counts: Sequence[int]) -> Part:
        cache = self.batch.cache
        return Part(rows=rows, counts=counts, column=cache.column, num_all_rows=cache.num_rows, device=self.device)

    def _layers(self, indexes: range, hidden_NM: Tensor, part: Part, view: Any) -> tuple[Tensor, Tensor | None]:
        """The states after these layers, and where the measure wants them, those of the newest tokens before the last of them."""
        batch, before_RM = self.batch, None
        is_propagated = self.heads.settings.policy is Policy.PROPAGATED and part.num_queries > 1
        newest = part.newest() if is_propagated else part
        own = view if part.is_plain else batch.look_at(newest, view)
        for_keys = batch.look_for_keys(part, view) if is_propagated else own
        for index in indexes:
            if self.heads.measure.needs_before and index == indexes[-1]:
                before_RM = part.of_newest(hidden_NM).clone()
            if part.is_plain:
                hidden_NM = batch.layer(index, hidden_NM, own)
                continue
            queries = batch.write(index, hidden_NM, part, for_keys)
            if is_propagated:
                hidden_NM[part.newest_R] = batch.read(index, part.of_newest(hidden_NM), part.of_newest(queries), newest, own)
            else:
                hidden_NM = batch.read(index, hidden_NM, queries, part, own)
        return hidden_NM, before_RM

    def _leave(self, place: int, newest_RM: Tensor, before_RM: Tensor | None, rows: Sequence[int], rules: Sequence[Rule]) -> tuple[list[bool], Said | None]:
        """Which rows stay, and what the others say."""
        heads = self.heads
        may_leave = [rules[row].may_leave(place) for row in rows]
        if not any(may_leave):
            return [True] * len(rows), None
        if all(rules[row].draft == place for row in rows):
            normed_RM, logits_RK, leaves = heads.normed(place, newest_RM), None, may_leave
        else:
            judged = heads.judge(place, newest_RM, before_RM)
            normed_RM, logits_RK = judged.normed_NM, judged.logits_NK
            confidences = judged.confidence_N.tolist()
            leaves = [
                may and (rules[row].draft == place or confidence > rules[row].threshold)
                for row, may, confidence in zip(rows, may_leave, confidences, strict=True)
            ]
        if not any(leaves):
            return [True] * len(rows), None
        leaving = [number for number, leave in enumerate(leaves) if leave]
        if len(leaving) < len(rows):
            chosen = torch.tensor(leaving, device=self.device)
            normed_RM, logits_RK = normed_RM[chosen], None if logits_RK is None else logits_RK[chosen]
        logits_RK = heads.logits(normed_RM) if logits_RK is None else logits_RK
        said = Said(rows=[rows[number] for number in leaving], logits=logits_RK, vocabulary=heads.vocabulary, num_layers=heads.settings.layers[place])
        return [not leave for leave in leaves], said

    def _keep_waiting(self, place: int, hidden_NM: Tensor, part: Part, stays: Sequence[bool]) -> None:
        """The tokens of the rows that do not stay wait at this exit, with their states."""
        for row, count, stay in zip(part.rows, part.counts, stays, strict=True):
            self.waiting[place][row] += 0 if stay else count
        states = hidden_NM.view(len(hidden_NM), 2, 1, -1)  # as a layer has keys and values, of one head
        if any(stays):
            chosen = [not stay for stay, count in zip(stays, part.counts, strict=True) for _ in range(count)]
            kept = torch.tensor(chosen, device=self.device)
            self.batch.cache.store.layers[-1][:, part.rows_N[kept], :, part.columns_N[kept]] = states[kept]
        else:
            self.batch.cache.store.layers[-1][:, part.rows_N, :, part.columns_N] = states

    def _fetch_waiting(self, place: int, hidden_NM: Tensor, rows: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The tokens of these rows that wait at an exit join their later ones."""
        joining = [self.waiting[place][row] for row in rows]
        if not any(joining):
            return hidden_NM, list(counts)
        joined = [before + count for before, count in zip(joining, counts, strict=True)]
        all_NM = hidden_NM.new_empty(sum(joined), hidden_NM.shape[1])
        ends = list(accumulate(joined))
        old = [number for end, before, count in zip(ends, joining, joined, strict=True) for number in range(end - count, end - count + before)]
        new = [number for end, before, count in zip(ends, joining, joined, strict=True) for number in range(end - count + before, end)]
        column = self.batch.cache.column
        of_rows = [row for row, before in zip(rows, joining, strict=True) for _ in range(before)]
        columns = [number for before, count in zip(joining, joined, strict=True) for number in range(column - count + 1, column - count + 1 + before)]
        where: Any = {"device": self.device}
        states = self.batch.cache.store.layers[-1][:, torch.tensor(of_rows, **where), :, torch.tensor(columns, **where)]
        all_NM[torch.tensor(old, **where)] = states.flatten(1)
        all_NM[torch.tensor(new, **where)] = hidden_NM
        for row in rows:
            self.waiting[place][row] = 0
        return all_NM, joined

    def _say(self, hidden_NM: Tensor, part: Part, rules: Sequence[Rule]) -> Said:
        """At full depth: the newest token of each row, and all those of a row that verifies."""
        if any(rules[row].verify for row in part.rows) and part.num_queries > 1:
            numbers, rows = [], []
            for row, count, end in zip(part.rows, part.counts, accumulate(part.counts), strict=True):
                num_said = count if rules[row].verify else 1
                numbers += range(end - num_said, end)
                rows += [row] * num_said
            hidden_NM = hidden_NM[torch.tensor(numbers, device=self.device)]
        else:
            hidden_NM, rows = part.of_newest(hidden_NM), part.rows
        return Said(rows=rows, logits=self.head(hidden_NM), vocabulary=None, num_layers=self.num_layers)
