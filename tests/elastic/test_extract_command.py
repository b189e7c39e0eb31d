"""`llmdistill extract`: what it takes out, what it says, and what it refuses, in processes of its own where that matters."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from elastic_models import AXES, elastic_model, logits

from llmdistill.cli import main
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.kept import keep, space_of
from llmdistill.models import checkpoint
from llmdistill.models.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic T5, its smallest sub-network chosen."""
    folder = tmp_path_factory.mktemp("models") / "elastic"
    model, space = elastic_model("t5 v1.1")
    keep(model, space, space.smallest())
    checkpoint.save(model, train_tokenizer(["some text"], 262, lower_case=False, ends_every_text=True), folder, lineage=[], card="# Elastic")
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said."""
    with pytest.raises(SystemExit) as end:
        main(["extract", *words])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def test_it_writes_the_sub_network_and_says_what_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["extract", str(folder), str(tmp_path / "new" / "small"), "--subnet", "smallest"])
    told = capsys.readouterr().out
    small, _ = checkpoint.load(tmp_path / "new" / "small")
    model, _ = checkpoint.load(folder)
    assert torch.equal(logits(small), logits(extracted(model, space_of(model).smallest())))
    numbers = [sum(parameter.numel() for parameter in one.parameters()) for one in (small, model)]
    assert f"parameters: {numbers[0]:,} of {numbers[1]:,}" in told
    assert "Stock transformers loads it." in told
    assert "sub-network: width=16,encoder.depth=2," in told
    assert json.loads((tmp_path / "new" / "small" / "lineage.json").read_text())[-1]["technique"] == "extract"

    main(["extract", str(folder), str(tmp_path / "uneven"), "--subnet", "encoder.ffn=8+16+32"])
    assert "It loads where llmdistill is imported" in capsys.readouterr().out


def test_without_a_sub_network_it_lists_what_there_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(tmp_path / "out")]):
        main(["extract", str(folder), *words])
        told = capsys.readouterr().out
        rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in told.splitlines() if line.startswith("  ")}
        assert rows == {"width": "16, 24, 32"} | {
            f"{stack}.{axis}": values for stack in ("encoder", "decoder") for axis, values in (("depth", "2, 3"), ("heads", "2, 4"), ("ffn", "8, 16, 32"))
        }
        assert "Chosen in this checkpoint: width=16,encoder.depth=2" in told
    assert not (tmp_path / "out").exists()


def test_ranks_and_even_spaces_are_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(["some text"], 262, lower_case=False, ends_every_text=True)
    for name, axes, expected in (("t5 low rank", AXES, "encoder.rank"), ("llama", replace(AXES, even=True), "the layers of each alike")):
        checkpoint.save(elastic_model(name, axes)[0], tokenizer, tmp_path / name, lineage=[], card="")
        main(["extract", str(tmp_path / name)])
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "subnet, message",
    [
        ("encoder.height=2", "'encoder.height=2' in 'encoder.height=2' is no choice of this checkpoint"),
        ("ffn=9", "encoder.ffn is 9: this checkpoint has 8, 16, 32"),
        ("width=two", "'width=two' has no whole numbers after the ="),
        ("width=16+32", "'width=16+32' has 2 values"),
        ("decoder.depth=2+3", "'decoder.depth=2+3' has 2 values"),
        ("decoder.depth=-1", "decoder.depth is -1: this checkpoint has 2, 3"),
        ("ffn=8+16", "encoder.ffn has 2 values for 3 layers: give one for all, or 3"),
        ("decoder.heads=2+4+4", "share one table of position biases"),
        ("rank=0.5", "encoder.rank is 0.5: this checkpoint has 1.0"),
    ],
)
def test_what_is_no_sub_network_is_told_in_one_line(subnet: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused([str(folder), str(tmp_path / "out"), "--subnet", subnet], capsys)
    assert not list(tmp_path.iterdir())


def test_folders_that_will_not_do_are_told_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, small = str(tmp_path / "out"), tmp_path / "small"
    assert "there is no such folder" in refused([str(tmp_path / "missing"), out, "--subnet", "smallest"], capsys)
    assert "it has no config.json" in refused([str(tmp_path), out], capsys)
    assert "name the folder to write" in refused([str(folder), "--subnet", "smallest"], capsys)
    assert f"{folder} exists already" in refused([str(folder), str(folder), "--subnet", "smallest"], capsys)
    main(["extract", str(folder), str(small), "--subnet", "smallest"])
    capsys.readouterr()
    assert f"{small} is not elastic" in refused([str(small), out, "--subnet", "smallest"], capsys)


def test_listing_needs_no_torch(folder: Path) -> None:
    script = f"""
import sys
from llmdistill.cli import main
main(["extract", {str(folder)!r}])
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "encoder.depth" in told.stdout
