"""Checkpoints of real (tiny, random) models behind the server."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.models.checkpoint import load, save
from llmdistill.serve.served_model import Precision, load_served_model
from llmdistill.serve.settings import ServeSettings

KINDS = ["t5", "llama"]
PROMPTS = ["the parcel is late", "please cancel my order", "one lamp was paid for twice", "where is it", "小さい箱"] * 10


@pytest.fixture(scope="module")
def checkpoints(tokenizers, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}
    t5_tokenizer, llama_tokenizer = tokenizers["metaspace"], tokenizers["byte_level"]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(t5_tokenizer), pad_token_id=0, eos_token_id=1, **small))
    t5.generation_config.decoder_start_token_id = 0
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(llama_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.3,
        )
    )
    section = {"task": "tickets", "input_template": "{message}", "choices": ["cancel_order", "billing_problem"]}
    for kind, model, tokenizer in [("t5", t5, t5_tokenizer), ("llama", llama, llama_tokenizer)]:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # lively enough to write different things about different prompts
        save(model.eval(), tokenizer, folder / kind, lineage=[], card="a test")
        path = folder / kind / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"llmdistill": section}))
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def url(checkpoints, kind, server_context) -> Iterator[str]:
    settings = ServeSettings(max_batch_rows=16)
    with server_context(load_served_model(checkpoints[kind], settings=settings, device="cpu", precision=Precision.FLOAT32), settings) as running:
        yield running.url


def greedy(folder: Path, prompts: list[str], max_new_tokens: int, start_token: int = 0) -> list[str]:
    """What the engine says, one prompt at a time."""
    model, tokenizer = load(folder, dtype=torch.float32)
    is_causal = not model.config.is_encoder_decoder
    assert model.generation_config is not None
    model.generation_config.decoder_start_token_id = start_token  # pyright: ignore[reportAttributeAccessIssue]
    engine = Engine(model, max_batch_rows=1)

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    texts = []
    for prompt in prompts:
        tokens = list(tokenizer(prompt)["input_ids"])
        answer = engine.generate([tokens], Decoding(max_new_tokens=max_new_tokens))[0].tokens
        texts.append(text([*tokens, *answer])[len(text(tokens)) :] if is_causal else text(answer))
    return texts


def test_an_answer_is_the_same_alone_and_among_fifty(url, kind, checkpoints, connect) -> None:
    expected = greedy(checkpoints[kind], PROMPTS[:5], 24)
    assert len(set(expected)) > 2
    alone = [connect(url).completions.create(model=kind, prompt=prompt, temperature=0, max_tokens=24).choices[0].text for prompt in PROMPTS[:5]]
    assert alone == expected

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def ask(index: int, prompt: str) -> str:
                await asyncio.sleep(index * 0.004)  # join while others decode
                if index % 3:
                    return (await client.completions.create(model=kind, prompt=prompt, temperature=0, max_tokens=24)).choices[0].text
                stream = await client.completions.create(model=kind, prompt=prompt, temperature=0, max_tokens=24, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(PROMPTS)))

    assert asyncio.run(ask_all()) == expected * 10


def test_sampling_repeats_by_seed_alone_and_in_company(url, kind, connect) -> None:
    client = connect(url)
    options = {"model": kind, "temperature": 1.3, "top_p": 0.95, "max_tokens": 12, "seed": 3, "n": 3, "extra_body": {"top_k": 40}}
    first = client.completions.create(**options, prompt=PROMPTS[0])
    again = client.completions.create(**options, prompt=PROMPTS[:5])
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices[:3]]
    assert len({choice.text for choice in first.choices}) > 1


def test_predict_on_a_real_student(url, kind, checkpoints, http) -> None:
    answer = http.post(f"{url}/v1/predict", json={"fields": {"message": "the parcel is late"}, "rationale": True}).json()
    suffix = "\n" if kind == "llama" else ""
    for name, prefix, max_new_tokens in [("output", "predict: ", 32), ("rationale", "explain: ", 128)]:
        prompt = f"{prefix}the parcel is late{suffix}"
        assert answer[name].strip() == greedy(checkpoints[kind], [prompt], max_new_tokens)[0].strip()
    assert answer["label"] in (None, "cancel_order", "billing_problem")


def test_a_student_told_its_task_by_the_first_token(checkpoints, start_server, http, tmp_path) -> None:
    folder = tmp_path / "shared"
    shutil.copytree(checkpoints["t5"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["llmdistill"] = {"prefixes": {"predict": "", "explain": ""}, "suffix": "", "decoder_start_token_ids": {"predict": 0, "explain": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    settings = ServeSettings()
    url = start_server(load_served_model(folder, settings=settings, device="cpu", precision=Precision.FLOAT32), settings).url
    answer = http.post(f"{url}/v1/predict", json={"input": "the parcel is late", "rationale": True}).json()
    assert answer["output"] == greedy(folder, ["the parcel is late"], 32)[0]
    assert answer["rationale"] == greedy(folder, ["the parcel is late"], 128, start_token=1)[0].strip()
    assert answer["output"] != answer["rationale"][: len(answer["output"])]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_served_model(tmp_path, settings=ServeSettings(), device="cpu", precision=Precision.FLOAT32)


def test_the_command_serves_a_checkpoint_and_drains(checkpoints, connect, http, tmp_path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(checkpoints["t5"], folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    command = [sys.executable, "-m", "llmdistill", "serve", str(folder), "--port", "0", "--model-name", "small"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving small on http://127.0.0.1:"), line or process.communicate()[1]
        url = line.split()[-1]
        client = connect(url)
        assert [model.id for model in client.models.list()] == ["small"]
        prediction = http.post(f"{url}/v1/predict", json={"fields": {"message": "where is it"}, "rationale": True}).json()
        assert prediction["rationale"]
        stream = client.completions.create(model="small", prompt="please", temperature=0, max_tokens=500, stream=True, stream_options={"include_usage": True})
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage is not None
        assert last.usage.completion_tokens == 500
        assert process.wait(60) == 0
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert "Traceback" not in errors
