"""CalibrateExits: a student with exits in, the same student out with thresholds that keep a promise about its quality.

    CalibrateExits(checkpoint=with_exits, task=task, deltas=(0.02,), epsilon=0.05)

With probability at least 1 - epsilon over the calibration rows, the expected loss of quality against the full student is at most delta (exits/guarantee.py).
The rows are held-out ones that nothing was trained on. Those of the split "validation" may have chosen among weights (TrainSettings.best); a split that has
chosen nothing keeps the promise to the letter. The thresholds are for these weights: they come with their digest, and the engine refuses them for others. So
this is the last technique to be applied.

    CalibrateExits(checkpoint=with_exits, task=task, subnets=search)

gives sub-networks of an elastic student thresholds too, each by itself as it is when it is extracted: the promise is each one's, against that sub-network at
full depth, and not one for all of them at once. The server offers each at its risks (serve/points.py), and an extraction has them.

calibration.json beside the model holds the whole curve: for every threshold the mean loss, the accuracy and the layers a token; under `subnets` those of the
sub-networks.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmdistill.core.artifacts import CALIBRATION, Checkpoint, FoundSubnets
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage, speed
from llmdistill.decode.decoding import Decoding, Generated
from llmdistill.exits.quality import Quality
from llmdistill.models.exit_settings import NEVER, Calibration, Confidence, ExitSettings, Point, Policy
from llmdistill.stages import scoring
from llmdistill.stages.answering import PREDICT, Answering
from llmdistill.stages.evaluate import device_name
from llmdistill.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.elastic.choice import Subnet
    from llmdistill.exits.losses import Curve

log = logging.getLogger(__name__)
NUM_SPLITS = 200


@dataclass(frozen=True, kw_only=True)
class CalibrateExits(Stage[Checkpoint]):
    """A student whose tokens leave early within a promised loss of quality. It leaves at the threshold of the first delta unless a request says otherwise."""

    artifact = Checkpoint

    checkpoint: Stage[Checkpoint]
    task: Task
    deltas: tuple[float, ...] = (0.02, 0.05)
    """The loss of quality that may be expected, each with a threshold of its own; 0.01 is one point."""
    epsilon: float = 0.05
    quality: Quality = Quality.CORRECT
    confidence: Confidence = Confidence.TOP1
    policy: Policy = Policy.DEFERRED
    decay: float = 0.0
    subnets: tuple[str, ...] | Stage[FoundSubnets] = ()
    """The sub-networks of an elastic student that get thresholds beside the whole, as elastic/choice.py writes them, or those that a search has measured."""
    split: str = "validation"
    max_new_tokens: int = 64
    max_batch_rows: int = speed(32)
    seed: int = 0
    """Of the draws that check the guarantee."""

    def __post_init__(self) -> None:
        if not self.deltas or list(self.deltas) != sorted(set(self.deltas)) or not all(0 < delta < 1 for delta in self.deltas):
            raise ValueError(f"CalibrateExits.deltas is {self.deltas}; give one or more, ascending, each above 0 and below 1 (the full model loses nothing)")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"CalibrateExits.epsilon is {self.epsilon}; give more than 0 and less than 1")
        if self.max_new_tokens < 1 or self.max_batch_rows < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens} and max_batch_rows {self.max_batch_rows}; give 1 or more")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.elastic.extract import extracted
        from llmdistill.models import checkpoint
        from llmdistill.models.exits import keep_settings

        source = run.artifact(self.checkpoint)
        student = Answering.load(source.folder, device=device_name(), max_batch_rows=self.max_batch_rows)
        settings = self._settings(student.model)
        model, subnets = student.model, self._subnets(run, student.model, settings)
        keep_settings(model, settings)
        found, calibration = self._calibrated(run, student)
        figures, record = self._figures(found, calibration.points, settings), _record(self, found, calibration.points, model)
        of_subnets: dict[str, Calibration] = {}
        for text, subnet in subnets.items():
            small = extracted(model, subnet).eval()
            found, of_subnets[text] = self._calibrated(run, replace(student, model=small))
            record.setdefault("subnets", {})[text] = _record(self, found, of_subnets[text].points, small)
        if subnets:
            figures["num_calibrated_subnets"] = len(subnets)
        keep_settings(model, replace(settings, calibration=calibration, subnet_calibrations=of_subnets))
        entry = {"technique": "calibrate exits", "settings": describe(self), "measured": figures}
        checkpoint.save(model, student.tokenizer, run.folder, lineage=[*source.lineage(), entry], card=_card(self, source, figures, of_subnets))
        (run.folder / CALIBRATION).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return figures

    def _subnets(self, run: Run, model: "PreTrainedModel", settings: ExitSettings) -> "dict[str, Subnet]":
        """Those that are calibrated beside the whole, by their names."""
        from llmdistill.elastic.choice import parse, write
        from llmdistill.elastic.exit_cuts import exits_within
        from llmdistill.elastic.kept import is_elastic, space_of

        texts = self.subnets if isinstance(self.subnets, tuple) else [str(point["subnet"]) for point in run.artifact(self.subnets).found()["points"]]
        if not texts:
            return {}
        if not is_elastic(model):
            raise ValueError(f"the student of {self.checkpoint.name!r} is not elastic, and CalibrateExits.subnets is {self.subnets}; leave it out")
        space = space_of(model)
        found = {write(subnet, space): subnet for subnet in (parse(text, space) for text in texts) if subnet != space.largest()}
        for text in [text for text, subnet in found.items() if exits_within(settings, space, subnet) is None]:
            log.warning("the sub-network %s keeps no layer on both sides of an exit, and stays at full depth", text)
            del found[text]
        return found

    def _calibrated(self, run: Run, student: Answering) -> "tuple[Curve, Calibration]":
        """What the student loses at each threshold, and the thresholds that are safe for it."""
        from llmdistill.models.exits import digest

        found = self._curve(run, student)
        points = tuple(self._point(found, delta) for delta in self.deltas)
        num_rows = found.losses_Tn.shape[1]
        return found, Calibration(weights=digest(student.model), epsilon=self.epsilon, quality=self.quality.value, num_rows=num_rows, points=points)

    def _settings(self, model: "PreTrainedModel") -> ExitSettings:
        from llmdistill.models.exit_settings import read_exits

        settings = read_exits(model.config)
        if settings is None:
            raise ValueError(f"the student of {self.checkpoint.name!r} has no exits, so there is no threshold to find: train some first (the TrainExits stage)")
        return replace(settings, confidence=self.confidence, policy=self.policy, decay=self.decay, calibration=None, subnet_calibrations={})

    def _curve(self, run: Run, student: Answering) -> "Curve":
        from llmdistill.exits.guarantee import THRESHOLDS, fewest_rows
        from llmdistill.exits.losses import curve

        rows = scoring.rows_of_split(self.task, self.split)
        texts = [self.task.text(row) for row in rows]
        for delta in self.deltas:
            if len(rows) < fewest_rows(delta, self.epsilon):
                log.warning(
                    "%d rows of split %r cannot promise a delta of %g at epsilon %g, which needs %d that lose nothing: no token will leave at it",
                    *(len(rows), self.split, delta, self.epsilon, fewest_rows(delta, self.epsilon)),
                )
        with run.progress(len(THRESHOLDS) + 1, "thresholds") as bar:

            def decode(threshold: float) -> Sequence[Generated]:
                generated = student.generated(PREDICT, texts, decoding=Decoding(max_new_tokens=self.max_new_tokens, exit_threshold=threshold))
                bar.advance()
                return generated

            answer = self.task.answer
            return curve(decode, lambda row: answer.parse(student.decoded(row)), answer.same, [row.gold for row in rows], self.quality, THRESHOLDS)

    def _point(self, found: "Curve", delta: float) -> Point:
        from llmdistill.exits.guarantee import last_safe

        place = last_safe(found.losses_Tn, delta, self.epsilon)
        if place is None:
            return Point(delta=delta, threshold=NEVER, mean_loss=0.0, mean_layers=found.full_mean_layers)
        mean_loss, mean_layers = float(found.losses_Tn[place].mean()), float(found.mean_layers_T[place])
        return Point(delta=delta, threshold=found.thresholds[place], mean_loss=mean_loss, mean_layers=mean_layers)

    def _figures(self, found: "Curve", points: Sequence[Point], settings: ExitSettings) -> dict[str, JsonScalar]:
        from llmdistill.exits.guarantee import violations

        first = points[0]
        figures: dict[str, JsonScalar] = {
            "num_rows": found.losses_Tn.shape[1],
            "delta": first.delta,
            "threshold": round(first.threshold, 6),
            "mean_layers": round(first.mean_layers, 3),
            "mean_loss": round(first.mean_loss, 5),
        }
        if settings.encoder_layers and first.threshold in found.thresholds:
            figures["mean_encoder_layers"] = round(found.mean_encoder_layers_T[found.thresholds.index(first.threshold)], 3)
        for point in points[1:]:
            figures |= {f"threshold_at_{point.delta:g}": round(point.threshold, 6), f"mean_layers_at_{point.delta:g}": round(point.mean_layers, 3)}
        for point in points:
            num_rows = found.losses_Tn.shape[1]
            share = violations(found.losses_Tn, point.delta, self.epsilon, num_rows=num_rows, num_splits=NUM_SPLITS, seed=self.seed)
            figures[f"violations_at_{point.delta:g}"] = share
        return figures


def _record(stage: CalibrateExits, found: "Curve", points: Sequence[Point], model: Any) -> dict[str, Any]:
    """calibration.json."""
    from llmdistill.models.anatomy import stacks

    return {
        "epsilon": stage.epsilon,
        "quality": stage.quality.value,
        "confidence": stage.confidence.value,
        "policy": stage.policy.value,
        "num_rows": found.losses_Tn.shape[1],
        "num_layers": len(stacks(model)[-1].layers),
        "full_accuracy": found.full_accuracy,
        "curve": [
            {"threshold": threshold, "mean_loss": float(losses.mean()), "mean_layers": layers, "mean_encoder_layers": encoder, "accuracy": accuracy}
            for threshold, losses, layers, encoder, accuracy in zip(
                found.thresholds, found.losses_Tn, found.mean_layers_T, found.mean_encoder_layers_T, found.accuracy_T, strict=True
            )
        ],
        "points": [{"delta": point.delta, "threshold": point.threshold, "mean_layers": point.mean_layers} for point in points],
    }


def _card(stage: CalibrateExits, source: Checkpoint, figures: Mapping[str, JsonScalar], of_subnets: Mapping[str, Calibration]) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    if of_subnets:
        rows = (f"| `{text}` | {point.delta:g} | {point.threshold:.6g} | {point.mean_layers:.3f} |" for text, one in of_subnets.items() for point in one.points)
        table += "\n\nSub-networks, each by itself:\n\n| sub-network | delta | threshold | layers a token |\n|---|---|---|---|\n" + "\n".join(rows)
    return f"""{source.model_card().rstrip()}

# {stage.name}: calibrated exits
With probability {1 - stage.epsilon:g} over the calibration rows, the expected loss (quality: {stage.quality.value}) against the full student is at most
{figures["delta"]}; tokens leave at a confidence ({stage.confidence.value}) above {figures["threshold"]}. `violations` is the share of {NUM_SPLITS} calibrations
on redrawn rows in which that did not hold.

| figure | value |
|---|---|
{table}
"""
