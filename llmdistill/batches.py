"""From rows of tokens to batches of tensors: who is in which step, how a step is split up, and how little of it is padding.

A row of the data is an `Example`: one or more `Pair`s of an input and a target, each for one part of the loss (label, rationale). Which examples belong to
step n is a function of (seed, n) and of nothing else: a resumed run needs no more than a step's number, and processes agree without talking. Batches are
cut from rows sorted by length within a window of `bucket_steps` steps, and then shuffled again: almost no padding, and still random.

A step is split into micro-batches, the same number for each process. Losses are sums, divided by the counts of the whole step (train.py), so the split changes
speed only. A process that is left without rows computes an idle micro-batch of weight 0, since collective operations need everyone.

For an encoder-decoder the pairs are decoded part by part, because labels are short and rationales long. Pairs of an example that hold the same input array
share one row of the encoder: the shared-encoder form is nothing more than that. A causal model reads input and target as one sequence. Rows are padded on
the right, so causal attention needs no mask.

Shapes: E rows of the encoder or of a causal model, L their tokens, G pairs of one part, T their target tokens, N target tokens without padding, all parts
together.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llmdistill.train_settings import BatchUnit, Steps, TrainSettings

Tokens: TypeAlias = Int[np.ndarray, " L"]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One input and what is to be written for it, the end token included. `start` is the decoder's first token; a causal model has no use for it."""

    part: int
    input: Tokens
    target: Tokens
    start: int = 0


Example: TypeAlias = "tuple[Pair, ...]"


@dataclass(frozen=True)
class Decoded:
    """The pairs of one part, as a decoder reads them. rows_G: the row of the encoder that each looks at."""

    rows_G: Int[Tensor, " G"]
    input_GT: Int[Tensor, "G T"]


@dataclass(frozen=True)
class Batch:
    """A micro-batch. position_N: where in the flattened hidden states (of all `decoded` one after the other, or of the causal model) target_N is predicted."""

    input_EL: Int[Tensor, "E L"]
    mask_EL: Bool[Tensor, "E L"]
    decoded: tuple[Decoded, ...]
    position_N: Int[Tensor, " N"]
    target_N: Int[Tensor, " N"]
    part_N: Int[Tensor, " N"]
    num_examples: int
    num_real_tokens: int
    idle: bool = False
    step: int = 0
    """Of the training; for losses that do another thing at each step, and the same in all its micro-batches and processes."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_EL.numel() + sum(decoded.input_GT.numel() for decoded in self.decoded)

    def to(self, device: torch.device) -> "Batch":
        """A copy on this device."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in ("input_EL", "mask_EL", "position_N", "target_N", "part_N")}
        decoded = tuple(Decoded(one.rows_G.to(device, non_blocking=True), one.input_GT.to(device, non_blocking=True)) for one in self.decoded)
        return replace(self, **tensors, decoded=decoded)


class Plan:
    """Which examples are in which step. Epochs follow one another without a gap; each has every example once."""

    def __init__(self, examples: Sequence[Example], settings: TrainSettings, *, seed: int) -> None:
        if not examples:
            raise ValueError("there are no examples to train on; look at the split, the refused rows and the least confidence that was asked for")
        self._lengths = np.array([num_tokens(example) for example in examples])
        self._settings = settings
        self._seed = seed
        self._first_steps = [0]  # of each epoch that was reached so far, and of the next one
        self._epoch = lru_cache(maxsize=2)(self._cut_epoch)

    def step(self, step: int) -> list[int]:
        """The numbers of a step's examples."""
        while step >= self._first_steps[-1]:
            self._first_steps.append(self._first_steps[-1] + self._num_steps_of(len(self._first_steps) - 1))
        epoch = bisect_right(self._first_steps, step) - 1
        return self._epoch(epoch)[step - self._first_steps[epoch]]

    def num_steps(self) -> int:
        """Steps of the whole training; a part of an epoch is rounded to whole steps."""
        duration = self._settings.duration
        if isinstance(duration, Steps):
            return duration.number
        whole = int(duration.number)
        part = duration.number - whole
        num = sum(self._num_steps_of(epoch) for epoch in range(whole)) + (round(part * self._num_steps_of(whole)) if part else 0)
        return max(1, num)

    def _num_steps_of(self, epoch: int) -> int:
        if self._settings.batch_unit is BatchUnit.EXAMPLES:
            return -(-len(self._lengths) // self._settings.batch_size)
        return len(self._epoch(epoch))

    def _cut_epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._lengths))
        unit, size = self._settings.batch_unit, self._settings.batch_size
        per_step = size if unit is BatchUnit.EXAMPLES else max(1, int(size / self._lengths.mean()))
        window = per_step * self._settings.bucket_steps
        steps: list[list[int]] = []
        for first in range(0, len(order), window):
            numbers = order[first : first + window]
            numbers = numbers[np.argsort(self._lengths[numbers], kind="stable")]
            steps += cut([int(number) for number in numbers], [int(length) for length in self._lengths[numbers]], size, unit)
        return [steps[number] for number in rng.permutation(len(steps))]


