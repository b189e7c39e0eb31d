"""Any student made elastic, searched on this machine, and cut: a checkpoint of ours, or a stock T5, Llama or Qwen2, and the rows of a task.

    llmdistill run elastic --checkpoint runs/quickstart/latest/label_only
    llmdistill run elastic --checkpoint runs/quickstart/latest/label_only --limits 'latency_ms_batch_1<=3' 'weight_bytes<=4000000'

The student is trained so that the first neurons, heads and layers of it are students too. Some of these are measured, accuracy on the validation rows and
latency on this machine, and from what they say of the others the best within the limits is found. It is extracted as an ordinary checkpoint, evaluated on
the test rows beside the whole student and the smallest, and can be compressed and served as any. Any other one is had with `llmdistill extract`.

    llmdistill run elastic --checkpoint runs/quickstart/latest/label_only --num-exits 1 --deltas 0.02
    llmdistill serve runs/elastic/latest/calibrated --front runs/elastic/latest/search --target-p95-ms 50

With exits, tokens may leave the decoder early too: the whole and every sub-network of the front get thresholds of their own, so that the server chooses among
sub-networks times risks.

Labels and reasons to train on are the student's own answers (`own`), known ones with their rationales (`given`) or a file of a teacher's
(`file:rationales.jsonl`).
"""

from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.evolution import Evolution
from llmdistill.elastic.latency import LatencySetting
from llmdistill.elastic.question import Limit
from llmdistill.elastic.strategy import Progressive, Sandwich
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.student import Pretrained
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.exits import TrainExits
from llmdistill.stages.extract import Extract
from llmdistill.stages.report import ReportStage
from llmdistill.stages.rows_to_learn import Own, RowsToLearn, rows_to_learn
from llmdistill.stages.search import SearchMethod, SearchSubnets
from llmdistill.stages.take import Take
from llmdistill.tasks.options import TaskOption, Tickets
from llmdistill.train_settings import Epochs, Steps, TrainSettings


def pipeline(
    checkpoint: str,
    task: TaskOption = Tickets(),
    rationales: RowsToLearn = Own(),
    axes: Axes = Axes(),
    strategy: Sandwich | Progressive = Sandwich(),
    loss: Multitask | LabelOnly | RationaleOnly = Multitask(),
    duration: Epochs | Steps = Epochs(8),
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    limits: tuple[str, ...] = (),
    methods: tuple[SearchMethod, ...] = (Evolution(),),
    latency: LatencySetting = LatencySetting(),
    num_samples: int = 100,
    budget: float = 1000,
    max_input_tokens: int = 512,
    max_target_tokens: int = 128,
    num_exits: int = 0,
    deltas: tuple[float, ...] = (0.02, 0.05),
    seed: int = 0,
) -> Stage[Report]:
    """A checkpoint and the rows of a task; an elastic checkpoint, the best sub-network within the limits, and a report.

    Args:
        checkpoint: A folder, a hub id with its revision, or a package's weights; see llmdistill/models/source.py.
        task: The rows that the student is for; known answers, where there are any, are for its accuracy.
        rationales: Whose labels and reasons the sub-networks learn.
        axes: What of the student may be cut, and to which fractions.
        strategy: Which sub-networks are trained at each step.
        loss: What matters in the rows: labels, rationales or both.
        duration: Of the training.
        learning_rate: At its peak, after warm-up.
        batch_size: Rows of one step.
        limits: What the chosen sub-network must keep, such as 'latency_ms_batch_1<=20' 'weight_bytes<=1e7' (in float32).
        methods: How the front is searched for; each has the same budget.
        latency: The batch size and the lengths at which sub-networks are timed on this machine.
        num_samples: Sub-networks that are measured, to predict all others from.
        budget: Predicted accuracies that each method may ask for.
        max_input_tokens: Longer inputs are cut.
        max_target_tokens: Longer labels and rationales are cut.
        num_exits: Early exits between the decoder's layers, for the whole and its sub-networks.
        deltas: The loss of quality that may be expected of them, each with thresholds of its own.
        seed: Of training, samples and searches.
    """
    rows = task.task()
    student = Take(name="student", source=Pretrained(source=checkpoint))
    answers = rows_to_learn(rationales, rows, student)
    lengths: Any = {"max_input_tokens": max_input_tokens, "max_target_tokens": max_target_tokens}
    elastic = Elastic(
        checkpoint=student,
        task=rows,
        rationales=answers,
        axes=axes,
        strategy=strategy,
        loss=loss,
        settings=TrainSettings(duration=duration, learning_rate=learning_rate, batch_size=batch_size, evaluate_every_steps=50),
        seed=seed,
        **lengths,
    )
    search = SearchSubnets(
        name="search",
        checkpoint=elastic,
        task=rows,
        rationales=answers,
        methods=methods,
        latencies=(latency,),
        cost=latency.name,
        limits=tuple(Limit.parse(limit) for limit in limits),
        loss=loss,
        num_samples=num_samples,
        budget=budget,
        seed=seed,
    )
    chosen, smallest = Extract(name="chosen", checkpoint=elastic, subnet=search), Extract(name="smallest", checkpoint=elastic)
    students: tuple[Stage[Checkpoint], ...] = (student, elastic, chosen, smallest)
    if num_exits:
        exits = TrainExits(name="exits", checkpoint=elastic, task=rows, rationales=answers, loss=loss, num_exits=num_exits, seed=seed, **lengths)
        calibrated = CalibrateExits(name="calibrated", checkpoint=exits, task=rows, deltas=deltas, subnets=search, seed=seed)
        students = (*students, calibrated, Extract(name="chosen_early", checkpoint=calibrated, subnet=search))
    evaluations = tuple(Evaluate(name=f"evaluate_{one.name}", checkpoint=one, task=rows, rationales=answers) for one in students)
    return ReportStage(title=f"Sub-networks of {Path(checkpoint).name}", evaluations=evaluations, rationales=answers, searches=(search,))


if __name__ == "__main__":
    main(pipeline)
