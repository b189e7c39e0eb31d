"""Int8: weights in 8 bits with a scale for each output, multiplied as integers with inputs that are quantized token by token as they come.

Embedding and head count: of a small student they are most of the weights. Where they were one matrix they stay one. What is sensitive stays as it was
(sensitivity.py). How the product is computed is in models/int8_product.py.

No torch at import.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmdistill.compress.int4 import check_max_loss_rise
from llmdistill.compress.method import Applied, Layer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Weights in 8 bits, run as 8 bits."""

    kind: ClassVar[str] = "int8"
    quantizes: ClassVar[bool] = True

    head: bool = True
    embedding: bool = True
    keep: tuple[str, ...] = ()
    """Paths of linears that are left as they are; * stands for anything."""
    max_loss_rise: float = 0.05
    """Nats by which the held-out loss may rise; the most sensitive layers are kept as they are where it would rise by more."""

    def __post_init__(self) -> None:
        check_max_loss_rise("Int8", self.max_loss_rise)

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Replace the linears, then the embedding with the head that is tied to it; the sensitive ones are kept."""
        from llmdistill.compress.weight_only import quantize_linears
        from llmdistill.models.int8_linear import Int8Linear

        def make(linear: nn.Linear, mean_square_I: Tensor) -> Any:
            return Int8Linear.from_linear(linear)

        applied = quantize_linears(model, calibration, make, kind=self.kind, head=self.head, keep=self.keep, max_loss_rise=self.max_loss_rise)
        return _with_embedding(model, calibration, applied, self.max_loss_rise) if self.embedding else applied


def _with_embedding(model: Any, calibration: Calibration, applied: Applied, max_loss_rise: float) -> Applied:
    """The embedding too, in all its places at once, and the head where it is the same matrix. Of a low-rank one it is the table that has the bytes."""
    from torch import nn

    from llmdistill.compress.sensitivity import keep_sensitive
    from llmdistill.compress.slots import HEAD, embedding_paths
    from llmdistill.models.int8_embedding import Int8Embedding
    from llmdistill.models.low_rank_embedding import LowRankEmbedding

    embedding: Any = model.get_input_embeddings()
    table, suffix, head = (embedding.table, ".table", f"{HEAD}.up") if type(embedding) is LowRankEmbedding else (embedding, "", HEAD)
    if type(table) is not nn.Embedding:
        note = f"a {getattr(table, 'kind', type(table).__name__)} module, and only an embedding of ordinary numbers becomes int8"
        return dataclasses.replace(applied, layers=(*applied.layers, Layer(path=embedding_paths(model)[0], kind="kept", note=note)))
    quantized = Int8Embedding.from_embedding(table)
    heads = [path for path, module in model.named_modules() if path == head and type(module) is nn.Linear and module.weight is table.weight]
    paths = (*(path + suffix for path in embedding_paths(model)), *heads)

    def quantize(model: Any, path: str) -> nn.Module:
        before = model.get_submodule(path)
        model.set_submodule(path, quantized if path not in heads else quantized.head(None if before.bias is None else before.bias.detach()))
        return before

    weight = table.weight.detach().float()
    error = float((quantized.weight.float() * quantized.scale_O[:, None] - weight).norm() / weight.norm())
    known = dataclasses.replace(calibration, known_loss=applied.held_out_loss)
    sensitivity = keep_sensitive(model, [paths], quantize, known, max_loss_rise)
    layers = {layer.path: layer for layer in applied.layers} | {layer.path: layer for layer in sensitivity.kept}
    for path in paths:
        if not sensitivity.is_kept(path):
            kind = Int8.kind if path in heads else quantized.kind
            layers[path] = Layer(path=path, kind=kind, figures={"bits": 8 + 32 / weight.shape[1], "relative_weight_error": error})
    kept = sum(layer.kind == "kept" for layer in layers.values())
    figures = dict(applied.figures) | {"layers_quantized": len(layers) - kept, "layers_kept": kept}
    return Applied(figures=figures, layers=tuple(layers.values()), held_out_loss=sensitivity.loss_after)
