"""What SVD can factorise in a model: its linears, its embedding and its head, each with what it costs and how it is replaced.

Shapes: I inputs, O outputs, R rank; of an embedding, V vocabulary (its O) and D model width (its I).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.compress.method import Layer
from llmdistill.compress.ranks import Budget, linear_costs
from llmdistill.compress.slots import HEAD, Role, Slot, embedding_paths, plain, slots
from llmdistill.compress.svd import Scope
from llmdistill.models.low_rank_embedding import LowRankEmbedding
from llmdistill.models.low_rank_linear import LowRankLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration


@dataclass(frozen=True, eq=False)
class Target:
    """A matrix to factorise."""

    path: str
    weight_OI: Tensor
    slot: Slot | None
    """Whose inputs count; None where all count alike."""
    row_weight_O: Tensor | None = None
    """What each row counts; None where all count alike."""
    embeddings: tuple[str, ...] = ()
    """Where it is an embedding."""
    head: str | None = None
    """Where it is a head as well as an embedding."""

    @property
    def scaled_OI(self) -> Tensor:
        """The weight whose error counts everywhere alike."""
        weight_OI = self.weight_OI.detach().double()
        return weight_OI if self.row_weight_O is None else weight_OI * self.row_weight_O.sqrt()[:, None]

    def costs(self, budget: Budget) -> tuple[int, int]:
        """What one rank costs, and what the dense matrix does. An embedding looks up a row at no cost, and multiplies it by the projection once factorised."""
        num_outputs, num_inputs = self.weight_OI.shape
        rank_cost, full_cost = linear_costs(num_inputs, num_outputs, budget, bytes_per_number=self.weight_OI.element_size())
        return (rank_cost + 2 * num_inputs if self.embeddings and budget is Budget.FLOPS else rank_cost), full_cost

    def replace(self, model: Any, up_OR: Tensor, down_RI: Tensor) -> list[tuple[str, str]]:
        """Put the factors of `scaled_OI` in its place, in the weight's dtype; paths and kinds of what is there now."""
        if self.row_weight_O is not None:
            up_OR = up_OR / self.row_weight_O.sqrt()[:, None]
        up_OR, down_RI = up_OR.to(self.weight_OI), down_RI.to(self.weight_OI)
        bias_O = model.get_submodule(self.head or self.path).bias if self.head or not self.embeddings else None
        if not self.embeddings:
            return [_put(model, self.path, LowRankLinear.from_factors(up_OR, down_RI, bias_O))]
        embedding = LowRankEmbedding.from_factors(up_OR, down_RI)
        heads = [_put(model, self.head, embedding.head(bias_O))] if self.head else []
        return [_put(model, path, embedding) for path in self.embeddings] + heads


def _put(model: Any, path: str, module: Any) -> tuple[str, str]:
    module.train(model.training)
    model.set_submodule(path, module)
    return path, module.kind


def targets_of(
    model: PreTrainedModel, scope: Sequence[Scope], budget: Budget, calibration: Calibration, *, counts_tokens: bool
) -> tuple[list[Target], list[Layer]]:
    """What is in scope, the embedding first, in the order in which data passes; and what has to stay, with the reason."""
    targets: list[Target] = []
    kept: list[Layer] = []
    for slot in slots(model):
        if slot.role is Role.HEAD or (Scope.ATTENTION if slot.role.is_attention else Scope.FEED_FORWARD) not in scope:
            continue
        if _is_factorised(slot.module(model)):
            kept.append(_left(slot.path, slot.module(model)))
        else:
            targets.append(Target(slot.path, plain(model, slot, "SVD").weight, slot))
    if Scope.EMBEDDINGS in scope:
        of_embeddings, kept_too = _embeddings(model, budget, calibration, counts_tokens)
        targets = [*(one for one in of_embeddings if one.embeddings), *targets, *(one for one in of_embeddings if not one.embeddings)]
        kept += kept_too
    if not targets:
        names = ", ".join(part.name for part in scope)
        raise ValueError(f"SVD has nothing to do in {names}: everything there is factorised already, or costs nothing in {budget.name}; widen the scope")
    return targets, kept


def _is_factorised(module: Any) -> bool:
    """By an earlier method, into numbers: integers would be refused."""
    return type(module) is not nn.Linear and hasattr(module, "kind") and all(parameter.is_floating_point() for parameter in module.parameters())


def _left(path: str, module: Any) -> Layer:
    return Layer(path=path, kind="kept", note=f"it holds a {module.kind} module already, from an earlier method")


def _embeddings(model: Any, budget: Budget, calibration: Calibration, counts_tokens: bool) -> tuple[list[Target], list[Layer]]:
    """The embedding and the head, or the one matrix that both are."""
    paths = embedding_paths(model)
    modules = [model.get_submodule(path) for path in paths]
    head_slot = slots(model)[-1]
    head = head_slot.module(model)
    if any(_is_factorised(module) for module in (*modules, head)):
        factorised = [(path, module) for path, module in zip((*paths, HEAD), (*modules, head), strict=True) if _is_factorised(module)]
        raise ValueError(f"SVD factorises embedding and head together, and {factorised[0][0]} holds a {factorised[0][1].kind} module already: leave one out")
    if any(type(module) is not nn.Embedding or module.weight is not modules[0].weight for module in modules):
        raise ValueError(f"SVD factorises an embedding that is one plain matrix, and those at {', '.join(paths)} are not: leave EMBEDDINGS out of the scope")
    weight_VD = modules[0].weight
    read_V, written_V = _token_counts(model, calibration) if counts_tokens else (None, None)
    if plain(model, head_slot, "SVD").weight is weight_VD:
        counts_V = None if read_V is None or written_V is None else read_V + written_V - 1
        return [Target(paths[0], weight_VD, head_slot, row_weight_O=counts_V, embeddings=paths, head=HEAD)], []
    of_head = Target(HEAD, head.weight, head_slot, row_weight_O=written_V)
    if budget is Budget.FLOPS:
        return [of_head], [Layer(path=paths[0], kind="kept", note="a row is looked up at no FLOPs, so there is nothing to save in this budget")]
    return [Target(paths[0], weight_VD, None, row_weight_O=read_V, embeddings=paths), of_head], []


def _token_counts(model: Any, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """How often each token is read, and how often it is to be written, each plus 1."""
    num = model.get_input_embeddings().num_embeddings
    read_V, written_V = (torch.ones(num, dtype=torch.float64, device=model.device) for _ in range(2))
    for batch in calibration.batches(model):
        read = torch.cat([batch.input_EL.flatten(), *(decoded.input_GT.flatten() for decoded in batch.decoded)])
        for counts_V, tokens in ((read_V, read), (written_V, batch.target_N)):
            counts_V += torch.bincount(tokens, minlength=num)
    return read_V, written_V
