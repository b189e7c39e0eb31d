"""The inputs of linears as earlier layers now give them: the calibration rows go through a model block by block, and wait while a block is changed.

A full pass for each layer would cost the square of their number. Here a row's hidden state before the present block is kept, and only that block is run: once
for each group of its linears that read the same input, up to that input and no further, and once to the end when the block is done. So every linear's
statistics come from inputs that passed through all that was compressed before it, also within its own block, for two to three passes in all.

What a stack hands to its first block (embeddings, masks, positions; for T5's decoder the encoder's output too) is recorded from the model itself, with the
blocks taken out. Of what blocks hand on to each other there is the hidden state and, in T5, the position bias, which depends on lengths only.

Memory: one hidden state for each row; with `Original`, the inputs of one block's linears too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel, T5ForConditionalGeneration

if TYPE_CHECKING:
    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.slots import Slot


def stack_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Where the lists of blocks are, in the order in which data passes them."""
    return ("encoder.block", "decoder.block") if isinstance(model, T5ForConditionalGeneration) else ("model.layers",)


def groups_of_block(slots: Sequence[Slot], block_path: str) -> list[list[Slot]]:
    """A block's slots in their order, those together that read the same input."""
    inside = [slot for slot in slots if slot.path.startswith(f"{block_path}.")]
    return [list(group) for _, group in groupby(inside, key=lambda slot: slot.input)]


@dataclass
class _Call:
    """How a stack calls its blocks for one row (T5's decoder: for one part of a row), and the hidden state before the present block."""

    hidden: Tensor
    arguments: list[tuple[Any, ...]]
    """After the hidden state, for each block."""
    keywords: list[dict[str, Any]]


class Rows:
    """All rows, before one block of a stack."""

    def __init__(self, model: PreTrainedModel, stack_path: str, calibration: Calibration) -> None:
        self.calls = _recorded(model, stack_path, calibration)
        first: Any = model.get_submodule(f"{stack_path}.0")
        self._bias_module = first.layer[0].SelfAttention if isinstance(model, T5ForConditionalGeneration) else None
        self._biases: dict[int, Tensor] = {}
        self._block = 0

    def inputs(self, block: nn.Module, path: str) -> Iterator[Tensor]:
        """What the module at this path of the block reads, row by row. The block is run no further than that."""
        reader = block.get_submodule(path)
        handle = reader.register_forward_pre_hook(_stop)
        try:
            for call in self.calls:
                try:
                    self._run(block, call)
                except _Reached as reached:
                    yield reached.input
                else:
                    raise AssertionError(f"the block never called {path}")
        finally:
            handle.remove()

    def all_inputs(self, block: nn.Module, paths: Sequence[str]) -> list[dict[str, Tensor]]:
        """What each of these modules reads, for each row; moves the rows on to the next block."""
        seen: list[dict[str, Tensor]] = []

        def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen[-1][path] = inputs[0]

            return see

        handles = [block.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
        try:
            for call in self.calls:
                seen.append({})
                call.hidden = self._run(block, call)
        finally:
            for handle in handles:
                handle.remove()
        self._block += 1
        return seen

    def advance(self, block: nn.Module) -> None:
        """On to the next block."""
        self.all_inputs(block, ())

    def _run(self, block: nn.Module, call: _Call) -> Tensor:
        arguments = list(call.arguments[self._block])
        if self._bias_module is not None:
            arguments[1] = self._bias(call.hidden.shape[1])
        result = block(call.hidden, *arguments, **call.keywords[self._block])
        return result[0] if isinstance(result, tuple) else result

    def _bias(self, length: int) -> Tensor:
        """As the first block's attention makes it, and hands it to all others."""
        assert self._bias_module is not None
        if length not in self._biases:
            self._biases[length] = self._bias_module.compute_bias(length, length)
        return self._biases[length]


class Original:
    """The same rows in the model as it was: its blocks are copied one by one, before they are changed."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self._rows = {path: Rows(model, path, calibration) for path in stack_paths(model)}

    def inputs(self, stack_path: str, block: nn.Module, paths: Sequence[str]) -> list[dict[str, Tensor]]:
        """What these modules of the next block, which is still as it was, read in each row."""
        return self._rows[stack_path].all_inputs(copy.deepcopy(block), paths)


class _Reached(Exception):
    def __init__(self, input_: Tensor) -> None:
        self.input = input_


def _stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _Reached(inputs[0])


class _Recorder(nn.Module):
    """Takes the place of a block, remembers how it is called, and hands on what it was given."""

    def __init__(self, calls: list[_Call], *, is_first: bool, is_t5: bool) -> None:
        super().__init__()
        self.calls, self.is_first, self.is_t5 = calls, is_first, is_t5

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if self.is_first:
            self.calls.append(_Call(hidden, [], []))
        self.calls[-1].arguments.append(arguments)
        self.calls[-1].keywords.append(keywords)
        return (hidden, None, None) if self.is_t5 else hidden


def _recorded(model: PreTrainedModel, stack_path: str, calibration: Calibration) -> list[_Call]:
    calls: list[_Call] = []
    blocks: Any = model.get_submodule(stack_path)
    is_t5 = isinstance(model, T5ForConditionalGeneration)
    recorders = nn.ModuleList(_Recorder(calls, is_first=number == 0, is_t5=is_t5) for number in range(len(blocks)))
    model.set_submodule(stack_path, recorders)
    try:
        for batch in calibration.batches(model):
            calibration.loss.sums_P(model, batch)
    finally:
        model.set_submodule(stack_path, blocks)
    return calls
