"""DeepSpeed's ZeRO: weights and optimiser states put together from all ranks; all use of its private names is here."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam and AdamW keep of each parameter, besides the number of steps


def _zero_optimizer(optimizer: torch.optim.Optimizer):
    """DeepSpeed's ZeRO optimiser (stage 1 to 3) inside accelerate's wrapper, or None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    sharded = hasattr(inner, "single_partition_of_fp32_groups") or hasattr(inner, "fp32_partitioned_groups_flat")
    return inner if sharded else None


def _flat_partitions(zero: Any) -> list[torch.Tensor]:
    """This rank's flat float32 partitions, which the optimiser inside ZeRO steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that are trained, the same under any wrapper."""
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    zero = _zero_optimizer(optimizer)
    states = zero.optimizer.state if zero is not None else optimizer.state
    return max((int(s["step"]) for s in states.values() if "step" in s), default=0)


def whole_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each weight and moment, in float32; under ZeRO put together from all ranks, one at a time."""
    zero = _zero_optimizer(optimizer)
    if zero is not None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    stepped = optimizer_steps(optimizer) > 0
    for name, parameter in _parameters(model):
        if zero is not None:
            yield f"weight.{name}", safe_get_full_fp32_param(parameter)
            for moment in MOMENTS if stepped else ():
                yield f"{moment}.{name}", safe_get_full_optimizer_state(parameter, moment)
        else:
            yield f"weight.{name}", parameter.data
            for moment in MOMENTS if parameter in optimizer.state else ():
                yield f"{moment}.{name}", optimizer.state[parameter][moment]


@torch.no_grad()
def set_whole_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, value_of: Callable[[str], torch.Tensor], steps: int
) -> None:
    """Undo `whole_tensors`."""
    zero = _zero_optimizer(optimizer)
    if zero is None:
        for name, parameter in _parameters(model):
            parameter.copy_(value_of(f"weight.{name}"))
            if steps:
                state = {moment: value_of(f"{moment}.{name}").to(parameter.device) for moment in MOMENTS}
                step = torch.tensor(float(steps), device=parameter.device)  # fused AdamW reads it there
                optimizer.state[parameter] = {"step": step, **state}
        return
    if steps:  # ZeRO's inner optimiser makes its state at the first step
        for flat in _flat_partitions(zero):
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **moments}
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        _set_zero3(zero, model, value_of, steps)
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    if steps:
        zero._lazy_init_hp_params_optimizer_state()  # links each parameter to its part of that state
    for name, parameter in _parameters(model):
        _set_master(zero, parameter, value_of(f"weight.{name}"))
        for moment in MOMENTS if steps else ():
            safe_set_full_optimizer_state(parameter, value_of(f"{moment}.{name}"), moment)
    zero.update_lp_params()  # the weights that the model computes with, from their float32 masters


def _set_zero3(zero: Any, model: torch.nn.Module, value_of: Callable[[str], torch.Tensor], steps: int) -> None:
    from deepspeed.utils import safe_set_local_optimizer_state

    for name, parameter in _parameters(model):
        _set_master(zero, parameter, value_of(f"weight.{name}"))
        for moment in MOMENTS if steps else ():
            safe_set_local_optimizer_state(parameter, _own_part(zero, parameter, value_of(f"{moment}.{name}")), moment)
    if zero.persistent_parameters:  # small ones are whole on every rank: give them back before they change
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _with_masters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that compute in float32 (`packed_rows.exact`) while DeepSpeed trains a copy in bf16."""
    return [p for p in model.parameters() if hasattr(p, "master") and p.dtype != torch.float32]


@torch.no_grad()
def update_masters(model: torch.nn.Module) -> None:
    """Look up the float32 masters of parameters that compute in float32; call on all ranks after each optimiser step.

    Args:
        model: as `accelerator.prepare` returned it.
    """
    for parameter in _with_masters(model):
        from deepspeed.utils import safe_get_full_fp32_param

        parameter.master = safe_get_full_fp32_param(parameter).to(parameter.device)


@torch.no_grad()
def set_masters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The other way round, at the beginning: DeepSpeed makes its masters of weights that it has rounded."""
    for parameter in _with_masters(model):
        parameter.master = parameter.master.to(parameter.device)
        _set_master(_zero_optimizer(optimizer), parameter, parameter.master)


def _set_master(zero: Any, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole parameter's float32 master; of ZeRO-3, this rank's part."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(zero, "fp32_partitioned_groups_flat"):
        safe_set_local_fp32_param(parameter, _own_part(zero, parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def _own_part(zero: Any, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor, what ZeRO-3 keeps on this rank."""
    n, rank = parameter.ds_tensor.numel(), zero._get_param_partition_rank(parameter)
    part = value.flatten()[n * rank : n * (rank + 1)]
    return torch.nn.functional.pad(part, (0, n - part.numel()))  # the last rank's part may be short


@contextlib.contextmanager
def full_weights(model: torch.nn.Module) -> Iterator[None]:
    """Under ZeRO-3: whole weights on every rank and no communication inside, so that ranks may do as many passes of the
    unwrapped model as each needs. Elsewhere nothing.

    Args:
        model: as `accelerator.prepare` returned it.
    """
    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        # the hooks fetch and release the weights of each layer
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