def num_tokens(example: Example) -> int:
    """Tokens of an example; an input that several pairs share counts once."""
    return sum({id(pair.input): len(pair.input) for pair in example}.values()) + sum(len(pair.target) for pair in example)


def cut(numbers: Sequence[int], lengths: Sequence[int], size: int, unit: BatchUnit) -> list[list[int]]:
    """Consecutive pieces of at most `size` examples or padded tokens; an example that is too long by itself is a piece of its own."""
    pieces: list[list[int]] = []
    longest = 0
    for number, length in zip(numbers, lengths, strict=True):
        longest = max(longest, length)
        num = len(pieces[-1]) + 1 if pieces else 1
        if not pieces or (num if unit is BatchUnit.EXAMPLES else num * longest) > size:
            pieces.append([])
            longest = length
        pieces[-1].append(number)
    return pieces


def split(examples: Sequence[Example], settings: TrainSettings, num_processes: int) -> list[list[list[Example]]]:
    """For each process its micro-batches, as many as every other process has; an empty one is idle."""
    ordered = sorted(examples, key=num_tokens)
    lengths = [num_tokens(example) for example in ordered]
    total = len(ordered) if settings.batch_unit is BatchUnit.EXAMPLES else len(ordered) * lengths[-1]
    size = min(settings.micro_batch_size, -(-total // num_processes))
    pieces = cut(range(len(ordered)), lengths, size, settings.batch_unit)
    while len(pieces) % num_processes:
        largest = max(range(len(pieces)), key=lambda index: len(pieces[index]))
        half = len(pieces[largest]) // 2
        if half:
            pieces[largest : largest + 1] = [pieces[largest][:half], pieces[largest][half:]]
        else:
            pieces.append([])
    return [[[ordered[number] for number in piece] for piece in pieces[process::num_processes]] for process in range(num_processes)]


def collate(examples: Sequence[Example], *, causal: bool, idle: bool = False, multiple_of: int = 1) -> Batch:
    """The tensors of a micro-batch, each padded to its longest row, rounded up to a multiple."""
    pairs = sorted((pair for example in examples for pair in example), key=lambda pair: pair.part)
    if causal:
        inputs = [np.concatenate([pair.input, pair.target[:-1]]) for pair in pairs]
        width = _width(inputs, multiple_of)
        position = [row * width + len(pair.input) - 1 + np.arange(len(pair.target)) for row, pair in enumerate(pairs)]
        decoded = ()
    else:
        row_of = {id(pair.input): 0 for pair in pairs}  # in order of first appearance, so that the rows of a part are mostly consecutive
        inputs = list({id(pair.input): pair.input for pair in pairs}.values())
        row_of = dict(zip(row_of, range(len(inputs)), strict=True))
        decoded, position = _decoded(pairs, row_of, multiple_of)
        width = _width(inputs, multiple_of)
    return Batch(
        input_EL=torch.from_numpy(_padded(inputs, width)),
        mask_EL=torch.from_numpy(np.arange(width) < np.array([len(row) for row in inputs])[:, None]),
        decoded=decoded,
        position_N=torch.from_numpy(np.concatenate(position)),
        target_N=torch.from_numpy(np.concatenate([pair.target for pair in pairs]).astype(np.int64)),
        part_N=torch.from_numpy(np.repeat([pair.part for pair in pairs], [len(pair.target) for pair in pairs])),
        num_examples=len(examples),
        num_real_tokens=sum(len(tokens) for tokens in inputs) + (0 if causal else sum(len(pair.target) for pair in pairs)),
        idle=idle,
    )


def _decoded(pairs: Sequence[Pair], row_of: dict[int, int], multiple_of: int) -> tuple[tuple[Decoded, ...], list[np.ndarray]]:
    """What the decoder reads for each part, and where in its flattened hidden states each pair's targets are predicted."""
    decoded, position, offset = [], [], 0
    for part in dict.fromkeys(pair.part for pair in pairs):
        group = [pair for pair in pairs if pair.part == part]
        inputs = [np.concatenate([[pair.start], pair.target[:-1]]) for pair in group]
        width = _width(inputs, multiple_of)
        rows = torch.tensor([row_of[id(pair.input)] for pair in group])
        decoded.append(Decoded(rows_G=rows, input_GT=torch.from_numpy(_padded(inputs, width))))
        position += [offset + row * width + np.arange(len(pair.target)) for row, pair in enumerate(group)]
        offset += len(group) * width
    return tuple(decoded), position


def _width(rows: Sequence[np.ndarray], multiple_of: int) -> int:
    return -(-max(len(row) for row in rows) // multiple_of) * multiple_of


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Padding is token 0; nothing ever looks at it."""
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded
