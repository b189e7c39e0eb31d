"""What the vLLM class cannot do, said by name before any weight is read. Needs no vLLM."""

from __future__ import annotations

from typing import Any

KINDS = ("int8", "int8_embedding", "low_rank", "low_rank_embedding")
REMEDY = "use `llmdistill serve`, which serves every checkpoint"


def refuse(config: Any, *, tensor_parallel_size: int, pipeline_parallel_size: int, quantization: str | None) -> None:
    """Raise where a checkpoint's config, or how vLLM was told to run it, will not do."""
    reasons = _because_of_checkpoint(config)
    for name, size in (("tensor", tensor_parallel_size), ("pipeline", pipeline_parallel_size)):
        if size > 1:
            reasons.append(f"--{name}-parallel-size is {size}, and its tensors are not divided: a student fits one device, use --data-parallel-size {size}")
    if quantization is not None:
        reasons.append(f"--quantization is {quantization!r}, and a structured student is quantized by llmdistill alone: leave it out")
    if reasons:
        raise ValueError(f"llmdistill's vLLM class cannot run this checkpoint: {'; and '.join(reasons)}")


def _because_of_checkpoint(config: Any) -> list[str]:
    reasons = []
    kinds: dict[str, str] = {}
    for path, module in (config.structure or {}).items():
        if module["kind"] not in KINDS:
            kinds.setdefault(module["kind"], path)
    if kinds:
        listed = ", ".join(f"{kind} (as at {path})" for kind, path in sorted(kinds.items()))
        reasons.append(f"it has modules of kind {listed}, and the class has {', '.join(KINDS)}: {REMEDY}")
    if getattr(config, "exits", None):
        reasons.append(f"it has early exits, which vLLM does not take: {REMEDY}")
    if config.hidden_act not in ("silu", "swish"):
        reasons.append(f"its feed-forward has the activation {config.hidden_act!r}, and the class has silu: {REMEDY}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        reasons.append("it has sliding-window attention (layer_types), which llmdistill does not run: set use_sliding_window=False")
    return reasons
