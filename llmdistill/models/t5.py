"""What is particular to T5: its head, and how a new one is initialised.

The head. T5 v1.0 uses the embedding as the head and scales the decoder's output by d_model^-0.5; v1.1 and flan have a head of their own and no scale.
transformers 5 reads both from `tie_word_embeddings`, and then sets it to True in either case, so that the two forms differ only in whether the file holds
two matrices. A later `tie_weights()` (resizing the vocabulary calls it) would then quietly put the embedding in the place of a v1.1 head, and other tools
that read the saved config would tie and scale. `protect_head` and `saved_tie` keep the config true to the model in both places.

The initialisation. The final norm hands the head vectors of length sqrt(d_model).
- Untied: transformers draws the head with standard deviation 1, so logits have sqrt(d_model) and the first loss is 41 nats at width 128 and 95 at 512 (in
  transformers 5, which makes the head the embedding, even 70 to 190: every input token predicts itself). We draw it with 1 / d_model, as Tensor Programs V
  (Yang et al. 2022, table 8) has it for output weights: logits have d_model^-0.5 and the loss starts at ln(vocabulary) + 1 / (2 d_model). With d_model^-0.5,
  which mesh-tensorflow's T5 had, it would start half a nat higher.
- Tied: the scale makes logits of standard deviation 1, half a nat above ln(vocabulary), and what an input token says for itself comes on top. The matrix must
  keep its standard deviation of 1, since the largest logit that it can give is proportional to that, so the decoder's final norm starts at TIED_GAIN
  instead of 1: the excess shrinks with its square, and it is learned like any norm. Half of 1 is near enough and soon grown; 0.3 slowed learning visibly.
All else is stock.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

TIED_GAIN = 0.5


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether the head and the embedding are one matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return isinstance(head, nn.Linear) and head.weight is embedding.weight


def protect_head(model: PreTrainedModel) -> None:
    """Say on an untied T5's config that it is untied, so that nothing ties it again."""
    if isinstance(model, T5ForConditionalGeneration) and not head_is_tied(model):
        model.config.tie_word_embeddings = False


def saved_tie(model: PreTrainedModel) -> bool:
    """The `tie_word_embeddings` to write: of a T5 it decides the scale, and whether the head is tied shows in the tensors."""
    return model.config.scale_decoder_outputs if isinstance(model, T5ForConditionalGeneration) else head_is_tied(model)


def new_t5(config: T5Config) -> T5ForConditionalGeneration:
    """A randomly initialised T5 of the global generator; `config.scale_decoder_outputs` decides whether its head is tied (see the module's text)."""
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        if config.scale_decoder_outputs:
            model.decoder.final_layer_norm.weight.fill_(TIED_GAIN)
        else:
            model.lm_head.weight = nn.Parameter(torch.randn(config.vocab_size, config.d_model) / config.d_model)
    protect_head(model)
    return model
