"""The front that each search finds with the same number of true evaluations, and how well accuracies are predicted: `python benchmarks/elastic_search.py`.

    llmdistill run quickstart
    python benchmarks/elastic_search.py
    python benchmarks/elastic_search.py --student 't5:midi?lower_case=true' --epochs 8 --best LAST

On the quickstart's elastic student (or on another one, made elastic as benchmarks/elastic.py does with seed 0) every method asks the same question: what is
the accuracy of this sub-network on the validation rows (nothing is predicted), and what does it cost in parameters. One evaluation is one accuracy on all rows;
gradients are counted by the rows that they look at (elastic/question.py). Told is the hypervolume of the front, as a share of what no cost and no error would
have, the best accuracy within half of the parameters, and the same for all sub-networks, which is the most that any method can find. The space is even, so that
all of it can be measured, once.

The predictor of accuracy (elastic/accuracy_predictor.py) is fitted to as many sub-networks as there are evaluations, drawn at random; told is how it orders all
the others (Kendall's tau), and its mean error on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from elastic import QUICKSTART, student_option

from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.store import Store
from llmdistill.elastic.accuracy_predictor import PredictorSettings, fit
from llmdistill.elastic.agreement import kendall_tau
from llmdistill.elastic.choice import Subnet, parse, write
from llmdistill.elastic.controller import Controller
from llmdistill.elastic.cost import num_parameters
from llmdistill.elastic.differentiable import Differentiable, Paths
from llmdistill.elastic.evolution import Evolution
from llmdistill.elastic.kept import space_of
from llmdistill.elastic.nsga2 import NSGA2
from llmdistill.elastic.question import Candidate, Question, Search, Supernet, hypervolume, search
from llmdistill.elastic.random_search import RandomSearch
from llmdistill.elastic.space import Space
from llmdistill.elastic.subnet import with_subnet
from llmdistill.losses.multitask import LabelOnly, lessons_of
from llmdistill.models.student import ScratchT5
from llmdistill.stages.answering import Answering
from llmdistill.stages.elastic import Elastic
from llmdistill.train_settings import Best

METHODS: dict[str, Search] = {
    "random": RandomSearch(),
    "evolution": Evolution(),
    "nsga2": NSGA2(),
    "darts": Differentiable(paths=Paths.MIXED),
    "proxylessnas": Differentiable(paths=Paths.SAMPLED),
    "controller": Controller(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/store"), help="where the quickstart's stages are")
    parser.add_argument("--student", type=student_option, default=ScratchT5(lower_case=True), help="a T5, as the quickstart takes it")
    parser.add_argument("--epochs", type=float, default=12, help="of the elastic training")
    parser.add_argument("--best", choices=["LOSS", "LAST"], default="LOSS", help="which weights are kept of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--kept", type=Path, default=Path("runs/elastic_search.json"), help="where accuracies are kept that were measured")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    store = Store(arguments.store)
    elastic = {stage.name: stage for stage in Graph.above(load(QUICKSTART)(student=arguments.student, elastic_epochs=arguments.epochs)).stages}["elastic"]
    assert isinstance(elastic, Elastic)
    elastic = replace(elastic, settings=replace(elastic.settings, best=Best[arguments.best]))
    student = Answering.load(store.build(elastic).folder, device="cpu", max_batch_rows=64)
    rows = [row for row in store.artifact(elastic.rationales).rows() if row.split == "validation"]
    space = space_of(student.model)
    accuracies = _all_accuracies(student, elastic, rows, arguments.kept)
    examples = LabelOnly().examples(lessons_of(rows), student.tokenizer, student.model.config, max_input_tokens=512, max_target_tokens=128)
    supernet = Supernet(model=student.model, examples=examples, loss=LabelOnly())
    whole = num_parameters(space, space.largest())

    def costs(subnet: Subnet) -> dict[str, float]:
        return {"parameters": num_parameters(space, subnet)}

    everything = [Candidate(subnet=subnet, accuracy=accuracy, costs=costs(subnet)) for subnet, accuracy in accuracies.items()]
    least, most = min(accuracies.values()), max(accuracies.values())
    print(f"{len(rows)} validation rows; all {len(everything)} sub-networks, {100 * least:.1f}% to {100 * most:.1f}%: {told(everything, whole)}")
    figures: list[dict[str, Any]] = []
    for budget in arguments.budgets:
        qualities = [predicted(space, accuracies, budget, seed) for seed in arguments.seeds]
        figures += [{"num_samples": budget, "seed": seed} | quality for seed, quality in zip(arguments.seeds, qualities, strict=True)]
        print(
            f"predictor of {budget:4} samples, on the other {len(everything) - budget}: "
            + " | ".join(f"tau {one['kendall_tau']:.2f}, {100 * one['mean_absolute_error']:.1f} points" for one in qualities),
            flush=True,
        )
    for budget in arguments.budgets:
        for name, method in METHODS.items():
            found = []
            for seed in arguments.seeds:
                torch.manual_seed(seed)
                question = Question(space=space, accuracy=accuracies.__getitem__, costs=costs, cost="parameters", budget=budget, supernet=supernet)
                found.append(search(method, question, seed=seed))
                figures.append({"budget": budget, "method": name, "seed": seed, "num_asked": len(found[-1])} | measures(found[-1], whole))
            print(f"budget {budget:4}  {name:13} " + " | ".join(told(one, whole) for one in found) + f" | mean {_mean(found, whole):.4f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measures(candidates: list[Candidate], whole: int) -> dict[str, float]:
    """Of everything that was asked."""
    within = [one.accuracy for one in candidates if one.costs["parameters"] <= whole / 2]
    return {"hypervolume": hypervolume(candidates, "parameters", worst_cost=whole * 1.01), "best_within_half": max(within, default=0.0)}


def told(candidates: list[Candidate], whole: int) -> str:
    figures = measures(candidates, whole)
    return f"{figures['hypervolume']:.4f}, {100 * figures['best_within_half']:.1f}%"


def predicted(space: Space, accuracies: Mapping[Subnet, float], num_samples: int, seed: int) -> dict[str, float]:
    """How well a predictor that is fitted to so many says what the others have."""
    subnets = list(accuracies)
    Random(seed).shuffle(subnets)
    samples, others = subnets[:num_samples], subnets[num_samples:]
    predictor = fit(space, [(subnet, accuracies[subnet]) for subnet in samples], PredictorSettings(seed=seed))
    told, measured = predictor.predict(others), [accuracies[subnet] for subnet in others]
    error = statistics.mean(abs(one - true) for one, true in zip(told, measured, strict=True))
    return {"kendall_tau": kendall_tau(told, measured), "mean_absolute_error": error}


def _mean(found: list[list[Candidate]], whole: int) -> float:
    return statistics.mean(measures(one, whole)["hypervolume"] for one in found)


def _all_accuracies(student: Answering, elastic: Elastic, rows: Any, kept: Path) -> dict[Subnet, float]:
    """Of every sub-network; measured once for each elastic student."""
    space = space_of(student.model)
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if known.get("student") != elastic.key:
        known = {"student": elastic.key, "accuracy": {}}
        for subnet in space.every():
            with with_subnet(student.model, subnet):
                accuracy = student.accuracy(elastic.task.answer, [row.input for row in rows], [row.label for row in rows])
            known["accuracy"][write(subnet, space)] = accuracy
        kept.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return {parse(text, space): accuracy for text, accuracy in known["accuracy"].items()}


if __name__ == "__main__":
    main()
