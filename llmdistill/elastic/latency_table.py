"""Milliseconds of every sub-network, from those of some that were measured: a sum of what its parts take.

Source: the latency models of ProxylessNAS (Cai et al. 2019, section 3.3.1) and HAT (Wang et al. 2020, section 3.1). ProxylessNAS measures each part alone;
parts alone do not take what they take among others, so here whole sub-networks are measured, and the parts are what explains them best: least squares with
coefficients that are not negative, since nothing takes less than no time. HAT fits a network to 2,000 latencies; a sum of a dozen parts needs some dozens, can
be read, and has a mean under random choices that is exact (latency_features.py). Errors count as shares of the latency, so that a millisecond more matters more
to a fast sub-network.

The quality that is told is measured on sub-networks which were held out; the table itself is then fitted anew to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmdistill.elastic.agreement import held_out, kendall_tau
from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.latency import LatencySetting
from llmdistill.elastic.latency_features import latency_feature_names, latency_features
from llmdistill.elastic.nonnegative import nonnegative_least_squares
from llmdistill.elastic.space import Space


@dataclass(frozen=True, kw_only=True)
class LatencyQuality:
    """On sub-networks that it was not fitted to; errors in percent of what was measured."""

    num_measured: int
    num_held_out: int
    mean_error_percent: float
    worst_error_percent: float
    kendall_tau: float


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Fitted. `coefficients` are the milliseconds of one whole part each, in the order of `names`; a latency is their product with latency_features."""

    space: Space
    setting: LatencySetting
    coefficients: tuple[float, ...]
    quality: LatencyQuality

    @property
    def names(self) -> tuple[str, ...]:
        """What each coefficient belongs to."""
        return latency_feature_names(self.space)

    def __call__(self, subnet: Subnet) -> float:
        """Its milliseconds."""
        return sum(coefficient * feature for coefficient, feature in zip(self.coefficients, latency_features(self.space, subnet), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, to be read by people too; without the space."""
        return {
            "setting": asdict(self.setting),
            "coefficients_ms": dict(zip(self.names, self.coefficients, strict=True)),
            "quality": asdict(self.quality),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], space: Space) -> LatencyTable:
        """What `to_json` wrote, for the space that it was fitted to."""
        names, coefficients = latency_feature_names(space), data["coefficients_ms"]
        if set(coefficients) != set(names):
            raise ValueError(f"the latency table has the parts {', '.join(coefficients)}, and the space {', '.join(names)}: measure sub-networks of this space")
        return cls(
            space=space,
            setting=LatencySetting(**data["setting"]),
            coefficients=tuple(coefficients[name] for name in names),
            quality=LatencyQuality(**data["quality"]),
        )


def fit_latency_table(
    space: Space, setting: LatencySetting, measured: Sequence[tuple[Subnet, float]], *, held_out_share: float = 0.2, seed: int = 0
) -> LatencyTable:
    """The table that explains these milliseconds best; `held_out_share` of them, by the seed, judge it."""
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share is {held_out_share}; give more than 0 and less than 1")
    if len({subnet for subnet, _ in measured}) < len(measured):
        raise ValueError("a sub-network is given twice, so it could be fitted to and held out; give each once, with its median")
    wrong = [latency for _, latency in measured if not (math.isfinite(latency) and latency > 0)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no latency; give milliseconds above 0")
    num_parts = len(latency_feature_names(space))
    num_needed = math.ceil(num_parts / (1 - held_out_share)) + 1
    if len(measured) < num_needed:
        raise ValueError(
            f"{len(measured)} sub-networks are measured, and the table has {num_parts} parts: measure {num_needed} or more, better three times as many"
        )
    fitted, others = ([measured[place] for place in places] for places in held_out(len(measured), share=held_out_share, seed=seed))
    judged = _coefficients(space, fitted)
    predicted = [float(np.dot(judged, latency_features(space, subnet))) for subnet, _ in others]
    percents = [100 * abs(one - latency) / latency for one, (_, latency) in zip(predicted, others, strict=True)]
    quality = LatencyQuality(
        num_measured=len(measured),
        num_held_out=len(others),
        mean_error_percent=sum(percents) / len(percents),
        worst_error_percent=max(percents),
        kendall_tau=kendall_tau(predicted, [latency for _, latency in others]),
    )
    return LatencyTable(space=space, setting=setting, coefficients=_coefficients(space, measured), quality=quality)


def _coefficients(space: Space, measured: Sequence[tuple[Subnet, float]]) -> tuple[float, ...]:
    rows = np.array([latency_features(space, subnet) for subnet, _ in measured])
    latencies = np.array([latency for _, latency in measured])
    return tuple(nonnegative_least_squares(rows / latencies[:, None], np.ones(len(measured))).tolist())
