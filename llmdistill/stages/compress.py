"""Compress: a checkpoint in, a smaller one out, by any methods of llmdistill/compress one after the other, and a short re-distillation between.

    Compress(checkpoint=student, task=task, rationales=rationales, methods=(QSVD(keep=0.5), Int8()), recover=Recover())

An elastic student is refused: what a method does to the whole is not what its sub-networks were trained for, and would have to be found for each by itself. One
of them is extracted first, and that is compressed; or a low-rank student is made elastic, its ranks too.

Methods that leave numbers to train (low rank) come first, then the recovery, then those that leave integers. What each did to each layer is kept in
compression.json beside the model, for the report. Statistics are taken over train rows, settings are chosen on validation rows, test rows are never looked at.

While it builds, `training/` holds the student after the first methods, and the state of the recovery.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.compress.method import Applied
from llmdistill.compress.methods import CompressionMethod
from llmdistill.compress.recovery import Recover
from llmdistill.core.artifacts import COMPRESSION, Checkpoint, RationaleRow, Rationales, read_json
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.spec import write
from llmdistill.core.stage import JsonScalar, Launcher, Stage
from llmdistill.elastic.kept import is_elastic, refusal
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.stages.distil_card import task_section
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.learned_rows import examples_of, lessons_to_train
from llmdistill.stages.training_folder import training_folder
from llmdistill.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration

log = logging.getLogger(__name__)

_LEAST = {
    "num_calibration_rows": 1,
    "num_held_out_rows": 1,
    "max_calibration_tokens": 1,
    "max_held_out_tokens": 1,
    "max_input_tokens": 2,
    "max_target_tokens": 2,
}


@dataclass(frozen=True, kw_only=True)
class Compress(Stage[Checkpoint]):
    """A student made smaller. Without `recover` nothing is trained."""

    artifact = Checkpoint
    launcher = Launcher.ACCELERATE

    checkpoint: Stage[Checkpoint]
    methods: tuple[CompressionMethod, ...]
    task: Task
    rationales: Stage[Rationales]
    """The rows to calibrate on and to recover from: the teacher's, or the student's own answers (OwnAnswers)."""
    loss: Multitask | LabelOnly | RationaleOnly = Multitask()
    """What matters in these rows; the student's own loss. A row without a rationale counts with its label alone."""
    recover: Recover | None = None
    num_calibration_rows: int = 256
    num_held_out_rows: int = 128
    max_calibration_tokens: int = 16384
    """Of inputs and targets; fewer rows are taken where theirs are more."""
    max_held_out_tokens: int = 4096
    max_input_tokens: int = 512
    max_target_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("Compress.methods is empty; give at least one, such as Int8()")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"Compress.{name} is {getattr(self, name)}; give {least} or more")
        order = [method.quantizes for method in self.methods]
        if order != sorted(order):
            late = next(method for method, before in zip(self.methods[1:], self.methods, strict=False) if before.quantizes and not method.quantizes)
            raise ValueError(
                f"{late.kind} comes after {self.methods[order.index(True)].kind}, which leaves integers that it cannot change; put {late.kind} first"
            )
        if isinstance(self.checkpoint, Elastic):
            raise ValueError(refusal(f"the student of {self.checkpoint.name!r}", verb="compress"))

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.models import checkpoint

        rows = run.artifact(self.rationales).rows()
        with training_folder(run, lambda initial: self._shrink(run, initial, rows)) as (folder, process):
            model, tokenizer = checkpoint.load(folder / "initial")
            record: dict[str, Any] = read_json(folder / "initial" / COMPRESSION)
            calibration = self._calibration(rows, tokenizer, model)
            left = [method for method in self.methods if method.quantizes]
            if self.recover is not None:
                left = self._recover(run, self.recover, folder, model, tokenizer, calibration, rows, left, record)
            figures: dict[str, JsonScalar] = {}
            if process.is_main_process:
                self._apply(model, left, calibration, record)
                figures = self._write(run, model, tokenizer, calibration, record)
        return figures

    def _shrink(self, run: Run, folder: Path, rows: Sequence[RationaleRow]) -> None:
        """Write the student as it is after the methods that come before the recovery."""
        from llmdistill.models import checkpoint

        source = run.artifact(self.checkpoint)
        model, tokenizer = checkpoint.load(source.folder)
        if is_elastic(model):
            raise ValueError(refusal(f"the student of {self.checkpoint.name!r}", verb="compress"))
        calibration = self._calibration(rows, tokenizer, model)
        record: dict[str, Any] = {"before": _size(model) | {"held_out_loss_nats": calibration.mean_loss(model)}, "steps": []}
        self._apply(model, [method for method in self.methods if not method.quantizes], calibration, record)
        checkpoint.save(model, tokenizer, folder, lineage=source.lineage(), card="")
        (folder / COMPRESSION).write_text(json.dumps(record), encoding="utf-8")

    def _apply(self, model: "PreTrainedModel", methods: Sequence[CompressionMethod], calibration: "Calibration", record: dict[str, Any]) -> None:
        """Each method in turn, what it did, and the held-out loss after it."""
        for method in methods:
            start = time.monotonic()
            last = record["steps"][-1]["figures"] if record["steps"] else record["before"]
            applied = method.apply(model, replace(calibration, known_loss=last["held_out_loss_nats"]))
            record["steps"].append(_step(model, method.kind, method, applied, calibration, start))

    def _recover(
        self,
        run: Run,
        recovery: Recover,
        folder: Path,
        model: "PreTrainedModel",
        tokenizer: Any,
        calibration: "Calibration",
        rows: Sequence[RationaleRow],
        quantizing: list[CompressionMethod],
        record: dict[str, Any],
    ) -> list[CompressionMethod]:
        """Train the model for a while; returns the methods that are left, without the one whose rounding was trained with."""
        from llmdistill.compress.recover_run import QuantizationAware, recover
        from llmdistill.losses.recover import RecoveryLoss
        from llmdistill.models import checkpoint

        start = time.monotonic()
        teacher, _ = checkpoint.load(run.artifact(self.checkpoint).folder)
        weights = {"hard_weight": recovery.hard_weight, "kl_weight": recovery.kl_weight, "temperature": recovery.temperature}
        aware = QuantizationAware(method=quantizing[0], calibration=calibration) if quantizing and recovery.quantization_aware else None
        recovered = recover(
            model,
            RecoveryLoss(teacher, self.loss, **weights),
            lessons_to_train(self, rows, tokenizer, model, needs_validation=False),
            recovery,
            folder,
            seed=self.seed,
            journal=run,
            aware=aware,
        )
        nothing = Applied(figures=recovered.figures, layers=())
        record["steps"].append(_step(model, "recover", recovery, recovered.quantized or nothing, calibration, start) | {"training": dict(recovered.figures)})
        return quantizing[1:] if recovered.quantized else quantizing

    def _calibration(self, rows: Sequence[RationaleRow], tokenizer: Any, model: "PreTrainedModel") -> "Calibration":
        """Rows drawn by the hash of their ids: the same ones for every checkpoint that is compressed on this task."""
        from llmdistill.compress.calibration import Calibration, within

        examples = {}
        limits = {"train": (self.num_calibration_rows, self.max_calibration_tokens), "validation": (self.num_held_out_rows, self.max_held_out_tokens)}
        for split, (num_rows, num_tokens) in limits.items():
            examples[split] = within(examples_of(self, _drawn([row for row in rows if row.split == split], num_rows), tokenizer, model), num_tokens)
        if not examples["train"]:
            raise ValueError(f"none of the {len(rows)} rationales has split 'train', so there is nothing to calibrate on; annotate some train rows")
        return Calibration(examples=examples["train"], held_out=examples["validation"], loss=self.loss)

    def _write(self, run: Run, model: "PreTrainedModel", tokenizer: Any, calibration: "Calibration", record: dict[str, Any]) -> dict[str, JsonScalar]:
        """Write the checkpoint; returns its figures."""
        from llmdistill.models import checkpoint

        source = run.artifact(self.checkpoint)
        record["after"] = {name: record["steps"][-1]["figures"][name] for name in record["before"]}
        if getattr(model.config, "llmdistill", None) is None:
            model.config.llmdistill = task_section(self.task, self.loss, model.config, calibration.examples)
        before, after = record["before"], record["after"]
        figures: dict[str, JsonScalar] = {f"{name}_before": value for name, value in before.items()} | {f"{name}_after": value for name, value in after.items()}
        figures["weight_bytes_share"] = round(after["weight_bytes"] / before["weight_bytes"], 4)
        entry = {"technique": "compress", "settings": describe(self), "measured": figures}
        card = _card(self, source, record, figures)
        checkpoint.save(model.eval(), tokenizer, run.folder, lineage=[*source.lineage(), entry], card=card)
        (run.folder / COMPRESSION).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return figures


