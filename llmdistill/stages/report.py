"""The report of a pipeline: report.json with every figure, and report.html, one page for people made from the same data.

What stands in report.json (units in the names; null where a figure cannot be known):

    title, created_utc, findings, machine
    students     name, checkpoint, parameters, weight_bytes, accuracy, accuracy_ci95, latency_ms_batch_1, tokens_per_second_batch_32
                 and all else that their evaluation measured
    baselines    the same for classifiers that are not students
    comparisons  McNemar's test of pairs on the same rows
    teacher      model, accuracy, num_completions, num_refused, tokens_in, tokens_out, and the rest of the annotation's account
    refused      by_reason, examples
    training     name, points: what each training logged, by step
    compression  name, before, after, steps: what each compression did to each layer
    elastic      name, cost, limits, chosen, points, predictors and methods of each search among sub-networks, and some of those that it asked about
    exits        name, num_layers, full_accuracy, curve, points: what each calibration of exits found at every threshold
    samples      a few rows with what the teacher and each student said
    stages       name, key, seconds, cached, depends_on
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import CALIBRATION, COMPRESSION, SEARCH, Evaluation, FoundSubnets, Rationales, Report, read_json, read_json_lines
from llmdistill.core.graph import Graph
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage, upstream
from llmdistill.report import figures
from llmdistill.report.text import print_summary
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.evaluate_baseline import EvaluateBaseline
from llmdistill.statistics import mcnemar, wilson_interval

__all__ = ["ReportStage", "print_summary"]

NUM_REFUSED_SHOWN = 5
SIGNIFICANT_BELOW = 0.05
TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class ReportStage(Stage[Report]):
    """Joins evaluations of students and baselines with the teacher's account; the last stage of a pipeline."""

    artifact = Report

    name: str = "report"
    title: str = "Report"
    evaluations: tuple[Evaluate, ...]
    baselines: tuple[EvaluateBaseline, ...] = ()
    rationales: Stage[Rationales] | None = None
    """The teacher's labels that the students learned from; None where there was no teacher."""
    searches: tuple[Stage[FoundSubnets], ...] = ()
    """Searches among sub-networks to show although no student here comes from them; those that one comes from are shown anyway."""

    def __post_init__(self) -> None:
        names = [evaluation.student_name for evaluation in (*self.evaluations, *self.baselines)]
        repeated = sorted(name for name, number in Counter(names).items() if number > 1)
        if repeated:
            raise ValueError(f"more than one student of the report is called {repeated[0]!r}; name their stages apart, as in Distil(name='label_only', ...)")
        if not self.evaluations:
            raise ValueError("ReportStage.evaluations is empty; give at least one Evaluate stage")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.report import page

        start = time.monotonic()
        artifacts = {stage.student_name: run.artifact(stage) for stage in (*self.evaluations, *self.baselines)}
        lines = {name: artifact.predictions() for name, artifact in artifacts.items()}
        students = [_entry(stage.student_name, stage.checkpoint.key, artifacts[stage.student_name]) for stage in self.evaluations]
        baselines = [_entry(stage.student_name, None, artifacts[stage.student_name]) for stage in self.baselines]
        teacher = self._teacher(run)
        comparisons = list(_comparisons([stage.student_name for stage in self.evaluations], [stage.student_name for stage in self.baselines], lines))
        best = _best(students)
        data: dict[str, Any] = {
            "title": self.title,
            "created_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "findings": list(_findings(students, baselines, teacher, comparisons, best)),
            "task": students[0]["task"],
            "best_student": best["name"],
            "students": students,
            "baselines": baselines,
            "comparisons": comparisons,
            "teacher": teacher,
            "refused": _refused(run.artifact(self.rationales)) if self.rationales else {"by_reason": {}, "examples": {}},
            "training": self._training(run, [stage.checkpoint.name for stage in self.evaluations]),
            "compression": self._left(run, COMPRESSION),
            "elastic": page.searches(self._left(run, SEARCH)),
            "exits": self._exits(run),
            "samples": _samples({student["name"]: student for student in students}),
            "machine": students[0]["machine"],
            "stages": self._stages(run, start),
        }
        for student in students:
            student.pop("samples")
        (run.folder / "report.json").write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        (run.folder / "report.html").write_text(page.render(data), encoding="utf-8")
        return {"num_students": len(students), "best_accuracy": best["accuracy"], "teacher_accuracy": teacher["accuracy"] if teacher else None}

    def _teacher(self, run: Run) -> dict[str, Any] | None:
        """The annotation's account, and the interval of its accuracy."""
        if self.rationales is None:
            return None
        account = run.artifact(self.rationales).summary()
        num_rows = account["num_rows_accuracy"]
        return account | {"accuracy_ci95": list(wilson_interval(round(account["accuracy"] * num_rows), num_rows)) if num_rows else None}

    def _training(self, run: Run, first: Sequence[str]) -> list[dict[str, Any]]:
        """The log of every stage above that trained, students' first; a step that was logged again after a restart counts once."""
        histories = []
        names = {stage.key: stage.name for stage in Graph.above(self).stages}
        for manifest in run.above():
            path = _folder(run, manifest["key"]) / "metrics.jsonl"
            steps: dict[int, dict[str, Any]] = {}
            for line in read_json_lines(path) if path.is_file() else ():
                if "step" in line:
                    steps.setdefault(line["step"], {}).update(line)
            if steps:
                histories.append({"name": names[manifest["key"]], "points": [steps[step] for step in sorted(steps)]})
        return sorted(histories, key=lambda history: first.index(history["name"]) if history["name"] in first else len(first))

    def _left(self, run: Run, file: str) -> list[dict[str, Any]]:
        """What every stage above that has left this file says in it, with the stage's name: those that compressed a student, or searched in one."""
        names = {stage.key: stage.name for stage in Graph.above(self).stages}
        paths = {manifest["key"]: _folder(run, manifest["key"]) / file for manifest in run.above()}
        return [{"name": names[key], **read_json(path)} for key, path in paths.items() if path.is_file()]

    def _exits(self, run: Run) -> list[dict[str, Any]]:
        """What was calibrated, a sub-network after the whole that it is of."""
        found = []
        for whole in self._left(run, CALIBRATION):
            subnets = whole.pop("subnets", {})
            found += [whole, *({"name": f"{whole['name']}, {text}", **one} for text, one in subnets.items())]
        return found

    def _stages(self, run: Run, start: float) -> list[dict[str, Any]]:
        """Every stage of the pipeline, this one last, with the time up to here."""
        names = {stage.key: stage.name for stage in Graph.above(self).stages}
        stages = [
            {key: manifest[key] for key in ("key", "seconds", "cached")} | {"name": names[manifest["key"]], "depends_on": manifest["upstream"]}
            for manifest in run.above()
        ]
        here = {
            "key": self.key,
            "seconds": round(time.monotonic() - start, 3),
            "cached": False,
            "name": self.name,
            "depends_on": [above.key for above in upstream(self)],
        }
        return [{"name": stage.pop("name"), **stage} for stage in [*stages, here]]


