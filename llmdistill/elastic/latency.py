"""How fast sub-networks answer on this machine, on the decode engine that serves.

As in HAT (Wang et al. 2020, section 3.1) the device is asked and not the arithmetic, since the same operations take different times at different shapes.
Prompts have one length, and all answers have all their tokens (there are no stop tokens): what a sub-network would say does not count, and one that never
learned to end is as fast as one that did.

A machine drifts, by its clock, its heat and its other users. So sub-networks are not measured one after the other but in rounds, each in an order of its own,
and a latency is the median over all rounds: drift meets all alike. Within a visit one call that is not counted goes first. Rounds should be worth more than
repeats, which meet the same disturbance. On two cores under a load of 4 to 5, for 60 sub-networks of a T5 with 4 + 4 layers of width 256 at batch size 1, the
error of a latency table (latency_table.py) on held-out ones, and its Kendall's tau, both in the mean over 6 choices of these:

    median of 12 rounds     3.8%   0.89        (by the processor's time, which other processes hardly touch: 2.7%, 0.95)
    median of 3 rounds      9.9%   0.80
    least of 12 rounds       37%   0.52
    3 rounds of 2 repeats    27%   0.43        (another hour, 70 sub-networks)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

from llmdistill.decode.decoding import Decoding
from llmdistill.elastic.choice import Subnet

if TYPE_CHECKING:
    from llmdistill.decode.engine import Engine


@dataclass(frozen=True, kw_only=True)
class LatencySetting:
    """So many prompts at once, of so many tokens, answered with so many tokens."""

    batch_size: int = 1
    prompt_tokens: int = 64
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatencySetting.{name} is {getattr(self, name)}; give 1 or more")

    @property
    def name(self) -> str:
        """What the cost is called, such as latency_ms_batch_1."""
        return f"latency_ms_batch_{self.batch_size}"


def measure_latencies(
    model: Any, subnets: Sequence[Subnet], settings: Sequence[LatencySetting], *, num_rounds: int = 10, num_repeats: int = 1, seed: int = 0
) -> list[dict[str, float]]:
    """Milliseconds of one `generate` call by the settings' names, for each sub-network, with as many threads as torch has now.

    The seed orders the rounds and draws the prompts. Each round makes `num_repeats` calls that count, for each sub-network and setting.
    """
    if not subnets or not settings or num_rounds < 1 or num_repeats < 1:
        raise ValueError(
            f"there are {len(subnets)} sub-networks, {len(settings)} settings, {num_rounds} rounds and {num_repeats} repeats to measure; give 1 or more of each"
        )
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ValueError(f"two latency settings are both named {max(names, key=names.count)}; give each another batch_size, or measure them apart")
    from llmdistill.decode.engine import Engine
    from llmdistill.elastic.subnet import with_subnet
    from llmdistill.models.modes import evaluating

    generator = Random(seed)
    vocabulary_size = int(model.config.vocab_size)
    prompts = {setting: _prompts(setting, vocabulary_size, generator) for setting in settings}
    milliseconds: dict[tuple[int, str], list[float]] = {(place, name): [] for place in range(len(subnets)) for name in names}
    places = list(range(len(subnets)))
    with evaluating(model):
        for _ in range(num_rounds):
            generator.shuffle(places)
            for place in places:
                with with_subnet(model, subnets[place]):
                    for setting in settings:
                        engine = Engine(model, max_batch_rows=setting.batch_size)
                        milliseconds[place, setting.name] += _visit(engine, setting, prompts[setting], num_repeats)
    return [{name: median(milliseconds[place, name]) for name in names} for place in range(len(subnets))]


def _prompts(setting: LatencySetting, vocabulary_size: int, generator: Random) -> list[list[int]]:
    return [[generator.randrange(vocabulary_size) for _ in range(setting.prompt_tokens)] for _ in range(setting.batch_size)]


def _visit(engine: Engine, setting: LatencySetting, prompts: Sequence[Sequence[int]], num_repeats: int) -> list[float]:
    if engine.max_positions is not None and setting.prompt_tokens + setting.new_tokens > engine.max_positions:
        raise ValueError(
            f"prompts of {setting.prompt_tokens} tokens with {setting.new_tokens} new ones are more than the model's {engine.max_positions} positions: "
            "give LatencySetting fewer of either"
        )
    decoding = Decoding(max_new_tokens=setting.new_tokens, stop_token_ids=())
    engine.generate(prompts, decoding)
    times = []
    for _ in range(num_repeats):
        _synchronize()
        begin = time.perf_counter()
        engine.generate(prompts, decoding)
        _synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return times


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
