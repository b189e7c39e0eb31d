"""The whole job on one machine and no model hub: a teacher's rationales, two students, a smaller one, a comparison, a report.

The task is `tickets`: messages to a shop's support desk and the intent behind each. The teacher's answers come from a recording that is shipped with
llmdistill, so nobody is asked; `--teacher transformers:...` (or vllm:, openai:) asks one again. The student is a T5 of 1.8 million parameters, built
from scratch, with a tokenizer trained on the messages. It is trained twice, with the teacher's labels alone and with labels and rationales together
(Distilling step-by-step, Hsieh et al. 2023), and the report says which did better, beside a bag-of-words classifier that learned from the same labels.

The student with labels alone is then compressed: every linear, the embedding and the head get a lower rank, a short re-distillation recovers what that cost,
and what is left becomes int8. It is decoded as int8 and takes a fifth of the bytes.

It is also made elastic: trained on, so that its first neurons, heads, channels and layers are students too. Some of these are timed and judged on this machine,
and the best one of at most 4 MB becomes a checkpoint of its own.

What is served in the end is all of it at once: the elastic student's largest sub-network gets an exit after its decoder's first layer, is made int8 and
trained again for a while with the rounding, and a threshold is found at which tokens may leave early and, with probability 0.95, at most two points of
accuracy are lost.

The messages come with their true intents, and those of the train rows are used for one thing: what the teacher got wrong is refused and not taught
(`--no-check-gold` teaches it all, as one must where nothing is known). The teacher is wrong on three train rows of ten, and a student that knows no language
to begin with cannot tell those from the others.

    llmdistill run quickstart
    llmdistill serve runs/quickstart/latest/served
"""

from dataclasses import replace
from pathlib import Path

from llmdistill.compress.int8 import Int8
from llmdistill.compress.recovery import Recover
from llmdistill.compress.svd import SVD, Scope
from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.latency import LatencySetting
from llmdistill.elastic.question import Limit
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.models.student import ScratchT5, Student
from llmdistill.stages.annotate import Annotate
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.compress import Compress
from llmdistill.stages.distil import Distil
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.evaluate_baseline import EvaluateBaseline
from llmdistill.stages.exits import TrainExits
from llmdistill.stages.extract import Extract
from llmdistill.stages.report import ReportStage
from llmdistill.stages.search import SearchSubnets
from llmdistill.tasks.tickets import RECORDING, tickets
from llmdistill.teach.options import TeacherOption
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.recorded import Recorded
from llmdistill.teach.teacher import Sampling
from llmdistill.teach.verify import Verification
from llmdistill.train_settings import Adafactor, Best, Epochs, TrainSettings

PROMPT = Path(__file__).parent.parent / "prompts" / "tickets.jinja"


