"""LSQ: training with the rounding of int8 and int4 in the forward pass, and with step sizes that are learned.

Source: Esser et al. 2020, "Learned Step Size Quantization", section 2. With v = w / s, rounded and clipped to -Qn..Qp, the weight that is used is
w' = s * round(clip(v)), and the rounding is passed straight through:

    dw'/dw = 1 inside the clip, else 0                                                (equation 5)
    dw'/ds = round(v) - v inside the clip, -Qn or Qp outside, times 1 / sqrt(N Qp)    (equation 3, and section 2.2; N weights have this step)

Modules of fake quantization stand in for linears and embeddings while a student is trained (`install_lsq`), and become the integer modules that run and are
saved (`convert`). Outside of training, where no gradient is wanted, they run these integer modules themselves: so what is evaluated during training is what
will be served, bit by bit. A checkpoint cannot hold them.

Where we differ, each time to end in the modules that run: weights have a step for each output (int8) or group (int4, with a zero that is learned as well,
after LSQ+, Bhalgat et al. 2020, equation 6), in the precision in which it is stored; activations are rounded token by token to their own largest, as the
int8 product does, and have no step to learn; at 4 bits they are not rounded. The logarithm of the step is the parameter: Adam divides the size of a gradient
out, and would move a step of 0.001 by the learning rate as it does a weight of 0.1. And steps begin at the scales found without training unless
StepStart.PAPER is asked for, since a recovery is short. Measured on the quickstart's student, KL from what it was: int4 in groups of 128 has 0.0080 without
training, and after 50 steps 0.0051, from the paper's start 0.0363 and 0.0133; int8 has 0.0001 without training, which 50 steps do not better.

Shapes: O outputs (or tokens of an embedding), I inputs (or its width), G groups = ceil(I / S) or 1, S inputs of a group.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.compress.recovery import StepStart
from llmdistill.models.int4_linear import MIDDLE, Int4Linear
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.int8_product import LARGEST, quantize_rows

NO_STEP = 1e-20  # what is below has no scale of its own: a row of zeros, a group of equal weights
LEAST_STEP = 1e-8
NOT_CONVERTED: tuple[Any, Any] = (None, None)


def install_lsq(model: nn.Module, quantized: nn.Module, *, start: StepStart = StepStart.FITTED) -> tuple[str, ...]:
    """Put fake quantization where `quantized`, the same model after an integer method, holds integers; returns the paths. Shared weights have shared steps."""
    paths = tuple(path for path, module in quantized.named_modules(remove_duplicate=False) if isinstance(module, (Int8Linear, Int8Embedding, Int4Linear)))
    made: dict[int, LSQLinear | LSQEmbedding] = {}
    grids: dict[int, Grid] = {}
    for path in paths:
        module: Any = model.get_submodule(path)
        if any(module is one for one in made.values()):  # a module that stands in several places, as a low-rank embedding may, has it in all of them
            continue
        if type(module) not in (nn.Linear, nn.Embedding):
            raise ValueError(f"{path} holds a {type(module).__name__}, and fake quantization takes the place of plain linears and embeddings: install it once")
        if id(module) not in made:
            if id(module.weight) not in grids:
                grids[id(module.weight)] = Grid(module.weight, quantized.get_submodule(path), start)
            grid = grids[id(module.weight)]
            made[id(module)] = (LSQLinear(module, grid) if isinstance(module, nn.Linear) else LSQEmbedding(module, grid)).train(module.training)
        model.set_submodule(path, made[id(module)])
    return paths


@torch.no_grad()
def convert(model: nn.Module) -> dict[str, float]:
    """Put integer modules in the place of fake quantization; returns by path how far they are from the trained weights, as a share of their norm."""
    found: list[Any] = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, (LSQLinear, LSQEmbedding))]
    converted: dict[int, Any] = {}
    first: dict[int, Any] = {}
    errors = {}
    for path, module in found:
        if id(module) not in converted:
            new = converted[id(module)] = module.converted()
            source = first.setdefault(id(module.weight), new)
            for name in ("packed_OJ", "scale_OG", "zero_OG") if isinstance(new, Int4Linear) else ("weight", "scale_O"):
                setattr(new, name, getattr(source, name))
        errors[path] = float((module.grid.fake(module.weight) - module.weight).norm() / module.weight.norm().clamp(min=LEAST_STEP))
        model.set_submodule(path, converted[id(module)])
    return errors


class Grid(nn.Module):
    """The steps of one weight, and at 4 bits the zeros. Flat, so that the optimizer does not decay them."""

    def __init__(self, weight_OI: Tensor, like: Any, start: StepStart) -> None:
        super().__init__()
        self.has_zeros = type(like) is Int4Linear
        self.group_size: int = like.group_size if self.has_zeros else weight_OI.shape[1]
        self.low, self.high = (-MIDDLE, MIDDLE - 1) if self.has_zeros else (-LARGEST, LARGEST)
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        weight_OI = weight_OI.detach().to(wide)
        of_all = paper_step(weight_OI.flatten(), self.high).clamp(min=LEAST_STEP)
        if start is StepStart.PAPER:
            step_OG = paper_step(self._groups(weight_OI), self.high)[..., 0] * self.group_size / self._real_inputs(weight_OI)
            zero_OG = torch.zeros_like(step_OG)
        else:
            step_OG = (like.scale_OG if self.has_zeros else like.scale_O[:, None]).to(weight_OI)
            zero_OG = like.zero_OG.to(weight_OI) if self.has_zeros else torch.zeros_like(step_OG)
        self.num_groups = step_OG.shape[1]
        self.log_lsq_step: Any = nn.Parameter(torch.where(step_OG > NO_STEP, step_OG, of_all).log().flatten())
        self.lsq_zero: Any = nn.Parameter(zero_OG.flatten()) if self.has_zeros else None

    def step_and_zero_OG1(self) -> tuple[Tensor, Tensor | None]:
        """As they are stored; the rounding to bfloat16 of those of int4 passes gradients."""
        step_OG1 = self.log_lsq_step.exp().view(-1, self.num_groups, 1)
        if self.lsq_zero is None:
            return step_OG1, None
        return _bfloat16(step_OG1), _bfloat16(self.lsq_zero.view(-1, self.num_groups, 1))

    def fake(self, weight_OI: Tensor) -> Tensor:
        """The weight that the codes stand for."""
        step_OG1, zero_OG1 = self.step_and_zero_OG1()
        return fake_quantize(self._groups(weight_OI), step_OG1, zero_OG1, self.low, self.high).flatten(1)[:, : weight_OI.shape[1]]

    def fake_rows(self, weight_OI: Tensor, row_BL: Tensor, padding_row: int | None) -> Tensor:
        """Some rows of it, for an embedding: the others are not computed."""
        step_BL1 = F.embedding(row_BL, self.log_lsq_step[:, None]).exp()
        return fake_quantize(F.embedding(row_BL, weight_OI, padding_row), step_BL1, None, self.low, self.high)

    def codes_OI(self, weight_OI: Tensor) -> Tensor:
        """Whole numbers from low to high."""
        step_OG1, zero_OG1 = self.step_and_zero_OG1()
        return _codes(self._groups(weight_OI), step_OG1, zero_OG1, self.low, self.high).flatten(1)[:, : weight_OI.shape[1]]

    def _groups(self, weight_OI: Tensor) -> Tensor:
        return F.pad(weight_OI, (0, -weight_OI.shape[1] % self.group_size)).unflatten(1, (-1, self.group_size))

    def _real_inputs(self, weight_OI: Tensor) -> Tensor:
        """How many inputs each group has; the last may be short."""
        return self._groups(torch.ones_like(weight_OI[:1])).sum(-1)


class LSQLinear(nn.Module):
    """A linear with a rounded weight and, at 8 bits, rounded inputs. Its weight stays the parameter that it was."""

    def __init__(self, linear: nn.Linear, grid: Grid) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.grid = linear.weight, linear.bias, grid
        self._converted = NOT_CONVERTED

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training:
            hidden_BLI = hidden_BLI if self.grid.has_zeros else _RoundedRows.apply(hidden_BLI)  # pyright: ignore[reportAssignmentType]
            return F.linear(hidden_BLI, self.grid.fake(self.weight).to(hidden_BLI.dtype), self.bias)
        return _kept(self)(hidden_BLI)

    @torch.no_grad()
    def converted(self) -> Int8Linear | Int4Linear:
        """The integer module that computes the same."""
        step_OG1, zero_OG1 = self.grid.step_and_zero_OG1()
        codes_OI = self.grid.codes_OI(self.weight)
        if zero_OG1 is None:
            module = Int8Linear.from_integers(codes_OI.to(torch.int8), step_OG1[:, 0, 0].float(), self.bias)
        else:
            codes_OI = (codes_OI + MIDDLE).to(torch.uint8)
            module = Int4Linear.from_codes(codes_OI, step_OG1[..., 0], zero_OG1[..., 0], self.bias, group_size=self.grid.group_size)
        module.bias = self.bias
        return module

    def train(self, mode: bool = True) -> Self:
        self._converted = NOT_CONVERTED
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={8 if self.grid.low == -LARGEST else 4}"


class LSQEmbedding(nn.Module):
    """An embedding with rounded rows."""

    def __init__(self, embedding: nn.Embedding, grid: Grid) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        self.weight, self.grid = embedding.weight, grid
        self._converted = NOT_CONVERTED

    def forward(self, token_BL: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training:
            return self.grid.fake_rows(self.weight, token_BL, self.padding_idx)
        return _kept(self)(token_BL)

    @torch.no_grad()
    def converted(self) -> Int8Embedding:
        """The integer module that computes the same."""
        module = Int8Embedding(self.num_embeddings, self.embedding_dim, dtype=self.weight.dtype, device=self.weight.device)
        module.weight.copy_(self.grid.codes_OI(self.weight))
        module.scale_O.copy_(self.grid.step_and_zero_OG1()[0][:, 0, 0])
        return module

    def train(self, mode: bool = True) -> Self:
        self._converted = NOT_CONVERTED
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


def paper_step(weight: Tensor, high: int) -> Tensor:
    """LSQ's first step for the weights of the last axis: 2 mean|w| / sqrt(Qp)."""
    return 2 * weight.abs().mean(-1, keepdim=True) / high**0.5


