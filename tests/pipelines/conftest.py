"""What the shipped pipelines are run with here: their options in this process, a folder in SVAMP's form, and tiny models with tokenizers of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmdistill.core import options
from llmdistill.core.artifacts import Artifact, Report
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.evaluate_baseline import EvaluateBaseline

PIPELINES = Path(__file__).parents[2] / "pipelines"


@dataclass(frozen=True)
class Run:
    """A pipeline with options, as the command line reads them, built in this process."""

    graph: Graph
    store: Store

    def stage(self, name: str) -> Stage[Artifact]:
        """One stage by its name."""
        return next(stage for stage in self.graph.stages if stage.name == name)

    def names(self) -> list[str]:
        """Of all stages, in order."""
        return [stage.name for stage in self.graph.stages]

    def report(self) -> Report:
        """Everything built."""
        report = self.store.build(self.graph.last)
        assert isinstance(report, Report)
        return report


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Run]:
    """`start("svamp", "--data", ...)`."""

    def start_run(name: str, *words: str) -> Run:
        pipeline = load(PIPELINES / f"{name}.py")
        _, chosen = options.read(pipeline, list(words), name)
        return Run(Graph.above(pipeline(**chosen)), Store(tmp_path / "store"))

    return start_run


@pytest.fixture
def svamp_folder(tmp_path: Path) -> Path:
    """30 train and 10 test problems in SVAMP's form, and completions: every fifth is wrong, and of the first test answer the brackets hold only half."""
    folder = tmp_path / "svamp"
    (folder / "llm").mkdir(parents=True)
    for split, first, num in (("train", 100, 30), ("test", 501, 10)):
        rows = [{"input": f"Ann has {a} apples and Bob {a * 7}.\nHow many are there?", "label": f"( {a}.0 + {a * 7}.0 )"} for a in range(first, first + num)]
        (folder / f"svamp_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        completions = [
            f"Ann has {a}, Bob {a * 7}. The answer is ({a} {'-' if a % 5 == 0 else '+'} {a * 7}).\n\nQ: And {a + 1}?\nA: One. The answer is (1)."
            for a in range(first, first + num)
        ]
        if split == "test":
            completions[0] = "Ann has 501, Bob 3507. The answer is (500 + 1) + 3507.\n\nQ: Next?"
        (folder / "llm" / f"{split}_CoT_0.json").write_text(json.dumps(completions))
    return folder


@pytest.fixture(autouse=True)
def _quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is not what is tested here: two repeats of a few tokens are enough."""
    quick = {"latency_repeats": 2, "max_new_tokens": 12, "max_rationale_tokens": 12}
    for stage in (Evaluate, EvaluateBaseline):
        defaults = stage.__init__.__kwdefaults__
        assert defaults is not None
        for name in quick.keys() & defaults.keys():
            monkeypatch.setitem(defaults, name, quick[name])
