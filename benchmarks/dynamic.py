"""What students that decide what to compute save: every technique in one table at the quality of the plain student, wall clock first.

    llmdistill run quickstart
    python benchmarks/dynamic.py

Students, each trained on the quickstart's rationales: the quickstart's own (2 + 2 layers of width 128) and `deep` (12 + 12 layers). Each technique is trained
from it at several settings, with the student as it was as the teacher and with its dropout. `deep` takes ten times as long to train: give it fewer epochs.

    skip layers         gates at whole layers, straight-through (SkipNet), at several weights of what is computed
    + REINFORCE         the last of these, refined
    skip feed-forwards  gates at feed-forwards
    gate channels       groups of neurons, token by token (feature boosting and suppression)
    early exits         exits between decoder layers, calibrated on the validation rows; and drafts of the model by itself, verified at full depth

Every setting is a row of the table, marked where its accuracy on the 412 test rows is more than --margin below the plain student's (the validation rows will
not do to choose by: the plain student's weights were chosen there). Wall clock is that of whole answers at batch 1 and 8 (encoder, decoder, the tokens that the
student itself says), as a share of the plain student's: all sides take the same rows in turn, in one process, medians of repeats. Beside it in brackets is
processor time, which other work on the machine does not lengthen. Work is the share of multiplications with weights (losses/work.py) on the validation rows,
layers those that a decoder token goes through; exits are counted in layers alone.

The second part is time alone: a T5 of T5-small's shape with random weights, and random gates that are open for about given shares of the tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5Config

from llmdistill.core.artifacts import Checkpoint
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.decode.decoding import Decoding, Generated
from llmdistill.decode.engine import Engine
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.skipped_feed_forward import SkippedFeedForward
from llmdistill.models.skipped_layer import SkippedLayer, replace_layers
from llmdistill.models.skipping import Skipping, skipped
from llmdistill.models.student import ScratchT5, T5Size
from llmdistill.models.t5 import new_t5
from llmdistill.stages.answering import PREDICT, Answering
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.distil import Distil
from llmdistill.stages.exits import TrainExits
from llmdistill.stages.skip import GateChannels, RefineSkips, SkipLayers, Unit
from llmdistill.train_settings import Adafactor, Best, Epochs, TrainSettings

QUICKSTART = Path(__file__).parent.parent / "pipelines" / "quickstart.py"
PLAIN, SKIP, REFINED = "plain", "skip layers", "+ REINFORCE"
BATCH_SIZES = (1, 8)
BOTH = ("encoder", "decoder")


@dataclass(frozen=True)
class Setting:
    """One student, and how it is decoded."""

    name: str
    stage: Stage[Checkpoint]
    decoding: Mapping[str, Any] = field(default_factory=dict)


def techniques(student: Distil, epochs: float, weights: Sequence[float]) -> dict[str, tuple[Setting, ...]]:
    """The settings of each technique but REINFORCE, which begins from one of them."""
    settings = TrainSettings(batch_size=32, duration=Epochs(epochs), learning_rate=1e-2, optimizer=Adafactor(), evaluate_every_steps=100, best=Best.LAST)
    common: Any = {"checkpoint": student, "task": student.task, "rationales": student.rationales, "loss": LabelOnly(), "seed": student.seed}
    trained: Any = common | {"settings": settings, "temperature": 2.0, "dropout": True}

    def skip(unit: Unit, weight: float) -> Setting:
        name = f"weight {weight:g}"
        return Setting(name, SkipLayers(name=f"{student.name} skips {unit.name} {weight:g}", unit=unit, compute_weight=weight, **trained))

    def gate(kept: int) -> Setting:
        return Setting(f"{kept} of 8 groups", GateChannels(name=f"{student.name} keeps {kept} of 8", groups=8, kept=kept, **trained))

    short = TrainSettings(batch_size=32, duration=Epochs(6), learning_rate=3e-3, evaluate_every_steps=25)
    exits = TrainExits(name=f"{student.name} exits", settings=short, **common)
    calibrated = CalibrateExits(name=f"{student.name} calibrated", checkpoint=exits, task=student.task, deltas=(0.02,), seed=student.seed)
    drafts = {"exit_threshold": 1.0, "draft_tokens": 3, "draft_exit": 0}
    return {
        PLAIN: (Setting("", student),),
        SKIP: tuple(skip(Unit.LAYER, weight) for weight in weights),
        "skip feed-forwards": tuple(skip(Unit.FEED_FORWARD, weight) for weight in weights),
        "gate channels": tuple(gate(kept) for kept in (2, 4)),
        "early exits": (Setting("delta 0.02", calibrated),),
        "drafts": (Setting("3 from the first exit", calibrated, drafts),),
    }


def refined(student: Distil, skipping: Setting, epochs: float) -> Setting:
    """The same compute weight, judged by what is drawn."""
    assert isinstance(skipping.stage, SkipLayers)
    settings = TrainSettings(batch_size=32, duration=Epochs(epochs / 2), learning_rate=3e-3, optimizer=Adafactor(), evaluate_every_steps=100, best=Best.LAST)
    stage = RefineSkips(
        name=f"{skipping.stage.name} refined",
        checkpoint=skipping.stage,
        teacher=student,
        task=student.task,
        rationales=student.rationales,
        loss=LabelOnly(),
        compute_weight=skipping.stage.compute_weight,
        temperature=2.0,
        dropout=True,
        settings=settings,
        seed=student.seed,
    )
    return Setting(skipping.name, stage)


class Side:
    """A setting that is built: it answers, and is measured."""

    def __init__(self, store: Store, setting: Setting, student: Distil) -> None:
        artifact = store.build(setting.stage)
        self.setting, self.task = setting, student.task
        self.figures = artifact.manifest()["figures"]
        self.answering = Answering.load(artifact.folder, device="cpu")
        self.engine = Engine(self.answering.model, max_batch_rows=32)
        longest = self.answering.model.config.llmdistill["max_new_tokens"][PREDICT]  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        self.decoding = Decoding(max_new_tokens=longest, **setting.decoding)
        self.rows = {split: [row for row in student.task.rows() if row.split == split] for split in ("validation", "test")}
        self.answers = {split: self.engine.generate(self.prompts(split), self.decoding) for split in self.rows}

    def prompts(self, split: str) -> list[list[int]]:
        return self.answering.tokens(PREDICT, [self.task.text(row) for row in self.rows[split]])

    def accuracy(self, split: str) -> float:
        rows, answers = self.rows[split], self.answers[split]
        return sum(self.task.is_correct(row, self.answering.decoded(answer)) for row, answer in zip(rows, answers, strict=True)) / len(rows)

    @property
    def work(self) -> float:
        """Of the plain student's multiplications; early exits are counted by layers alone."""
        return float(self.figures.get("share_model", 1.0))

    @property
    def layers(self) -> float:
        """Of the decoder, that a token goes through."""
        layers = [number for answer in self.answers["validation"] for number in answer.layers]
        share = self.figures.get("share_decoder", 1.0) if any(isinstance(module, SkippedLayer) for module in skipped(self.answering.model).values()) else 1.0
        return float(share) * statistics.mean(layers)


