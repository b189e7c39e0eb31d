"""Sub-networks trained together against the same shapes trained alone, and against the same shapes cut without training.

    llmdistill run quickstart
    python benchmarks/elastic.py
    python benchmarks/elastic.py --student 't5:midi?lower_case=true' --epochs 8 --shapes smallest half three-quarters

From the quickstart's label-only student, for each seed: it is made elastic (sorted, then trained as a sandwich, with the student as it was as the teacher), and
some of its sub-networks are extracted (together). The same sub-networks are extracted from the sorted student before elastic training (cut), and each of these
is then trained alone on the same rows for as many epochs, as the quickstart trains its student (alone). So all of them see as many examples, and the ones
trained alone have no other to share weights with, nor a teacher's logits. With `--logits` they are trained once more, as sub-networks are: with the logits of
the whole student as it was, and without dropout (taught).

`--student` takes another student of the pipeline's kinds. The line above is for one of 11.5 million parameters, of which a step takes six times as long; that
is why its epochs and shapes are fewer.

Every training ends with its last weights. The loss of validation rows is least after one or two epochs on labels alone, when accuracy still rises: with
`--best LOSS` the shapes trained alone are kept from there.

Accuracy is that on the 412 test rows; what is said is each seed's mean over the shapes. Cost is CPU time of training, since a clock says little where others
run too. Everything is a stage, so that a killed run goes on where it was, and what another run has trained is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taught_by_logits import TaughtByLogits

from llmdistill.core.artifacts import Checkpoint, read_json
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.spec import kinds_of, parse
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.strategy import Progressive, Sandwich
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.student import ScratchT5, Student
from llmdistill.stages.distil import Distil
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.extract import Extract
from llmdistill.train_settings import Adafactor, Best, Epochs, Steps, TrainSettings

QUICKSTART = Path(__file__).parent.parent / "pipelines" / "quickstart.py"
AXES = Axes(ffn=(0.25, 0.5, 0.75), heads=(0.5, 0.75), depth=(0.5,), width=(0.5, 0.75), even=True)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A sub-network as fractions of the student."""

    width: float = 1.0
    encoder_depth: float = 1.0
    decoder_depth: float = 1.0
    heads: float = 1.0
    ffn: float = 1.0

    def of(self, config: Mapping[str, Any]) -> str:
        """As elastic/choice.py reads it, for the T5 of this config.json."""
        each = f"heads={config['num_heads'] * self.heads:.0f},{{stack}}.ffn={config['d_ff'] * self.ffn:.0f}"
        parts = [f"width={config['d_model'] * self.width:.0f}"]
        for stack, depth in (("encoder", config["num_layers"] * self.encoder_depth), ("decoder", config["num_decoder_layers"] * self.decoder_depth)):
            parts.append(f"{stack}.depth={depth:.0f},{stack}.{each.format(stack=stack)}")
        return ",".join(parts)


