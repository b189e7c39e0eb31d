"""A teacher in this machine's vLLM: continuous batching, the shared few-shot prefix cached by the engine, tensor and data parallelism passed through.

vLLM's asynchronous engine, not its `LLM` class: `LLM` refuses data parallelism in one process and hands over nothing before all is done, while here each
completion is handed over when it finishes, on one path for one GPU and for many. The engine's core works in processes of its own; the calling thread feeds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from llmdistill.core.stage import speed
from llmdistill.teach.teacher import Completion, Request, Sampling, TeacherError, cut_at_stop

if TYPE_CHECKING:
    from llmdistill.models.source import ModelSource

MAX_WAITING = 2_048  # requests inside the engine: many times what it decodes at once, and few enough to feed it from one thread
LENGTH_STEP = 256  # the engine's length limit is rounded up to this


@dataclass(frozen=True, kw_only=True)
class VLLMTeacher:
    """A causal model of a hub (`org/name@revision`) or of a local folder (`./folder`).

    chat: each prompt is one user message in the model's own chat template.
    dtype: "auto" is the weights' own.
    memory_share: how much of the device's memory the engine may take.
    compile: the engine compiles the model before it begins, which takes it minutes on a CPU; without, it begins sooner and decodes more slowly.
    """

    kind: ClassVar[str] = "vllm"

    source: str
    chat: bool = False
    dtype: str = "auto"
    tensor_parallel_size: int = speed(1)
    data_parallel_size: int = speed(1)
    memory_share: float = speed(0.9)
    compile: bool = speed(True)
    dollars_per_million_tokens_in: float = speed(0.0)
    dollars_per_million_tokens_out: float = speed(0.0)

    def __post_init__(self) -> None:
        if self.source.endswith(".gguf"):
            raise ValueError(f"VLLMTeacher.source is {self.source!r}: vLLM reads hub ids and folders, not GGUF files; use transformers:{self.source}")
        if self.tensor_parallel_size < 1 or self.data_parallel_size < 1:
            raise ValueError(
                f"VLLMTeacher has tensor_parallel_size {self.tensor_parallel_size} and data_parallel_size {self.data_parallel_size}: both must be at least 1"
            )
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"VLLMTeacher.memory_share is {self.memory_share}: it is a share above 0 and at most 1")

    @property
    def model(self) -> str:
        """The hub id, or the folder's name."""
        return self._source.name

    @property
    def revision(self) -> str:
        """The hub's revision, or the sha256 of the folder's files."""
        return self._source.revision

    def fingerprint(self) -> dict[str, object]:
        """Model, revision, chat and dtype."""
        return {"model": self.model, "revision": self.revision, "chat": self.chat, "dtype": self.dtype}

    def render(self, prompt: str) -> str:
        """The prompt, or the chat that holds it as its only message."""
        if not self.chat:
            return prompt
        return self._tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        """Answer every request; the engine is started for this call and stopped after it."""
        if requests:
            asyncio.run(self._complete(requests, sampling, done))

    async def _complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
            from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise TeacherError("the teacher vllm needs vLLM: pip install 'llmdistill[vllm]', or use transformers:MODEL") from error
        # The chat template writes the special tokens itself.
        tokens = [self._tokenizer(self.render(request.prompt), add_special_tokens=not self.chat).input_ids for request in requests]
        longest = max(map(len, tokens)) + sampling.max_tokens
        engine = vllm.AsyncLLMEngine.from_engine_args(
            vllm.AsyncEngineArgs(
                model=self._location,
                revision=None if self.revision.startswith("sha256:") else self.revision,
                dtype=self.dtype,  # type: ignore[arg-type]
                max_model_len=-(-longest // LENGTH_STEP) * LENGTH_STEP,
                tensor_parallel_size=self.tensor_parallel_size,
                data_parallel_size=self.data_parallel_size,
                gpu_memory_utilization=self.memory_share,
                enable_prefix_caching=True,
                enforce_eager=not self.compile,
                disable_log_stats=True,
                seed=sampling.seed,
            )
        )
        room = asyncio.Semaphore(MAX_WAITING)
        last = time.perf_counter()

        async def answer(index: int) -> None:
            nonlocal last
            async with room:
                params = vllm.SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed + requests[index].sample_index if sampling.temperature > 0 else None,
                    stop=list(sampling.stop),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                final: Any = None
                async for output in engine.generate({"prompt_token_ids": tokens[index]}, params, str(index)):
                    final = output
            now = time.perf_counter()
            completion, last = _completion(final, sampling, now - last), now
            done(index, completion)

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(requests)):
                    group.create_task(answer(index))
        except BaseExceptionGroup as group_of_errors:
            raise _first(group_of_errors) from None
        finally:
            engine.shutdown()

    @cached_property
    def _source(self) -> ModelSource:
        from llmdistill.models.source import ModelSource

        return ModelSource(self.source)

    @property
    def _location(self) -> str:
        """What vLLM takes as the model: a hub id or a path."""
        from pathlib import Path

        return str(Path(self.source).expanduser().resolve()) if self.revision.startswith("sha256:") else self.model

    @cached_property
    def _tokenizer(self) -> Any:
        return self._source.load_tokenizer()


def _completion(output: Any, sampling: Sampling, seconds: float) -> Completion:
    """What the engine's final output says."""
    result = output.outputs[0]
    if result.finish_reason not in ("stop", "length"):
        raise TeacherError(f"vLLM ended request {output.request_id} with {result.finish_reason!r}: all completions so far are kept, run again")
    return Completion(
        text=cut_at_stop(result.text, sampling.stop)[0],
        tokens_in=len(output.prompt_token_ids),
        tokens_out=len(result.token_ids),
        seconds=seconds,
        finish_reason=result.finish_reason,
    )


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the group; the others are its echoes."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
