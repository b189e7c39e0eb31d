"""SearchSubnets: which sub-networks of an elastic checkpoint are worth having on this machine.

    SearchSubnets(checkpoint=elastic, task=task, rationales=rationales, limits=(Limit(cost="latency_ms_batch_1", most=20.0),))

Some sub-networks are measured: accuracy on validation rows and latency by the decode engine. A predictor of accuracy (elastic/accuracy_predictor.py) and a
latency table (elastic/latency_table.py) are fitted to them, and say what they do on those that they did not see. The searches then ask about as many as they
like, and the best that they find are measured in truth: what is chosen is chosen by measurement. With limits it is the most accurate within them; without,
the cheapest that is nearly as accurate as the best.

Files: search.json (see `FoundSubnets`), predictors.json (the fitted ones), samples.jsonl (what they were fitted to; a killed build goes on from it). Latencies
are of the machine that built it.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from llmdistill.core.artifacts import SEARCH, Checkpoint, FoundSubnets, RationaleRow, Rationales, read_json_lines
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.elastic.choice import Subnet, write
from llmdistill.elastic.controller import Controller
from llmdistill.elastic.cost import num_bytes, num_parameters
from llmdistill.elastic.differentiable import Differentiable
from llmdistill.elastic.evolution import Evolution
from llmdistill.elastic.latency import LatencySetting
from llmdistill.elastic.nsga2 import NSGA2
from llmdistill.elastic.question import Candidate, Limit, Question, Supernet, excess, front, hypervolume, search
from llmdistill.elastic.random_search import RandomSearch
from llmdistill.elastic.space import Space
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly, lessons_of
from llmdistill.stages.answering import Answering
from llmdistill.tasks.task import Task

if TYPE_CHECKING:
    from llmdistill.elastic.accuracy_predictor import Predictor
    from llmdistill.elastic.latency_table import LatencyTable

log = logging.getLogger(__name__)

SearchMethod: TypeAlias = RandomSearch | Evolution | NSGA2 | Differentiable | Controller
SAMPLES, PREDICTORS = "samples.jsonl", "predictors.json"


@dataclass(frozen=True, kw_only=True)
class SearchSubnets(Stage[FoundSubnets]):
    """The sub-networks on the front of accuracy and cost, predicted and measured, and the one to take."""

    artifact = FoundSubnets

    checkpoint: Stage[Checkpoint]
    task: Task
    rationales: Stage[Rationales]
    """Its validation rows judge accuracy, against the labels that students learn."""
    methods: tuple[SearchMethod, ...] = (Evolution(),)
    latencies: tuple[LatencySetting, ...] = (LatencySetting(),)
    cost: str = "latency_ms_batch_1"
    """What is weighed against accuracy: a latency by its name, parameters or weight_bytes."""
    limits: tuple[Limit, ...] = ()
    loss: Multitask | LabelOnly | RationaleOnly = Multitask()
    """What gradients look at, where a method takes some."""
    num_samples: int = 100
    """Sub-networks that predictors are fitted to."""
    budget: float = 1000
    """Predicted accuracies that each method may ask for."""
    num_points: int = 6
    """Of the front, measured in truth."""
    num_validation_rows: int = 512
    accuracy_margin: float = 0.01
    """Without limits, the cheapest sub-network is chosen that is no more than this below the most accurate one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 10), ("num_points", 1), ("num_validation_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"SearchSubnets.{name} is {getattr(self, name)}; give {least} or more")
        if not self.methods or not self.latencies:
            raise ValueError("SearchSubnets.methods or latencies is empty; give at least one, such as Evolution() and LatencySetting()")
        if not 0 <= self.accuracy_margin < 1:
            raise ValueError(f"SearchSubnets.accuracy_margin is {self.accuracy_margin}; give 0 or more and less than 1")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.elastic.kept import space_of
        from llmdistill.stages.evaluate import device_name

        rows = [row for row in run.artifact(self.rationales).rows() if row.split == "validation"][: self.num_validation_rows]
        if not rows:
            raise ValueError("none of the rationales has split 'validation', so there is nothing to measure accuracy on; annotate some validation rows")
        student = Answering.load(run.artifact(self.checkpoint).folder, device=device_name(), max_batch_rows=64)
        measured = _Measured(self, student, rows, space_of(student.model))
        samples = self._samples(run, measured)
        predictor, tables = self._fitted(measured, samples)
        question = self._question(measured, predictor, tables)
        asked: dict[str, list[Candidate]] = {}
        for method in self.methods:
            asked[method.kind] = search(method, replace(question, asked={}, num_spent=0.0), seed=self.seed)
        found = self._found(measured, question, predictor, tables, asked, dict(samples))
        (run.folder / SEARCH).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        fitted = {"accuracy": predictor.to_json()} | {table.setting.name: table.to_json() for table in tables}
        (run.folder / PREDICTORS).write_text(json.dumps(fitted) + "\n", encoding="utf-8")
        [chosen] = [point for point in found["points"] if point["subnet"] == found["chosen"]]
        return {
            "subnet": found["chosen"],
            "parameters": chosen["parameters"],
            "validation_accuracy": chosen["measured_accuracy"],
            "predictor_kendall_tau": found["accuracy_predictor"]["kendall_tau"],
            "num_samples": len(samples),
            **{name: cost for name, cost in chosen["measured"].items() if name.startswith("latency")},
        }

    def _samples(self, run: Run, measured: "_Measured") -> list[tuple[Subnet, float]]:
        """Sub-networks and their accuracies: the largest, the smallest and others at random, all of them where there are few."""
        path, space = run.folder / SAMPLES, measured.space
        subnets = list(space.every()) if space.num_subnets <= self.num_samples else list(_some(space, self.num_samples, self.seed))
        known = {line["subnet"]: float(line["accuracy"]) for line in _whole_lines(path)}
        with run.progress(len(subnets), "sub-networks") as bar, path.open("a", encoding="utf-8") as file:
            for subnet in subnets:
                text = write(subnet, space)
                if text not in known:
                    known[text] = measured.accuracy(subnet)
                    file.write(json.dumps({"subnet": text, "accuracy": known[text]}) + "\n")
                    file.flush()
                bar.advance()
        return [(subnet, known[write(subnet, space)]) for subnet in subnets]

    def _fitted(self, measured: "_Measured", samples: Sequence[tuple[Subnet, float]]) -> "tuple[Predictor, list[LatencyTable]]":
        from llmdistill.elastic.accuracy_predictor import PredictorSettings, fit
        from llmdistill.elastic.latency_table import fit_latency_table

        subnets = [subnet for subnet, _ in samples]
        latencies = measured.latencies(subnets)
        tables = [
            fit_latency_table(measured.space, setting, [(subnet, one[setting.name]) for subnet, one in zip(subnets, latencies, strict=True)], seed=self.seed)
            for setting in self.latencies
        ]
        predictor = fit(measured.space, samples, PredictorSettings(seed=self.seed))
        log.info(
            "accuracy predictor: Kendall tau %.2f, mean error %.4f; latency: mean error %.1f%%",
            predictor.quality.kendall_tau,
            predictor.quality.mean_absolute_error,
            tables[0].quality.mean_error_percent,
        )
        return predictor, tables

    def _question(self, measured: "_Measured", predictor: "Predictor", tables: "Sequence[LatencyTable]") -> Question:
        def costs(subnet: Subnet) -> dict[str, float]:
            return measured.sizes(subnet) | {table.setting.name: table(subnet) for table in tables}

        return Question(
            space=measured.space,
            accuracy=predictor,
            costs=costs,
            cost=self.cost,
            limits=self.limits,
            budget=self.budget,
            supernet=Supernet(model=measured.student.model, examples=measured.examples(self.loss), loss=self.loss),
        )

    def _found(
        self,
        measured: "_Measured",
        question: Question,
        predictor: "Predictor",
        tables: "Sequence[LatencyTable]",
        asked: Mapping[str, Sequence[Candidate]],
        known: Mapping[Subnet, float],
    ) -> dict[str, Any]:
        """What search.json says. `known` are the accuracies that were measured already."""
        space = measured.space
        largest, smallest = space.largest(), space.smallest()
        everything = list({one.subnet: one for candidates in asked.values() for one in candidates}.values())
        best = _spread(front(everything, self.cost, self.limits), self.num_points)
        subnets = list(dict.fromkeys([smallest, *(one.subnet for one in best), largest]))
        points = []
        for subnet, latencies in zip(subnets, measured.latencies(subnets), strict=True):
            points.append(
                {
                    "subnet": write(subnet, space),
                    "parameters": num_parameters(space, subnet),
                    "predicted_accuracy": predictor(subnet),
                    "measured_accuracy": known[subnet] if subnet in known else measured.accuracy(subnet),
                    "predicted": question.costs(subnet),
                    "measured": measured.sizes(subnet) | latencies,
                    "is_largest": subnet == largest,
                    "is_smallest": subnet == smallest,
                }
            )
        worst = question.costs(largest)[self.cost]
        return {
            "cost": self.cost,
            "limits": [asdict(limit) for limit in self.limits],
            "methods": {
                name: {"num_asked": len(candidates), "hypervolume": hypervolume(candidates, self.cost, worst_cost=worst)} for name, candidates in asked.items()
            },
            "num_samples": len(known),
            "accuracy_predictor": {name: getattr(predictor.quality, name) for name in ("kendall_tau", "mean_absolute_error", "num_held_out")},
            "cost_predictors": {
                table.setting.name: {
                    "mean_relative_error": table.quality.mean_error_percent / 100,
                    "kendall_tau": table.quality.kendall_tau,
                    "num_held_out": table.quality.num_held_out,
                }
                for table in tables
            },
            "asked": [{"accuracy": one.accuracy, "cost": one.costs[self.cost]} for one in everything],
            "chosen": self._chosen(points),
            "points": points,
        }

    def _chosen(self, points: Sequence[Mapping[str, Any]]) -> str:
        """By what was measured."""
        within = [point for point in points if not excess(point["measured"], self.limits)]
        if not within:
            nearest = min(points, key=lambda point: excess(point["measured"], self.limits))
            told = ", ".join(f"{limit.cost} <= {limit.most:g}" for limit in self.limits)
            raise ValueError(f"no sub-network that was measured keeps {told}; the nearest has {nearest['measured']}: raise the limits, or make smaller ones")
        most = max(point["measured_accuracy"] for point in within)
        margin = 0.0 if self.limits else self.accuracy_margin
        good = [point for point in within if point["measured_accuracy"] >= most - margin]
        return str(min(good, key=lambda point: point["measured"][self.cost])["subnet"])


class _Measured:
    """The elastic student and its validation rows: what is measured on them."""

    def __init__(self, stage: SearchSubnets, student: Answering, rows: Sequence[RationaleRow], space: Space) -> None:
        self.stage, self.student, self.rows, self.space = stage, student, rows, space

    def accuracy(self, subnet: Subnet) -> float:
        """On all validation rows."""
        from llmdistill.elastic.subnet import with_subnet

        with with_subnet(self.student.model, subnet):
            return self.student.accuracy(self.stage.task.answer, [row.input for row in self.rows], [row.label for row in self.rows])

    def latencies(self, subnets: Sequence[Subnet]) -> list[dict[str, float]]:
        """Milliseconds by the settings' names."""
        from llmdistill.elastic.latency import measure_latencies

        return measure_latencies(self.student.model, subnets, self.stage.latencies, seed=self.stage.seed)

    def sizes(self, subnet: Subnet) -> dict[str, float]:
        """What arithmetic says."""
        return {"parameters": num_parameters(self.space, subnet), "weight_bytes": num_bytes(self.space, subnet)}

    def examples(self, loss: Multitask | LabelOnly | RationaleOnly) -> list[Any]:
        """The rows in tokens."""
        return loss.examples(lessons_of(self.rows), self.student.tokenizer, self.student.model.config, max_input_tokens=512, max_target_tokens=128)


def _some(space: Space, number: int, seed: int) -> Iterator[Subnet]:
    """The largest, the smallest, and others at random, none twice."""
    generator, seen = Random(seed), {space.largest(), space.smallest()}
    yield from sorted(seen, key=lambda subnet: -num_parameters(space, subnet))
    while len(seen) < number:
        subnet = space.sample(generator)
        if subnet not in seen:
            seen.add(subnet)
            yield subnet


def _spread(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """So many of a front, evenly by place, both ends among them."""
    if len(candidates) <= number:
        return list(candidates)
    return [candidates[round(place * (len(candidates) - 1) / max(1, number - 1))] for place in range(number)]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What an earlier build has measured; its last line may be torn, and then the file is cut before it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return list(read_json_lines(path))