def fake_quantize(weight_S: Tensor, step_1: Tensor, zero_1: Tensor | None, low: int, high: int) -> Tensor:
    """The weights of the last axis on the grid of their step and zero, with the gradients above."""
    return _FakeQuantize.apply(weight_S, step_1, zero_1, low, high)  # pyright: ignore[reportReturnType]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_S: Tensor, step_1: Tensor, zero_1: Tensor | None, low: int, high: int) -> Tensor:
        ctx.save_for_backward(weight_S, step_1, zero_1)
        ctx.low, ctx.high = low, high
        codes_S = _codes(weight_S, step_1, zero_1, low, high)
        return codes_S * step_1 if zero_1 is None else torch.addcmul(zero_1, codes_S, step_1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight_S, step_1, zero_1), (gradient_S,) = ctx.saved_tensors, gradients
        value_S = _scaled(weight_S, step_1, zero_1)
        is_inside_S = (value_S > ctx.low) & (value_S < ctx.high)
        slope_S = torch.where(is_inside_S, value_S.round() - value_S, value_S.clamp(ctx.low, ctx.high))
        scale = (weight_S.shape[-1] * ctx.high) ** -0.5
        of_step_1 = (gradient_S * slope_S).sum(-1, keepdim=True) * scale
        of_zero_1 = None if zero_1 is None else gradient_S.masked_fill(is_inside_S, 0).sum(-1, keepdim=True)
        return gradient_S * is_inside_S, of_step_1, of_zero_1, None, None


