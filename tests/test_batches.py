"""Batches: every example once an epoch, the same for everyone who asks, and nothing but padding differs between ways to split a step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmdistill.batches import Example, Pair, Plan, collate, num_tokens, split
from llmdistill.train_settings import BatchUnit, Epochs, Steps, TrainSettings


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def example(length: int, *, shared: bool = False, num_parts: int = 2) -> Example:
    rng = np.random.default_rng(length)
    inputs = [rng.integers(3, 90, length).astype(np.int32) for _ in range(num_parts)]
    return tuple(
        Pair(part=part, input=inputs[0] if shared else inputs[part], target=rng.integers(3, 90, 1 + (length + part) % 4).astype(np.int32), start=part)
        for part in range(num_parts)
    )


few = hypothesis_settings(max_examples=30, deadline=None)
lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=60)
settings_values = st.builds(
    TrainSettings,
    batch_size=st.integers(1, 200),
    micro_batch_size=st.integers(1, 100),
    batch_unit=st.sampled_from(BatchUnit),
    bucket_steps=st.integers(1, 5),
)


@few
@given(lengths_lists, settings_values, st.integers(0, 9))
def test_every_epoch_has_every_example_once(lengths: list[int], settings: TrainSettings, seed: int) -> None:
    plan = Plan([example(length) for length in lengths], settings, seed=seed)
    wanted, seen, step = sorted(range(len(lengths))), [], 0
    for _ in range(2):
        seen = []
        while len(seen) < len(lengths):
            seen += plan.step(step)
            step += 1
        assert sorted(seen) == wanted


@few
@given(lengths_lists, settings_values)
def test_a_step_is_the_same_whoever_asks_and_when(lengths: list[int], settings: TrainSettings) -> None:
    examples = [example(length) for length in lengths]
    first = Plan(examples, settings, seed=3)
    in_order = [first.step(step) for step in range(12)]
    assert [Plan(examples, settings, seed=3).step(step) for step in reversed(range(12))] == in_order[::-1]


def test_epochs_and_seeds_differ() -> None:
    examples = [example(length) for length in range(1, 41)]
    settings = TrainSettings(batch_size=8)
    plan = Plan(examples, settings, seed=0)
    assert [plan.step(step) for step in range(5)] != [plan.step(step) for step in range(5, 10)]
    assert [plan.step(step) for step in range(5)] != [Plan(examples, settings, seed=1).step(step) for step in range(5)]


@few
@given(lengths_lists, settings_values)
def test_a_step_is_no_larger_than_asked_for(lengths: list[int], settings: TrainSettings) -> None:
    examples = [example(length) for length in lengths]
    plan = Plan(examples, settings, seed=0)
    for step in range(4):
        numbers = plan.step(step)
        longest = max(num_tokens(examples[number]) for number in numbers)
        size = len(numbers) if settings.batch_unit is BatchUnit.EXAMPLES else len(numbers) * longest
        assert size <= settings.batch_size or len(numbers) == 1


@pytest.mark.parametrize("unit", list(BatchUnit))
def test_the_number_of_steps_is_that_of_the_epochs(unit: BatchUnit) -> None:
    examples = [example(length) for length in range(1, 38)]
    for duration, parts in ((Epochs(1), 1.0), (Epochs(3), 3.0), (Epochs(0.5), 0.5)):
        settings = TrainSettings(batch_size=5 if unit is BatchUnit.EXAMPLES else 300, batch_unit=unit, duration=duration)
        plan = Plan(examples, settings, seed=0)
        num_seen = sum(len(plan.step(step)) for step in range(plan.num_steps()))
        assert num_seen == pytest.approx(37 * parts, abs=0 if parts >= 1 else 12)
    assert Plan(examples, TrainSettings(duration=Steps(17)), seed=0).num_steps() == 17


def test_buckets_leave_little_padding() -> None:
    rng = np.random.default_rng(0)
    examples = [example(int(length)) for length in rng.integers(5, 60, 640)]

    def padding(bucket_steps: int) -> float:
        plan = Plan(examples, TrainSettings(batch_size=32, bucket_steps=bucket_steps), seed=0)
        batches = [collate([examples[number] for number in plan.step(step)], causal=False) for step in range(20)]
        return 1 - sum(batch.num_real_tokens for batch in batches) / sum(batch.num_tokens for batch in batches)

    assert padding(1) > 0.35
    assert padding(10) < 0.12


@few
@given(lengths_lists, settings_values, st.integers(1, 4))
def test_processes_share_a_step_without_losing_or_doubling_anything(lengths: list[int], settings: TrainSettings, num_processes: int) -> None:
    examples = [example(length) for length in lengths]
    shares = split(examples, settings, num_processes)
    assert len(shares) == num_processes
    assert len({len(share) for share in shares}) == 1
    assert sorted(id(one) for share in shares for piece in share for one in piece) == sorted(id(one) for one in examples)
    for piece in (piece for share in shares for piece in share if len(piece) > 1):
        size = len(piece) if settings.batch_unit is BatchUnit.EXAMPLES else len(piece) * max(num_tokens(one) for one in piece)
        assert size <= settings.micro_batch_size
    if len(examples) >= num_processes:
        assert all(any(share) for share in shares)


@few
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans(), st.sampled_from([1, 8]))
def test_an_encoder_decoder_batch_holds_every_pair(lengths: list[int], shared: bool, multiple_of: int) -> None:
    examples = [example(length, shared=shared) for length in lengths]
    batch = collate(examples, causal=False, multiple_of=multiple_of)
    assert len(batch.input_EL) == len(lengths) * (1 if shared else 2)
    assert batch.input_EL.shape[1] % multiple_of == 0
    found, first = [], 0
    flat = torch.cat([decoded.input_GT.flatten() for decoded in batch.decoded])
    row = 0
    for part, decoded in enumerate(batch.decoded):
        for group_row, encoder_row in enumerate(decoded.rows_G.tolist()):
            target = [pair.target for one in examples for pair in one if pair.part == part][group_row]
            here = slice(first, first + len(target))
            read = flat[batch.position_N[here]].tolist()
            assert read == [part, *target[:-1].tolist()]
            assert batch.part_N[here].tolist() == [part] * len(target)
            found.append((batch.input_EL[encoder_row][batch.mask_EL[encoder_row]].tolist(), batch.target_N[here].tolist()))
            first += len(target)
            row += 1
    assert sorted(found) == sorted((pair.input.tolist(), pair.target.tolist()) for one in examples for pair in one)
    assert batch.num_real_tokens == int(batch.mask_EL.sum()) + len(batch.target_N)


def test_a_causal_batch_predicts_each_target_from_what_stands_before_it() -> None:
    pairs = (Pair(part=0, input=tokens(5, 6, 7), target=tokens(8, 1)), Pair(part=1, input=tokens(5), target=tokens(9, 8, 1)))
    batch = collate([pairs], causal=True)
    assert batch.input_EL.tolist() == [[5, 6, 7, 8], [5, 9, 8, 0]]
    assert batch.input_EL.flatten()[batch.position_N].tolist() == [7, 8, 5, 9, 8]
    assert batch.target_N.tolist() == [8, 1, 9, 8, 1]
    assert batch.part_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.decoded == ()


def test_an_example_without_a_part_is_fine() -> None:
    batch = collate([example(3), example(4, num_parts=1)], causal=False)
    assert [len(decoded.rows_G) for decoded in batch.decoded] == [2, 1]


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples to train on"):
        Plan([], TrainSettings(), seed=0)
