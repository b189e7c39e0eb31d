"""`llmdistill export`: what it writes, and what it says of what cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dense_models import random_model, write

from llmdistill.cli import main
from llmdistill.core.artifacts import RationaleRow
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.resized import resize
from llmdistill.teach.rationale_files import export_rationales, read_rationale_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama."""
    return write(random_model("llama"), tmp_path_factory.mktemp("models") / "llama")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said."""
    with pytest.raises(SystemExit) as end:
        main(["export", *words])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def with_config(folder: Path, out: Path, **values: Any) -> Path:
    """A checkpoint of which only the config is there, with these values: nothing else is read before it is refused."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | values))
    return out


@pytest.mark.parametrize("name, to", [("student.gguf", "gguf:Q8_0"), ("student", "ctranslate2:INT8")])
def test_a_checkpoint_is_written(name: str, to: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / name
    left = out.with_name(out.name + ".partial")  # by a run that was killed
    left.mkdir(parents=True)
    main(["export", str(folder), str(out), "--to", to])
    assert capsys.readouterr().out.endswith(f"{out}\n")
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert f"{out} exists already" in refused([str(folder), str(out), "--to", to], capsys)


def test_rationales_are_written_as_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = RationaleRow(id="1", split="train", input="a", label="b", rationale="c", gold="b", confidence=1.0)
    stage = tmp_path / "runs" / "mine" / "latest" / "annotate"
    export_rationales([row], stage / "rationales.jsonl")
    monkeypatch.setenv("LLMDISTILL_RUNS", str(tmp_path / "runs"))
    main(["export", "mine", str(tmp_path / "mine.parquet"), "--to", "rationales"])
    assert capsys.readouterr().out == f"{tmp_path / 'mine.parquet'}\n"
    assert [values["label"] for _, values in read_rationale_file(tmp_path / "mine.parquet")] == ["b"]
    assert "neither a folder nor a finished pipeline 'mine' has a config.json" in refused(["mine", "out", "--to", "ctranslate2"], capsys)


@pytest.mark.parametrize("to, program", [("ctranslate2", "CTranslate2"), ("gguf", "GGUF")])
@pytest.mark.parametrize(
    "values, message",
    [
        ({"structure": {"a": {"kind": "low_rank"}, "b": {"kind": "int4"}, "c": {"kind": "int4"}}}, "llmdistill's own (2 int4, 1 low_rank): export"),
        ({"sizes": {"decoder": {}}}, "sizes that no stock config can say: extract a sub-network whose layers are alike"),
        ({"elastic": {"space": {}}}, "it is elastic: take out a sub-network with `llmdistill extract`"),
        ({"exits": {"layers": [1]}}, "early exits, which would stay behind: write ?leave_exits=true"),
        ({"model_type": "mamba"}, "it is of type 'mamba', and what can be written is"),
        ({"elastic": {"space": {}}, "exits": {"layers": [1]}}, "and export that; and it has early exits"),
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(
    to: str, program: str, values: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused([str(with_config(folder, tmp_path / "x", **values)), str(tmp_path / "out.gguf"), "--to", to], capsys)
    assert f"{tmp_path / 'x'} cannot be exported to {program}: " in told
    assert message in told


def test_a_t5_is_no_gguf(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5 = with_config(folder, tmp_path / "x", model_type="llmdistill_t5")
    assert "it is of type 't5', and what can be written is llama, qwen2" in refused([str(t5), str(tmp_path / "out.gguf"), "--to", "gguf"], capsys)


def test_checkpoints_of_ours_are_refused_by_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model("llama")
    model.model.layers[0].mlp.up_proj = LowRankLinear(64, 96, 8, bias=False)
    write(model, tmp_path / "low")
    assert "(1 low_rank)" in refused([str(tmp_path / "low"), "out", "--to", "ctranslate2"], capsys)
    model = random_model("llama")
    resize(model, {"decoder": {"heads": [4, 2], "ffn_widths": [96, 40]}})
    write(model, tmp_path / "uneven")
    assert "sizes that no stock config can say" in refused([str(tmp_path / "uneven"), "out", "--to", "ctranslate2"], capsys)


def test_a_refusal_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from llmdistill.cli import main
try:
    main(["export", {str(folder)!r}, {str(folder)!r}, "--to", "ctranslate2"])
except SystemExit as end:
    assert end.code == 2
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
