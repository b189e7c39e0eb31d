"""Any student made to think less about easy tokens: exits between its decoder's layers, thresholds with a guarantee, and a comparison with the full student.

    llmdistill run dynamic --checkpoint runs/quickstart/latest/multitask
    llmdistill run dynamic --checkpoint FOLDER --deltas 0.01 0.02 --confidence gate --trains whole --layer-dropout 0.1
    llmdistill serve runs/dynamic/latest/calibrated

The checkpoint is one of ours, whatever was done to it, or a stock T5, Llama or Qwen2. Its exits learn the labels and reasons of the rows, and what the last
layer says of them. On the validation rows thresholds are then found such that, with probability 1 - epsilon, the expected loss of quality is at most each
delta; the report has the full student beside the one that leaves early at the first of them. `--quantize` makes the student int8 in between.

Labels and reasons to train on are the student's own answers (`own`), known ones with their rationales (`given`) or a file of a teacher's
(`file:rationales.jsonl`).
"""

from pathlib import Path
from typing import Any

from llmdistill.compress.int8 import Int8
from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.exits.quality import Quality
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.exit_settings import Confidence, Policy
from llmdistill.models.student import Pretrained
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.compress import Compress
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.exits import TrainExits, Trains, Vocabulary
from llmdistill.stages.report import ReportStage
from llmdistill.stages.rows_to_learn import Own, RowsToLearn, rows_to_learn
from llmdistill.stages.take import Take
from llmdistill.tasks.options import TaskOption, Tickets
from llmdistill.train_settings import Epochs, Steps, TrainSettings


def pipeline(
    checkpoint: str,
    task: TaskOption = Tickets(),
    rationales: RowsToLearn = Own(),
    num_exits: int = 3,
    layers: tuple[int, ...] = (),
    encoder_layers: tuple[int, ...] = (),
    trains: Trains = Trains.EXITS,
    adapter_rank: int = 0,
    vocabulary: Vocabulary = Vocabulary.OF_ROWS,
    layer_dropout: float = 0.0,
    input_noise: float = 0.0,
    loss: Multitask | LabelOnly | RationaleOnly = Multitask(),
    duration: Epochs | Steps = Epochs(8),
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    quantize: bool = False,
    confidence: Confidence = Confidence.TOP1,
    policy: Policy = Policy.DEFERRED,
    decay: float = 0.0,
    deltas: tuple[float, ...] = (0.02, 0.05),
    epsilon: float = 0.05,
    quality: Quality = Quality.CORRECT,
    max_input_tokens: int = 512,
    max_target_tokens: int = 128,
    seed: int = 0,
) -> Stage[Report]:
    """A checkpoint and the rows of a task; a checkpoint whose tokens leave early, and a report.

    Args:
        checkpoint: A folder, a hub id with its revision, or a package's weights; see llmdistill/models/source.py.
        task: The rows that the student is for; known answers, where there are any, are for its accuracy.
        rationales: Whose labels and reasons the exits learn.
        num_exits: Spread evenly over the decoder's layers.
        layers: After which layers the exits are instead; empty for evenly.
        encoder_layers: After which layers of a T5's encoder a prompt may leave.
        trains: The exits alone, which leaves the full student what it was, or the whole student with them.
        adapter_rank: Of a low-rank map before each exit's head; 0 for none.
        vocabulary: What an exit can say: the tokens of the rows' answers, or all.
        layer_dropout: Rate at which the last layer is left out in training, where the whole student is trained.
        input_noise: The most of a row's input tokens that are replaced by others in training; 0.6 for gates that can tell.
        loss: What matters in the rows: labels, rationales or both.
        duration: Of the training.
        learning_rate: At its peak, after warm-up.
        batch_size: Rows of one step.
        quantize: Make the student int8 before the thresholds are found.
        confidence: By what a token is judged at an exit.
        policy: Where keys and values of layers that a token did not go through come from.
        decay: How fast the threshold falls along an answer; 0 keeps it.
        deltas: The loss of quality that may be expected, each with a threshold of its own.
        epsilon: The probability with which that may fail.
        quality: What must not be lost: known answers, or the full student's.
        max_input_tokens: Longer inputs are cut.
        max_target_tokens: Longer labels and rationales are cut.
        seed: Of the order of the rows and of what the exits begin with.
    """
    rows = task.task()
    student = Take(name="student", source=Pretrained(source=checkpoint))
    answers = rows_to_learn(rationales, rows, student)
    limits: Any = {"max_input_tokens": max_input_tokens, "max_target_tokens": max_target_tokens}
    exits: Stage[Checkpoint] = TrainExits(
        name="exits",
        checkpoint=student,
        task=rows,
        rationales=answers,
        loss=loss,
        num_exits=num_exits,
        layers=layers,
        encoder_layers=encoder_layers,
        adapter_rank=adapter_rank,
        vocabulary=vocabulary,
        trains=trains,
        layer_dropout=layer_dropout,
        input_noise=input_noise,
        settings=TrainSettings(duration=duration, learning_rate=learning_rate, batch_size=batch_size, evaluate_every_steps=50),
        seed=seed,
        **limits,
    )
    if quantize:
        exits = Compress(name="int8", checkpoint=exits, methods=(Int8(),), task=rows, rationales=answers, loss=loss, seed=seed, **limits)
    calibrated = CalibrateExits(
        name="calibrated",
        checkpoint=exits,
        task=rows,
        deltas=deltas,
        epsilon=epsilon,
        quality=quality,
        confidence=confidence,
        policy=policy,
        decay=decay,
        seed=seed,
    )
    students = (student, *((exits,) if quantize or trains is Trains.WHOLE else ()), calibrated)
    evaluations = tuple(Evaluate(name=f"evaluate_{one.name}", checkpoint=one, task=rows, rationales=answers) for one in students)
    return ReportStage(title=f"Early exits of {Path(checkpoint).name}", evaluations=evaluations, rationales=answers)


if __name__ == "__main__":
    main(pipeline)
