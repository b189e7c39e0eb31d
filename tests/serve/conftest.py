"""Tiny models, a scripted engine, and a real uvicorn on a loopback port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmdistill.decode.decoding import Decoding, Token
from llmdistill.serve.app import build_app
from llmdistill.serve.gate import Gate
from llmdistill.serve.pace import Pace
from llmdistill.serve.points import OperatingPoint, Points
from llmdistill.serve.predict import TaskSection
from llmdistill.serve.scheduler import BatchEngine
from llmdistill.serve.served_model import ServedModel
from llmdistill.serve.server import Server
from llmdistill.serve.settings import ServeSettings

TEXTS = [
    "the parcel is late and the customer wants to know where it is",
    "please cancel my order before it is sent out",
    "one lamp was paid for twice, send the money back",
    "größere Jacke? 小さい箱が届いた 🙂 naïve café",
] * 3
DEFAULT_SETTINGS = ServeSettings()
NUM_LAYERS = 4
PACE = Pace(beginning=0.001, per_prompt_token=0.0001, per_step=0.001, per_neighbour=0.0001)
ONE_POINT = Points([OperatingPoint(num_layers=NUM_LAYERS, weight_bytes=1000, pace=PACE)])
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def byte_level_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """As Llama 3's and Qwen's: a character outside ASCII is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=chat_template)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's: words begin with a mark that the decoder turns into a space, except the first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: what the vocabulary lacks is written in byte tokens."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁order"]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@dataclass
class ScriptedEngine:
    """Answers each prompt with itself, a token a step, then stops; with a temperature, draws by the row's seed. Fails when told."""

    eos: int
    step_seconds: float = 0.0
    fail_steps: int = 0
    poison: int = -1  # a prompt with this token is refused by an error
    prompts: dict[int, list[int]] = field(default_factory=dict)
    decodings: dict[int, Decoding] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    num_added: int = 0
    most_rows: int = 0

    def add(self, prompt: Sequence[int], decoding: Decoding) -> int:
        if self.poison in prompt:
            raise RuntimeError("poisoned prompt")
        self.num_added += 1
        self.prompts[self.num_added] = [token for token in prompt if token != self.eos]
        self.decodings[self.num_added] = decoding
        self.positions[self.num_added] = 0
        self.most_rows = max(self.most_rows, len(self.prompts))
        return self.num_added

    def step(self) -> list[Token]:
        time.sleep(self.step_seconds)
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("scripted failure")
        return [self._next(row) for row in list(self.prompts)]

    def drop(self, row: int) -> None:
        del self.prompts[row], self.decodings[row], self.positions[row]

    def _next(self, row: int) -> Token:
        prompt, position, decoding = self.prompts[row], self.positions[row], self.decodings[row]
        token = prompt[position] if position < len(prompt) else self.eos
        if decoding.temperature > 0 and token != self.eos:
            token = prompt[hash((decoding.seed, position)) % len(prompt)]
        self.positions[row] += 1
        is_stop, is_last = token == self.eos, self.positions[row] >= decoding.max_new_tokens
        if is_stop or is_last:
            self.drop(row)
        finish_reason = "stop" if is_stop else "length" if is_last else None
        return Token(row=row, token=token, finished=is_stop or is_last, finish_reason=finish_reason, logprob=0.0, num_layers=self.num_layers(decoding))

    def num_layers(self, decoding: Decoding) -> int:
        """A threshold of 0.5 halves the layers."""
        assert isinstance(decoding.exit_threshold, float)
        return round(NUM_LAYERS * decoding.exit_threshold)


@dataclass
class Running:
    """A server that runs: where, and what is inside."""

    url: str
    gate: Gate
    server: Server

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        self.wait_until(lambda: not (self.gate.scheduler.num_active or self.gate.scheduler.num_waiting or self.gate.num_working))


@contextmanager
def run_in_thread(model: ServedModel, settings: ServeSettings) -> Iterator[Running]:
    gate = build_app(model, settings)
    started = threading.Event()
    addresses: list[str] = []
    server = Server(gate, "127.0.0.1", 0, settings, on_started=lambda address: (addresses.append(address), started.set())[0])
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(10)
    try:
        yield Running(addresses[0], gate, server)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def make_model(tokenizer: Any, engine: BatchEngine | Callable[[], BatchEngine], *, name: str = "student", causal: bool = False, **fields: Any) -> ServedModel:
    """A served model around an engine that is there, or is made on demand."""
    return ServedModel(
        name=name,
        created=1,
        tokenizer=tokenizer,
        make_engine=engine if callable(engine) else lambda: engine,
        vocabulary_size=len(tokenizer),
        num_positions=fields.pop("num_positions", 0),
        answer_continues_prompt=causal,
        points=fields.pop("points", ONE_POINT),
        task=fields.pop("task", TaskSection.from_config({}, is_encoder_decoder=not causal)),
        **fields,
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {"byte_level": byte_level_tokenizer(), "metaspace": metaspace_tokenizer(), "byte_fallback": byte_fallback_tokenizer()}


@pytest.fixture(scope="session")
def scripted_engine() -> type[ScriptedEngine]:
    return ScriptedEngine


@pytest.fixture(scope="session")
def served_model() -> Callable[..., ServedModel]:
    return make_model


@pytest.fixture(scope="session")
def server_context() -> Callable[[ServedModel, ServeSettings], AbstractContextManager[Running]]:
    return run_in_thread


@pytest.fixture
def start_server() -> Iterator[Callable[..., Running]]:
    """Starts a server; it ends with the test."""
    with ExitStack() as stack:
        yield lambda model, settings=DEFAULT_SETTINGS: stack.enter_context(run_in_thread(model, settings))


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """One client for all: to make one reads every certificate of the machine."""
    with httpx.Client(timeout=10) as client:
        yield client


@pytest.fixture(scope="session")
def connect() -> Iterator[Callable[[str], OpenAI]]:
    """OpenAI's client for a server."""
    with OpenAI(base_url="http://nowhere", api_key="none", max_retries=0, timeout=10) as client:
        yield lambda url: client.with_options(base_url=f"{url}/v1")
