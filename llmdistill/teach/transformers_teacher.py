"""A teacher that runs here through transformers: rows of many prompts decoded together, the shared few-shot prefix computed once.

Rows leave the batch as they finish and new ones take their places, so the matrix products stay large; that is what throughput is on a CPU and what it is on
a small GPU. A token is chosen as in llmdistill.decode, greedily or with a generator a request, so an answer does not depend on which rows it was decoded
with, up to the rounding of differently shaped matrix products. Of the model's generation config only the end tokens count (no repetition penalty and the
like), as with the other teachers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from llmdistill.core.stage import speed
from llmdistill.models.source import ModelSource
from llmdistill.teach.teacher import Completion, Request, Sampling, cut_at_stop

if TYPE_CHECKING:
    from torch import Tensor

PREFILL_TOKENS = 2048  # the most new tokens in one prefill pass: bounds the memory of its activations


@dataclass(frozen=True, kw_only=True)
class TransformersTeacher:
    """A causal model of transformers as the teacher. ``chat`` wraps each prompt as one user message in the model's own chat template."""

    kind: ClassVar[str] = "transformers"

    source: str
    chat: bool = False
    dtype: str = "float32"
    batch_size: int = speed(64)
    device: str = speed("cpu")
    dollars_per_million_tokens_in: float = speed(0.0)
    dollars_per_million_tokens_out: float = speed(0.0)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give at least 1 row")
        if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"dtype {self.dtype!r} is not one of float32, bfloat16, float16, float64")

    @cached_property
    def _source(self) -> ModelSource:
        return ModelSource(self.source)

    @property
    def model(self) -> str:
        """The model's name in the cache."""
        return self._source.name

    @property
    def revision(self) -> str:
        """The hub revision, or ``sha256:...`` of the weights."""
        return self._source.revision

    def fingerprint(self) -> dict[str, object]:
        """Model, revision, chat and dtype."""
        return {"model": self.model, "revision": self.revision, "chat": self.chat, "dtype": self.dtype}

    @cached_property
    def _tokenizer(self) -> Any:
        return self._source.load_tokenizer()

    def render(self, prompt: str) -> str:
        """What the model reads: the prompt, or the chat that holds it as its only message."""
        if not self.chat:
            return prompt
        return self._tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        """Answer every request, calling ``done(index, completion)`` as each finishes."""
        if not requests:
            return
        config = self._source.config
        if config.is_encoder_decoder:
            raise ValueError(f"the teacher transformers:{self.source} is an encoder-decoder ({config.model_type}): give a causal model")
        # The chat template writes the special tokens itself.
        prompts = [self._tokenizer(self.render(request.prompt), add_special_tokens=not self.chat).input_ids for request in requests]
        _check_lengths(prompts, sampling.max_tokens, getattr(config, "max_position_embeddings", None))
        import torch

        model: Any = self._source.load_model(dtype=getattr(torch, self.dtype))
        with torch.inference_mode():
            _Batch(model.eval().to(self.device), self._tokenizer, prompts, requests, sampling, self.batch_size).run(done)


@dataclass
class _Active:
    """A request that is being decoded: the part of its prompt that it does not share, and what it says so far."""

    index: int
    prompt: list[int]
    generator: random.Random
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


