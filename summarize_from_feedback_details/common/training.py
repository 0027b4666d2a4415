"""What training needs whatever the loss is: processes, the order of the data, micro batches, the update, the checkpoint
that it ends with."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
import transformers  # whose parts are imported where they are used, and not for --help: half of its time
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from summarize_from_feedback_details.common.adapters import (
    FOLDER,
    check_merged,
    has_adapters,
    merge_adapters,
    save_adapter,
)
from summarize_from_feedback_details.common.arguments import refuse, refuse_settings_of_accelerate
from summarize_from_feedback_details.common.checkpoints import Checkpoints
from summarize_from_feedback_details.common.engines import refuse_engine
from summarize_from_feedback_details.common.files import atomic_folder
from summarize_from_feedback_details.common.machine import keep_freed_memory, on_gpu, warn_of_busy_cores
from summarize_from_feedback_details.common.precision import cast_parameters, cast_products, choose_precision
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.zero import update_masters


def connect(args: Any) -> Accelerator:
    """The processes of this run. Refuses a launch that is not what the arguments say.

    Args:
        args: has `world_size`, `precision` and `deepspeed`.
    """
    keep_freed_memory()
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU wherever there is one
    # without a handler, DeepSpeed on CPU leaves each process believing that it is the only one
    handlers = [] if on_gpu() or args.world_size == 1 else [InitProcessGroupKwargs(backend="gloo")]
    try:
        accelerator = Accelerator(mixed_precision=choose_precision(args.precision), kwargs_handlers=handlers)
    except (ValueError, RuntimeError) as error:
        refuse_settings_of_accelerate(error)
        raise
    if accelerator.is_main_process:
        warn_of_busy_cores()
    if accelerator.num_processes != args.world_size:
        refuse("world_size", f"{accelerator.num_processes} connected processes", f"{args.world_size}, as launched")
    if args.deepspeed and accelerator.state.deepspeed_plugin is None:
        refuse("deepspeed", "a launch without DeepSpeed", "`accelerate launch --config_file deepspeed.yaml`")
    if accelerator.is_main_process:
        print(f"{args.world_size} process(es) on {accelerator.device}, precision {accelerator.mixed_precision}")
    return accelerator


def launch(args: Any, unit: str) -> Accelerator:
    """The processes of a run that trains, and DeepSpeed's settings.

    Args:
        args: with their sizes derived.
        unit: what a batch consists of, e.g. `rows`.
    """
    accelerator = connect(args)
    refuse_engine(args, accelerator)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage == 0:
            refuse("deepspeed", "zero_stage 0", "1, 2 or 3, or a launch without DeepSpeed")
        if plugin.zero_stage == 3:
            # models are loaded whole; the trained ones are sharded when they are prepared
            transformers.integrations.unset_hf_deepspeed_config()
            plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if accelerator.mixed_precision == "bf16" and plugin.zero_stage > 1:  # stage 1 would take another optimiser
            # Deviates: many small gradients are added up in float32, not in bf16
            plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        # the loops accumulate by hand, so that a short last batch is scaled right
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.local_micro_batch_size
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm or 0.0
    if accelerator.is_main_process:
        cuts = {
            "processes": args.world_size, "mini-batches": getattr(args, "nminibatches", None),
            "accumulation": args.gradient_accumulation_steps, "micro batch": args.local_micro_batch_size,
        }  # fmt: skip
        cuts = {name: size for name, size in cuts.items() if size is not None}
        numbers = " x ".join(map(str, cuts.values()))
        print(f"batch {args.batch_size} {unit} = {numbers} ({' x '.join(cuts)})", flush=True)
    return accelerator


def prepare(accelerator: Accelerator, model: torch.nn.Module, args: Any):
    """(model, optimiser, schedule of the learning rate), ready to train.

    Args:
        model: holds the trained networks of transformers as its attributes.
        args: has --optimizer, --scheduler, what belongs to them, and --gradient_checkpointing.
    """
    for network in model.children() if args.gradient_checkpointing else ():
        if isinstance(network, transformers.PreTrainedModel):
            network.gradient_checkpointing_enable({"use_reentrant": False})
    # Detail: optimiser - AdamW, eps 1e-5, lr 3e-6 in all stages; weight decay 0.01 is torch's default
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trained, lr=args.lr, eps=args.eps, weight_decay=args.weight_decay, fused=True)
    scheduler = transformers.get_scheduler(args.scheduler, optimizer, args.warm_up_steps, args.num_updates)
    model, optimizer = accelerator.prepare(model, optimizer)
    # gradients get their place before activations fragment the memory; DeepSpeed keeps its own
    if accelerator.state.deepspeed_plugin is None:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    return model, optimizer, scheduler


def epoch_order(rows: int, episodes: int, seed: int) -> np.ndarray:
    """One global permutation per pass over the data, the same on every process: [episodes] row numbers."""
    # Deviates: the original shuffled with a per-rank seed and then sharded: rows came twice, others never
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(rows) for _ in range(math.ceil(episodes / rows))]
    return np.concatenate(passes)[:episodes]


def micro_batches(
    lengths: list[int], micro: int, rank: int, world_size: int, sort_by_length: bool = False
) -> list[list[int]]:
    """Cut a batch into this rank's micro batches, each with about as many tokens, so that memory peaks are even.

    Every rank gets the same number of micro batches (so that collectives match); those of a batch that does not fill
    may be empty. With `sort_by_length`, rows of similar length come together, longest first: least padding.

    >>> micro_batches([5, 9, 7], micro=1, rank=1, world_size=2)
    [[2], []]
    >>> micro_batches([1, 2, 3, 4], micro=2, rank=0, world_size=1)
    [[3, 0], [2, 1]]
    >>> micro_batches([1, 2, 3, 4], micro=2, rank=0, world_size=1, sort_by_length=True)
    [[3, 2], [1, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    steps = math.ceil(math.ceil(len(order) / world_size) / micro)
    mine = order[rank::world_size]
    if sort_by_length:
        return [mine[i * micro : (i + 1) * micro] for i in range(steps)]
    there_and_back = [*range(steps), *reversed(range(steps))]
    parts = [[row for i, row in enumerate(mine) if there_and_back[i % (2 * steps)] == step] for step in range(steps)]
    # the largest one first: what it leaves free is wide enough for the others
    return sorted(parts, key=lambda part: -sum(lengths[i] for i in part))


class Gradient:
    """The gradient of one batch, added up over micro batches and ranks, and the optimiser step that it is for.

        gradient = Gradient(accelerator, model, optimizer, checkpoints)
        for rows, weight in gradient.micro_batches(lengths, sort_by_length=not packed):
            ...
            gradient.add(loss, batch)
        norm = gradient.step()

    Args:
        model, optimizer: as `prepare` returned them.
        checkpoints: of the run; polled between micro batches, which ends the process where a signal asked to stop.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        checkpoints: Checkpoints,
    ):
        self.accelerator, self.model, self.optimizer, self.checkpoints = accelerator, model, optimizer, checkpoints
        self.args, self.weight, self.batches = checkpoints.args, 1.0, []

    def micro_batches(
        self, lengths: list[int], sort_by_length: bool, together: int = 1
    ) -> Iterator[tuple[list[int], float]]:
        """Yield this rank's micro batches, each for one `add`: (numbers of rows, weight).

        The weight is 1; 0 where there is no row left for this rank, which then reads the first ones once more, so that
        collectives match.

        Args:
            lengths: tokens of each row of the whole batch, the same on all ranks.
            sort_by_length: see `micro_batches`.
            together: so many neighbours share a query; as many of them as fit stay in one micro batch.
        """
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        micro = self.args.local_micro_batch_size
        unit = math.gcd(together, micro)
        sums = [sum(lengths[i : i + unit]) for i in range(0, len(lengths), unit)]
        parts = micro_batches(sums, micro // unit, rank, world_size, sort_by_length)
        parts = [[unit * i + j for i in part for j in range(unit)] for part in parts]
        ddp = isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            self.accelerator.sync_gradients = last
            self.weight = float(bool(part))
            with self.model.no_sync() if ddp and not last else nullcontext():
                yield part or list(range(unit)), self.weight
            if not last:
                self.checkpoints.poll()

    def add(self, loss: torch.Tensor, batch: dict[str, Any]) -> None:
        """Add the gradient of a micro batch.

        Args:
            loss: its part of the loss over the GLOBAL batch (a sum over ranks and micro batches gives the loss).
            batch: what it was computed from, columns of rows; written to a file where the loss or the gradient is not
                finite, which ends the run.
        """
        self.batches.append(batch)
        loss = loss * self.weight * self.accelerator.num_processes  # gradients are averaged over ranks: undo it
        if not torch.isfinite(loss):
            self._stop("loss", [batch])
        self.accelerator.backward(loss)  # with DeepSpeed, the last one also steps

    def step(self) -> float:
        """Make the optimiser step; returns the global gradient norm, before it is clipped."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm or math.inf)
        norm = float(norm if norm is not None else math.nan)
        if not math.isfinite(norm):
            self._stop("gradient", self.batches)
        self.optimizer.step()
        update_masters(self.model)
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def _stop(self, what: str, batches: list[dict[str, Any]]) -> NoReturn:
        update, step, _ = self.checkpoints.marked
        what += "" if step is None else f" of step {step + 1}"
        columns = {name: [batch[name] for batch in batches] for name in batches[0]}
        join = lambda parts: torch.cat(parts).cpu() if torch.is_tensor(parts[0]) else [row for p in parts for row in p]
        batch = {name: join(parts) for name, parts in columns.items()}
        self.checkpoints.run.stop_on_bad_numbers(update + 1, what, batch)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0."""
    # Detail: dropout off [7] - or the first-pass ratio of PPO is not 1, and the KL not reproducible
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # configurations, and the layers of some architectures, keep probabilities as numbers (OPT: `dropout`, `layerdrop`)
    for keeper in (model.config, *model.modules()):
        for name in [k for k, v in vars(keeper).items() if "drop" in k and isinstance(v, float)]:
            setattr(keeper, name, 0.0)


def freeze(model: torch.nn.Module, accelerator: Accelerator, offload: bool) -> torch.nn.Module:
    """Make a network one that is only read, and return it.

    It computes what a trained one would, to the bit, so that KL starts at 0: in bf16 DeepSpeed trains rounded weights,
    and autocast rounds them for each product.

    Args:
        offload: leave it in host memory: see `lent`.
    """
    if accelerator.mixed_precision == "bf16" and accelerator.state.deepspeed_plugin is not None:
        cast_parameters(model, torch.bfloat16)
    elif accelerator.mixed_precision == "bf16":
        cast_products(model)
    model.eval().requires_grad_(False)
    if not offload:
        return model.to(accelerator.device)
    if accelerator.device.type == "cuda":  # pinned memory is copied without a detour
        for parameter in model.parameters():
            parameter.data = parameter.data.pin_memory()
    return model


@contextmanager
def lent(model: torch.nn.Module | None, device: torch.device) -> Iterator[None]:
    """A frozen model on this device for one pass. With --offload its weights stay in host memory, too, so that nothing
    is copied back; elsewhere nothing happens, nor where there is no model."""
    if model is None:
        yield
        return
    home, weights = next(model.parameters()).device, [parameter.data for parameter in model.parameters()]
    model.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, weight in zip(model.parameters(), weights):
            parameter.data = weight
        model.to(home)  # its buffers


def save_model(
    accelerator: Accelerator,
    run: RunFolder,
    wrapped: torch.nn.Module,
    model: torch.nn.Module,
    tokenizer: Any,
    path: str,
) -> None:
    """Write a standard checkpoint: safetensors, config, tokenizer; loads with the plain Auto classes.

    Adapters are merged into it, and also kept by themselves in its folder `adapter`.

    Args:
        run: the run that writes it.
        wrapped: what `accelerator.prepare` returned; `model`, or a module that holds it as an attribute.
    """
    state = accelerator.get_state_dict(wrapped) or {}  # ZeRO-3 puts it together on rank 0 only
    prefix = next(
        (f"{name}." for name, child in accelerator.unwrap_model(wrapped).named_children() if child is model), ""
    )
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if state:  # DeepSpeed lists tied weights twice, and rounds the heads that compute in float32
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        state = {name: weight for name, weight in state.items() if name in names}
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "master") and parameter.dtype != torch.float32:
                state[name] = parameter.master
    adapter = {}
    if has_adapters(model) and state:
        state, adapter = merge_adapters(model, state)
    # the plain class reads a row's reward at its last token that is not this one, so the end-of-text token cannot be it
    inside = tokenizer.pad_token_id < model.config.vocab_size
    model.config.pad_token_id = tokenizer.pad_token_id if inside else None
    if model.can_generate():  # with the ids of the config, and without the base model's habits of sampling
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    if accelerator.is_main_process:
        with run.one_line_for_a_full_disk(), atomic_folder(path, run) as folder:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            if adapter:
                model.config.dtype = torch.float32  # of what is merged, also where the trunk computes in bf16
                model.config.save_pretrained(folder)
                save_adapter(model, adapter, folder / FOLDER)
    del state, adapter  # whole weights in float32
    accelerator.wait_for_everyone()
    if has_adapters(model):
        check_merged(accelerator, wrapped, model, path)
