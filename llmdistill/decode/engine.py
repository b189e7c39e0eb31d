"""The decode engine: `generate` for many prompts at once, `add`, `step` and `drop` for rows that come and go.

Rows decode together and independently: a row joins between two steps, leaves when it is finished, and the others move together. Its tokens are a function
of the model, its prompt and its Decoding; its neighbours only change which rounding errors a matrix product makes, so they can flip a choice between two
tokens that are equal to within rounding, and no other. Logits are cast to float32 before a choice, as in transformers' generate, whose tokens these are; of
the model's generation config only the start and stop tokens are used (no repetition penalty and the like).

The weights are read when the engine is made: make a new engine after they change.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, T5ForConditionalGeneration

from llmdistill.decode.beam import beam_search
from llmdistill.decode.cache import places_after
from llmdistill.decode.causal import CausalDecoder
from llmdistill.decode.confidence import decayed
from llmdistill.decode.decoding import Decoding, ExitThreshold, FinishReason, Generated, StopTokens, Token
from llmdistill.decode.exiting import ExitingBatch, Rule
from llmdistill.decode.latent_cross import CrossCache
from llmdistill.decode.sampling import choose, row_generator
from llmdistill.decode.t5 import T5Decoder
from llmdistill.models.exit_settings import NEVER
from llmdistill.models.exits import own_threshold

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CrossCache", "Decoding", "Engine", "ExitThreshold", "Generated", "StopTokens", "Token"]


@dataclass(kw_only=True)
class Row:
    """One prompt that is being decoded by `step`."""

    id: int
    prompt: tuple[int, ...]
    decoding: Decoding
    stops: frozenset[int]
    num_tokens_left: int
    generator: random.Random
    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    encoder_layers: int = 0
    logprob_sum: float = 0.0
    drafts: list[int] = field(default_factory=list)
    """Tokens that the full model has yet to verify."""

    def rule(self, threshold: Callable[[Decoding], float], decay: float) -> Rule:
        """When its newest token leaves."""
        decoding = self.decoding
        if decoding.draft_tokens:
            may_draft = len(self.drafts) < min(decoding.draft_tokens, self.num_tokens_left - 1) and not self.stops & set(self.drafts[-1:])
            return Rule(draft=decoding.draft_exit) if may_draft else Rule(verify=True)
        num_tokens = len(self.tokens)
        return Rule(threshold=decayed(threshold(decoding), decay, num_tokens, num_tokens + self.num_tokens_left))

    def verified(self, tokens: Sequence[int]) -> int:
        """How many drafts are what the full model says, whose tokens after the row's last one and after each draft these are."""
        return next((number for number, (draft, token) in enumerate(zip(self.drafts, tokens, strict=False)) if draft != token), len(self.drafts))

    def take(self, token: int, logprob: float, num_layers: int) -> Token:
        """The row's next token; what it means for the row."""
        self.logprob_sum += logprob
        self.layers.append(num_layers)
        self.num_tokens_left -= 1
        finish_reason: FinishReason | None = None
        if token in self.stops:
            finish_reason = "stop"
        else:
            self.tokens.append(token)
            if not self.num_tokens_left:
                finish_reason = "length"
        return Token(self.id, token, finish_reason is not None, finish_reason, logprob, num_layers)


