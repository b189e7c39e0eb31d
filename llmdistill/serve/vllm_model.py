"""Llama and Qwen2 class students with low-rank and int8 modules, ties and layers of different sizes, as a model of vLLM.

The arithmetic is that of transformers' LlamaForCausalLM and Qwen2ForCausalLM: attention, norms and rotary positions are vLLM's, the linears are put together
as the structure in config.json says (vllm_linears.py). One class for both, which differ in their biases alone. It runs on one device; several serve in
parallel by vLLM's data parallelism.

Shapes: N tokens of all requests together, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile  # pyright: ignore[reportMissingImports] - in an environment of its own
from vllm.model_executor.layers.activation import SiluAndMul  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.attention import Attention  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.layernorm import RMSNorm  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.rotary_embedding import get_rope  # pyright: ignore[reportMissingImports]

from llmdistill.serve.vllm_ends import Embedding, Head
from llmdistill.serve.vllm_linears import Linear, Plan, make_linears
from llmdistill.serve.vllm_refusals import refuse
from llmdistill.serve.vllm_weights import fill


class CausalAttention(nn.Module):
    """Queries, keys and values, rotated; attention over the cache; the output's linear."""

    def __init__(self, config: Any, plan: Plan, path: str, heads: int, cache_config: Any) -> None:
        super().__init__()
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = heads * config.num_key_value_heads // config.num_attention_heads
        is_qwen2 = config.model_type.endswith("qwen2")
        bias_qkv, bias_o = (True, False) if is_qwen2 else (config.attention_bias, config.attention_bias)
        self.sizes = [heads * head_width, groups * head_width, groups * head_width]
        names = zip(("q_proj", "k_proj", "v_proj"), self.sizes, strict=True)
        self.qkv = make_linears(plan, [Linear(path=f"{path}.{name}", inputs=config.hidden_size, outputs=size, bias=bias_qkv) for name, size in names])
        self.output = make_linears(plan, [Linear(path=f"{path}.o_proj", inputs=self.sizes[0], outputs=config.hidden_size, bias=bias_o)])
        self.rotary = get_rope(head_width, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters)
        self.attend = Attention(heads, head_width, head_width**-0.5, num_kv_heads=groups, cache_config=cache_config, prefix=f"{path}.attn")

    def forward(self, position_N: Tensor, hidden_ND: Tensor) -> Tensor:
        queries, keys, values = self.qkv(hidden_ND).split(self.sizes, -1)
        queries, keys = self.rotary(position_N, queries, keys)
        return self.output(self.attend(queries, keys, values))

    def places(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.qkv.places()
        yield from self.output.places()


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Any, plan: Plan, path: str, width: int) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_and_up = make_linears(
            plan, [Linear(path=f"{path}.{name}", inputs=config.hidden_size, outputs=width, bias=bias) for name in ("gate_proj", "up_proj")]
        )
        self.activation = SiluAndMul()
        self.down = make_linears(plan, [Linear(path=f"{path}.down_proj", inputs=width, outputs=config.hidden_size, bias=bias)])

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_and_up(hidden_ND)))

    def places(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.gate_and_up.places()
        yield from self.down.places()


class Layer(nn.Module):
    """One layer; as in all of vLLM, the sum so far travels beside what is to be added to it, and the next norm adds them."""

    def __init__(self, config: Any, plan: Plan, index: int, cache_config: Any) -> None:
        super().__init__()
        sizes = (config.sizes or {}).get("decoder")
        heads = sizes["heads"][index] if sizes else config.num_attention_heads
        width = sizes["ffn_widths"][index] if sizes else config.intermediate_size
        self.path = f"model.layers.{index}"
        self.attention_norm: Any = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward_norm: Any = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = CausalAttention(config, plan, f"{self.path}.self_attn", heads, cache_config)
        self.feed_forward = FeedForward(config, plan, f"{self.path}.mlp", width)

    def forward(self, position_N: Tensor, hidden_ND: Tensor, sum_ND: Tensor | None) -> tuple[Tensor, Tensor]:
        normed_ND, sum_ND = (self.attention_norm(hidden_ND), hidden_ND) if sum_ND is None else self.attention_norm(hidden_ND, sum_ND)
        normed_ND, total_ND = self.feed_forward_norm(self.attention(position_N, normed_ND), sum_ND)
        return self.feed_forward(normed_ND), total_ND

    def places(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.path}.input_layernorm.weight", self.attention_norm.weight.data
        yield f"{self.path}.post_attention_layernorm.weight", self.feed_forward_norm.weight.data
        yield from self.attention.places()
        yield from self.feed_forward.places()


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class CausalModel(nn.Module):
    """All but the head."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        plan = Plan(config.structure or {}, config.ties or {})
        self.embedding = Embedding(plan, config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(Layer(config, plan, index, vllm_config.cache_config) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        hidden_ND = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        sum_ND = None
        for layer in self.layers:
            hidden_ND, sum_ND = layer(positions, hidden_ND, sum_ND)
        return self.norm(hidden_ND, sum_ND)[0]

    def places(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.embedding.places()
        for layer in self.layers:
            yield from layer.places()
        yield "model.norm.weight", self.norm.weight.data


class StructuredCausalLM(nn.Module):
    """What vLLM asks of a model that generates text; the names of methods and arguments are vLLM's."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        parallel = vllm_config.parallel_config
        refuse(
            self.config,
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            quantization=vllm_config.model_config.quantization,
        )
        self.model: Any = CausalModel(vllm_config=vllm_config, prefix="model")
        plan = Plan(self.config.structure or {}, self.config.ties or {})
        self.lm_head = Head(plan, self.model.embedding, self.config.vocab_size, self.config.hidden_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embedding(input_ids)

    def forward(self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the model; the names of its parameters, all of which are filled."""
        places = [*self.model.places(), *self.lm_head.places()]
        fill(places, self.config.ties or {}, weights)
        return {name for name, _ in self.named_parameters(remove_duplicate=False)}
