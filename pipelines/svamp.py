"""SVAMP (Patel et al. 2021) with the completions of PaLM 540B that were published with Distilling step-by-step (Hsieh et al. 2023): no teacher is asked.

The folder is laid out as its authors publish it (llmdistill/tasks/svamp.py says how); completions are joined with their problems by position, and a file that
lacks one or has them in another order is an error that says where it begins.

The report states how many of the teacher's labels are right, on train and on test. The authors report 73.5% and 74.0%; by their rule the report says the same
(accuracy_train_published_rule, accuracy_published_rule). Ours (accuracy_train, accuracy) are 74.25% and 77.5%, and it is ours that the students learn from: of
"The answer is (12 - 2) - 7." we read the whole expression and not what stands in brackets.

    llmdistill run svamp --data FOLDER
    llmdistill run svamp --data FOLDER --student pretrained:google/flan-t5-small --learning-rate 3e-4

A T5 from scratch learns the form of an equation from 700 problems and hardly which one: that is what pretraining is for, and the second line needs a model hub.
"""

from pathlib import Path

from llmdistill.core.artifacts import Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.student import ScratchT5, Student
from llmdistill.stages.distil import Distil, Labels
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.published_rationales import PublishedRationales
from llmdistill.stages.report import ReportStage
from llmdistill.tasks.svamp import COMPLETIONS, svamp
from llmdistill.teach.verify import Verification
from llmdistill.train_settings import Epochs, Steps, TrainSettings


def pipeline(
    data: Path,
    student: Student = ScratchT5(vocabulary_size=1024),
    losses: tuple[Multitask | LabelOnly | RationaleOnly, ...] = (LabelOnly(), Multitask()),
    labels: Labels = Labels.TEACHER,
    check_gold: bool = False,
    duration: Epochs | Steps = Epochs(30),
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> Stage[Report]:
    """SVAMP, from PaLM's published completions to students and a report.

    Args:
        data: The folder with svamp_train.json, svamp_test.json and llm/train_CoT_0.json and so on.
        student: What is trained.
        losses: One student is trained for each.
        labels: Whose labels the students learn, the teacher's or the known ones.
        check_gold: Leave out train problems that the teacher answered wrongly.
        duration: Of each training.
        learning_rate: At its peak, after warm-up.
        batch_size: Problems of one step.
        seed: Of the student's initial weights, of dropout and of the order of the problems.
    """
    task = svamp(data)
    rationales = PublishedRationales(task=task, folder=data / COMPLETIONS, verification=Verification(check_gold=check_gold))
    settings = TrainSettings(batch_size=batch_size, duration=duration, learning_rate=learning_rate)
    students = tuple(
        Distil(
            name=loss.kind.replace("-", "_"),
            task=task,
            rationales=rationales,
            student=student,
            loss=loss,
            labels=labels,
            settings=settings,
            max_target_tokens=256,
            seed=seed,
        )
        for loss in losses
    )
    evaluations = tuple(Evaluate(name=f"evaluate_{trained.name}", checkpoint=trained, task=task, rationales=rationales) for trained in students)
    return ReportStage(title="SVAMP, with the published completions of PaLM 540B", evaluations=evaluations, rationales=rationales)


if __name__ == "__main__":
    main(pipeline)
