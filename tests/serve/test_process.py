"""The process that a server is: it says where it listens, drains on SIGTERM and ends with status 0."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

SCRIPT = """
import sys, time
from llmdistill.decode.decoding import Token
from llmdistill.serve.app import run_server
from llmdistill.serve.pace import Pace
from llmdistill.serve.points import OperatingPoint, Points
from llmdistill.serve.predict import TaskSection
from llmdistill.serve.served_model import ServedModel
from llmdistill.serve.settings import ServeSettings

class Tokenizer:
    chat_template = ""
    def __call__(self, text, **options):
        return {"input_ids": list(text.encode())}
    def decode(self, tokens, **options):
        return bytes(tokens).decode()

class Engine:
    row = -1
    def add(self, prompt, decoding):
        self.row, self.left = self.row + 1, decoding.max_new_tokens
        return self.row
    def step(self):
        time.sleep(float(sys.argv[1]))
        self.left -= 1
        return [Token(self.row, 97, not self.left, None if self.left else "length", 0.0, 2)]
    def drop(self, row):
        pass

task = TaskSection.from_config({}, is_encoder_decoder=True)
numbers = {"created": 1, "vocabulary_size": 256, "num_positions": 0}
points = Points([OperatingPoint(num_layers=2, weight_bytes=1, pace=Pace(beginning=0.0, per_prompt_token=0.0, per_step=0.001, per_neighbour=0.0))])
model = ServedModel(name="m", tokenizer=Tokenizer(), make_engine=Engine, points=points, answer_continues_prompt=False, task=task, **numbers)
assert "torch" not in sys.modules, "a server must not need torch before it has a model"
run_server(model, "127.0.0.1", 0, ServeSettings(drain_seconds=float(sys.argv[2])))
"""
BODY = {"model": "m", "prompt": "b", "max_tokens": 60, "stream": True}


@pytest.fixture
def start_process() -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    processes: list[subprocess.Popen] = []

    def start(step_seconds: float, drain_seconds: float) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", SCRIPT, str(step_seconds), str(drain_seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        line = process.stdout.readline() if process.stdout else ""
        assert line.startswith("serving m on http://127.0.0.1:"), line or process.communicate()[1]
        return process, line.split()[-1]

    yield start
    for process in processes:
        process.kill()
        _, errors = process.communicate()
        assert "Traceback" not in errors


def test_sigterm_finishes_what_runs_and_exits_0(start_process, http) -> None:
    process, url = start_process(0.01, 30)
    with http.stream("POST", f"{url}/v1/completions", json=BODY) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(60) == 0


def test_sigterm_while_idle_and_ctrl_c_exit_0(start_process) -> None:
    processes = [start_process(0, 30)[0] for _ in range(2)]
    processes[0].send_signal(signal.SIGTERM)
    processes[1].send_signal(signal.SIGINT)
    assert [process.wait(60) for process in processes] == [0, 0]


def test_the_limit_of_the_drain_holds_even_for_an_engine_that_never_returns(start_process, http) -> None:
    process, url = start_process(3600, 0.2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, f"{url}/v1/completions", json=BODY)
        while not http.get(f"{url}/health").json()["active_rows"]:
            pass
        process.send_signal(signal.SIGTERM)
        assert answer.result(60).status_code == 503
    assert process.wait(60) == 0
