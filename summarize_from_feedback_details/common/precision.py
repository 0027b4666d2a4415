"""Precision: whether a run computes in bf16 or float32, and the few parameters that stay float32 in a bf16 model."""

import os
import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from summarize_from_feedback_details.common.machine import on_gpu


def choose_precision(wanted: str) -> str:
    """Name of accelerate's mixed precision ("bf16" or "no") for `auto`, `bf16` or `fp32` on this hardware."""
    if on_gpu():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if wanted == "bf16" and not native and os.environ.get("RANK", "0") == "0":
        times = []
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(128, 128, dtype=dtype)
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        print(f"warning: no native bf16 here; a product took {times[1] / times[0]:.0f} times that of fp32", flush=True)
    return "bf16" if wanted == "bf16" or (wanted == "auto" and native) else "no"


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, as DeepSpeed casts those that it trains; float32 heads stay as they are.

    Never its buffers, as `model.to(dtype)` would: rounded rotary frequencies make another network of it.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "master"):
            parameter.data = parameter.data.to(dtype)


def cast_products(model: torch.nn.Module) -> None:
    """Cast to bf16, in place, the weights of linear layers, which autocast would round for each product anyway."""
    kept = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}  # a head may be tied to it
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) not in kept:
            for parameter in module.parameters(recurse=False):
                if not hasattr(parameter, "master"):
                    parameter.data = parameter.data.to(torch.bfloat16)


def trunk_dtype(args: Any, accelerator: Any) -> torch.dtype:
    """Precision in which a network is loaded: that of computing where only adapters are trained, else float32."""
    return torch.bfloat16 if args.lora and accelerator.mixed_precision == "bf16" else torch.float32


def keep_exact(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Compute with this parameter in float32 although DeepSpeed trains a bf16 copy of it.

    Call it once the parameter has its first value. `checkpoints.update_masters` keeps `parameter.master` up to date;
    without DeepSpeed nobody reads it.
    """
    parameter.master = parameter.detach().float().clone()
    return parameter


def exact(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The value in float32 of a parameter that `keep_exact` marked; the gradient goes to the parameter."""
    if parameter.dtype == torch.float32:
        return parameter
    rounded = parameter.float()
    return rounded + (parameter.master - rounded).detach()


class Float32Head(torch.nn.Linear):
    """A linear head in float32, also where the trunk computes in bf16, whose steps are 1/32 between 4 and 8."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Deviates: the original's scores and values were rounded to bf16: ties, and steps in what PPO learns from
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), exact(self.weight))


def use_float32_head(model: torch.nn.Module) -> None:
    """Let the head of a sequence-classification model compute in float32; weight and checkpoint stay as they are."""
    head = Float32Head(model.score.in_features, model.score.out_features, bias=False, device="meta")
    head.weight = keep_exact(model.score.weight)
    model.score = head
