"""What the training loop is given before its first step: accelerate's Accelerator, the optimizer and its schedule."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn
from transformers import get_scheduler

from llmdistill.train_settings import Adafactor, BatchUnit, Precision, TrainSettings

log = logging.getLogger(__name__)


def this_process() -> PartialState:
    """Which process of how many this is. accelerate's Accelerator reads ACCELERATE_USE_CPU, but its PartialState, if it comes first, must be told."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """Devices, processes, sharding and mixed precision as the user's accelerate says; precision as the settings say where the user's does not."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "no" and computes_in_bfloat16(settings.precision, this_process().device or torch.device("cpu")):
        wanted = "bf16"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:  # an earlier stage of this process computed in another
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=wanted,
        log_with=[tracker.value for tracker in settings.trackers] or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder.parent / "trackers")),  # outlives the training's folder
    )
    plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        if settings.batch_unit is BatchUnit.PADDED_TOKENS:
            raise ValueError("DeepSpeed must know the number of rows of a micro-batch; set batch_unit=EXAMPLES")
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
        plugin.deepspeed_config["gradient_clipping"] = settings.max_gradient_norm
    return accelerator


def computes_in_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether to. Without hardware for it, a CPU multiplies bfloat16 nine times slower than float32 (measured: AVX2, a T5 of 3 million parameters)."""
    if precision is not Precision.FASTEST:
        return precision is Precision.BFLOAT16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def make_optimizer(module: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; matrices are decayed, norms and biases are not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters; nothing would be learned")
    kind = settings.optimizer
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": kind.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if isinstance(kind, Adafactor):
        return torch.optim.Adafactor(groups, lr=settings.learning_rate, beta2_decay=kind.beta2_decay)
    fused = device.type in ("cpu", "cuda")  # one pass over the weights: 4 against 18 ms a step for 3 million on a CPU
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(kind.beta1, kind.beta2), eps=kind.epsilon, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, num_steps: int) -> Any:
    """transformers' schedule of this name."""
    try:
        return get_scheduler(
            settings.schedule.value,
            optimizer,
            num_warmup_steps=settings.num_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(settings.schedule_options),
        )
    except TypeError as error:
        raise ValueError(f"schedule {settings.schedule.value} does not take schedule_options {dict(settings.schedule_options)}: {error}") from error