class _RoundedRows(torch.autograd.Function):
    """Each token to 255 steps of its own largest number, as the int8 product does; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, hidden_BLI: Tensor) -> Tensor:
        codes_MI, scale_M1 = quantize_rows(hidden_BLI.flatten(0, -2))
        return (codes_MI * scale_M1).view(hidden_BLI.shape).to(hidden_BLI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _scaled(weight_S: Tensor, step_1: Tensor, zero_1: Tensor | None) -> Tensor:
    return (weight_S if zero_1 is None else weight_S - zero_1) / step_1


def _codes(weight_S: Tensor, step_1: Tensor, zero_1: Tensor | None, low: int, high: int) -> Tensor:
    return _scaled(weight_S, step_1, zero_1).clamp_(low, high).round_()


def _bfloat16(number: Tensor) -> Tensor:
    """Rounded, with the gradient going straight through."""
    return number + (number.detach().bfloat16().to(number.dtype) - number.detach())


def _kept(module: LSQLinear | LSQEmbedding) -> Any:
    """The integer module of one evaluation. `train` and `eval` forget it, since torch's fused optimizers change parameters and not their version."""
    version = tuple((parameter.data_ptr(), parameter._version) for parameter in module.parameters())
    if module._converted[0] != version:
        module._converted = version, module.converted()
    return module._converted[1]
