"""What a checkpoint says of its exits: `exits` in config.json. No torch, so that settings and stages can hold these.

    "exits": {"layers": [2, 4], "encoder_layers": [], "adapter_rank": 0, "num_vocabulary": 0, "has_gates": false, "confidence": "top1", "decay": 0.0,
              "policy": "deferred", "calibration": {"weights": "<sha256>", "epsilon": 0.05, "quality": "correct", "num_rows": 300,
                                                    "points": [{"delta": 0.02, "threshold": 0.8, "mean_loss": 0.01, "mean_layers": 3.1}]}}

A token leaves the decoder at an exit where the confidence there is above the threshold. A prompt leaves the encoder of a T5 in the same way, where there are
exits in it, by their gates alone: a head has nothing to say there. Thresholds are in [0, 1], and 1 never leaves. They are calibrated for the weights
as they are (exits/calibrate.py), so they come with the digest of these, and whoever reads them for other weights is told so.

The exits of an elastic student are its sub-networks' too (elastic/exit_cuts.py). Those that were calibrated are in "subnet_calibrations", each under its name
(elastic/choice.py), with the digest of its extraction.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "exits"
NEVER = 1.0
"""The threshold that no confidence is above."""


class Confidence(enum.Enum):
    """By what a token is judged at an exit; each is a number from 0 to 1 (decode/confidence.py)."""

    TOP1 = "top1"
    GAP = "gap"
    ENTROPY = "entropy"
    SATURATION = "saturation"
    GATE = "gate"


class Policy(enum.Enum):
    """Where the keys and values of the layers that a token did not go through come from, when a later token reads them."""

    DEFERRED = "deferred"
    """From the layers themselves: all waiting tokens go through them at once, when a later token of the row does. Exact."""
    PROPAGATED = "propagated"
    """From the state with which the token left, by the layers' key and value projections alone."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A threshold with its guarantee: the expected loss of quality is at most `delta`, with probability 1 - epsilon over the calibration rows."""

    delta: float
    threshold: float
    mean_loss: float
    """Of quality, on the calibration rows."""
    mean_layers: float
    """That a token went through, on the calibration rows."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Thresholds that were calibrated for these weights."""

    weights: str
    epsilon: float
    quality: str
    num_rows: int
    points: tuple[Point, ...]
    """Ascending in delta."""

    @classmethod
    def read(cls, config: Any) -> Calibration | None:
        """Of a transformers config or of config.json's content; None where nothing was calibrated."""
        settings = read_exits(config)
        return settings.calibration if settings else None

    def to_json(self) -> dict[str, Any]:
        """As config.json has it."""
        return asdict(self) | {"points": [asdict(point) for point in self.points]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """Back from config.json."""
        points = tuple(Point(**point) for point in value["points"])
        return cls(**{name: one for name, one in value.items() if name != "points"}, points=points)

    def threshold(self, risk: float) -> float:
        """That of the largest delta which is at most the risk; NEVER where none is that small."""
        return max((point for point in self.points if point.delta <= risk), key=lambda point: point.delta, default=Point(**_FULL)).threshold


_FULL = {"delta": 0.0, "threshold": NEVER, "mean_loss": 0.0, "mean_layers": 0.0}


@dataclass(frozen=True, kw_only=True)
class ExitSettings:
    """The exits of a decoder."""

    layers: tuple[int, ...]
    """After how many layers of the decoder a token may leave; ascending, each less than all of them."""
    encoder_layers: tuple[int, ...] = ()
    """After how many layers of the encoder a prompt may leave."""
    adapter_rank: int = 0
    """Of a residual low-rank map before an exit's head; 0 for none."""
    num_vocabulary: int = 0
    """How many tokens an exit's head can say; 0 for the whole head."""
    has_gates: bool = False
    confidence: Confidence = Confidence.TOP1
    decay: float = 0.0
    """tau of the decaying threshold (Schuster et al. 2022, "Confident Adaptive Language Modeling", equation 5); 0 keeps it as it is."""
    policy: Policy = Policy.DEFERRED
    calibration: Calibration | None = None
    subnet_calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layers in (self.layers, self.encoder_layers):
            if list(layers) != sorted(set(layers)) or min(layers, default=1) < 1 or not (self.layers or self.encoder_layers):
                raise ValueError(f"the exits are after layers {list(layers)}; give one or more numbers of layers, ascending, each 1 or more")
        if self.adapter_rank < 0 or self.num_vocabulary < 0:
            raise ValueError(f"adapter_rank is {self.adapter_rank} and num_vocabulary {self.num_vocabulary}; give 0 for none, or more")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay is {self.decay}; give 0 for a threshold that stays, or more")
        if self.confidence is Confidence.GATE and not self.has_gates:
            raise ValueError("the confidence is that of gates, and these exits were trained without; train them with gates, or choose another confidence")

    def to_json(self) -> dict[str, Any]:
        """As config.json has it."""
        layers = {"layers": list(self.layers), "encoder_layers": list(self.encoder_layers)}
        calibration = None if self.calibration is None else self.calibration.to_json()
        data = asdict(self) | layers | {"confidence": self.confidence.value, "policy": self.policy.value, "calibration": calibration}
        del data["subnet_calibrations"]
        of_subnets = {subnet: one.to_json() for subnet, one in self.subnet_calibrations.items()}
        return data | ({"subnet_calibrations": of_subnets} if of_subnets else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExitSettings:
        """Back from config.json."""
        try:
            fields = dict(value)
            calibration = fields["calibration"]
            fields["calibration"] = None if calibration is None else Calibration.from_json(calibration)
            fields["subnet_calibrations"] = {subnet: Calibration.from_json(one) for subnet, one in fields.get("subnet_calibrations", {}).items()}
            fields |= {"layers": tuple(fields["layers"]), "encoder_layers": tuple(fields["encoder_layers"])}
            fields |= {"confidence": Confidence(fields["confidence"]), "policy": Policy(fields["policy"])}
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"`{KEY}` in config.json is not as this llmdistill writes it ({error}); make the exits again, or upgrade llmdistill") from error


def read_exits(config: Any) -> ExitSettings | None:
    """The exits of a transformers config, or of config.json's content; None where there are none."""
    value = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
    return None if value is None else ExitSettings.from_json(value)
