"""What compression costs the quickstart's student: dense, int8, low rank, low rank and int8, each without and with recovery.

    llmdistill run quickstart
    llmdistill run benchmarks/compression.py
    llmdistill report compression

A pipeline like any other, whose first stages are the quickstart's own and are found built. The report has accuracy on the test rows with its interval, bytes,
latency and tokens/s of each, side by side, and what became of each layer. Int8 alone recovers with its rounding in the forward pass (LSQ).
"""

from pathlib import Path

from llmdistill.compress.int8 import Int8
from llmdistill.compress.recovery import Recover
from llmdistill.compress.svd import SVD, Scope
from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load, main
from llmdistill.core.stage import Stage
from llmdistill.losses.multitask import LabelOnly
from llmdistill.stages.annotate import Annotate
from llmdistill.stages.compress import Compress
from llmdistill.stages.distil import Distil
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.report import ReportStage
from llmdistill.train_settings import Epochs, TrainSettings

QUICKSTART = Path(__file__).parent.parent / "pipelines" / "quickstart.py"


def pipeline(keep: float = 0.8, num_epochs: float = 2, learning_rate: float = 2e-4, seed: int = 0) -> Stage[Report]:
    """The quickstart's label-only student and six compressed ones.

    Args:
        keep: Share of the parameters that low rank leaves, embedding and head included.
        num_epochs: Of each recovery.
        learning_rate: Of each recovery, at its peak.
        seed: Of the recoveries.
    """
    by_name = {stage.name: stage for stage in Graph.above(load(QUICKSTART)()).stages}
    dense, rationales = by_name["label_only"], by_name["annotate"]
    assert isinstance(dense, Distil)
    assert isinstance(rationales, Annotate)
    low_rank, int8 = SVD(keep=keep, scope=(Scope.ATTENTION, Scope.FEED_FORWARD, Scope.EMBEDDINGS)), Int8()
    settings = TrainSettings(duration=Epochs(num_epochs), learning_rate=learning_rate, evaluate_every_steps=25)
    students: list[Stage[Checkpoint]] = [dense]
    for name, methods, is_aware in (("int8", (int8,), True), ("low_rank", (low_rank,), False), ("low_rank_int8", (low_rank, int8), False)):
        for ending, recover in (("", None), ("_recovered", Recover(settings=settings, quantization_aware=is_aware))):
            compressed = Compress(
                name=name + ending, checkpoint=dense, methods=methods, task=dense.task, rationales=rationales, loss=LabelOnly(), recover=recover, seed=seed
            )
            students.append(compressed)
    evaluations = tuple(Evaluate(name=f"evaluate_{one.name}", checkpoint=one, task=dense.task, rationales=rationales) for one in students)
    return ReportStage(title="Compression of the quickstart's student", evaluations=evaluations, rationales=rationales)


if __name__ == "__main__":
    main(pipeline)
