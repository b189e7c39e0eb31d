"""The transformers teacher says what transformers' generate says to each prompt alone, whatever it decodes beside it, and counts it rightly.

Tiny random models in float64, whose tokens are characters, so that a text is its tokens. Each model's end token is one that it says now and then.
"""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.sampling import choose, row_generator
from llmdistill.models.source import ModelSource
from llmdistill.teach import transformers_teacher
from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher
from llmdistill.teach.transformers_teacher import TransformersTeacher

SPECIAL = ["<s>", "</s>", "<unk>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .:\n"
LIMIT = 128
SHAPE: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),  # does something to its logits after the head
}
PREFIX = "some words that all of the prompts begin with. "
RESTS = ["a", "then some more of it", "bc: ", "x" * 30, "one\ntwo", "q", "the last but one, or so", "zz top", "m" * 11, "no", "yes: yes", "abc", "k."]
PROMPTS = {
    "a common prefix": [PREFIX + rest for rest in RESTS],
    "nothing in common": [chr(ord("a") + number) + rest for number, rest in enumerate(RESTS)],
    "one prompt": [PREFIX],
    "equal prompts": [PREFIX] * 3,
}
GREEDY = Sampling(max_tokens=12)
SAMPLED = Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=3)


def write_tokenizer(folder: Path) -> Any:
    vocabulary = {text: number for number, text in enumerate([*SPECIAL, *CHARACTERS])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    model.decoder = tokenizers.decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda name: write_model(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Path:
    return folder_of(request.param)


@pytest.fixture
def llama(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("llama")


def write_model(name: str, path: Path) -> Path:
    """A random model, one of whose end tokens is a character that about half of its answers have."""
    tokenizer = write_tokenizer(path)
    torch.manual_seed(2)
    model: Any = MODELS[name]().double().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # Qwen2's start at zero, which would hide a lost one
            torch.nn.init.normal_(parameter, std=0.3)
    said = {kind: [greedy(model, tokenizer, prompt, GREEDY)[0] for prompt in PROMPTS[kind]] for kind in ("a common prefix", "nothing in common")}
    off_half = {end: sum(abs(sum(end in text for text in texts) / len(texts) - 0.5) for texts in said.values()) for end in CHARACTERS}
    model.generation_config.eos_token_id = [1, len(SPECIAL) + CHARACTERS.index(min(off_half, key=off_half.__getitem__))]
    model.save_pretrained(path)
    return path


@functools.cache
def stock(path: Path) -> tuple[Any, Any]:
    """The model as transformers loads it, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64), ModelSource(str(path)).load_tokenizer()


@functools.cache
def expected(path: Path, prompt: str, sampling: Sampling) -> tuple[str, int, int, str]:
    """Text, tokens in and out, and finish reason by transformers' generate."""
    return greedy(*stock(path), prompt, sampling)


def greedy(model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> tuple[str, int, int, str]:
    """By transformers' generate, stop strings cut afterwards."""
    ids_1L = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        made = model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), max_new_tokens=sampling.max_tokens, do_sample=False, pad_token_id=2)
    tokens = made[0, ids_1L.shape[1] :].tolist()
    return cut(tokenizer, tokens, model.generation_config.eos_token_id, sampling, ids_1L.shape[1])


def cut(tokenizer: Any, tokens: list[int], ends: int | list[int], sampling: Sampling, num_in: int) -> tuple[str, int, int, str]:
    """What is left of tokens that were made without regard to stop strings."""
    ends = ends if isinstance(ends, list) else [ends]
    for num_out in range(1, len(tokens) + 1):
        is_end = tokens[num_out - 1] in ends
        text = tokenizer.decode(tokens[: num_out - is_end], skip_special_tokens=True)
        found = [text.index(stop) for stop in sampling.stop if stop in text]
        if found or is_end:
            return text[: min(found)] if found else text, num_in, num_out, "stop"
    return tokenizer.decode(tokens, skip_special_tokens=True), num_in, len(tokens), "length"


def asked(teacher: Teacher, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
    completions: dict[int, Completion] = {}

    def done(index: int, completion: Completion) -> None:
        assert index not in completions
        completions[index] = completion

    teacher.complete(requests, sampling, done)
    return [completions[index] for index in range(len(requests))]


def answers(path: Path, prompts: Sequence[str], sampling: Sampling, batch_size: int) -> list[tuple[str, int, int, str]]:
    teacher = TransformersTeacher(source=str(path), dtype="float64", batch_size=batch_size)
    completions = asked(teacher, [Request(prompt=prompt) for prompt in prompts], sampling)
    return [(completion.text, completion.tokens_in, completion.tokens_out, completion.finish_reason) for completion in completions]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_completions_are_those_of_generate(folder: Path, kind: str, batch_size: int) -> None:
    wanted = [expected(folder, prompt, GREEDY) for prompt in PROMPTS[kind]]
    assert answers(folder, PROMPTS[kind], GREEDY, batch_size) == wanted
    if len(wanted) > 3:
        assert {reason for *_, reason in wanted} == {"stop", "length"}


@pytest.mark.parametrize("max_tokens", [1, 2, 40])
def test_completions_are_cut_at_max_tokens(folder: Path, max_tokens: int) -> None:
    sampling = Sampling(max_tokens=max_tokens)
    prompts = PROMPTS["a common prefix"][:5]
    assert answers(folder, prompts, sampling, 2) == [expected(folder, prompt, sampling) for prompt in prompts]


def test_completions_end_before_the_first_stop_string(folder: Path) -> None:
    prompts = PROMPTS["a common prefix"]
    texts = [text for text, *_ in answers(folder, prompts, GREEDY, 4)]
    long = [text for text in texts if len(text) >= 8]
    sampling = Sampling(max_tokens=12, stop=(long[0][3:5], long[1][2:5], "never said"))
    wanted = [expected(folder, prompt, sampling) for prompt in prompts]
    assert answers(folder, prompts, sampling, 4) == wanted
    assert sum(text != uncut for (text, *_), uncut in zip(wanted, texts, strict=True)) >= 2


def test_prompts_longer_than_a_prefill_pass_are_fed_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_teacher, "PREFILL_TOKENS", 7)
    for prompts in (PROMPTS["a common prefix"], PROMPTS["nothing in common"]):
        assert answers(folder, prompts, GREEDY, 3) == [expected(folder, prompt, GREEDY) for prompt in prompts]


@pytest.mark.parametrize("name", MODELS)
def test_sampled_tokens_are_drawn_from_the_stock_models_logits(name: str, folder_of: Callable[[str], Path]) -> None:
    path = folder_of(name)
    model, tokenizer = stock(path)
    decoding = Decoding(temperature=SAMPLED.temperature, top_p=SAMPLED.top_p)
    prompts = PROMPTS["a common prefix"][:6]
    wanted = []
    for prompt in prompts:
        ids: list[int] = tokenizer(prompt).input_ids
        generator, tokens = row_generator(SAMPLED.seed, ids), []
        while len(tokens) < SAMPLED.max_tokens and not set(tokens) & set(model.generation_config.eos_token_id):
            with torch.inference_mode():
                logits_1V = model(torch.tensor([ids + tokens])).logits[:, -1]
            tokens += choose(logits_1V, [decoding], [generator])[0]
        wanted.append(cut(tokenizer, tokens, model.generation_config.eos_token_id, SAMPLED, len(ids)))
    assert answers(path, prompts, SAMPLED, 4) == wanted
    assert wanted != [expected(path, prompt, SAMPLED) for prompt in prompts]


def test_a_sample_depends_on_its_prompt_and_seed_alone(llama: Path) -> None:
    requests = [Request(prompt=prompt, sample_index=index) for prompt in PROMPTS["a common prefix"][:7] for index in range(4)]

    def texts(chosen: Sequence[Request], sampling: Sampling, batch_size: int) -> list[str]:
        return [completion.text for completion in asked(TransformersTeacher(source=str(llama), dtype="float64", batch_size=batch_size), chosen, sampling)]

    at_once = texts(requests, SAMPLED, 64)
    assert texts(requests, SAMPLED, 64) == at_once
    assert texts(requests, SAMPLED, 3) == at_once
    assert texts(requests[::-1], SAMPLED, 5) == at_once[::-1]
    assert texts(requests[5:6], SAMPLED, 1) == at_once[5:6]
    assert all(len(set(at_once[start : start + 4])) > 1 for start in range(0, len(requests), 4))
    other_seed = texts(requests, Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=4), 64)
    assert other_seed != at_once
    for start in range(0, len(requests), 4):  # sample i uses seed + i
        assert other_seed[start : start + 3] == at_once[start + 1 : start + 4]


def test_samples_follow_the_models_distribution(llama: Path) -> None:
    num_samples, prompt = 1_500, PREFIX
    sampling = Sampling(max_tokens=1, temperature=1.5, top_p=0.8)
    teacher = TransformersTeacher(source=str(llama), batch_size=256)
    counts = Counter(
        completion.text if completion.finish_reason == "length" else "end"
        for completion in asked(teacher, [Request(prompt=prompt, sample_index=index) for index in range(num_samples)], sampling)
    )
    model, tokenizer = stock(llama)
    with torch.inference_mode():
        probabilities_V = (model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1] / 1.5).softmax(-1)
    shares: defaultdict[str, float] = defaultdict(float)
    held = 0.0
    for token in probabilities_V.argsort(descending=True).tolist():
        if held >= 0.8:
            break
        held += float(probabilities_V[token])
        shares["end" if token in model.generation_config.eos_token_id else tokenizer.decode([token], skip_special_tokens=True)] += float(probabilities_V[token])
    assert len(shares) >= 3
    assert counts.keys() <= shares.keys()
    distance = sum(abs(counts[text] / num_samples - share / held) for text, share in shares.items()) / 2
    assert distance < 0.05  # 1,500 fair draws of a dozen tokens are about 0.02 off