class _Batch:
    """One run over a list of requests. Shapes: B rows, L new tokens a row, V vocabulary."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[list[int]], requests: Sequence[Request], sampling: Sampling, batch_size: int) -> None:
        from llmdistill.decode.decoding import Decoding
        from llmdistill.decode.sampling import row_generator
        from llmdistill.teach.shared_prefix import prefill_prefix, shared_length, with_cache

        self.clock = time.perf_counter()
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.decoding = Decoding(temperature=sampling.temperature, top_p=sampling.top_p)
        self.end_tokens = _end_tokens(model, tokenizer)
        self.prefix_length = shared_length(prompts)
        self.num_slots = min(batch_size, len(prompts))
        capacity = max(map(len, prompts)) - self.prefix_length + sampling.max_tokens
        self.cache = prefill_prefix(model, prompts[0][: self.prefix_length], self.num_slots, capacity)
        self.with_cache = with_cache(model, self.cache)
        self.waiting = [
            _Active(index, prompts[index][self.prefix_length :], row_generator(sampling.seed + requests[index].sample_index, prompts[index]))
            for index in reversed(_order(prompts, self.num_slots))
        ]
        self.active: list[_Active] = []
        self._share_seconds(self.waiting)

    def run(self, done: Callable[[int, Completion], None]) -> None:
        while self.waiting or self.active:
            free = self.num_slots - len(self.active)
            if self.waiting and free >= max(1, self.num_slots // 8):
                moved = self._prefill()
            else:
                moved = list(self.active)
                self._advance(moved, slice(0, len(moved)), [row.tokens[-1:] for row in moved])
            self._share_seconds(moved)
            self._finish(done)

    def _prefill(self) -> list[_Active]:
        """Start as many waiting rows as fit the free slots and one pass, or one longer row in several passes."""
        first, rows, longest = len(self.active), [], 0
        while self.waiting and first + len(rows) < self.num_slots:
            longest = max(longest, len(self.waiting[-1].prompt))
            if rows and (len(rows) + 1) * longest > PREFILL_TOKENS:
                break
            rows.append(self.waiting.pop())
        slots = slice(first, first + len(rows))
        self.cache.lengths_S[slots] = 0
        self.active += rows
        new = [row.prompt for row in rows]
        while len(new[0]) > PREFILL_TOKENS and len(new) == 1:
            self._feed(slots, [new[0][:PREFILL_TOKENS]])
            new = [new[0][PREFILL_TOKENS:]]
        self._advance(rows, slots, new)
        return rows

    def _advance(self, rows: list[_Active], slots: slice, new: list[list[int]]) -> None:
        """Feed each row its new tokens and choose its next one."""
        from llmdistill.decode.sampling import choose

        chosen, _ = choose(self._feed(slots, new), [self.decoding] * len(rows), [row.generator for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            row.tokens.append(token)

    def _feed(self, slots: slice, new: list[list[int]]) -> Tensor:
        """Run the model on each row's new tokens and give the logits after its last one (B V)."""
        import torch

        device = self.model.device
        longest = max(map(len, new))
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=device)
        num_new_B = torch.tensor([len(ids) for ids in new], device=device)
        rows_B = torch.arange(len(new), device=device)
        position_ids_BL, mask = self.cache.begin(slots, longest)
        # The head sees only the last token of each row; called inside the model, so that what the model does to its logits is done to these.
        only_last = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][rows_B, num_new_B - 1][:, None],))
        try:
            logits_B1V = self.model(input_ids=ids_BL, position_ids=position_ids_BL, attention_mask=mask, **self.with_cache).logits
        finally:
            only_last.remove()
        self.cache.lengths_S[slots] += num_new_B
        return logits_B1V[:, 0]

    def _share_seconds(self, rows: Sequence[_Active]) -> None:
        """Divide the time since the last call among these rows."""
        now = time.perf_counter()
        for row in rows:
            row.seconds += (now - self.clock) / len(rows)
        self.clock = now

    def _finish(self, done: Callable[[int, Completion], None]) -> None:
        """Report the rows that are complete and close the gaps that they leave."""
        slot = 0
        while slot < len(self.active):
            row = self.active[slot]
            text, reason = self._outcome(row)
            if reason is None:
                slot += 1
                continue
            completion = Completion(
                text=text,
                tokens_in=self.prefix_length + len(row.prompt),
                tokens_out=len(row.tokens),
                seconds=row.seconds,
                finish_reason=reason,
            )
            last = len(self.active) - 1
            if slot != last:
                self.cache.move(last, slot)
                self.active[slot] = self.active[last]
            self.active.pop()
            done(row.index, completion)

    def _outcome(self, row: _Active) -> tuple[str, str | None]:
        """The text so far, and why it is finished, if it is."""
        ended = row.tokens[-1] in self.end_tokens
        is_full = len(row.tokens) >= self.sampling.max_tokens
        if not (ended or is_full or self.sampling.stop):
            return "", None
        text = self.tokenizer.decode(row.tokens[:-1] if ended else row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text, is_cut = cut_at_stop(text, self.sampling.stop)
        return text, "stop" if is_cut or ended else "length" if is_full else None


def _order(prompts: Sequence[list[int]], num_slots: int) -> list[int]:
    """Sorted by length inside windows of a few batches: little padding in prefill, yet what is done first is still a fair sample of the whole."""
    window = 4 * num_slots
    return sorted(range(len(prompts)), key=lambda index: (index // window, len(prompts[index])))


def _check_lengths(prompts: Sequence[list[int]], max_tokens: int, limit: int | None) -> None:
    """Before any weights are loaded."""
    if not all(prompts):
        raise ValueError(f"prompt {[len(ids) for ids in prompts].index(0)} is empty once tokenized: check the prompt template")
    longest = max(map(len, prompts))
    if limit is not None and longest + max_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_tokens is {max_tokens}, but the model reads at most {limit}: "
            "shorten the prompt or lower max_tokens"
        )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    ends = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
