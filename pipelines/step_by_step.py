"""Distilling step-by-step (Hsieh et al. 2023) as its authors do it, for users with a model hub and a GPU: vLLM runs the teacher, flan-T5 is the student.

    pip install 'llmdistill[vllm]'
    llmdistill run step_by_step --dry-run
    llmdistill run step_by_step

The task is `tickets` until you name your own rows and a prompt whose examples end as your answers do:

    llmdistill run step_by_step --prompt prompts/nli.jinja --task \
        'choices:nli.jsonl?choices=entailment,neutral,contradiction&input={premise} {hypothesis}&gold=label'

Learning rate, batch size, lengths and number of steps are the defaults of the authors' code, whose loss counts label and rationale alike, as ours does at
weight 1. Where we differ: training stops when the validation loss no longer improves, the best weights are kept, and hub models are named by their commits.
A folder in place of a hub id works too, for the teacher (`transformers:./folder`, `vllm:./folder`) and for the student (`pretrained:./folder`).
"""

import math
from pathlib import Path

from llmdistill.core.artifacts import Rationales, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.student import Pretrained, Student
from llmdistill.stages.annotate import Annotate
from llmdistill.stages.distil import Distil, Labels
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.evaluate_baseline import EvaluateBaseline
from llmdistill.stages.import_rationales import RationaleFile
from llmdistill.stages.report import ReportStage
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.options import TaskOption, Tickets
from llmdistill.teach.options import TeacherOption
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.teacher import Sampling
from llmdistill.teach.verify import Verification
from llmdistill.teach.vllm_teacher import VLLMTeacher
from llmdistill.train_settings import Epochs, Precision, Steps, TrainSettings
from llmdistill.tuning import Full, LoRA

PROMPTS = Path(__file__).parent.parent / "prompts"


def pipeline(
    task: TaskOption = Tickets(),
    prompt: Path = PROMPTS / "tickets.jinja",
    teacher: RationaleFile | TeacherOption = VLLMTeacher(source="Qwen/Qwen2.5-7B-Instruct@a09a35458c702b33eeacc393d103063234e8bc28"),
    student: Student = Pretrained(source="google/flan-t5-small@0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab"),
    losses: tuple[Multitask | LabelOnly | RationaleOnly, ...] = (LabelOnly(), Multitask()),
    labels: Labels = Labels.TEACHER,
    num_samples: int = 1,
    temperature: float = 0.0,
    max_completion_tokens: int = 128,
    check_gold: bool = False,
    max_rows: float = math.inf,
    max_cost: float = math.inf,
    max_tokens: float = math.inf,
    tuning: Full | LoRA = Full(),
    duration: Epochs | Steps = Steps(10_000),
    patience_evaluations: int = 10,
    evaluate_every_steps: int = 250,
    learning_rate: float = 5e-5,
    batch_size: int = 64,
    max_input_tokens: int = 1024,
    max_target_tokens: int = 256,
    seed: int = 0,
) -> Stage[Report]:
    """From unlabelled rows and a hub teacher to T5 students and a report.

    Args:
        task: The rows, what the student reads of them, and the kind of answer.
        prompt: The few-shot template that the teacher completes; its variables are the columns of the rows.
        teacher: Who labels and explains the rows, or a file with rationales that exist already.
        student: What is trained.
        losses: One student is trained for each; they share the teacher's answers.
        labels: Whose labels the students learn, the teacher's or the known ones.
        num_samples: The teacher's answers to each row; the majority counts. More than one needs a temperature.
        temperature: Of the teacher's sampling; 0 takes the likeliest token.
        max_completion_tokens: What the teacher may write for one row.
        check_gold: Leave out train rows whose known label the teacher did not give.
        max_rows: Annotate so many rows, a fair sample of all splits.
        max_cost: Stop before the teacher costs more dollars than this; everything is kept.
        max_tokens: Stop before the teacher reads and writes more tokens than this; everything is kept.
        tuning: All weights, or low-rank updates that are merged at the end.
        duration: Of each training, at most.
        patience_evaluations: Stop after so many evaluations without a better one; 0 trains to the end.
        evaluate_every_steps: Validation rows are looked at this often.
        learning_rate: At its peak, after warm-up.
        batch_size: Rows of one step.
        max_input_tokens: Longer inputs are cut.
        max_target_tokens: Longer labels and rationales are cut, in training.
        seed: Of the teacher's sampling, of dropout and of the order of the rows.
    """
    rows, verification = task.task(), Verification(check_gold=check_gold)
    if isinstance(teacher, RationaleFile):
        rationales: Stage[Rationales] = teacher.stage(rows, verification)
    else:
        rationales = Annotate(
            task=rows,
            teacher=teacher,
            prompt=Prompt(path=prompt, stop=("\n", ").")),
            sampling=Sampling(max_tokens=max_completion_tokens, temperature=temperature, seed=seed),
            num_samples=num_samples,
            max_rows=max_rows,
            verification=verification,
            max_cost_dollars=max_cost,
            max_tokens=max_tokens,
        )
    settings = TrainSettings(
        batch_size=batch_size,
        duration=duration,
        learning_rate=learning_rate,
        precision=Precision.FASTEST,
        evaluate_every_steps=evaluate_every_steps,
        patience_evaluations=patience_evaluations,
    )
    students = tuple(
        Distil(
            name=loss.kind.replace("-", "_"),
            task=rows,
            rationales=rationales,
            student=student,
            loss=loss,
            labels=labels,
            tuning=tuning,
            settings=settings,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            seed=seed,
        )
        for loss in losses
    )
    evaluations = tuple(Evaluate(name=f"evaluate_{trained.name}", checkpoint=trained, task=rows, rationales=rationales) for trained in students)
    baselines = (EvaluateBaseline(task=rows, rationales=rationales, labels=labels),) if isinstance(rows.answer, Choice) else ()
    return ReportStage(title="Distilling step-by-step", evaluations=evaluations, baselines=baselines, rationales=rationales)


if __name__ == "__main__":
    main(pipeline)