def test_the_seconds_add_up_to_the_time_spent(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(transformers_teacher, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    teacher = TransformersTeacher(source=str(llama), batch_size=4)
    completions = asked(teacher, [Request(prompt=prompt) for prompt in PROMPTS["a common prefix"]], GREEDY)
    assert sum(completion.seconds for completion in completions) == pytest.approx(next(ticks) - 1)
    assert min(completion.seconds for completion in completions) > 0


def test_a_completion_is_handed_over_when_it_is_finished_and_an_exception_ends_the_asking(llama: Path) -> None:
    prompts = PROMPTS["a common prefix"]
    seen: list[int] = []

    def done(index: int, completion: Completion) -> None:
        seen.append(index)
        if len(seen) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        TransformersTeacher(source=str(llama), batch_size=2).complete([Request(prompt=prompt) for prompt in prompts], GREEDY, done)
    assert len(seen) == 3
    assert len(set(seen)) == 3


def test_what_is_asked_first_is_done_first_by_and_large(llama: Path) -> None:
    order: list[int] = []
    requests = [Request(prompt=prompt) for prompt in PROMPTS["a common prefix"] * 4]
    TransformersTeacher(source=str(llama), batch_size=4).complete(requests, GREEDY, lambda index, _: order.append(index))
    assert sorted(order) == list(range(len(requests)))
    assert max(order[:16]) < 32  # a window is four batches, and the second begins while the first ends


def test_a_chat_has_the_special_tokens_of_its_template_and_no_others(llama: Path, tmp_path: Path) -> None:
    stock(llama)[0].save_pretrained(tmp_path)
    tokenizer: Any = ModelSource(str(llama)).load_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(tmp_path)
    chat = TransformersTeacher(source=str(tmp_path), chat=True, dtype="float64")
    assert chat.render("hello") == "<s>user: hello\n"
    (completion,) = asked(chat, [Request(prompt="hello")], GREEDY)
    assert completion.tokens_in == 1 + len("user: hello\n")
    (same,) = asked(TransformersTeacher(source=str(tmp_path), dtype="float64"), [Request(prompt="user: hello\n")], GREEDY)
    assert (completion.text, completion.tokens_in, completion.tokens_out) == (same.text, same.tokens_in, same.tokens_out)


def test_what_cannot_be_asked_is_said_before_weights_are_loaded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(self: ModelSource, dtype: torch.dtype) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(ModelSource, "load_model", load_model)
    teacher = TransformersTeacher(source=str(llama))
    asked(teacher, [], GREEDY)
    with pytest.raises(ValueError, match=rf"longest prompt has 117 tokens and max_tokens is 12, but the model reads at most {LIMIT}"):
        asked(teacher, [Request(prompt="a"), Request(prompt="a" * 117)], GREEDY)
    with pytest.raises(ValueError, match="prompt 1 is empty once tokenized"):
        asked(teacher, [Request(prompt="a"), Request(prompt="")], GREEDY)
    write_tokenizer(tmp_path)
    T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\)"):
        asked(TransformersTeacher(source=str(tmp_path)), [Request(prompt="a")], GREEDY)
    for settings in ({"batch_size": 0}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            TransformersTeacher(**{"source": "org/name", **settings})  # type: ignore[arg-type]


def test_identity_is_what_changes_the_answers(llama: Path, tmp_path: Path) -> None:
    MODELS["llama"]().save_pretrained(tmp_path)
    teacher = TransformersTeacher(source=str(llama))
    assert isinstance(teacher, Teacher)
    assert teacher.revision.startswith("sha256:")
    assert teacher.fingerprint() == TransformersTeacher(source=str(llama), batch_size=2, device="cuda").fingerprint()
    for other in (
        TransformersTeacher(source=str(llama), chat=True),
        TransformersTeacher(source=str(llama), dtype="bfloat16"),
        TransformersTeacher(source=str(tmp_path)),
    ):
        assert other.fingerprint() != teacher.fingerprint()
