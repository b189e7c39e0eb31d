"""A model from elsewhere (a hub id, a folder, a package's weights) as a checkpoint of the store, as any stage upstream would have written it.

So pipelines that begin with a finished model (a stock T5 or Llama to be compressed, or a checkpoint of ours that was copied here) are built like all others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llmdistill.core.artifacts import Checkpoint
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.models.source import ModelSource
from llmdistill.models.student import Pretrained


@dataclass(frozen=True, kw_only=True)
class Take(Stage[Checkpoint]):
    """A finished model, unchanged: stock weights in float32, or one of our checkpoints with all that was done to it."""

    artifact = Checkpoint

    source: Pretrained

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.models import checkpoint

        folder = ModelSource(self.source.source).folder()
        if folder and (folder / checkpoint.LINEAGE).is_file():
            model, tokenizer = checkpoint.load(folder)
            lineage, card = Checkpoint(folder).lineage(), Checkpoint(folder).model_card()
        else:
            model, tokenizer = self.source.prepare((), seed=0)
            lineage = [{"technique": "take", "settings": describe(self), "measured": {}}]
            card = _card(self.source.source)
        checkpoint.save(model, tokenizer, run.folder, lineage=lineage, card=card)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _card(source: str) -> str:
    return f"""---
library_name: transformers
---
# {json.dumps(source)[1:-1]}

The model of `{source}`, unchanged, as llmdistill read it.
"""