class Engine:
    """Decodes with one model, T5 or of the Llama or Qwen2 class, whatever linear modules it has."""

    def __init__(self, model: nn.Module, *, max_batch_rows: int = 32, cross_cache: CrossCache = CrossCache.BY_RULE) -> None:
        if max_batch_rows < 1:
            raise ValueError(f"max_batch_rows is {max_batch_rows}; give 1 or more")
        self.model = model
        self.max_batch_rows = max_batch_rows
        with torch.inference_mode():
            self._decoder = make_decoder(model, cross_cache)
            self._exits = self._decoder.exits
        self._batch = self._new_batch()
        self._active: list[Row] = []  # in the order of the batch
        self._inputs: list[int] = []  # the newest token of each active row
        self._waiting: list[Row] = []
        self._ids = itertools.count()

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return self._decoder.num_layers

    @property
    def has_exits(self) -> bool:
        """Whether tokens may leave before the last layer."""
        return self._exits is not None

    @property
    def cross_cache(self) -> CrossCache | None:
        """What is kept of a row's encoder output; None for a causal model."""
        return self._decoder.cross_cache if isinstance(self._decoder, T5Decoder) else None

    @property
    def num_active(self) -> int:
        """Rows that were added and are neither finished nor dropped."""
        return len(self._active) + len(self._waiting)

    @property
    def max_positions(self) -> int | None:
        """The most tokens that a prompt and its answer may have together; None where the model has no limit."""
        return self._decoder.max_positions

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding | Sequence[Decoding]) -> list[Generated]:
        """One answer a prompt, in order; `decoding` is one for all prompts or one each. Rows that finish make room for the next prompts."""
        decodings = [decoding] * len(prompts) if isinstance(decoding, Decoding) else list(decoding)
        if len(decodings) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(decodings)} decodings; give one decoding, or one a prompt")
        if self.num_active:
            raise ValueError(f"{self.num_active} rows that were added are still being decoded; finish or drop them before generate, or use another engine")
        for prompt, one in zip(prompts, decodings, strict=True):
            self._check(prompt, one)
        generated: dict[int, Generated] = {
            index: Generated(tokens=(), finish_reason="length", logprob_sum=0.0) for index, one in enumerate(decodings) if one.max_new_tokens == 0
        }
        # Prompts of like length go together, so that there is little padding.
        order = sorted((index for index in range(len(prompts)) if index not in generated), key=lambda index: -len(prompts[index]))
        generated |= self._generate_rows({index: (prompts[index], decodings[index]) for index in order if decodings[index].num_beams == 1})
        for one in dict.fromkeys(decodings):
            if one.num_beams > 1:
                asked = {index: prompts[index] for index in order if decodings[index] == one}
                generated |= {index: hypotheses[0] for index, hypotheses in self._search(asked, one).items()}
        return [generated[index] for index in range(len(prompts))]

    def beams(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[Generated]]:
        """Beam search's hypotheses of each prompt, the best first (`generate` gives that one): `num_beams`, or all there are in a tiny vocabulary."""
        if decoding.num_beams == 1 or decoding.max_new_tokens == 0:
            raise ValueError(f"num_beams is {decoding.num_beams} and max_new_tokens {decoding.max_new_tokens}; give 2 beams or more, and 1 token or more")
        for prompt in prompts:
            self._check(prompt, decoding)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        found = self._search({index: prompts[index] for index in order}, decoding)
        return [found[index] for index in range(len(prompts))]

    def add(self, prompt: Sequence[int], decoding: Decoding) -> int:
        """Takes up a row, which joins the others at the next step; its id."""
        self._check(prompt, decoding)
        if decoding.num_beams > 1:
            raise ValueError(f"num_beams is {decoding.num_beams}, but beam search has no tokens to hand out before its end; use generate, or num_beams=1")
        if decoding.max_new_tokens == 0:
            raise ValueError("max_new_tokens is 0, so there is nothing to step for; give 1 or more")
        if self.num_active >= self.max_batch_rows:
            raise ValueError(f"all {self.max_batch_rows} rows are taken; step until one finishes, drop one, or make the engine with a larger max_batch_rows")
        return self._enqueue(prompt, decoding).id

    def step(self) -> list[Token]:
        """One more token for every row, those that were just added included; none when there are no rows."""
        with torch.inference_mode():
            self._admit_waiting()
            if not self._active:
                return []
            if isinstance(self._batch, ExitingBatch):
                news = self._step_with_exits(self._batch)
            else:
                tokens, logprobs = self._choose(self._batch.step(self._inputs), self._active)
                news = [row.take(token, logprob, self.num_layers) for row, token, logprob in zip(self._active, tokens, logprobs, strict=True)]
                self._inputs = tokens
            finished = {token.row for token in news if token.finished}
            if finished:
                self._keep([place for place, row in enumerate(self._active) if row.id not in finished])
        return news

    def _step_with_exits(self, batch: ExitingBatch) -> list[Token]:
        """As `step`, where a row that drafts has no token, and one that verifies has several."""
        rules = [row.rule(self._threshold, batch.heads.settings.decay) for row in self._active]
        chosen: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
        for said in batch.step(self._inputs, rules):
            tokens, logprobs = self._choose(said.logits, [self._active[place] for place in said.rows])
            for place, token, logprob in zip(said.rows, tokens, logprobs, strict=True):
                chosen[place].append((token if said.vocabulary is None else said.vocabulary[token], logprob, said.num_layers))
        news: list[Token] = []
        for place, (row, rule) in enumerate(zip(self._active, rules, strict=True)):
            said_of_row = chosen[place]
            if rule.draft is not None:
                row.drafts.append(said_of_row[0][0])
            else:
                num_verified = row.verified([token for token, _, _ in said_of_row])
                batch.take_back(place, len(row.drafts) - num_verified)
                row.drafts.clear()
                said_of_row = said_of_row[: num_verified + 1]
                for one in said_of_row:
                    news.append(row.take(*one))
                    if news[-1].finished:
                        break
            self._inputs[place] = said_of_row[-1][0]
        return news

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
        return choose(logits, [row.decoding for row in rows], [row.generator for row in rows])

    @cached_property
    def _threshold_of_model(self) -> float:
        return own_threshold(self.model)

    def _threshold(self, decoding: Decoding) -> float:
        """What a row's confidence has to be above; what is drafted is verified against the whole model, so nothing of it leaves for good."""
        if decoding.draft_tokens:
            return NEVER
        return self._threshold_of_model if isinstance(decoding.exit_threshold, ExitThreshold) else decoding.exit_threshold

    def _new_batch(self) -> Any:
        return self._decoder.new_batch(1) if self._exits is None else ExitingBatch(self._decoder, self._exits)

    def drop(self, row: int) -> None:
        """Forgets a row; one that has finished is forgotten already."""
        self._waiting = [waiting for waiting in self._waiting if waiting.id != row]
        kept = [place for place, active in enumerate(self._active) if active.id != row]
        if len(kept) < len(self._active):
            with torch.inference_mode():
                self._keep(kept)

    def _generate_rows(self, asked: dict[int, tuple[Sequence[int], Decoding]]) -> dict[int, Generated]:
        indexes: dict[int, int] = {}
        rows: dict[int, Row] = {}
        for index, (prompt, decoding) in asked.items():
            row = self._enqueue(prompt, decoding)
            indexes[row.id], rows[row.id] = index, row
        generated = {}
        try:
            while self.num_active:
                for token in self.step():
                    if token.finish_reason is not None:
                        row = rows[token.row]
                        generated[indexes[row.id]] = Generated(
                            tokens=tuple(row.tokens),
                            finish_reason=token.finish_reason,
                            logprob_sum=row.logprob_sum,
                            layers=tuple(row.layers),
                            encoder_layers=row.encoder_layers,
                        )
        except BaseException:  # a call that was interrupted leaves no rows behind
            self._batch = self._new_batch()
            self._active, self._inputs, self._waiting = [], [], []
            raise
        return generated

    def _search(self, prompts: dict[int, Sequence[int]], decoding: Decoding) -> dict[int, list[Generated]]:
        stops = self._stops(decoding)
        num_candidates = max(2, 1 + len(stops)) * decoding.num_beams
        if num_candidates > self._decoder.vocabulary_size * decoding.num_beams:
            raise ValueError(f"{len(stops)} stop tokens are too many for a vocabulary of {self._decoder.vocabulary_size}; give fewer stop_token_ids")
        found: dict[int, list[Generated]] = {}
        num_prompts = max(1, self.max_batch_rows // decoding.num_beams)
        indexes = list(prompts)
        with torch.inference_mode():
            for first in range(0, len(indexes), num_prompts):
                chunk = indexes[first : first + num_prompts]
                batch = self._decoder.new_batch(decoding.num_beams)
                limits = [self._num_new_tokens(prompts[index], decoding) for index in chunk]
                results = beam_search(batch, [prompts[index] for index in chunk], decoding, limits, stops, self._decoder.device)
                found |= dict(zip(chunk, results, strict=True))
        return found

    def _enqueue(self, prompt: Sequence[int], decoding: Decoding) -> Row:
        row = Row(
            id=next(self._ids),
            prompt=tuple(prompt),
            decoding=decoding,
            stops=self._stops(decoding),
            num_tokens_left=self._num_new_tokens(prompt, decoding),
            generator=row_generator(decoding.seed, prompt) if decoding.temperature > 0 else random.Random(0),
        )
        self._waiting.append(row)
        return row

    def _admit_waiting(self) -> None:
        """Lets waiting rows in: all if there is room; else when a quarter of the places is free, because a few prompts at a time are dear to read."""
        num_free = self.max_batch_rows - len(self._active)
        if not self._waiting or num_free < min(len(self._waiting), -(-self.max_batch_rows // 4)):
            return
        joining, self._waiting = self._waiting[:num_free], self._waiting[num_free:]
        joining.sort(key=lambda row: -len(row.prompt))
        prompts = [row.prompt for row in joining]
        if isinstance(self._batch, ExitingBatch):
            self._inputs += self._batch.admit(prompts, [self._threshold(row.decoding) for row in joining])
            for row, depth in zip(joining, self._batch.encoder_depths[len(self._active) :], strict=False):
                row.encoder_layers = depth
        else:
            self._inputs += self._batch.admit(prompts)
        self._active += joining

    def _keep(self, kept: Sequence[int]) -> None:
        order = places_after(kept)
        self._batch.rearrange(order)
        self._active = [self._active[place] for place in order]
        self._inputs = [self._inputs[place] for place in order]

    def _stops(self, decoding: Decoding) -> frozenset[int]:
        if decoding.stop_token_ids is not StopTokens.OF_MODEL:
            return frozenset(decoding.stop_token_ids)
        stops = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset(() if stops is None else [stops] if isinstance(stops, int) else stops)

    def _num_new_tokens(self, prompt: Sequence[int], decoding: Decoding) -> int:
        if self.max_positions is None:
            return decoding.max_new_tokens
        return min(decoding.max_new_tokens, self.max_positions - len(prompt))

    def _check(self, prompt: Sequence[int], decoding: Decoding) -> None:
        if decoding.draft_tokens and (self._exits is None or decoding.draft_exit >= len(self._exits.settings.layers)):
            exits = f"after layers {list(self._exits.settings.layers)}" if self._exits else "not there"
            raise ValueError(
                f"draft_tokens is {decoding.draft_tokens} and draft_exit {decoding.draft_exit}, and the model's exits are {exits}: "
                "train some (the TrainExits stage), or set draft_tokens=0"
            )
        if self.model.training:
            raise ValueError(f"the model ({type(self.model).__name__}) is in training mode, so dropout would change its answers; call model.eval() first")
        if not len(prompt):
            raise ValueError("a prompt has no tokens; give at least one (T5 tokenizers end every text with </s>, causal ones may begin with a start token)")
        vocabulary_size = self._decoder.vocabulary_size
        if min(prompt) < 0 or max(prompt) >= vocabulary_size:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary_size)
            raise ValueError(f"a prompt has token {wrong}, but the model's vocabulary has tokens 0 to {vocabulary_size - 1}; use the model's own tokenizer")
        if self.max_positions is not None and len(prompt) >= self.max_positions:
            raise ValueError(f"a prompt has {len(prompt)} tokens, but the model has {self.max_positions} positions for prompt and answer; shorten it")


def make_decoder(model: nn.Module, cross_cache: CrossCache = CrossCache.BY_RULE) -> T5Decoder | CausalDecoder:
    """How the model decodes, by its class."""
    if isinstance(model, T5ForConditionalGeneration):
        return T5Decoder(model, cross_cache)
    if isinstance(model, LlamaForCausalLM | Qwen2ForCausalLM):
        if cross_cache is not CrossCache.BY_RULE:
            raise ValueError(f"cross_cache is {cross_cache.name}, and a {type(model).__name__} has no cross-attention; leave it at BY_RULE")
        return CausalDecoder(model)
    supported = ", ".join(one.__name__ for one in (T5ForConditionalGeneration, LlamaForCausalLM, Qwen2ForCausalLM))
    raise ValueError(
        f"the decode engine does not run {type(model).__name__}; it runs {supported} and subclasses of these (merge adapters into the model first)"
    )
