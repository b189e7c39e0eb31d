"""Any student made smaller: a checkpoint of ours, or a stock T5, Llama or Qwen2, and the rows of a task; no teacher is asked.

    llmdistill run compress --checkpoint runs/quickstart/latest/label_only
    llmdistill run compress --checkpoint google/flan-t5-small@0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab --task 'choices:rows.jsonl?choices=yes,no&input={text}' \
        --methods qsvd:0.6 svd:0.6 int8

Methods are applied in their order: low rank (svd, qsvd, tucker, cp) and smooth before int8, int4 and the storage formats. Between the two a short
re-distillation recovers what low rank has cost, towards the uncompressed student's own logits and the labels of the rows: the student's own answers (`own`),
known ones with their rationales (`given`) or a file of a teacher's (`file:rationales.jsonl`). The report shows the student before, without and with recovery.
"""

from pathlib import Path

from llmdistill.compress.int8 import Int8
from llmdistill.compress.methods import CompressionMethod
from llmdistill.compress.recovery import Recover
from llmdistill.compress.svd import SVD
from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.student import Pretrained
from llmdistill.stages.compress import Compress
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.report import ReportStage
from llmdistill.stages.rows_to_learn import Own, RowsToLearn, rows_to_learn
from llmdistill.stages.take import Take
from llmdistill.tasks.options import TaskOption, Tickets
from llmdistill.train_settings import Epochs, Steps, TrainSettings


def pipeline(
    checkpoint: str,
    task: TaskOption = Tickets(),
    rationales: RowsToLearn = Own(),
    methods: tuple[CompressionMethod, ...] = (SVD(keep=0.6), Int8()),
    recover: bool = True,
    loss: Multitask | LabelOnly | RationaleOnly = Multitask(),
    duration: Epochs | Steps = Epochs(3),
    learning_rate: float = 2e-4,
    batch_size: int = 32,
    kl_weight: float = 1.0,
    temperature: float = 2.0,
    num_calibration_rows: int = 256,
    max_input_tokens: int = 512,
    max_target_tokens: int = 128,
    seed: int = 0,
) -> Stage[Report]:
    """A checkpoint and the rows of a task; the compressed checkpoint and a report.

    Args:
        checkpoint: A folder, a hub id with its revision, or a package's weights; see llmdistill/models/source.py.
        task: The rows that the student is for; known answers, where there are any, are for its accuracy.
        rationales: Whose labels and reasons compression looks at and recovery learns.
        methods: What is done, in this order.
        recover: Train for a while after the methods of low rank.
        loss: What matters in the rows: labels, rationales or both.
        duration: Of the recovery.
        learning_rate: Of the recovery, at its peak.
        batch_size: Rows of one step of the recovery.
        kl_weight: What the uncompressed student's logits count beside labels and rationales.
        temperature: At which its logits are learned.
        num_calibration_rows: Statistics are taken over so many train rows.
        max_input_tokens: Longer inputs are cut.
        max_target_tokens: Longer labels and rationales are cut.
        seed: Of the order of the rows.
    """
    rows = task.task()
    student = Take(name="student", source=Pretrained(source=checkpoint))
    answers = rows_to_learn(rationales, rows, student)
    settings = TrainSettings(duration=duration, learning_rate=learning_rate, batch_size=batch_size)
    students: list[Stage[Checkpoint]] = [student]
    for name, recovery in {"compressed": None, "recovered": Recover(settings=settings, kl_weight=kl_weight, temperature=temperature)}.items():
        if recovery is None or recover:
            students.append(
                Compress(
                    name=name,
                    checkpoint=student,
                    methods=methods,
                    task=rows,
                    rationales=answers,
                    loss=loss,
                    recover=recovery,
                    num_calibration_rows=num_calibration_rows,
                    max_input_tokens=max_input_tokens,
                    max_target_tokens=max_target_tokens,
                    seed=seed,
                )
            )
    evaluations = tuple(Evaluate(name=f"evaluate_{one.name}", checkpoint=one, task=rows, rationales=answers) for one in students)
    return ReportStage(title=f"Compression of {Path(checkpoint).name}", evaluations=evaluations, rationales=answers)


if __name__ == "__main__":
    main(pipeline)
