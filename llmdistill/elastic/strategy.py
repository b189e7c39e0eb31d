"""Which sub-networks are trained at each step: the settings, and the choice as a function of the seed and the step alone, so that a resumed run repeats it.

Sandwich (Yu & Huang 2019, section 3.2): at every step the smallest sub-network and some at random, beside the whole model, which is always trained and is their
teacher. The smallest and the largest bound all others, and get the most training.

Progressive shrinking (Once-for-All, Cai et al. 2020, section 3.3): the space opens one axis after the other, each from its largest value downwards, so that the
small ones start from large ones that work. Where we differ: OFA trains the whole model first and then freezes a copy of it as the teacher; here it comes
trained, and goes on being trained beside its sub-networks, as in the sandwich, so that it never forgets what they share with it. OFA's axes are kernel size,
depth and width of vision networks; the order here is an option.

No torch at import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.space import Space

AXES: tuple[str, ...] = ("depth", "ffn", "heads", "rank", "width")
_FIELDS = {"depth": "depths", "ffn": "ffn_widths", "heads": "heads", "rank": "ranks"}


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """The smallest and some at random, beside the whole model."""

    kind: ClassVar[str] = "sandwich"

    num_random: int = 2

    def __post_init__(self) -> None:
        if self.num_random < 0:
            raise ValueError(f"Sandwich.num_random is {self.num_random}; give 0 or more")

    @property
    def num_subnets(self) -> int:
        """At a step, beside the whole model."""
        return self.num_random + 1

    def subnets(self, space: Space, *, seed: int, num_steps: int) -> Callable[[int], Sequence[Subnet]]:
        """Those of each step."""

        def at(step: int) -> list[Subnet]:
            return [space.smallest(), *_drawn(space, self.num_random, seed, step)]

        return at


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Some at random from a space that opens axis by axis. The last `open_share` of the steps have the whole of it."""

    kind: ClassVar[str] = "progressive"

    num_random: int = 3
    order: tuple[str, ...] = AXES
    open_share: float = 0.4

    def __post_init__(self) -> None:
        if self.num_random < 1:
            raise ValueError(f"Progressive.num_random is {self.num_random}; give 1 or more")
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"Progressive.order is {self.order}; name each of {', '.join(AXES)} once")
        if not 0 < self.open_share <= 1:
            raise ValueError(f"Progressive.open_share is {self.open_share}; give more than 0 and at most 1")

    @property
    def num_subnets(self) -> int:
        """At a step, beside the whole model."""
        return self.num_random

    def subnets(self, space: Space, *, seed: int, num_steps: int) -> Callable[[int], Sequence[Subnet]]:
        """Those of each step."""
        phases = self.phases(space)
        opening = max(1.0, num_steps * (1 - self.open_share))

        def at(step: int) -> list[Subnet]:
            phase = min(len(phases) - 1, int(step / opening * (len(phases) - 1)))
            return _drawn(phases[phase], self.num_random, seed, step)

        return at

    def phases(self, space: Space) -> list[Space]:
        """The spaces one after the other: each has one value more on one axis, and the last is the whole space."""
        values = {axis: max(map(len, _values(space, axis))) for axis in AXES}
        taken = dict.fromkeys(AXES, 1)
        phases = []
        for axis in self.order:
            for _ in range(values[axis] - 1):
                taken[axis] += 1
                phases.append(_largest(space, taken))
        return phases or [space]


def watched(space: Space, *, seed: int, num_random: int = 2) -> list[Subnet]:
    """The sub-networks whose losses say whether training still helps: the smallest and some that stay the same."""
    generator = Random(f"watched {seed}")
    return [space.smallest(), *(space.sample(generator) for _ in range(num_random))]


def _drawn(space: Space, number: int, seed: int, step: int) -> list[Subnet]:
    generator = Random(f"{seed} {step}")  # a text is hashed alike in every process
    return [space.sample(generator) for _ in range(number)]


def _values(space: Space, axis: str) -> list[Sequence[float]]:
    return [space.widths] if axis == "width" else [getattr(stack, _FIELDS[axis]) for stack in space.stacks]


def _largest(space: Space, taken: dict[str, int]) -> Space:
    """The space with only so many of the largest values of each axis."""
    stacks = tuple(replace(stack, **{name: getattr(stack, name)[-taken[axis] :] for axis, name in _FIELDS.items()}) for stack in space.stacks)
    return replace(space, widths=space.widths[-taken["width"] :], stacks=stacks)
