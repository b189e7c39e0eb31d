"""What accuracy a sub-network has, from those of a few hundred others: small networks on its features.

Source: Once-for-All (Cai et al. 2020, section 3.4): three layers of 400 neurons on the one-hot architecture, fitted to 16,000 sub-networks. Here each sample is
a run over the validation rows and there are a few hundred, which asks for more bias. So

    accuracy = line + mean of several networks, on the standardised features (features.py)

where the line is ridge regression and the networks (three layers of 64 neurons, weight decay 6, from as many random starts) are fitted to what it leaves. On
synthetic accuracies of 3 million sub-networks, with and without errors of 2 points in the samples, Kendall's tau on other sub-networks, in the mean of 6 seeds:

    samples            60           200           500
    line alone     0.877 0.886   0.902 0.908   0.914 0.917
    networks alone 0.868 0.890   0.912 0.925   0.928 0.937
    both           0.880 0.909   0.923 0.941   0.941 0.955

One network of 400 neurons with OFA's little weight decay had 0.77 and 0.80 after 60 samples; without decay any size of network learns the errors by heart.

The quality that is told is measured on samples which were held out; the predictor itself is then fitted anew to all of them.

Shapes: N sub-networks, F features, E networks, I inputs, O outputs.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from llmdistill.elastic.agreement import held_out, kendall_tau
from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.features import feature_names, features
from llmdistill.elastic.space import Space

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MIN_SAMPLES = 10
_LINE_PENALTY = 1.0  # of the squared slopes, in units of the squared errors
_LEARNING_RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class PredictorSettings:
    """`num_networks` of `num_layers` with `hidden_width` neurons between them; `weight_decay` is AdamW's."""

    kind: ClassVar[str] = "accuracy_predictor"
    hidden_width: int = 64
    num_layers: int = 3
    num_networks: int = 4
    epochs: int = 150
    weight_decay: float = 6.0
    held_out_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_width", "num_layers", "num_networks", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"PredictorSettings.{name} is {getattr(self, name)}; give 1 or more")
        if not (self.weight_decay >= 0 and self.weight_decay * _LEARNING_RATE < 1 and 0 < self.held_out_share < 1):
            raise ValueError(
                f"PredictorSettings has weight_decay {self.weight_decay} and held_out_share {self.held_out_share}; "
                f"give 0 up to less than {1 / _LEARNING_RATE:.0f}, and more than 0 up to less than 1"
            )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """On sub-networks that it was not fitted to. Errors are in the unit of the accuracies."""

    num_samples: int
    num_held_out: int
    kendall_tau: float
    mean_absolute_error: float
    root_mean_square_error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """Fitted. Features are standardised by their means and deviations; the line and the networks give the accuracy in its own unit."""

    space: Space
    quality: Quality
    means_F: Float[Tensor, " F"]
    deviations_F: Float[Tensor, " F"]
    slopes_F: Float[Tensor, " F"]
    offset: float
    scale: float
    """Of what the networks give."""
    weights: tuple[Float[Tensor, "E I O"], ...]
    biases: tuple[Float[Tensor, "E 1 O"], ...]

    def __call__(self, subnet: Subnet) -> float:
        """Its accuracy."""
        return self.predict([subnet])[0]

    def predict(self, subnets: Sequence[Subnet]) -> list[float]:
        """Their accuracies."""
        import torch

        if not subnets:
            return []
        with torch.inference_mode():
            inputs_NF = (_table(self.space, subnets) - self.means_F) / self.deviations_F
            rest_EN = _forward(inputs_NF.float(), self.weights, self.biases)
            return (inputs_NF @ self.slopes_F + self.offset + self.scale * rest_EN.double().mean(0)).tolist()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the space; numbers are in base64, exactly as they are."""
        tensors = {name: _packed(getattr(self, name)) for name in ("means_F", "deviations_F", "slopes_F")}
        layers = [[_packed(weight), _packed(bias)] for weight, bias in zip(self.weights, self.biases, strict=True)]
        names = list(feature_names(self.space))
        return {"features": names, "quality": asdict(self.quality), "offset": self.offset, "scale": self.scale, **tensors, "layers": layers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], space: Space) -> Predictor:
        """What `to_json` wrote, for the space that it was fitted to."""
        if tuple(data["features"]) != feature_names(space):
            raise ValueError(f"the predictor was fitted to {len(data['features'])} features of another space: fit one to sub-networks of this space")
        tensors = {name: _unpacked(data[name]) for name in ("means_F", "deviations_F", "slopes_F")}
        weights, biases = zip(*((_unpacked(weight), _unpacked(bias)) for weight, bias in data["layers"]), strict=True)
        return cls(
            space=space, quality=Quality(**data["quality"]), offset=data["offset"], scale=data["scale"], **tensors, weights=tuple(weights), biases=tuple(biases)
        )


def fit(space: Space, samples: Sequence[tuple[Subnet, float]], settings: PredictorSettings = PredictorSettings()) -> Predictor:
    """A predictor of sub-networks' accuracies. The same samples and settings give the same one."""
    if len(samples) < MIN_SAMPLES:
        raise ValueError(f"there are {len(samples)} sub-networks with accuracies to fit a predictor to; measure {MIN_SAMPLES} or more, better some hundreds")
    if len({subnet for subnet, _ in samples}) < len(samples):
        raise ValueError("a sub-network is given twice, so it could be fitted to and held out; give each once")
    wrong = [accuracy for _, accuracy in samples if not math.isfinite(accuracy)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no accuracy to fit a predictor to; give finite numbers")
    fitted, others = ([samples[place] for place in places] for places in held_out(len(samples), share=settings.held_out_share, seed=settings.seed))
    measured = [accuracy for _, accuracy in others]
    predicted = _fit(space, fitted, settings).predict([subnet for subnet, _ in others])
    errors = [one - true for one, true in zip(predicted, measured, strict=True)]
    quality = Quality(
        num_samples=len(samples),
        num_held_out=len(others),
        kendall_tau=kendall_tau(predicted, measured),
        mean_absolute_error=sum(map(abs, errors)) / len(errors),
        root_mean_square_error=math.sqrt(sum(error * error for error in errors) / len(errors)),
    )
    return replace(_fit(space, samples, settings), quality=quality)


def _fit(space: Space, samples: Sequence[tuple[Subnet, float]], settings: PredictorSettings) -> Predictor:
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        inputs_NF = _table(space, [subnet for subnet, _ in samples])
        targets_N = torch.tensor([accuracy for _, accuracy in samples], dtype=torch.float64)
        means_F, deviations_F = inputs_NF.mean(0), inputs_NF.std(0)
        deviations_F[deviations_F < 1e-6] = 1.0
        centred_NF = inputs_NF - means_F
        offset = targets_N.mean()
        # The penalty is on features as they are, from 0 to 1: one that hardly varies in the samples says little.
        gram_FF = centred_NF.T @ centred_NF + _LINE_PENALTY * torch.eye(inputs_NF.shape[1], dtype=torch.float64)
        slopes_F = torch.linalg.solve(gram_FF, centred_NF.T @ (targets_N - offset))
        rest_N = targets_N - offset - centred_NF @ slopes_F
        scale = float(rest_N.std())
        weights, biases = _train((centred_NF / deviations_F).float(), (rest_N / (scale or 1.0)).float(), settings)
    none = Quality(num_samples=len(samples), num_held_out=0, kendall_tau=0.0, mean_absolute_error=0.0, root_mean_square_error=0.0)
    return Predictor(
        space=space,
        quality=none,
        means_F=means_F,
        deviations_F=deviations_F,
        slopes_F=slopes_F * deviations_F,
        offset=float(offset),
        scale=scale,
        weights=weights,
        biases=biases,
    )


def _train(inputs_NF: Tensor, targets_N: Tensor, settings: PredictorSettings) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All networks at once, each by itself, on all samples a step."""
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    sizes = [inputs_NF.shape[1], *[settings.hidden_width] * (settings.num_layers - 1), 1]
    weights, biases = [], []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        gain = 1.0 if number == settings.num_layers - 1 else math.sqrt(2.0)  # He et al. 2015, for layers with a rectifier
        weights.append(torch.randn(settings.num_networks, inputs, outputs, generator=generator) * gain / math.sqrt(max(1, inputs)))
        biases.append(torch.zeros(settings.num_networks, 1, outputs))
    for parameter in (*weights, *biases):
        parameter.requires_grad_(True)
    groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for _ in range(settings.epochs):
        loss = (_forward(inputs_NF, weights, biases) - targets_N).square().mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuple(weight.detach() for weight in weights), tuple(bias.detach() for bias in biases)


def _forward(inputs_NF: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Float[Tensor, "E N"]:
    import torch

    hidden_ENI = inputs_NF.expand(len(weights[0]), -1, -1)
    for number, (weight_EIO, bias_E1O) in enumerate(zip(weights, biases, strict=True)):
        hidden_ENI = torch.baddbmm(bias_E1O, hidden_ENI.relu() if number else hidden_ENI, weight_EIO)
    return hidden_ENI[..., 0]


def _table(space: Space, subnets: Sequence[Subnet]) -> Float[Tensor, "N F"]:
    import torch

    return torch.tensor([features(space, subnet) for subnet in subnets], dtype=torch.float64)


def _packed(tensor: Tensor) -> dict[str, Any]:
    array = tensor.numpy()
    array = array.astype(array.dtype.newbyteorder("<"))
    return {"dtype": array.dtype.str, "sizes": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def _unpacked(data: Mapping[str, Any]) -> Tensor:
    import numpy as np
    import torch

    array = np.frombuffer(base64.b64decode(data["base64"]), dtype=data["dtype"]).reshape(data["sizes"])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
