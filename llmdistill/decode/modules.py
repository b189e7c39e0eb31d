"""Calls of a layer's submodules, made cheaper where the submodule is a stock one.

A submodule is called as a module whatever it is, so a low-rank or int8 replacement works. Where it is exactly the stock class without hooks, the same
arithmetic runs in fewer operations: a residual is added by the matrix product itself, q, k and v are one product, a norm is one call, the output head is
stored transposed. The copies made for that are taken when the engine is made, and differ from the module's own result by rounding only.

The modules that hold a layer's submodules (stacks, blocks, attention) are not called, since the keys and values are ours: what is inside them may be
anything, they themselves must do what the stock ones do, and hooks on them do not run (transformers leaves idle ones there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from llmdistill.decode.int8 import Int8FeedForward, Int8Joint, Int8Normed, reciprocal_root_mean_square
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.skipped_layer import SkippedLayer

if TYPE_CHECKING:
    from torch import Tensor

MAX_COPIED_HEAD_BYTES = 256 * 2**20  # larger output heads are used as they are
PACKED_FOR_ROWS = 32


def is_stock(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Exactly one of these classes, and nobody listens in."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return type(module) in classes and not any(hooks) and "forward" not in vars(module)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return is_stock(module, nn.Linear)


def opened(module: Any, *classes: type[nn.Module]) -> Any:
    """The module, whose submodules the engine runs in place of its forward, which must be that of one of these classes, skipped or not (skipped.py)."""
    is_known = isinstance(module, SkippedLayer) or any(isinstance(module, one) and type(module).forward is one.forward for one in classes)
    if "forward" in vars(module) or not is_known:
        names = " or ".join(one.__name__ for one in classes)
        raise ValueError(
            f"the decode engine runs what is inside a {names} itself, and this {type(module).__name__} has a forward of its own; "
            "replace modules inside it instead: linears, norms, the feed-forward, the embedding, the head"
        )
    return module


def are_int8(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[Int8Linear]]:
    return all(is_stock(module, Int8Linear) for module in modules)


def norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Root mean square norm."""
    return partial(_norm_float32, module, module.weight.new_full((1,), module.variance_epsilon)) if is_norm_float32(module) else module  # pyright: ignore


def is_norm_float32(module: Any) -> bool:
    """In other dtypes the stock modules pass through float32 in their own ways."""
    return is_stock(module, T5LayerNorm, LlamaRMSNorm, Qwen2RMSNorm) and module.weight.dtype == torch.float32


def _norm_float32(module: Any, epsilon_1: Tensor, hidden: Tensor) -> Tensor:
    """Twelve times as fast as F.rms_norm with 512 rows on a CPU, where that makes several large tensors on the way."""
    if hidden.dtype != torch.float32:
        return module(hidden)
    return (hidden * reciprocal_root_mean_square(hidden, epsilon_1)).mul_(module.weight)


def linear(module: Any) -> Callable[[Tensor], Tensor]:
    """A linear by itself."""
    if are_int8([module]):
        return Int8Joint([module])  # pyright: ignore[reportArgumentType] - which are_int8 has said of the list
    if is_stock(module, LowRankLinear):
        down, up = linear(module.down), linear(module.up)
        return lambda x: up(down(x))
    return module


