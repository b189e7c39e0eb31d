"""A teacher that runs here through transformers: rows of many prompts decoded together, the shared few-shot prefix computed once.

Rows leave the batch as they finish and new ones take their places, so the matrix products stay large; that is what throughput is on a CPU and what it is on
a small GPU. Greedy, or sampling with a generator a request (temperature, nucleus), so an answer does not depend on which rows it was decoded with, up to
the rounding of differently shaped matrix products.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from llmdistill.core.stage import speed
from llmdistill.models.source import ModelSource
from llmdistill.teach.teacher import Completion, Request, Sampling

if TYPE_CHECKING:
    import torch

    from llmdistill.teach.shared_prefix import SharedPrefixCache

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
        import torch

        model = self._source.load_model(dtype=getattr(torch, self.dtype)).to(self.device).eval()
        with torch.inference_mode():
            _Batch(model, self._tokenizer, requests, [self.render(r.prompt) for r in requests], sampling, self.batch_size).run(done)


@dataclass
class _Active:
    """A request that is being decoded."""

    index: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


class _Batch:
    """One run over a list of requests."""

    def __init__(self, model: Any, tokenizer: Any, requests: Sequence[Request], prompts: Sequence[str], sampling: Sampling, batch_size: int) -> None:
        from llmdistill.teach.shared_prefix import prefill_prefix

        self.model, self.tokenizer, self.requests, self.sampling = model, tokenizer, requests, sampling
        tokens: list[list[int]] = [tokenizer(prompt).input_ids for prompt in prompts]
        if not all(tokens):
            raise ValueError(f"prompt {tokens.index([])} is empty once tokenized: check the prompt template")
        prefix_length = _shared_length(tokens)
        suffixes = [ids[prefix_length:] for ids in tokens]
        self.prefix_length = prefix_length
        self.num_slots = min(batch_size, len(requests))
        # Sorted by length inside windows of a few batches: little padding in prefill, yet what is done first is still a fair sample of the whole.
        window = 4 * self.num_slots
        order = [i for start in range(0, len(tokens), window) for i in sorted(range(start, min(start + window, len(tokens))), key=lambda i: len(suffixes[i]))]
        self.waiting = [_Active(index, suffixes[index]) for index in reversed(order)]
        self.active: list[_Active] = []
        capacity = max(len(ids) for ids in suffixes) + sampling.max_tokens
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and prefix_length + capacity > limit:
            raise ValueError(
                f"the longest prompt has {max(len(ids) for ids in tokens)} tokens and max_tokens is {sampling.max_tokens}, but the model reads at most {limit}: "
                "shorten the prompt or lower max_tokens"
            )
        self.cache: SharedPrefixCache = prefill_prefix(model, tokens[0][:prefix_length], self.num_slots, capacity)
        self.end_tokens = _end_tokens(model, tokenizer)

    def run(self, done: Callable[[int, Completion], None]) -> None:
        while self.waiting or self.active:
            started = time.perf_counter()
            free = self.num_slots - len(self.active)
            if self.waiting and free >= max(1, self.num_slots // 8):
                first = len(self.active)
                self._prefill()
                moved = self.active[first:]
            else:
                self._advance(self.active, slice(0, len(self.active)), [row.tokens[-1:] for row in self.active])
                moved = list(self.active)
            share = (time.perf_counter() - started) / len(moved)
            for row in moved:
                row.seconds += share
            self._finish(done)

    def _prefill(self) -> None:
        """Start as many waiting rows as fit the free slots and one pass."""
        first, rows = len(self.active), []
        while self.waiting and first + len(rows) < self.num_slots:
            if rows and (len(rows) + 1) * max(len(self.waiting[-1].prompt), len(rows[-1].prompt)) > PREFILL_TOKENS:
                break
            rows.append(self.waiting.pop())
        self.cache.lengths_S[first : first + len(rows)] = 0
        self.active += rows
        self._advance(rows, slice(first, first + len(rows)), [row.prompt for row in rows])

    def _advance(self, rows: list[_Active], slots: slice, new: list[list[int]]) -> None:
        """Feed each row its new tokens and choose its next one."""
        import torch

        device = self.model.device
        longest = max(map(len, new))
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=device)
        position_ids_BL, mask = self.cache.begin(slots, longest)
        hidden_BLD = self.model.get_decoder()(
            input_ids=ids_BL, position_ids=position_ids_BL, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        num_new_B = torch.tensor([len(ids) for ids in new], device=device)
        self.cache.lengths_S[slots] += num_new_B
        last_BD = hidden_BLD[torch.arange(len(new), device=device), num_new_B - 1]
        logits_BV = self.model.get_output_embeddings()(last_BD).float()
        chosen = (
            logits_BV.argmax(-1).tolist()
            if self.sampling.temperature == 0
            else [self._sample(logits_V, row) for logits_V, row in zip(logits_BV, rows, strict=True)]
        )
        for row, token in zip(rows, chosen, strict=True):
            row.tokens.append(token)

    def _sample(self, logits_V: "torch.Tensor", row: _Active) -> int:
        """Draw one token by temperature and nucleus (Holtzman et al. 2020), from a generator that this request and position alone decide."""
        import torch

        request = self.requests[row.index]
        label = f"{self.sampling.seed}/{request.sample_index}/{len(row.tokens)}/{request.prompt}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big"))
        probabilities_V, order_V = (logits_V.cpu().double() / self.sampling.temperature).softmax(-1).sort(descending=True)
        keep_V = probabilities_V.cumsum(-1) - probabilities_V < self.sampling.top_p
        return int(order_V[torch.multinomial(probabilities_V * keep_V, 1, generator=generator)])

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
        text = self.tokenizer.decode(row.tokens[:-1] if ended else row.tokens, skip_special_tokens=True)
        cuts = [at for at in (text.find(stop) for stop in self.sampling.stop) if at >= 0]
        if cuts:
            return text[: min(cuts)], "stop"
        if ended:
            return text, "stop"
        return text, "length" if len(row.tokens) >= self.sampling.max_tokens else None


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at most one less than the shortest has: every row needs one of its own."""
    first, last = min(prompts), max(prompts)  # in dictionary order: what these two share, all share
    most = min(len(ids) for ids in prompts) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    ends = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