def pipeline(
    teacher: TeacherOption = Recorded(folder=RECORDING),
    check_gold: bool = True,
    student: Student = ScratchT5(lower_case=True),
    rationale_weight: float = 0.5,
    num_epochs: float = 16,
    learning_rate: float = 1e-2,
    batch_size: int = 32,
    keep: float = 0.8,
    recovery_epochs: float = 2,
    elastic_epochs: float = 12,
    elastic_limits: tuple[str, ...] = ("weight_bytes<=4e6",),
    exit_epochs: float = 6,
    delta: float = 0.02,
    seed: int = 0,
) -> Stage[Report]:
    """Tickets, from a teacher's rationales to two students, a compressed one, an elastic one, one that is served, and a report.

    Args:
        teacher: Who labels and explains the messages; by default a recording of Qwen2.5-Coder-1.5B-Instruct.
        check_gold: Refuse train and validation rows on which the teacher contradicts the known intent.
        student: What is trained.
        rationale_weight: lambda in L = L_label + lambda * L_rationale.
        num_epochs: Passes over the train rows.
        learning_rate: At its peak, after warm-up; Adafactor takes it relative to the size of the weights.
        batch_size: Examples of one step.
        keep: Share of the parameters that low rank leaves of the compressed student, before int8.
        recovery_epochs: Passes over the train rows after the ranks are lowered.
        elastic_epochs: Passes over the train rows that make the student elastic.
        elastic_limits: What the chosen sub-network must keep, such as latency_ms_batch_1<=3 or weight_bytes<=4e6 (in float32).
        exit_epochs: Passes over the train rows that train the exit.
        delta: The loss of accuracy that may be expected of tokens that leave early; 0.01 is one point.
        seed: Of the student's initial weights, of dropout and of the order of the rows.
    """
    task = tickets()
    prompt = Prompt(path=PROMPT, stop=("\n", ")."))
    rationales = Annotate(task=task, teacher=teacher, prompt=prompt, sampling=Sampling(max_tokens=64), verification=Verification(check_gold=check_gold))
    # Adafactor, as T5 was trained: embeddings start at a size of 1, and by Adam's steps of one size for all a rare word's would hardly move.
    settings = TrainSettings(
        batch_size=batch_size, duration=Epochs(num_epochs), learning_rate=learning_rate, optimizer=Adafactor(), evaluate_every_steps=50, best=Best.ACCURACY
    )
    students: tuple[Stage[Checkpoint], ...] = (
        Distil(name="label_only", task=task, rationales=rationales, student=student, loss=LabelOnly(), settings=settings, seed=seed),
        Distil(
            name="multitask", task=task, rationales=rationales, student=student, loss=Multitask(rationale_weight=rationale_weight), settings=settings, seed=seed
        ),
    )
    compressed = Compress(
        name="compressed",
        checkpoint=students[0],
        methods=(SVD(keep=keep, scope=(Scope.ATTENTION, Scope.FEED_FORWARD, Scope.EMBEDDINGS)), Int8()),
        task=task,
        rationales=rationales,
        loss=LabelOnly(),
        recover=Recover(settings=TrainSettings(batch_size=batch_size, duration=Epochs(recovery_epochs), learning_rate=2e-4, evaluate_every_steps=25)),
        seed=seed,
    )
    elastic = Elastic(
        name="elastic",
        checkpoint=students[0],
        task=task,
        rationales=rationales,
        axes=Axes(ffn=(0.25, 0.5, 0.75), heads=(0.5, 0.75), depth=(0.5,), width=(0.5, 0.75), even=True),
        loss=LabelOnly(),
        settings=replace(settings, duration=Epochs(elastic_epochs), best=Best.LOSS),
        seed=seed,
    )
    search = SearchSubnets(
        name="search",
        checkpoint=elastic,
        task=task,
        rationales=rationales,
        loss=LabelOnly(),
        latencies=(LatencySetting(prompt_tokens=32, new_tokens=6),),
        num_samples=48,
        limits=tuple(Limit.parse(limit) for limit in elastic_limits),
        seed=seed,
    )
    chosen = Extract(name="chosen", checkpoint=elastic, subnet=search)
    largest = Extract(name="largest", checkpoint=elastic, subnet="largest")
    exits = TrainExits(
        name="exits",
        checkpoint=largest,
        task=task,
        rationales=rationales,
        loss=LabelOnly(),
        settings=TrainSettings(batch_size=batch_size, duration=Epochs(exit_epochs), learning_rate=3e-3, evaluate_every_steps=25),
        seed=seed,
    )
    recover = Recover(
        settings=TrainSettings(batch_size=batch_size, duration=Epochs(recovery_epochs), learning_rate=2e-4, evaluate_every_steps=25), quantization_aware=True
    )
    int8 = Compress(name="int8", checkpoint=exits, methods=(Int8(),), task=task, rationales=rationales, loss=LabelOnly(), recover=recover, seed=seed)
    served = CalibrateExits(name="served", checkpoint=int8, task=task, deltas=(delta,), seed=seed)
    checkpoints = (*students, compressed, elastic, chosen, int8, served)
    evaluations = tuple(Evaluate(name=f"evaluate_{one.name}", checkpoint=one, task=task, rationales=rationales) for one in checkpoints)
    baseline = EvaluateBaseline(task=task, rationales=rationales)
    return ReportStage(title="Quickstart: support tickets", evaluations=evaluations, baselines=(baseline,), rationales=rationales, searches=(search,))


if __name__ == "__main__":
    main(pipeline)