def joint_linear(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The outputs of several linear modules on one input, side by side. Where low-rank ones share what reads the input, that runs once."""
    if are_int8(modules):
        return Int8Joint(modules)
    if len(modules) == 1:
        return linear(modules[0])
    if share_down(modules):
        factored: Sequence[Any] = modules
        down, up = linear(factored[0].down), joint_linear([module.up for module in factored])
        return lambda x: up(down(x))
    linears = [module for module in modules if is_plain_linear(module)]
    if len(linears) < len(modules) or len({linear.weight.dtype for linear in linears}) > 1 or len({linear.bias is None for linear in linears}) > 1:
        return lambda x: torch.cat([module(x) for module in modules], -1)
    weight_MO = torch.cat([linear.weight.detach() for linear in linears]).t().contiguous()  # read faster so, with few rows on a CPU
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return partial(_product, weight_MO, torch.cat(biases) if biases else None)


def separate_linears(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """The outputs of several linear modules on one input, each by itself; as one product where that saves work whatever the number of rows."""
    if len(modules) > 1 and (are_int8(modules) or share_down(modules)):
        joint, widths = joint_linear(modules), [int(module.out_features) for module in modules]  # pyright: ignore[reportArgumentType]
        return lambda x: joint(x).split(widths, -1)
    calls = [linear(module) for module in modules]
    return lambda x: [call(x) for call in calls]


def normed_joint(norm_module: nn.Module, modules: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """hidden -> joint_linear(norm(hidden)); int8 linears take their part of the norm upon themselves."""
    if not _take_norm(norm_module, modules):
        normed, joint = norm(norm_module), joint_linear(modules)
        return lambda hidden: joint(normed(hidden))
    if are_int8(modules):
        return Int8Normed(norm_module, modules)
    if len(modules) == 1 or share_down(modules):
        down, up = Int8Normed(norm_module, [modules[0].down]), joint_linear([module.up for module in modules])
        return lambda hidden: up(down(hidden))
    downs, ups = Int8Normed(norm_module, [module.down for module in modules]), [linear(module.up) for module in modules]
    ranks = [module.rank for module in modules]
    return lambda hidden: torch.cat([up(x) for up, x in zip(ups, downs(hidden).split(ranks, -1), strict=True)], -1)


def normed_separate(norm_module: nn.Module, modules: Sequence[Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    """hidden -> separate_linears(norm(hidden)), with int8 linears as in normed_joint."""
    if _take_norm(norm_module, modules):
        joint, widths = normed_joint(norm_module, modules), [int(module.out_features) for module in modules]
        return lambda hidden: joint(hidden).split(widths, -1)
    normed, separate = norm(norm_module), separate_linears(modules)
    return lambda hidden: separate(normed(hidden))


def _take_norm(norm_module: nn.Module, modules: Sequence[Any]) -> bool:
    """Whether these are int8 linears, or low-rank ones whose first factors are, behind a norm in float32."""
    is_low_rank = all(is_stock(module, LowRankLinear) for module in modules)
    return is_norm_float32(norm_module) and are_int8([module.down for module in modules] if is_low_rank else modules)


def normed_head(norm_module: nn.Module, module: nn.Module, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """hidden -> head(norm(hidden) * scale)."""
    if is_norm_float32(norm_module) and are_int8([module]):
        return Int8Normed(norm_module, [module], scale)  # pyright: ignore[reportArgumentType]
    normed, output = norm(norm_module), head(module)
    return (lambda hidden: output(normed(hidden))) if scale == 1 else (lambda hidden: output(normed(hidden) * scale))


def normed_feed_forward(
    norm_module: nn.Module, linears: Sequence[nn.Module], activation_module: nn.Module, out: nn.Module
) -> Callable[[Tensor], Tensor] | None:
    """hidden -> hidden + out(act(linears[0](norm(hidden))) [* linears[1](norm(hidden))]) where all of them are int8; None otherwise."""
    everything: list[Any] = [*linears, out]
    if not is_norm_float32(norm_module) or not are_int8(everything) or any(module.bias is not None for module in everything):
        return None
    return Int8FeedForward(
        norm_module, everything[:-1], activation(activation_module, linears[0]), everything[-1], is_relu=is_stock(activation_module, nn.ReLU)
    )


def share_down(modules: Sequence[Any]) -> bool:
    """Whether these are low-rank linears whose first factor is one and the same."""
    if len(modules) < 2 or not all(is_stock(module, LowRankLinear) for module in modules):
        return False
    factors = [[id(parameter) for parameter in module.down.parameters()] for module in modules]  # an int4 one has no `weight` to compare
    return all(factor == factors[0] for factor in factors)


def _product(weight_MO: Tensor, bias_O: Tensor | None, x: Tensor) -> Tensor:
    return x @ weight_MO if bias_O is None else x @ weight_MO + bias_O


def residual_linear(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(hidden, x) -> hidden + module(x), which may reuse the memory of `hidden`."""
    if is_plain_linear(module) and module.bias is None:
        return partial(_add_product, module)
    if are_int8([module]):
        return Int8Joint([module]).add_to  # pyright: ignore[reportArgumentType]
    if is_stock(module, LowRankLinear):
        down, add_up = linear(module.down), residual_linear(module.up)
        return lambda hidden, x: add_up(hidden, down(x))
    return lambda hidden, x: hidden + module(x)


def _add_product(module: nn.Linear, hidden: Tensor, x: Tensor) -> Tensor:
    if hidden.dtype != module.weight.dtype or x.dtype != hidden.dtype or not hidden.is_contiguous():
        return hidden + module(x)
    hidden.flatten(0, -2).addmm_(x.flatten(0, -2), module.weight.t())
    return hidden


def head(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The output head."""
    if not is_plain_linear(module) or module.bias is not None:
        return linear(module)
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.nbytes > MAX_COPIED_HEAD_BYTES:
        return module
    return PackedHead(weight.detach())


class PackedHead:
    """The product with the output head on a CPU, in float32, from a copy that suits the number of rows; a copy is made when it is first needed.

    Milliseconds for 32128 x 512 on one thread with 1, 4, 8, 32 rows: as it is 5.9, 14.7, 15.4, 26.2; transposed 3.0, 9.5, 11.7, 24.2; packed by oneDNN 4.5,
    6.7, 7.9, 16.8.
    """

    def __init__(self, weight_VM: Tensor) -> None:
        self.weight_VM = weight_VM
        self.transposed_MV: Tensor | None = None
        self.packed: Tensor | None = None

    def __call__(self, hidden_SM: Tensor) -> Tensor:
        if hidden_SM.dtype != torch.float32 or hidden_SM.dim() != 2:
            return F.linear(hidden_SM, self.weight_VM)
        if len(hidden_SM) == 1 or not torch.backends.mkldnn.is_available():
            if self.transposed_MV is None:
                self.transposed_MV = self.weight_VM.t().contiguous()
            return hidden_SM @ self.transposed_MV
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_VM, PACKED_FOR_ROWS)
        return torch.ops.mkldnn._linear_pointwise(hidden_SM, self.packed, None, "none", [], "")  # what TorchInductor calls for a frozen linear


def activation(module: nn.Module, before: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation of what `before` gives, in its place if nobody else can hold it."""
    may_overwrite = is_plain_linear(before) or is_stock(before, Int8Linear)
    if is_stock(module, nn.ReLU):
        return torch.relu_ if may_overwrite else torch.relu
    if is_stock(module, type(ACT2FN["gelu_new"]), type(ACT2FN["gelu_pytorch_tanh"])):
        return partial(F.gelu, approximate="tanh")
    if is_stock(module, nn.SiLU, type(ACT2FN["silu"])):
        return partial(F.silu, inplace=may_overwrite)
    return module


def attend(queries_NGD: Tensor, keys_NDL: Tensor, values_NLD: Tensor, bias_N1L: Tensor | None, scale: float) -> Tensor:
    """Attention of G queries to L keys, N times; the bias is added to the scaled scores."""
    if queries_NGD.dtype not in (torch.float32, torch.float64):  # softmax and its argument in float32
        bias = None if bias_N1L is None else bias_N1L[None].to(queries_NGD.dtype)
        return F.scaled_dot_product_attention(queries_NGD[None], keys_NDL.transpose(1, 2)[None], values_NLD[None], attn_mask=bias, scale=scale)[0]
    if bias_N1L is None:
        scores_NGL = torch.bmm(queries_NGD if scale == 1 else queries_NGD * scale, keys_NDL)
    else:
        scores_NGL = torch.baddbmm(bias_N1L, queries_NGD, keys_NDL, alpha=scale)
    return torch.bmm(scores_NGL.softmax(-1), values_NLD)
