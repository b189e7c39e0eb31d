"""Sub-networks trained together against the same shapes trained alone, and against the same shapes cut without training.

    llmdistill run quickstart
    python benchmarks/elastic.py

From the quickstart's label-only student, for each seed: it is made elastic (sorted, then trained as a sandwich, with the student as it was as the teacher), and
some of its sub-networks are extracted (together). The same sub-networks are extracted from the sorted student before elastic training (cut), and each of these
is then trained alone on the same rows for as many epochs, as the quickstart trains its student (alone). So all of them see as many examples, and the ones
trained alone have no other to share weights with, nor a teacher's logits.

Accuracy is that on the 412 test rows; what is said is each seed's mean over the shapes. Seconds are those of training, by this run or by the one that filled
the store. Everything is a stage, so that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import Checkpoint
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.strategy import Progressive, Sandwich
from llmdistill.losses.multitask import LabelOnly
from llmdistill.stages.distil import Distil
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.extract import Extract
from llmdistill.train_settings import Adafactor, Best, Epochs, Steps, TrainSettings

QUICKSTART = Path(__file__).parent.parent / "pipelines" / "quickstart.py"
AXES = Axes(ffn=(0.25, 0.5, 0.75), heads=(0.5, 0.75), depth=(0.5,), width=(0.5, 0.75), even=True)
SUBNETS = {
    "smallest": "smallest",
    "half": "width=64,encoder.depth=2,encoder.heads=4,encoder.ffn=128,decoder.depth=1,decoder.heads=4,decoder.ffn=128",
    "three quarters": "width=96,encoder.depth=2,encoder.heads=3,encoder.ffn=192,decoder.depth=2,decoder.heads=3,decoder.ffn=192",
    "shallow": "width=128,encoder.depth=1,encoder.heads=4,encoder.ffn=256,decoder.depth=1,decoder.heads=4,decoder.ffn=256",
}
STRATEGIES = {"sandwich": Sandwich(), "progressive": Progressive()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/store"), help="where the quickstart's stages are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=16)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=["sandwich"])
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    store = Store(arguments.store)
    by_name = {stage.name: stage for stage in Graph.above(load(QUICKSTART)()).stages}
    student = by_name["label_only"]
    assert isinstance(student, Distil)
    figures: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for strategy in arguments.strategies:
            figures.append({"seed": seed, "strategy": strategy} | one_seed(store, student, STRATEGIES[strategy], arguments.epochs, seed))
            tell(figures[-1])
    for strategy in arguments.strategies:
        ours = [one for one in figures if one["strategy"] == strategy]
        mean = {kind: statistics.mean(one["mean_accuracy"][kind] for one in ours) for kind in ours[0]["mean_accuracy"]}
        seconds = {kind: statistics.mean(one["seconds"][kind] for one in ours) for kind in ours[0]["seconds"]}
        print(
            f"{strategy}, {len(ours)} seeds: together {100 * mean['together']:.1f}%, alone {100 * mean['alone']:.1f}%, cut {100 * mean['cut']:.1f}%; "
            f"the whole {100 * mean['whole']:.1f}%. Training {len(SUBNETS)} alone takes {seconds['alone'] / seconds['together']:.2f} times as long as together"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def one_seed(store: Store, student: Distil, strategy: Sandwich | Progressive, epochs: float, seed: int) -> dict[str, Any]:
    """Accuracies by shape and kind, and seconds of training."""
    settings = TrainSettings(batch_size=32, duration=Epochs(epochs), learning_rate=1e-2, optimizer=Adafactor(), evaluate_every_steps=50)
    elastic = Elastic(
        name=f"elastic_{seed}",
        checkpoint=student,
        task=student.task,
        rationales=student.rationales,
        axes=AXES,
        strategy=strategy,
        loss=LabelOnly(),
        settings=settings,
        seed=seed,
    )
    untrained = replace(settings, duration=Steps(1), learning_rate=1e-12, best=Best.LAST)  # one step that moves no weight by more than its rounding
    sorted_only = replace(elastic, name=f"sorted_{seed}", strategy=Sandwich(), settings=untrained)
    accuracy: dict[str, dict[str, float]] = {}
    parameters: dict[str, int] = {}
    seconds = {"together": seconds_of(store, elastic), "alone": 0.0}
    for shape, text in SUBNETS.items():
        together, cut = (Extract(name=f"{one.name}_{shape}", checkpoint=one, subnet=text) for one in (elastic, sorted_only))
        alone = Distil(
            name=f"alone_{seed}_{shape}",
            task=student.task,
            rationales=student.rationales,
            student=cut,
            loss=LabelOnly(),
            settings=settings,
            seed=seed,
        )
        accuracy[shape] = {kind: evaluated(store, student, one) for kind, one in (("together", together), ("alone", alone), ("cut", cut))}
        parameters[shape] = int(store.artifact(cut).manifest()["figures"]["parameters"])
        seconds["alone"] += seconds_of(store, alone)
    mean = {kind: statistics.mean(of_shape[kind] for of_shape in accuracy.values()) for kind in ("together", "alone", "cut")}
    return {"accuracy": accuracy, "parameters": parameters, "mean_accuracy": mean | {"whole": evaluated(store, student, elastic)}, "seconds": seconds}


def evaluated(store: Store, student: Distil, checkpoint: Stage[Checkpoint]) -> float:
    """Accuracy on the test rows."""
    evaluate = Evaluate(name=f"evaluate_{checkpoint.name}", checkpoint=checkpoint, task=student.task, latency_repeats=1, num_sample_rows=0)
    return float(store.build(evaluate).summary()["accuracy"])


def seconds_of(store: Store, stage: Stage[Checkpoint]) -> float:
    """Of its training."""
    return float(store.build(stage).manifest()["figures"]["training_seconds"])


def tell(figures: dict[str, Any]) -> None:
    print(f"seed {figures['seed']}, {figures['strategy']}")
    for shape, by_kind in figures["accuracy"].items():
        told = ", ".join(f"{kind} {100 * value:.1f}%" for kind, value in by_kind.items())
        print(f"  {shape:16} {figures['parameters'][shape]:9,} parameters  {told}", flush=True)


if __name__ == "__main__":
    main()
