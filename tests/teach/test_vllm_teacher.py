"""The vLLM teacher against a fake engine, and against vLLM itself and the transformers teacher where vLLM is installed."""

import asyncio
import importlib.util
import sys
import types
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher, TeacherError
from llmdistill.teach.transformers_teacher import TransformersTeacher
from llmdistill.teach.vllm_teacher import VLLMTeacher

SAMPLING = Sampling(max_tokens=6, stop=("\n",))
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose tokens are characters."""
    import tokenizers
    import torch
    import transformers

    path = tmp_path_factory.mktemp("tiny")
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", "<unk>", *CHARACTERS])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    model.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<go>"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


class FakeEngine:
    """Answers in the order of the prompts' lengths, the shortest first; remembers how it was started."""

    started: SimpleNamespace
    generated: list[tuple[dict, SimpleNamespace, str]]
    is_shut_down = False
    finish_reason = "stop"

    @classmethod
    def from_engine_args(cls, args: SimpleNamespace) -> "FakeEngine":
        cls.started, cls.generated, cls.is_shut_down = args, [], False
        return cls()

    async def generate(self, prompt: dict, params: SimpleNamespace, request_id: str) -> AsyncIterator[SimpleNamespace]:
        FakeEngine.generated.append((prompt, params, request_id))
        tokens = prompt["prompt_token_ids"]
        await asyncio.sleep(0.002 * len(tokens))
        result = SimpleNamespace(text=f"answer {request_id}\nmore", token_ids=[1, 2, 3], finish_reason=self.finish_reason)
        yield SimpleNamespace(outputs=[result], prompt_token_ids=tokens, request_id=request_id)

    def shutdown(self) -> None:
        FakeEngine.is_shut_down = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    module, sampling = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    module.__dict__.update(AsyncLLMEngine=FakeEngine, AsyncEngineArgs=SimpleNamespace, SamplingParams=SimpleNamespace)
    sampling.__dict__.update(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    monkeypatch.setattr(FakeEngine, "finish_reason", "stop")
    return FakeEngine


def test_completions_are_handed_over_as_they_finish(folder: Path, fake: type[FakeEngine]) -> None:
    teacher: Teacher = VLLMTeacher(source=str(folder), tensor_parallel_size=2, data_parallel_size=3, memory_share=0.5, compile=False)
    order: list[int] = []
    completions: dict[int, Completion] = {}

    def done(index: int, completion: Completion) -> None:
        order.append(index)
        completions[index] = completion

    teacher.complete([Request(prompt="a" * 60), Request(prompt="b"), Request(prompt="c" * 30)], SAMPLING, done)
    assert order == [1, 2, 0]
    assert {index: completion.text for index, completion in completions.items()} == {index: f"answer {index}" for index in range(3)}
    assert (completions[0].tokens_in, completions[0].tokens_out, completions[0].finish_reason) == (60, 3, "stop")
    started = fake.started
    assert (started.model, started.revision, started.tensor_parallel_size, started.data_parallel_size) == (str(folder), None, 2, 3)
    assert (started.enable_prefix_caching, started.enforce_eager, started.max_model_len, started.gpu_memory_utilization) == (True, True, 256, 0.5)
    assert fake.is_shut_down
    _, params, _ = fake.generated[0]
    assert (params.max_tokens, params.temperature, params.top_p, params.stop, params.seed) == (6, 0.0, 1.0, ["\n"], None)


def test_a_sample_has_its_own_seed_and_a_chat_its_template(folder: Path, fake: type[FakeEngine]) -> None:
    teacher = VLLMTeacher(source=str(folder), chat=True)
    teacher.complete([Request(prompt="hi", sample_index=4)], Sampling(temperature=0.7, seed=10), lambda index, completion: None)
    prompt, params, _ = fake.generated[0]
    assert params.seed == 14
    assert teacher.render("hi") == "<user>hi<go>"
    assert len(prompt["prompt_token_ids"]) == len("<user>hi<go>")


def test_an_exception_of_done_stops_the_engine_and_passes_through(folder: Path, fake: type[FakeEngine]) -> None:
    seen: list[int] = []

    def done(index: int, completion: Completion) -> None:
        seen.append(index)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        VLLMTeacher(source=str(folder)).complete([Request(prompt="a" * 50), Request(prompt="b")], SAMPLING, done)
    assert seen == [1]
    assert fake.is_shut_down


def test_an_aborted_request_is_no_completion(folder: Path, fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "finish_reason", "abort")
    with pytest.raises(TeacherError, match="'abort'"):
        VLLMTeacher(source=str(folder)).complete([Request(prompt="a")], SAMPLING, lambda index, completion: None)


def test_identity_and_settings(folder: Path) -> None:
    one = VLLMTeacher(source=str(folder))
    assert one.revision.startswith("sha256:")
    assert one.fingerprint() == VLLMTeacher(source=str(folder), tensor_parallel_size=8, memory_share=0.2).fingerprint()
    assert one.fingerprint() != VLLMTeacher(source=str(folder), chat=True).fingerprint()
    hub = VLLMTeacher(source="org/name@v1")
    assert (hub.model, hub.revision, hub.render("p")) == ("org/name", "v1", "p")
    for settings in ({"source": "./m.gguf"}, {"tensor_parallel_size": 0}, {"memory_share": 0.0}):
        with pytest.raises(ValueError, match="VLLMTeacher"):
            VLLMTeacher(**{"source": "org/name", **settings})  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install(folder: Path) -> None:
    with pytest.raises(TeacherError, match=r"llmdistill\[vllm\]"):
        VLLMTeacher(source=str(folder)).complete([Request(prompt="a")], SAMPLING, lambda index, completion: None)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(1800)  # an engine starts three times, in processes of its own
def test_vllm_gives_the_completions_of_bare_vllm_and_of_transformers(folder: Path) -> None:
    requests = [Request(prompt=f"A prefix that is shared by all of the prompts. {number}: ") for number in range(12)]
    greedy = Sampling(max_tokens=24)
    plain = completed(TransformersTeacher(source=str(folder), batch_size=5), requests, greedy)
    texts = [completion.text for completion in plain]
    pairs = [text[start : start + 2] for text in texts for start in range(4, len(text) - 1)]
    stop = next(pair for pair in pairs if 0 < sum(pair in text for text in texts) < len(texts))  # two characters that some rows say and others do not
    greedy = Sampling(max_tokens=24, stop=(stop,))
    sampled = Sampling(max_tokens=12, temperature=0.9, top_p=0.95, seed=5)
    both = [Request(prompt=request.prompt, sample_index=index) for request in requests[:4] for index in range(2)]
    teacher = VLLMTeacher(source=str(folder), dtype="float32", memory_share=0.1, compile=False)

    of_greedy, of_sampled = completed(teacher, requests, greedy), completed(teacher, both, sampled)
    bare = bare_vllm(folder, [(requests, greedy), (both, sampled)])
    assert without_seconds(of_greedy) == bare[0]
    assert without_seconds(of_sampled) == bare[1]
    assert without_seconds(of_greedy) == without_seconds(completed(TransformersTeacher(source=str(folder)), requests, greedy))
    assert {completion.finish_reason for completion in of_greedy} == {"stop", "length"}
    assert len({completion.text for completion in of_sampled}) > len(both) / 2
    assert all(completion.seconds > 0 for completion in of_greedy)


def completed(teacher: Teacher, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
    """The completions in the order of the requests."""
    completions: dict[int, Completion] = {}
    teacher.complete(requests, sampling, completions.__setitem__)
    return [completions[index] for index in range(len(requests))]


def without_seconds(completions: Sequence[Completion]) -> list[tuple[str, int, int, str]]:
    return [(completion.text, completion.tokens_in, completion.tokens_out, completion.finish_reason) for completion in completions]


def bare_vllm(folder: Path, asked: Sequence[tuple[Sequence[Request], Sampling]]) -> list[list[tuple[str, int, int, str]]]:
    """What vLLM's own offline class says, without anything of ours."""
    import vllm  # pyright: ignore[reportMissingImports] - in an environment of its own

    engine = vllm.LLM(model=str(folder), dtype="float32", max_model_len=256, gpu_memory_utilization=0.1, enforce_eager=True)
    answers = []
    for requests, sampling in asked:
        params = [
            vllm.SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=list(sampling.stop),
                seed=sampling.seed + request.sample_index,
            )
            for request in requests
        ]
        outputs = engine.generate([request.prompt for request in requests], params, use_tqdm=False)
        results = [(output, output.outputs[0]) for output in outputs]
        answers.append([(result.text, len(output.prompt_token_ids), len(result.token_ids), result.finish_reason) for output, result in results])
    return answers