def _folder(run: Run, key: str) -> Path:
    """The finished folder of any stage above."""
    return run.folder.parent / key


def _entry(name: str, checkpoint: str | None, evaluation: Evaluation) -> dict[str, Any]:
    return {"name": name, "checkpoint": checkpoint, **evaluation.summary()}


def _best(students: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The most accurate student (by agreement with the teacher where no gold label is known); of equals the smaller, then the first."""

    def rank(student: Mapping[str, Any]) -> tuple[float, int]:
        quality = student["accuracy"] if student["accuracy"] is not None else student["agreement_with_teacher"]
        return (-(quality or 0.0), student["weight_bytes"])

    return min(students, key=rank)


def _comparisons(students: Sequence[str], baselines: Sequence[str], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Each pair of students, and each student with each baseline and with the teacher, where gold labels are known."""
    correct = {name: {line["id"]: line["correct"] for line in rows if line["correct"] is not None} for name, rows in lines.items()}
    correct[TEACHER] = {line["id"]: line["teacher_correct"] for line in lines[students[0]] if line["teacher_correct"] is not None}
    pairs = [*itertools.combinations(students, 2), *itertools.product(students, [*baselines, TEACHER])]
    for first, second in pairs:
        shared = [row for row in correct[first] if row in correct[second]]
        if not shared:
            continue
        test = mcnemar([correct[first][row] for row in shared], [correct[second][row] for row in shared])
        better = first if test.num_only_first_correct > test.num_only_second_correct else second
        yield {"first": first, "second": second, **asdict(test), "verdict": f"{better} is better" if test.p_exact < SIGNIFICANT_BELOW else "could be chance"}


def _findings(
    students: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
    teacher: Mapping[str, Any] | None,
    comparisons: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
) -> Iterator[str]:
    """What a reader in a hurry should know, in sentences."""
    what = f"{best['name']} ({figures.compact(best['parameters'])} parameters, {figures.size(best['weight_bytes'])})"
    if best["accuracy"] is not None:
        finding = (
            f"{what} answers {figures.percent(best['accuracy'])} of {figures.count(best['num_rows_with_gold'])} rows right "
            f"(95% interval {figures.interval(best['accuracy_ci95'])})"
        )
        yield finding + (f"; the teacher {figures.percent(teacher['accuracy'])}." if teacher and teacher["accuracy"] is not None else ".")
    else:
        yield f"{what} agrees with the teacher on {figures.percent(best['agreement_with_teacher'])} of the rows; no known labels, so no accuracy."
    others = {student["name"]: student for student in [*students, *baselines] if student["name"] != best["name"]}
    for pair in comparisons:
        if best["name"] not in (pair["first"], pair["second"]):
            continue
        other = pair["second"] if pair["first"] == best["name"] else pair["first"]
        if other in others and others[other]["accuracy"] is not None and best["accuracy"] is not None:
            points = 100 * (best["accuracy"] - others[other]["accuracy"])
            chance = "more than chance" if pair["p_exact"] < SIGNIFICANT_BELOW else "which could be chance"
            yield (
                f"{other} answers {figures.percent(others[other]['accuracy'])} right, {abs(points):.1f} points {'less' if points >= 0 else 'more'}: "
                f"{chance} (McNemar p {_p(pair)})."
            )
    yield (
        f"{best['name']} answers one row in {figures.milliseconds(best['latency_ms_batch_1'])} "
        f"and writes {figures.compact(best['tokens_per_second_batch_32'])} tokens/s at 32 rows."
    )


def _p(pair: Mapping[str, Any]) -> str:
    shown = figures.probability(pair["p_exact"])
    return shown if shown.startswith("<") else f"= {shown}"


def _refused(rationales: Rationales) -> dict[str, Any]:
    """Counts by reason, the commonest first, and a few examples of each."""
    rows = rationales.refused()
    by_reason = dict(Counter(str(row["reason"]) for row in rows).most_common())
    examples = {reason: [row for row in rows if row["reason"] == reason][:NUM_REFUSED_SHOWN] for reason in by_reason}
    return {"by_reason": by_reason, "num_largest": max(by_reason.values(), default=0), "examples": examples}


def _samples(students: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sample rows of all students, joined by row."""
    joined: dict[str, dict[str, Any]] = {}
    for name, student in students.items():
        for sample in student["samples"]:
            shared = {key: sample[key] for key in ("id", "input", "gold", "teacher_label", "teacher_correct", "teacher_rationale")}
            answer = {"name": name} | {key: sample[key] for key in ("prediction", "correct", "rationale")}
            joined.setdefault(sample["id"], shared | {"students": []})["students"].append(answer)
    return list(joined.values())