@dataclass(frozen=True)
class Clock:
    """Median seconds of one piece of work, as they pass and of the processor."""

    wall: float
    processor: float

    def share_of(self, other: Clock) -> dict[str, float]:
        """Of another's time."""
        return {"wall": self.wall / other.wall, "processor": self.processor / other.processor}


def interleaved(work: Mapping[str, Callable[[int], object]], repeats: int) -> dict[str, Clock]:
    """All do number n before any does number n + 1, the first to go by turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    names = list(work)
    for number in range(-1, repeats):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            start, start_processor = time.perf_counter(), time.process_time()
            work[name](max(number, 0))
            if number >= 0:
                seconds[name].append((time.perf_counter() - start, time.process_time() - start_processor))
    return {name: Clock(*(statistics.median(of_kind) for of_kind in zip(*of_name, strict=True))) for name, of_name in seconds.items()}


def wall_clock(sides: Mapping[str, Side], size: int, repeats: int) -> dict[str, Clock]:
    """Of whole answers of so many rows at once."""
    prompts = {name: side.prompts("test") for name, side in sides.items()}

    def answer(name: str, number: int) -> list[Generated]:
        of_side = prompts[name]
        batch = [of_side[(number * size + place) % len(of_side)] for place in range(size)]
        return sides[name].engine.generate(batch, sides[name].decoding)

    return interleaved({name: partial(answer, name) for name in sides}, repeats)


def table(store: Store, student: Distil, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting, measured beside the others."""
    settings = techniques(student, arguments.epochs, arguments.weights)
    settings[REFINED] = (refined(student, settings[SKIP][-1], arguments.epochs),)
    asked = [technique for technique in settings if technique in (PLAIN, *arguments.techniques)]
    sides = {f"{technique} {setting.name}".strip(): Side(store, setting, student) for technique in asked for setting in settings[technique]}
    clocks = {size: wall_clock(sides, size, max(8, arguments.repeats // size)) for size in BATCH_SIZES}
    least = sides[PLAIN].accuracy("test") - arguments.margin
    rows = []
    for name, side in sides.items():
        row: dict[str, Any] = {"side": name, "work": side.work, "decoder_layers": side.layers}
        row |= {f"accuracy_{split}": side.accuracy(split) for split in side.rows}
        row |= {f"wall_clock_batch_{size}": clock[name].share_of(clock[PLAIN]) for size, clock in clocks.items()}
        row |= {f"milliseconds_batch_{size}": 1000 * clock[name].wall for size, clock in clocks.items()}
        rows.append(row)
        times = ", ".join(f"{told(row[f'wall_clock_batch_{size}'])} at batch {size}" for size in BATCH_SIZES)
        print(
            f"  {name:32} wall clock {times} ({row['milliseconds_batch_1']:.1f} ms), {side.layers:5.2f} layers, work {side.work:.2f}, "
            f"accuracy {100 * row['accuracy_test']:.1f}%{'' if side.accuracy('test') >= least else ' (less)'}",
            flush=True,
        )
    return rows


def told(share: Mapping[str, float]) -> str:
    """As it passes, and of the processor."""
    return f"{share['wall']:.2f} ({share['processor']:.2f})"


def t5_small() -> Any:
    """6 + 6 layers of width 512, 2048 neurons, vocabulary 32128."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "vocab_size": 32128}
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    return new_t5(T5Config(**shape, **ids)).eval()


def open_for(modules: Sequence[Skipping], share: float) -> None:
    """Gates that are open for about so many tokens."""
    for module in modules:
        nn.init.normal_(module.gate.weight, std=module.width**-0.5)
        nn.init.zeros_(module.gate.bias)
        spread = (module.gate.weight[1] - module.gate.weight[0]).detach().norm()  # of the logits of normed inputs
        module.gate.bias.data[1] = 1e9 if share == 1 else float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share)) * spread)


def at_size(repeats: int) -> dict[str, Any]:
    """Wall clock of the shape alone, by how much is open."""
    models: dict[str, Any] = {PLAIN: t5_small()}
    for share in (1.0, 0.5, 0.25):
        for name, replaced in (("layers", replace_layers), ("feed-forwards", partial(replace_feed_forwards, kind=SkippedFeedForward))):
            model = copy.deepcopy(models[PLAIN])
            open_for(replaced(model, stack_names=BOTH), share)
            models[f"{name}, {share:g} open"] = model
    for kept in (2, 4):
        model = copy.deepcopy(models[PLAIN])
        for module in replace_feed_forwards(model, partial(ChannelGatedFeedForward, groups=8, kept=kept), BOTH):
            nn.init.normal_(module.saliency.weight, std=0.1 * module.width**-0.5)
        models[f"channels, {kept} of 8"] = model
    figures: dict[str, Any] = {}
    for size in BATCH_SIZES:
        prompts = torch.randint(2, 32000, (size, 32), generator=torch.Generator().manual_seed(1)).tolist()
        engines = {name: Engine(model, max_batch_rows=size) for name, model in models.items()}
        work = {name: partial(_generate, engine, prompts) for name, engine in engines.items()}
        seconds = interleaved(work, max(5, repeats // (4 * size)))
        figures[f"batch_{size}"] = {name: one.share_of(seconds[PLAIN]) for name, one in seconds.items()}
        shares = "; ".join(f"{name} {told(share)}" for name, share in figures[f"batch_{size}"].items() if name != PLAIN)
        print(f"  batch {size} (plain {1000 * seconds[PLAIN].wall:.1f} ms): {shares}", flush=True)
    return figures


def _generate(engine: Engine, prompts: list[list[int]], _: int) -> list[Generated]:
    return engine.generate(prompts, Decoding(max_new_tokens=8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/store"), help="where the quickstart's stages are")
    parser.add_argument("--students", nargs="*", default=["quickstart", "deep"], choices=["quickstart", "deep"])
    names = [SKIP, REFINED, "skip feed-forwards", "gate channels", "early exits", "drafts"]
    parser.add_argument("--techniques", nargs="*", default=names, choices=names)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.02, 0.05], help="of what is computed, in the losses of skipping")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--margin", type=float, default=0.01, help="how much less accurate on the test rows still is of equal quality")
    parser.add_argument("--repeats", type=int, default=200, help="answers at batch 1; fewer batches of more")
    parser.add_argument("--no-size", action="store_true", help="leave the second part out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    store = Store(arguments.store)
    student = next(stage for stage in Graph.above(load(QUICKSTART)()).stages if stage.name == "label_only")
    assert isinstance(student, Distil)
    students = {"quickstart": student, "deep": replace(student, name="deep", student=ScratchT5(size=T5Size.DEEP, lower_case=True))}
    figures: dict[str, Any] = {}
    for name in arguments.students:
        print(name, flush=True)
        figures[name] = table(store, students[name], arguments)
    if not arguments.no_size:
        print("T5-small's shape, random weights: wall clock as a share of plain", flush=True)
        figures["t5_small"] = at_size(arguments.repeats)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
