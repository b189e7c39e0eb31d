"""Evaluate a student on rows of a task: quality, agreement with the teacher, size, speed and memory.

The student answers through the decode engine that also serves, asked as it was taught to be asked. Quality is a function of the key; latency and memory are of
the machine that built it, which the summary names.

Files: summary.json (every figure, units in the names), predictions.jsonl (one line a row, see scoring.predictions).
"""

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import Checkpoint, Evaluation, Rationales
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage, speed
from llmdistill.decode.decoding import Decoding, Generated
from llmdistill.stages import scoring
from llmdistill.stages.answering import EXPLAIN, PREDICT, Answering
from llmdistill.tasks.task import Row, Task

BATCH_SIZES = (1, 32)
IN_MANIFEST = ("accuracy", "agreement_with_teacher", "parameters", "weight_bytes", "latency_ms_batch_1", "tokens_per_second_batch_32", "peak_memory_bytes")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage[Evaluation]):
    """What a checkpoint scores on one split of a task."""

    artifact = Evaluation

    checkpoint: Stage[Checkpoint]
    task: Task
    rationales: Stage[Rationales] | None = None
    """The teacher's labels, to measure agreement with; None where there is no teacher."""
    split: str = "test"
    max_new_tokens: int = 64
    """An answer that goes on beyond is cut there, and counted in num_cut_short."""
    num_sample_rows: int = 6
    """So many rows are shown with the student's rationale."""
    max_rationale_tokens: int = 96
    latency_repeats: int = 40
    """Measured answers at batch 1; a quarter as many batches of 32."""
    max_batch_rows: int = speed(32)

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation", "test"):
            raise ValueError(f"Evaluate.split is {self.split!r}; give train, validation or test")
        for name in ("max_new_tokens", "max_rationale_tokens", "latency_repeats", "max_batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Evaluate.{name} is {getattr(self, name)}; give 1 or more")
        if self.num_sample_rows < 0:
            raise ValueError(f"Evaluate.num_sample_rows is {self.num_sample_rows}; give 0 or more")

    @property
    def student_name(self) -> str:
        """What the report calls the student."""
        return self.checkpoint.name

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        folder = run.artifact(self.checkpoint).folder
        rows = scoring.rows_of_split(self.task, self.split)
        teacher = scoring.teacher_answers(run.artifact(self.rationales)) if self.rationales else {}
        device = device_name()
        resident_bytes = _resident_memory_bytes()
        student = Answering.load(folder, device=device, max_batch_rows=self.max_batch_rows)
        texts = [self.task.text(row) for row in rows]
        generated = self._generated(run, student, texts)
        lines = scoring.predictions(self.task, rows, [student.decoded(answer) for answer in generated], teacher)
        summary = {
            "task": {"name": self.task.name, "split": self.split},
            **scoring.score(self.task, rows, lines),
            "num_cut_short": sum(answer.finish_reason == "length" for answer in generated),
            "layers_per_token": _mean([num_layers for answer in generated for num_layers in answer.layers]),
            "encoder_layers_per_row": _mean([answer.encoder_layers for answer in generated]),
            "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
            "weight_bytes": scoring.weight_bytes(folder),
            **_speed(student, texts, self),
            **_memory(device, resident_bytes),
            "samples": _samples(student, self, rows, lines, teacher),
            "machine": machine(device),
        }
        return write(run.folder, lines, summary)

    def _generated(self, run: Run, student: Answering, texts: Sequence[str]) -> list[Generated]:
        """The student's answers, some batches at a time, so that the bar moves."""
        answers: list[Generated] = []
        chunk = 8 * self.max_batch_rows
        with run.progress(len(texts), "rows") as bar:
            for start in range(0, len(texts), chunk):
                part = texts[start : start + chunk]
                answers += student.generated(PREDICT, part, decoding=Decoding(max_new_tokens=self.max_new_tokens))
                bar.advance(len(part))
        return answers


def write(folder: Path, lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, JsonScalar]:
    """Write an evaluation's two files; returns the figures for its manifest."""
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return {name: summary[name] for name in IN_MANIFEST}


def _speed(student: Answering, texts: Sequence[str], stage: Evaluate) -> dict[str, float]:
    """Whole answers at batch 1 and 32, on prompts of the evaluated rows."""
    from llmdistill.decode.latency import measure

    prompts, decoding = student.tokens(PREDICT, texts), Decoding(max_new_tokens=stage.max_new_tokens)
    figures = {}
    for size in BATCH_SIZES:
        repeats = stage.latency_repeats if size == 1 else max(1, stage.latency_repeats // 4)
        [latency] = measure(student.model, prompts, decoding, (size,), repeats)
        figures |= {
            f"latency_ms_batch_{size}": round(latency.latency_ms_p50, 4),
            f"latency_p95_ms_batch_{size}": round(latency.latency_ms_p95, 4),
            f"tokens_per_second_batch_{size}": round(latency.tokens_per_second, 2),
            f"tokens_per_answer_batch_{size}": round(latency.tokens_per_answer, 3),
        }
    return figures


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


def _samples(
    student: Answering, stage: Evaluate, rows: Sequence[Row], lines: Sequence[Mapping[str, Any]], teacher: Mapping[str, scoring.TeacherAnswer]
) -> list[dict[str, Any]]:
    """A few rows with the reasons that teacher and student give."""
    chosen = scoring.sampled(rows, stage.num_sample_rows)
    texts = [stage.task.text(row) for row in chosen]
    rationales: Sequence[str | None] = (
        student.answers(EXPLAIN, texts, max_new_tokens=stage.max_rationale_tokens) if student.can(EXPLAIN) else [None] * len(chosen)
    )
    line_of = {line["id"]: line for line in lines}
    return [
        {"input": text, **line_of[row.id], "teacher_rationale": teacher[row.id].rationale if row.id in teacher else None, "rationale": rationale}
        for row, text, rationale in zip(chosen, texts, rationales, strict=True)
    ]


def device_name() -> str:
    """Where evaluation runs: on an accelerator of NVIDIA if there is one, else on the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory(device: str, resident_bytes: int) -> dict[str, int]:
    """The most memory of this process so far, and how much of it came after the libraries were loaded; on a GPU, the most that torch held there."""
    import torch

    if device == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "student_memory_bytes": torch.cuda.max_memory_allocated()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_memory_bytes": peak, "student_memory_bytes": max(0, peak - resident_bytes)}


def _resident_memory_bytes() -> int:
    """Memory of this process with torch and transformers imported, before the student is loaded."""
    import llmdistill.decode.engine
    import llmdistill.models.checkpoint  # noqa: F401

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: str) -> dict[str, Any]:
    """Where the figures were measured."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _processor() -> str:
    """The processor's name as the kernel tells it; platform.processor() is often empty."""
    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
