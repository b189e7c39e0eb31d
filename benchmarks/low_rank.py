"""What low rank costs a real model, SmolLM2-135M-Instruct on real text: `python benchmarks/low_rank.py --data FOLDER --out low_rank.json`.

FOLDER holds gsm8k's train.jsonl (calibration) and test.jsonl (held out); without it both are reasoning-gym's gsm_symbolic, of other seeds. Text is cut into
rows of 256 tokens.

(a) The error of a layer's outputs on held-out inputs, ||X (W - W')|| / ||X W||, at equal rank: whitened against plain and ASVD. Goal: at most half of plain's.
(b) Held-out perplexity with 20, 40 and 60% of the weights of all attention and feed-forward linears removed; how ranks are best divided (`ranks`), and whether
    taking layers in order and refining them helps (`shift`).
(c) The same for q, k and v alone, where QSVD shares one projection among them (`attention`).
(d) What a short re-distillation brings back (`recovery`): each form before and after it, on other train rows than those of the calibration.

Statistics and gradients are collected once and used for all of (a) and (b), so seconds there are those of ranks and factors only.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_student import own_student
from solved_problems import MODEL, ROW_TOKENS, examples, smollm2

from llmdistill.batches import Example
from llmdistill.compress import low_rank_maths as maths
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.importance import Importance
from llmdistill.compress.qsvd import QSVD, Outputs
from llmdistill.compress.ranks import Allocation, Budget
from llmdistill.compress.slots import Role, slots
from llmdistill.compress.statistics import input_statistics
from llmdistill.compress.svd import SVD, Data, Scope
from llmdistill.compress.svd_apply import by_loss as loss_ordered
from llmdistill.compress.svd_apply import factorise
from llmdistill.compress.svd_found import Found, found_of
from llmdistill.compress.svd_targets import Target, targets_of
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.modes import evaluating
from llmdistill.train import Lessons

LOSS = Importance.LOSS
"""Of text that the model does not know by heart, the better guide (compress/answers_loss.py)."""
GOAL_RATIO = 0.5
FORMS = ["plain", "activation", "whitened", "qsvd"]
PARTS = ["errors", "perplexity", "ranks", "shift", "attention", "recovery"]


class Bench:
    """The model, its rows, and what was measured."""

    def __init__(self, model: Any, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        start = time.perf_counter()
        with evaluating(model), torch.no_grad():
            self.statistics = input_statistics(model, slots(model)[:-1], calibration)
            self.held_out = input_statistics(model, slots(model)[:-1], replace(calibration, examples=calibration.held_out))
        print(f"statistics of {len(calibration.examples)} + {len(calibration.held_out)} rows: {time.perf_counter() - start:.0f} s", flush=True)
        self.found: dict[tuple[Data, Importance], dict[str, Found]] = {}
        self.measured: dict[Any, dict[str, Any]] = {}

    def targets(self, scope: Sequence[Scope] = (Scope.ATTENTION, Scope.FEED_FORWARD)) -> list[Target]:
        return targets_of(self.model, scope, Budget.PARAMETERS, self.calibration, counts_tokens=False)[0]

    def look(self, data: Data, importance: Importance = Importance.ENERGY) -> dict[str, Found]:
        """Spectra of all targets, their directions in the order of their energy or of what they do to the loss or the answers."""
        if (data, importance) not in self.found:
            settings = SVD(data=data, importance=importance, num_gradient_rows=min(64, len(self.calibration.examples)))
            if importance is not Importance.ENERGY:
                self.found[data, importance] = loss_ordered(settings, self.model, self.calibration, self.targets(), self.look(data))
            else:
                statistics = {} if data is Data.PLAIN else self.statistics
                found = {target.path: found_of(settings, target, statistics.get(target.slot.input) if target.slot else None) for target in self.targets()}
                self.found[data, importance] = found
        return self.found[data, importance]

    def perplexity(self, settings: Any, *, only: Collection[str] = ()) -> dict[str, Any]:
        """Of the model compressed so, or only the linears of these paths; a copy of it is changed. Nothing is measured twice."""
        if (settings, tuple(only)) in self.measured:
            return self.measured[settings, tuple(only)]
        model = copy.deepcopy(self.model)
        start = time.perf_counter()
        if isinstance(settings, SVD) and not settings.in_order:
            targets, kept = targets_of(model, settings.scope, settings.budget, self.calibration, counts_tokens=False)
            targets = [target for target in targets if not only or target.path in only]
            found = self.look(settings.data, settings.importance if settings.ranks is Allocation.GLOBAL else Importance.ENERGY)
            applied = factorise(settings, model, self.calibration, targets, kept, found)
        else:
            applied = settings.apply(model, self.calibration)
        seconds = time.perf_counter() - start
        loss = self.calibration.mean_loss(model)
        dense = sum(one.kind == "kept" for one in applied.layers)
        measured = {
            "perplexity": math.exp(min(loss, 50.0)),
            "loss_nats": loss,
            "seconds": seconds,
            "layers_dense": dense,
            "share_kept": applied.figures["share_kept"],
        }
        self.measured[settings, tuple(only)] = measured
        return measured


def layer_errors(bench: Bench, keep: float) -> dict[str, Any]:
    """(a), at the ranks that keep the same share of every layer."""
    errors: dict[str, dict[str, float]] = {}
    for target in bench.targets():
        assert target.slot is not None
        rank_cost, full_cost = target.costs(Budget.PARAMETERS)
        rank, gram_II, weight_OI = int(keep * full_cost / rank_cost), bench.held_out[target.slot.input].gram_II, target.weight_OI.detach().double()
        errors[target.path] = {}
        for data in Data:
            left_OR = bench.look(data)[target.path].spectrum.left_OK[:, :rank].double()
            errors[target.path][data.name.lower()] = maths.output_error(weight_OI, left_OR @ (left_OR.t() @ weight_OI), gram_II)
    ratios = {other: [one["whitened"] / one[other] for one in errors.values()] for other in ("plain", "activation")}
    return {
        "keep": keep,
        "mean_error": {data.name.lower(): float(np.mean([one[data.name.lower()] for one in errors.values()])) for data in Data},
        "mean_ratio": {other: float(np.mean(values)) for other, values in ratios.items()},
        "layers": errors,
    }


def perplexities(bench: Bench, keep: float) -> dict[str, Any]:
    """(b): the three forms with the same share for each layer, as in their papers, and with ranks by what they do to the loss."""
    uniform = {f"{data.name.lower()} uniform": bench.perplexity(SVD(keep=keep, data=data, ranks=Allocation.UNIFORM)) for data in Data}
    return uniform | {f"{data.name.lower()} by loss": bench.perplexity(SVD(keep=keep, data=data, importance=LOSS)) for data in Data}


def rank_choices(bench: Bench, keep: float) -> dict[str, Any]:
    """Whitened, with each division of the budget."""
    forms = {"uniform": SVD(keep=keep, ranks=Allocation.UNIFORM), "energy": SVD(keep=keep, ranks=Allocation.ENERGY)}
    forms |= {f"global by {importance.name.lower()}": SVD(keep=keep, importance=importance) for importance in Importance}
    return {name: bench.perplexity(settings) for name, settings in forms.items()}


def shifted_inputs(bench: Bench, keep: float) -> dict[str, Any]:
    """Statistics taken once, in order, and in order with refinement; the same share of every layer."""
    once = SVD(keep=keep, ranks=Allocation.UNIFORM)
    forms = {"once": once, "in order": replace(once, in_order=True), "refined": replace(once, in_order=True, refine=True)}
    return {name: bench.perplexity(settings) for name, settings in forms.items()}


def attention_alone(bench: Bench, keep: float) -> dict[str, Any]:
    """(c): q, k and v of low rank, each with factors of its own and with a shared projection, at the same number of parameters."""
    own = [target for target in bench.targets((Scope.ATTENTION,)) if target.slot is not None and target.slot.role in (Role.Q, Role.K, Role.V)]
    return {"svd": bench.perplexity(SVD(keep=keep, importance=LOSS), only={target.path for target in own}), "qsvd": bench.perplexity(_qsvd(keep))}


def _qsvd(keep: float) -> QSVD:
    return QSVD(keep=keep, importance=LOSS, outputs=Outputs.LOSS)


def recoveries(bench: Bench, keep: float, lessons: Sequence[Example], epochs: float, wanted: Sequence[str]) -> dict[str, Any]:
    """(d): perplexity before and after, with the dense model as teacher, all weights trained. Of QSVD's, o stays dense."""
    from llmdistill.compress.recover_run import recover
    from llmdistill.compress.recovery import Recover
    from llmdistill.losses.recover import RecoveryLoss
    from llmdistill.train_settings import Epochs, TrainSettings

    settings = TrainSettings(duration=Epochs(epochs), learning_rate=1e-4, batch_size=8, micro_batch_size=1, evaluate_every_steps=4)
    forms: dict[str, tuple[Any, ...]] = {data.name.lower(): (SVD(keep=keep, data=data, importance=LOSS),) for data in Data}
    forms["qsvd"] = (_qsvd(keep), SVD(keep=keep, importance=LOSS, scope=(Scope.FEED_FORWARD,)))
    figures = {}
    for name, methods in ((name, forms[name]) for name in wanted):
        model = copy.deepcopy(bench.model)
        start = time.perf_counter()
        for method in methods:
            method.apply(model, bench.calibration)
        before, compressed_s = bench.calibration.mean_loss(model), time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            loss = RecoveryLoss(copy.deepcopy(bench.model), LabelOnly(), temperature=1.0)
            rows = Lessons(train=lessons, validation=bench.calibration.held_out)
            recover(model, loss, rows, Recover(settings=settings), Path(folder), seed=0, journal=Quiet())
        after = bench.calibration.mean_loss(model)
        seconds = time.perf_counter() - start - compressed_s
        figures[f"{name} before"] = {"perplexity": math.exp(min(before, 50.0)), "seconds": compressed_s}
        figures[f"{name} after"] = {"perplexity": math.exp(min(after, 50.0)), "seconds": seconds}
    return figures


