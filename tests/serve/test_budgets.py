"""Budgets over a real connection: what a request asks for, what it gets, and what the server says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.choice import parse
from llmdistill.elastic.cost import num_bytes
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.kept import KEY, keep, space_of
from llmdistill.elastic.measure import shape_of
from llmdistill.models.checkpoint import load, save
from llmdistill.models.exit_settings import Point
from llmdistill.models.t5 import new_t5
from llmdistill.serve.controller import WINDOW
from llmdistill.serve.forecast import FEWEST, Forecast
from llmdistill.serve.pace import Pace
from llmdistill.serve.points import OperatingPoint, Points, with_exits
from llmdistill.serve.served_model import Precision, load_served_model
from llmdistill.serve.settings import ServeSettings


def risk(delta: float, threshold: float, mean_layers: float) -> Point:
    return Point(delta=delta, threshold=threshold, mean_loss=0.0, mean_layers=mean_layers)


TEXT = "the parcel is late 小さい箱が届いた 🙂"
SLOW = Pace(beginning=0.01, per_prompt_token=0.0, per_step=0.01, per_neighbour=0.001)
FAST = Pace(beginning=0.001, per_prompt_token=0.0, per_step=0.001, per_neighbour=0.001)
LARGEST = OperatingPoint(num_layers=4, weight_bytes=2, accuracy=0.8, pace=SLOW)
POINTS = Points(
    [
        *with_exits(LARGEST, (FAST, 1.0), [risk(0.01, 0.75, 4.0), risk(0.05, 0.5, 3.0)]),
        replace(LARGEST, subnet="depth=1", names=("smallest",), accuracy=0.7, pace=FAST),
    ]
)


@pytest.fixture(scope="module")
def url(server_context, served_model, scripted_engine, tokenizers) -> Iterator[str]:
    tokenizer = tokenizers["byte_level"]
    with server_context(served_model(tokenizer, lambda: scripted_engine(tokenizer.eos_token_id), causal=True, points=POINTS), ServeSettings()) as running:
        yield running.url


@pytest.fixture
def ask(url, http) -> Callable[..., Any]:
    def post(budget: dict[str, Any], **body: Any) -> httpx.Response:
        return http.post(f"{url}/v1/completions", json={"model": "student", "prompt": TEXT, "max_tokens": 200, "temperature": 0, "llmdistill": budget} | body)

    return post


def test_every_answer_says_what_it_was_made_by(ask, connect, url, http) -> None:
    expected = {"subnet": "largest", "exit_risk": 0.01, "exit_threshold": 0.75, "layers_per_token": 3.0, "num_layers": 4}
    assert ask({}).json()["llmdistill"] == expected
    assert http.post(f"{url}/v1/predict", json={"input": "a"}).json()["llmdistill"] == expected
    chat = connect(url).chat.completions.create(model="student", messages=[{"role": "user", "content": "hello"}], temperature=0)
    assert chat.llmdistill == expected  # type: ignore[attr-defined]  # OpenAI's client keeps what it does not know


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_says_so_in_its_last_chunk(url, http, path: str, include_usage: bool) -> None:
    prompt = {"prompt": "ab"} if path == "completions" else {"messages": [{"role": "user", "content": "ab"}]}
    body = {"model": "student", "n": 2, "temperature": 0, "stream": True, "stream_options": {"include_usage": include_usage}, "llmdistill": {"exit_risk": 1}}
    answer = http.post(f"{url}/v1/{path}", json=body | prompt)
    *chunks, end = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert end == "[DONE]"
    said = [json.loads(chunk).get("llmdistill") for chunk in chunks]
    assert said == [None] * (len(chunks) - 1) + [{"subnet": "largest", "exit_risk": 0.05, "exit_threshold": 0.5, "layers_per_token": 2.0, "num_layers": 4}]
    assert bool(json.loads(chunks[-1])["choices"]) != include_usage


def test_budgets_choose(ask) -> None:
    def chosen(**budget: Any) -> tuple[str, float]:
        made_by = ask(budget, max_tokens=10, prompt="a").json()["llmdistill"]
        return made_by["subnet"], made_by["exit_threshold"]

    assert chosen(subnet="smallest") == chosen(subnet="depth=1") == ("depth=1", 1.0)
    assert chosen(exit_risk=0) == ("largest", 1.0)
    assert chosen(max_latency_ms=200) == ("largest", 0.75)  # 110 ms alone
    assert chosen(max_latency_ms=50) == ("depth=1", 1.0)  # the exits of depth=1 are not calibrated, and the largest takes 80
    assert chosen(max_latency_ms=100) == ("largest", 0.5)
    assert chosen(max_latency_ms=200, exit_risk=0) == ("largest", 1.0)


@pytest.mark.parametrize(
    "budget, param, code",
    [
        ({"max_latency_ms": 1}, "llmdistill.max_latency_ms", "budget_too_small"),
        ({"max_latency_ms": 0}, "llmdistill.max_latency_ms", "invalid_value"),
        ({"max_latency_ms": "1"}, "llmdistill.max_latency_ms", "invalid_type"),
        ({"subnet": "depth=7"}, "llmdistill.subnet", "subnet_not_found"),
        ({"subnet": "smallest", "exit_risk": 0.1}, "llmdistill.subnet", "subnet_not_found"),
        ({"exit_risk": 1.5}, "llmdistill.exit_risk", "invalid_value"),
        ({"speed": 1}, "llmdistill.speed", "unknown_parameter"),
        ([], "llmdistill", "invalid_type"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_400(ask, budget: Any, param: str, code: str) -> None:
    response = ask(budget)
    assert (response.status_code, response.json()["error"]["param"], response.json()["error"]["code"]) == (400, param, code)


@pytest.mark.parametrize("stop", [None, ["いた"]])
def test_tokens_join_to_the_text(ask, url, http, stop) -> None:
    answer = ask({"tokens": True}, n=2, stop=stop).json()
    for choice, tokens in zip(answer["choices"], answer["llmdistill"]["tokens"], strict=True):
        assert "".join(token["text"] for token in tokens) == choice["text"] == (TEXT.partition("いた")[0] if stop else TEXT)
        assert {token["num_layers"] for token in tokens} == {3}
    assert len(answer["llmdistill"]["tokens"][0]) * 2 == answer["usage"]["completion_tokens"]
    prediction = http.post(f"{url}/v1/predict", json={"input": "abc", "rationale": True, "llmdistill": {"tokens": True}}).json()
    label, rationale = ("".join(token["text"] for token in tokens) for tokens in prediction["llmdistill"]["tokens"])
    assert (label, rationale.strip()) == (prediction["output"], prediction["rationale"])


def test_models_lists_the_points(url, http) -> None:
    points = http.get(f"{url}/v1/models").json()["data"][0]["llmdistill"]["points"]
    assert [(point["subnet"], point["exit_risk"]) for point in points] == [("largest", 0.0), ("largest", 0.01), ("largest", 0.05), ("depth=1", None)]
    assert points[3]["names"] == ["smallest"]
    assert points[0]["latency_ms"] == pytest.approx(170)


def test_under_load_the_server_moves_along_the_front_and_says_so(start_server, served_model, scripted_engine, tokenizers, http) -> None:
    tokenizer = tokenizers["byte_level"]
    model = served_model(tokenizer, scripted_engine(tokenizer.eos_token_id, step_seconds=0.001), causal=True, points=POINTS)
    running = start_server(model, ServeSettings(target_p95_ms=0.5))  # which no answer can keep
    body = {"model": "student", "prompt": ["abc"] * WINDOW, "temperature": 0}
    thresholds = [http.post(f"{running.url}/v1/completions", json=body).json()["llmdistill"]["exit_threshold"] for _ in range(4)]
    assert thresholds == [0.75, 0.5, 1.0, 1.0]
    assert http.post(f"{running.url}/v1/completions", json=body | {"llmdistill": {"exit_risk": 0.01}}).json()["llmdistill"]["exit_threshold"] == 0.75
    page = http.get(f"{running.url}/metrics").text.splitlines()
    for line in [
        "llmdistill_controller_position 2.0",
        "llmdistill_controller_steps 3.0",
        f'llmdistill_rows_at_point_total{{exit_risk="0.05",subnet="largest"}} {WINDOW}.0',
        f'llmdistill_rows_at_point_total{{exit_risk="0",subnet="depth=1"}} {2 * WINDOW}.0',
        f"llmdistill_layers_per_token_count {5 * WINDOW}.0",
        f"llmdistill_layers_per_token_sum {(3 + 2 + 4 + 4 + 3) * WINDOW}.0",
    ]:
        assert line in page, line


class Busy:
    """A scheduler with things to do."""

    num_active = 3

    def wait_seconds(self) -> float:
        return 0.5


def test_a_forecast_counts_the_wait_the_neighbours_and_usual_lengths() -> None:
    forecast: Any = Forecast(Busy(), 5)  # type: ignore[arg-type]
    assert forecast.latency_ms(LARGEST, [(8, 10)]) == pytest.approx(500 + 10 + 10 * (10 + 3))
    assert forecast.latency_ms(LARGEST, [(8, 10), (8, 2), (8, 2)]) == pytest.approx(500 + 10 + 10 * (10 + 4))
    for number in range(FEWEST - 1):
        forecast.saw("predict", number)
    assert forecast.length("predict", 32) == 32
    forecast.saw("predict", 40)
    assert forecast.length("predict", 32) == 32
    for _ in range(100):
        forecast.saw("predict", 5)
    assert forecast.length("predict", 32) == 5
    assert (forecast.length("predict", 3), forecast.length("", 3)) == (3, 3)


# ---- real checkpoints ----

SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "tie_word_embeddings": False, "decoder_start_token_id": 0},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": None,
    },
}


@pytest.fixture(scope="module", params=["t5", "llama"])
def elastic(request, tokenizers, tmp_path_factory) -> Path:
    """A tiny elastic checkpoint."""
    tokenizer = tokenizers["metaspace" if request.param == "t5" else "byte_level"]
    ids: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1} | SIZES[request.param]
    torch.manual_seed(0)
    model: Any = new_t5(T5Config(**ids)) if request.param == "t5" else LlamaForCausalLM(LlamaConfig(**ids))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    keep(model, Axes(ffn=(0.5,), heads=(0.5,), depth=(0.5,), width=(0.5,)).space(shape_of(model)))
    folder = tmp_path_factory.mktemp("elastic") / request.param
    save(model.eval(), tokenizer, folder, lineage=[], card="a test")
    return folder


def test_sub_networks_answer_side_by_side_as_their_extractions_do(elastic, start_server, http) -> None:
    settings = ServeSettings(max_batch_rows=8)
    served = load_served_model(elastic, settings=settings, device="cpu", precision=Precision.FLOAT32)
    url = start_server(served, settings).url
    model, tokenizer = load(elastic, dtype=torch.float32)
    space, prompt, names = space_of(model), "please cancel my order", ("largest", "smallest")
    prompt_tokens: Any = tokenizer(prompt)["input_ids"]
    expected = {}
    for name in names:
        tokens = Engine(extracted(model, parse(name, space)).eval()).generate([prompt_tokens], Decoding(max_new_tokens=12))[0].tokens
        expected[name] = str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
    assert len(set(expected.values())) == 2

    def ask(name: str) -> dict[str, Any]:
        body = {"model": elastic.name, "prompt": [prompt] * 3, "max_tokens": 12, "temperature": 0, "llmdistill": {"subnet": name}}
        return http.post(f"{url}/v1/completions", json=body).json()

    with ThreadPoolExecutor(8) as pool:
        for name, answer in zip(names * 4, pool.map(ask, names * 4), strict=True):
            assert {choice["text"].strip() for choice in answer["choices"]} == {expected[name]}
            num_layers = {"largest": 2, "smallest": 1}[name]
            assert (answer["llmdistill"]["num_layers"], answer["llmdistill"]["layers_per_token"]) == (num_layers, num_layers)
    assert [point.names for point in served.points.all] == [("largest", "chosen"), ("smallest",)]
    assert [point.weight_bytes for point in served.points.all] == [num_bytes(space, subnet) for subnet in (space.largest(), space.smallest())]


def test_a_front_names_the_sub_networks_and_their_accuracies(elastic, tmp_path) -> None:
    texts = {"largest": 0.5, "smallest": 0.75}
    found = {"chosen": "smallest", "points": [{"subnet": subnet, "measured_accuracy": accuracy} for subnet, accuracy in texts.items()]}
    (tmp_path / "search.json").write_text(json.dumps(found))
    options: dict[str, Any] = {"settings": ServeSettings(), "device": "cpu", "precision": Precision.FLOAT32, "front": str(tmp_path)}
    points = load_served_model(elastic, **options).points
    assert [(point.subnet, point.accuracy) for point in points.all] == [("smallest", 0.75), ("largest", 0.5)]
    assert points.front == points.all[:1]
    found["points"][0]["subnet"] = "decoder.depth=7"
    (tmp_path / "search.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is not of this checkpoint"):
        load_served_model(elastic, **options)


def test_a_front_for_a_checkpoint_that_is_not_elastic_is_refused(elastic, tmp_path) -> None:
    model, tokenizer = load(elastic)
    delattr(model.config, KEY)
    save(model, tokenizer, tmp_path / "plain", lineage=[], card="a test")
    with pytest.raises(ValueError, match="not elastic"):
        load_served_model(tmp_path / "plain", settings=ServeSettings(), device="cpu", precision=Precision.FLOAT32, front="search")
    [point] = load_served_model(tmp_path / "plain", settings=ServeSettings(), device="cpu", precision=Precision.FLOAT32).points.all
    assert (point.subnet, point.names, point.num_layers) == ("largest", (), 2)
    assert point.latency_ms > 0
    assert math.isfinite(point.latency_ms)