SHAPES = {
    "smallest": Shape(width=0.5, encoder_depth=0.5, decoder_depth=0.5, heads=0.5, ffn=0.25),
    "half": Shape(width=0.5, decoder_depth=0.5, ffn=0.5),
    "three-quarters": Shape(width=0.75, heads=0.75, ffn=0.75),
    "shallow": Shape(encoder_depth=0.5, decoder_depth=0.5),
}
STRATEGIES = {"sandwich": Sandwich(), "progressive": Progressive()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/store"), help="where the quickstart's stages are")
    parser.add_argument("--student", type=student_option, default=ScratchT5(lower_case=True), help="a T5, as the quickstart takes it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=16)
    parser.add_argument("--best", choices=["LOSS", "LAST"], default="LAST", help="which weights are kept of every training")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--logits", action="store_true", help="train each shape with the whole's logits too")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=["sandwich"])
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    store = Store(arguments.store)
    by_name = {stage.name: stage for stage in Graph.above(load(QUICKSTART)(student=arguments.student)).stages}
    student = by_name["label_only"]
    assert isinstance(student, Distil)
    shapes = {name: SHAPES[name] for name in arguments.shapes}
    settings = TrainSettings(
        batch_size=32,
        duration=Epochs(arguments.epochs),
        learning_rate=1e-2,
        optimizer=Adafactor(),
        evaluate_every_steps=50,
        best=Best[arguments.best],
    )
    figures: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for strategy in arguments.strategies:
            one = one_seed(store, student, STRATEGIES[strategy], shapes, settings, seed, with_logits=arguments.logits)
            figures.append({"seed": seed, "strategy": strategy} | one)
            tell(figures[-1])
    for strategy in arguments.strategies:
        ours = [one for one in figures if one["strategy"] == strategy]
        mean = {kind: statistics.mean(one["mean_accuracy"][kind] for one in ours) for kind in ours[0]["mean_accuracy"]}
        seconds = {kind: statistics.mean(one["cpu_seconds"][kind] for one in ours) for kind in ours[0]["cpu_seconds"]}
        print(f"{strategy}, {len(ours)} seeds: " + ", ".join(f"{kind} {100 * accuracy:.1f}%" for kind, accuracy in mean.items()))
        for kind in [kind for kind in seconds if kind != "together"]:
            print(f"  CPU time of training {len(shapes)} {kind}: {seconds[kind] / seconds['together']:.2f} times that of all sub-networks together")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def student_option(text: str) -> Student:
    """A student as it is written on the command line of a pipeline."""
    return parse(text, kinds_of(Student))


def one_seed(
    store: Store, student: Distil, strategy: Sandwich | Progressive, shapes: Mapping[str, Shape], settings: TrainSettings, seed: int, *, with_logits: bool
) -> dict[str, Any]:
    """Accuracies by shape and kind, and CPU seconds of training."""
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
    config = read_json(store.build(student).folder / "config.json")
    seconds: dict[str, float] = defaultdict(float, together=cpu_seconds(store, elastic))
    accuracy: dict[str, dict[str, float]] = {}
    parameters: dict[str, int] = {}
    for name, shape in shapes.items():
        together, cut = (Extract(name=f"{one.name}_{name}", checkpoint=one, subnet=shape.of(config)) for one in (elastic, sorted_only))
        trained = {"alone": alone(elastic, student, cut, f"{seed}_{name}")} | ({"taught": taught(elastic, cut, f"{seed}_{name}")} if with_logits else {})
        accuracy[name] = {kind: evaluated(store, student, one) for kind, one in ({"together": together, "cut": cut} | trained).items()}
        parameters[name] = int(store.artifact(cut).manifest()["figures"]["parameters"])
        for kind, stage in trained.items():
            seconds[kind] += cpu_seconds(store, stage)
    mean = {kind: statistics.mean(of_shape[kind] for of_shape in accuracy.values()) for kind in ("cut", *seconds)}
    return {"accuracy": accuracy, "parameters": parameters, "mean_accuracy": mean | {"whole": evaluated(store, student, elastic)}, "cpu_seconds": dict(seconds)}


def alone(elastic: Elastic, student: Distil, cut: Extract, name: str) -> Stage[Checkpoint]:
    """As the quickstart trains its student."""
    return Distil(
        name=f"alone_{name}",
        task=student.task,
        rationales=student.rationales,
        student=cut,
        loss=LabelOnly(),
        settings=elastic.settings,
        seed=elastic.seed,
    )


def taught(elastic: Elastic, cut: Extract, name: str) -> Stage[Checkpoint]:
    """As the elastic student trains its sub-networks."""
    return TaughtByLogits(
        name=f"taught_{name}",
        student=cut,
        teacher=elastic.checkpoint,
        rationales=elastic.rationales,
        settings=elastic.settings,
        hard_weight=elastic.hard_weight,
        kl_weight=elastic.kl_weight,
        temperature=elastic.temperature,
        dropout=elastic.dropout,
        max_input_tokens=elastic.max_input_tokens,
        max_target_tokens=elastic.max_target_tokens,
        seed=elastic.seed,
    )


def evaluated(store: Store, student: Distil, checkpoint: Stage[Checkpoint]) -> float:
    """Accuracy on the test rows."""
    evaluate = Evaluate(name=f"evaluate_{checkpoint.name}", checkpoint=checkpoint, task=student.task, latency_repeats=1, num_sample_rows=0)
    return float(store.build(evaluate).summary()["accuracy"])


def cpu_seconds(store: Store, stage: Stage[Checkpoint]) -> float:
    """Of its training."""
    return float(store.build(stage).manifest()["figures"]["training_cpu_seconds"])


def tell(figures: dict[str, Any]) -> None:
    print(f"seed {figures['seed']}, {figures['strategy']}")
    for shape, by_kind in figures["accuracy"].items():
        told = ", ".join(f"{kind} {100 * value:.1f}%" for kind, value in by_kind.items())
        print(f"  {shape:16} {figures['parameters'][shape]:9,} parameters  {told}", flush=True)


if __name__ == "__main__":
    main()