def _step(
    model: "PreTrainedModel", technique: str, settings: CompressionMethod | Recover, applied: Applied, calibration: "Calibration", start: float
) -> dict[str, Any]:
    """What compression.json says of one step, which began at `start`."""
    seconds, size = time.monotonic() - start, _size(model)
    loss = calibration.mean_loss(model) if applied.held_out_loss is None else applied.held_out_loss
    log.info("%s: %.1f s, %s bytes, held-out loss %.4f nats", technique, seconds, f"{size['weight_bytes']:,}", loss)
    return {
        "technique": technique,
        "settings": describe(settings),
        "figures": dict(applied.figures) | size | {"held_out_loss_nats": loss, "seconds": round(seconds, 3)},
        "layers": [asdict(layer) | _place(model, layer.path) for layer in applied.layers],
    }


def _drawn(rows: Sequence[RationaleRow], number: int) -> list[RationaleRow]:
    return sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:number]


def _size(model: "PreTrainedModel") -> dict[str, int]:
    """Numbers, and the bytes that they take on disk, tied ones once. A scale is a number too."""
    parameters = list(model.parameters())
    return {"parameters": sum(parameter.numel() for parameter in parameters), "weight_bytes": sum(parameter.nbytes for parameter in parameters)}


def _place(model: "PreTrainedModel", path: str) -> dict[str, Any]:
    """Where a layer is, for the heat map; nothing for what is in no slot (the embedding)."""
    from llmdistill.compress.slots import slots

    for slot in slots(model):
        if path == slot.path or path.startswith(f"{slot.path}."):
            return {"stack": slot.stack, "layer": slot.layer, "role": slot.role.value}
    return {"stack": None, "layer": None, "role": None}


def _card(stage: Compress, source: Checkpoint, record: Mapping[str, Any], figures: Mapping[str, JsonScalar]) -> str:
    """README.md: what was done, after what the uncompressed student says of itself."""
    steps = "\n".join(f"- `{write(method)}`" for method in stage.methods)
    kept = [layer for step in record["steps"] for layer in step["layers"] if layer["kind"] == "kept"]
    lines = "\n".join(f"- `{layer['path']}`: {layer['note']}" for layer in kept)
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""{source.model_card().rstrip()}

# {stage.name}: compressed
{steps}

Import llmdistill first: `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM` then reads the folder as any other, and `llmdistill serve` serves it.

| figure | value |
|---|---|
{table}

## Kept as they were
{lines or "Nothing."}
"""
