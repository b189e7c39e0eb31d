"""The page at `/`: its headers, and what a person sees in a browser after a click."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser, needs_chromium

from llmdistill.decode.decoding import Token
from llmdistill.models.exit_settings import Point
from llmdistill.serve.pace import Pace
from llmdistill.serve.playground import PAGE
from llmdistill.serve.points import OperatingPoint, Points, with_exits
from llmdistill.serve.predict import TaskSection
from llmdistill.serve.settings import ServeSettings

SECTION = {"task": "tickets", "input_template": "{message}", "choices": ["cancel_order", "billing_problem"]}
SLOW, FAST = (Pace(beginning=0.0, per_prompt_token=0.0, per_step=ms / 1000, per_neighbour=0.0) for ms in (2, 0.5))
WHOLE = OperatingPoint(subnet="depth=4", names=("largest",), num_layers=4, weight_bytes=7_300_000, accuracy=0.79, pace=SLOW)
RISKS = [Point(delta=0.02, threshold=0.75, mean_loss=0.0, mean_layers=3.0), Point(delta=0.05, threshold=0.5, mean_loss=0.0, mean_layers=2.0)]
POINTS = Points([*with_exits(WHOLE, (FAST, 1.0), RISKS), replace(WHOLE, subnet="depth=1", names=("smallest",), accuracy=0.7, num_layers=1, pace=FAST)])
WIDE, PHONE = (1180, 860), (360, 740)


@pytest.fixture(scope="module")
def start(server_context, served_model, scripted_engine, tokenizers) -> Callable[..., Any]:
    """A server whose tokens leave at layers that take turns, up to the one that the threshold allows."""
    tokenizer = tokenizers["byte_level"]

    @dataclass
    class Taking(scripted_engine):
        def step(self) -> list[Token]:
            return [token._replace(num_layers=1 + token.token % token.num_layers) for token in super().step()]

    def make(**fields: Any) -> Any:
        model = served_model(tokenizer, lambda: Taking(tokenizer.eos_token_id), causal=True, name="tickets-student", **fields)
        return server_context(model, ServeSettings())

    return make


@pytest.fixture(scope="module")
def url(start) -> Iterator[str]:
    with start(points=POINTS, task=TaskSection.from_config({"llmdistill": SECTION}, is_encoder_decoder=False)) as running:
        yield running.url


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(window, url) -> Browser:
    window.resize(*WIDE)
    window.open(url)
    window.wait_for("document.body.dataset.ready")
    return window


def look(page: Browser, name: str) -> None:
    """Keeps a picture where someone wants to look at it."""
    if folder := os.environ.get("LLMDISTILL_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def answered(page: Browser, num_runs: int) -> None:
    page.wait_for(f"document.querySelectorAll('#history tr').length === {num_runs} && !document.getElementById('ask').disabled")


def test_the_page_may_run_its_own_script_and_style_and_nothing_else(url, http) -> None:
    response = http.get(f"{url}/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", policy["script-src"])
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?:|@import|url\(|innerHTML| on\w+=| style=", PAGE.read_text(encoding="utf-8"))


@needs_chromium
def test_a_click_shows_the_label_the_reason_and_each_tokens_layer(page) -> None:
    assert page.text("h1") == "tickets-student"
    assert page.text("#fields label") == "Message"
    page.type("textarea", "billing problem <b>")
    page.click("#ask")
    answered(page, 1)
    assert page.text("#label") == "billing_problem"
    label, rationale = page.run(
        "return [...document.querySelectorAll('.tokens')].map(row => [...row.children].map(token => token.firstChild.textContent).join(''))"
    )
    assert label == "predict: billing problem <b>\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    assert rationale == label.replace("predict", "explain")
    layers = page.run("return [...document.querySelectorAll('.tokens .token')].map(token => [Number(token.dataset.layers), token.style.background])")
    assert {number for number, _ in layers} == {1, 2, 3}
    assert len({colour for _, colour in layers}) == 3
    assert page.text("#figures").startswith("sub-network\nlargest\nlayers a token\n")
    assert page.errors() == []
    look(page, "wide")
    page.dark()
    look(page, "dark")
    page.resize(*PHONE)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "a phone must not have to scroll sideways"
    look(page, "phone")


@needs_chromium
def test_the_slider_moves_the_budget(page) -> None:
    page.type("textarea", "billing problem")
    assert page.text("#point b") == "The server chooses"
    seen = []
    page.click("#explain")
    for step in range(4):
        page.run(f"const slider = document.getElementById('slider'); slider.value = {step}; slider.dispatchEvent(new Event('input')); return 0")
        seen.append(page.text("#point b"))
        page.click("#ask")
        answered(page, step + 1)
        look(page, f"point{step}")
    assert seen == [f"Sub-network {which}" for which in ("smallest", "largest, exit risk 0.05", "largest, exit risk 0.02", "largest, full depth")]
    rows = page.run("return [...document.querySelectorAll('#history tr')].map(row => [...row.cells].slice(1, 3).map(cell => cell.textContent))")
    assert rows == [["largest", "0"], ["largest", "0.02"], ["largest", "0.05"], ["smallest", "0"]]
    assert page.run("return document.querySelectorAll('.tokens').length") == 1, "no reason was asked for"
    page.run("const slider = document.getElementById('slider'); slider.value = 0; slider.dispatchEvent(new Event('change')); return 0")
    answered(page, 5)  # who has asked before sees at once what a move does
    page.click("#free")
    assert page.text("#point b") == "The server chooses"
    page.click("#ask")
    answered(page, 6)
    assert page.run("return document.querySelector('#history tr').cells[2].textContent") == "0.02"
    assert page.errors() == []


@needs_chromium
def test_the_keyboard_is_enough(page) -> None:
    page.run("document.activeElement.blur(); return 0")
    assert [page.press("\ue004") for _ in range(5)] == ["TEXTAREA", "explain", "free", "slider", "ask"]  # Tab
    page.type("textarea", "billing problem\ue009\ue007")  # Ctrl+Enter
    answered(page, 1)


@needs_chromium
def test_a_refusal_is_shown(page) -> None:
    page.type("textarea", "a ")
    page.run("document.querySelector('textarea').value = 'x '.repeat(9000); return 0")
    page.click("#ask")
    page.wait_for("!document.getElementById('error').hidden")
    assert "longest prompt of this server is 2048 tokens" in page.text("#error")
    assert ["400 (Bad Request)" in error for error in page.errors()] == [True]


@needs_chromium
def test_a_model_without_a_task_writes_on(window, start) -> None:
    with start() as running:
        window.resize(*WIDE)
        window.open(running.url)
        window.wait_for("document.body.dataset.ready")
        window.type("textarea", "hello")
        window.click("#ask")
        answered(window, 1)
        assert window.run("return [...document.querySelectorAll('.tokens .token')].map(token => token.firstChild.textContent).join('')") == "hello"
        assert window.run("return document.getElementById('budget').hidden")
        assert window.errors() == []