class Quiet:
    """A journal that keeps nothing."""

    def log_metrics(self, **values: Any) -> None: ...

    @contextlib.contextmanager
    def progress(self, total: int, unit: str) -> Iterator[Any]:
        yield self

    def advance(self, steps: int = 1) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with gsm8k's train.jsonl and test.jsonl")
    parser.add_argument("--checkpoint", type=Path, default=None, help="a student of ours in place of SmolLM2; with --rationales, and parts of (b)")
    parser.add_argument("--rationales", type=Path, default=None, help="the folder of the stage whose rows it learned from")
    parser.add_argument("--out", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--calibration-rows", type=int, default=32)
    parser.add_argument("--held-out-rows", type=int, default=12)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--recovery-rows", type=int, default=64)
    parser.add_argument("--recovery-epochs", type=float, default=1)
    parser.add_argument("--recovery-forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    if arguments.checkpoint and "recovery" in arguments.parts:
        parser.error("--parts recovery is of text, and --checkpoint has rows: see benchmarks/compression.py for the recovery of a student of ours")

    lessons: Sequence[Example] = ()
    rows = {"calibration_rows": arguments.calibration_rows, "held_out_rows": arguments.held_out_rows}
    if arguments.checkpoint:
        model, calibration = own_student(arguments.checkpoint, arguments.rationales, **rows)
    else:
        model, tokenizer, calibration = smollm2(arguments.data, **rows)
        lessons = examples(tokenizer, arguments.data, "train", arguments.calibration_rows + arguments.recovery_rows)[arguments.calibration_rows :]
    figures: dict[str, Any] = {
        "model": str(arguments.checkpoint or MODEL),
        "row_tokens": ROW_TOKENS,
        "calibration_rows": arguments.calibration_rows,
        "held_out_rows": arguments.held_out_rows,
    }
    figures["dense_perplexity"] = math.exp(calibration.mean_loss(model))
    print(f"dense: perplexity {figures['dense_perplexity']:.3f}", flush=True)
    bench = Bench(model, calibration)

    def record(name: str, keep: float, measured: dict[str, Any]) -> None:
        figures.setdefault(name, {})[str(keep)] = measured
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    for keep in arguments.keep if "errors" in arguments.parts else []:
        measured = layer_errors(bench, keep)
        record("layer_errors", keep, measured)
        errors, ratio = measured["mean_error"], measured["mean_ratio"]["plain"]
        verdict = "met" if ratio <= GOAL_RATIO else "MISSED"
        print(
            f"held-out layer error, {keep:.0%} kept: plain {errors['plain']:.3f}, asvd {errors['activation']:.3f}, whitened {errors['whitened']:.3f}; "
            f"whitened / plain {ratio:.2f} (goal at most {GOAL_RATIO}: {verdict})",
            flush=True,
        )
    parts = {
        "perplexity": lambda keep: perplexities(bench, keep),
        "ranks": lambda keep: rank_choices(bench, keep),
        "shift": lambda keep: shifted_inputs(bench, keep),
        "attention": lambda keep: attention_alone(bench, keep),
        "recovery": lambda keep: recoveries(bench, keep, lessons, arguments.recovery_epochs, arguments.recovery_forms),
    }
    for name, measure in parts.items():
        for keep in arguments.keep if name in arguments.parts else []:
            measured = measure(keep)
            record(name, keep, measured)
            listed = ", ".join(f"{form} {one['perplexity']:.2f} ({one['seconds']:.0f} s)" for form, one in measured.items())
            print(f"{name}, {keep:.0%} kept: {listed}", flush=True)


if __name__ == "__main__":
    main()
