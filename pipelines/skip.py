"""Any student made to decide what it computes, token by token: layers that a token skips, or groups of neurons that it uses; and a comparison with the student.

    llmdistill run skip --checkpoint runs/quickstart/latest/label_only
    llmdistill run skip --checkpoint FOLDER --technique 'skip:0.05?unit=FEED_FORWARD&refine=true'
    llmdistill run skip --checkpoint FOLDER --technique channels:4?groups=8

The checkpoint is one of ours, not elastic and not in integers, or a stock T5, Llama or Qwen2. It gets gates and is trained for a while with the student as it
was as its teacher; `refine` trains the gates of a skipping one further by REINFORCE. How much is skipped is what the weight of computing is chosen for: the
figures of each stage say the share of the work that is done on validation rows, the report its accuracy and time. Compress the result afterwards, if at all.

Labels and reasons to train on are the student's own answers (`own`), known ones with their rationales (`given`) or a file of a teacher's
(`file:rationales.jsonl`).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.student import Pretrained
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.report import ReportStage
from llmdistill.stages.rows_to_learn import Own, RowsToLearn, rows_to_learn
from llmdistill.stages.skip import GateChannels, RefineSkips, SkipLayers, Unit, Where
from llmdistill.stages.take import Take
from llmdistill.tasks.options import TaskOption, Tickets
from llmdistill.train_settings import Best, Epochs, Steps, TrainSettings


@dataclass(frozen=True)
class Skip:
    """Tokens skip layers or feed-forwards; the first number is what computing all of them counts in the loss, in nats."""

    kind: ClassVar[str] = "skip"
    compute_weight: float = 0.05
    unit: Unit = Unit.LAYER
    refine: bool = False


@dataclass(frozen=True)
class Channels:
    """Tokens use so many of the groups of each feed-forward's neurons."""

    kind: ClassVar[str] = "channels"
    kept: int = 4
    groups: int = 8


def pipeline(
    checkpoint: str,
    task: TaskOption = Tickets(),
    rationales: RowsToLearn = Own(),
    technique: Skip | Channels = Skip(),
    where: Where = Where.BOTH,
    loss: Multitask | LabelOnly | RationaleOnly = Multitask(),
    kl_weight: float = 1.0,
    temperature: float = 2.0,
    dropout: bool = True,
    duration: Epochs | Steps = Epochs(8),
    learning_rate: float = 5e-4,
    batch_size: int = 32,
    best: Best = Best.LAST,
    max_input_tokens: int = 512,
    max_target_tokens: int = 128,
    seed: int = 0,
) -> Stage[Report]:
    """A checkpoint and the rows of a task; a checkpoint that decides what it computes, and a report.

    Args:
        checkpoint: A folder, a hub id with its revision, or a package's weights; see llmdistill/models/source.py.
        task: The rows that the student is for; known answers, where there are any, are for its accuracy.
        rationales: Whose labels and reasons are learned beside the student's logits.
        technique: What is decided, as `skip:0.05?unit=FEED_FORWARD&refine=true` or `channels:4?groups=8`.
        where: Whose layers decide: the encoder's, the decoder's, or those of both.
        loss: What matters in the rows: labels, rationales or both.
        kl_weight: What KL from the student's own former logits counts.
        temperature: At which these are learned.
        dropout: Train with the student's dropout.
        duration: Of the training; the refinement's is half of it.
        learning_rate: At its peak, after warm-up.
        batch_size: Rows of one step.
        best: Which weights are kept: the last ones, or those of the least validation loss.
        max_input_tokens: Longer inputs are cut.
        max_target_tokens: Longer labels and rationales are cut.
        seed: Of the gates, of the order of the rows and of what is drawn.
    """
    rows = task.task()
    student = Take(name="student", source=Pretrained(source=checkpoint))
    answers = rows_to_learn(rationales, rows, student)
    settings = TrainSettings(duration=duration, learning_rate=learning_rate, batch_size=batch_size, evaluate_every_steps=50, best=best)
    common: Any = {"task": rows, "rationales": answers, "loss": loss, "kl_weight": kl_weight, "temperature": temperature, "dropout": dropout, "seed": seed}
    common |= {"settings": settings, "max_input_tokens": max_input_tokens, "max_target_tokens": max_target_tokens}
    deciding: list[Stage[Checkpoint]] = []
    if isinstance(technique, Channels):
        deciding.append(GateChannels(name="gated", checkpoint=student, where=where, groups=technique.groups, kept=technique.kept, **common))
    else:
        weight = technique.compute_weight
        deciding.append(SkipLayers(name="skipping", checkpoint=student, where=where, unit=technique.unit, compute_weight=weight, **common))
        if technique.refine:
            half = type(duration)(max(1, duration.number // 2))  # pyright: ignore[reportArgumentType] - a number of its own kind
            common |= {"settings": replace(settings, duration=half, learning_rate=learning_rate / 3)}
            deciding.append(RefineSkips(name="refined", checkpoint=deciding[0], teacher=student, compute_weight=weight, **common))
    students: list[Stage[Checkpoint]] = [student, *deciding]
    evaluations = tuple(Evaluate(name=f"evaluate_{one.name}", checkpoint=one, task=rows, rationales=answers) for one in students)
    return ReportStage(title=f"What {Path(checkpoint).name} need not compute", evaluations=evaluations, rationales=answers)


if __name__ == "__main__":
    main(pipeline)
