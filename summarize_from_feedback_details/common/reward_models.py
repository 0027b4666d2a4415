"""Reward models, ours or the original's: loading one, and reading the reward of whole rows."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification

from summarize_from_feedback_details.common.adapters import (
    add_adapter,
    copy_trained,
    find_adapter,
    has_adapters,
    reward_model_on,
)
from summarize_from_feedback_details.common.check_inputs import refuse_bad_weights
from summarize_from_feedback_details.common.hub import find_file
from summarize_from_feedback_details.common.packed_rows import (
    hidden_at,
    pack_rows,
    pack_shared,
    supports_packing,
    use_packed_attention,
)
from summarize_from_feedback_details.common.precision import use_float32_head
from summarize_from_feedback_details.common.training import disable_dropout


def load_reward_model(
    path: str, revision: str | None = None, argument: str = "reward_model_path", dtype: torch.dtype = torch.float32
):
    """Load a reward model of ours, or of the original code (`ScalarModel`).

    A `ScalarModel` checkpoint holds `lm_backbone.*`, `scalar_head.{weight,bias}`, and in its config the base model's
    configuration (`base_config`) and a `bias` to subtract; paths of the training machine in it are not used.

    Args:
        path: folder or hub id.
        revision: hub revision, or None.
        argument: the argument's name, for messages.
        dtype: precision of the trunk's weights; the head's is float32.

    Returns:
        Sequence-classification model, without dropout: reward = logit at the last real token + `config.reward_bias`.
    """
    revision = None if os.path.isdir(path) else revision
    config_file = find_file(path, revision, ["config.json"])
    config = json.loads(Path(config_file).read_text())
    if "base_config" not in config:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path, revision=revision, num_labels=1, dtype=dtype, output_loading_info=True
        )
        refuse_bad_weights(argument, path, loaded["missing_keys"], model)
        if dtype != torch.float32:  # which has rounded the head, too
            heads = (_read_tensors(file, ["score.weight"]) for file in _weight_files(path, revision))
            model.score.weight.data = next(head["score.weight"] for head in heads if head).float()
        return _ready(model, float(getattr(model.config, "reward_bias", 0.0)))
    base_config = AutoConfig.for_model(**config["base_config"])
    base_config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(base_config, dtype=dtype)
    model.score.float()
    saved = {}
    for file in _weight_files(path, revision):
        saved |= _read_tensors(file)
    state = {"score.weight": saved.pop("scalar_head.weight")}
    bias = float(saved.pop("scalar_head.bias")) - float(config.get("bias", 0.0))
    trunk = set(getattr(model, model.base_model_prefix).state_dict())
    for name, weight in saved.items():
        name = name.removeprefix("lm_backbone.")
        if name in trunk:  # old checkpoints hold buffers (rotary frequencies, causal masks) that are computed today
            state[f"{model.base_model_prefix}.{name}"] = weight
    model.load_state_dict(state, strict=True)
    refuse_bad_weights(argument, path, set(), model)
    return _ready(model, bias)


def _weight_files(path: str, revision: str | None) -> list[str]:
    """The files that hold a checkpoint's weights."""
    names = ["model.safetensors", "pytorch_model.bin"]
    file = find_file(path, revision, [*names, *(f"{name}.index.json" for name in names)])
    if not file.endswith(".index.json"):
        return [file]
    several = sorted(set(json.loads(Path(file).read_text())["weight_map"].values()))
    return [find_file(path, revision, [name]) for name in several]


def _read_tensors(file: str, wanted: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file of weights by name: those that are wanted and there, or all."""
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys() if not wanted or name in wanted}  # noqa: SIM118
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: weight for name, weight in content.items() if not wanted or name in wanted}


def _ready(model: torch.nn.Module, bias: float):
    disable_dropout(model)
    use_float32_head(model)
    use_packed_attention(model)
    model.config.reward_bias = bias
    return model


def load_frozen_reward(args: Any, reference: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The reward model; see `load_reward_and_value`."""
    path, revision = args.reward_model_path, args.reward_model_revision
    if args.lora and find_adapter(path, revision):
        return reward_model_on(reference, path, revision)
    return load_reward_model(path, revision, dtype=dtype)


def load_reward_and_value(
    args: Any, reference: torch.nn.Module, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the reward model, the value network to train), the same at the start; their weights are read once.

    With --lora and a reward model of `reward.py --lora`, both stand on the reference policy's weights; on those of the
    reward model itself where it was trained whole.

    Args:
        args: has `reward_model_path`, `reward_model_revision`, `lora` and `lora_params`.
        reference: the SFT policy, without adapters.
        dtype: precision of the trunk's weights.
    """
    reward_model = load_frozen_reward(args, reference, dtype)
    if not args.lora or has_adapters(reward_model):
        return reward_model, copy_trained(reward_model)
    reward_model.requires_grad_(False)
    reward_model.score.requires_grad_(True)
    value_model = copy_trained(reward_model)
    add_adapter(value_model, args.lora_params, args.reward_model_path, args.reward_model_revision)
    return reward_model, value_model


def read_rewards(model: torch.nn.Module, rows: list[list[int]], heads: list[int] | None = None) -> torch.Tensor:
    """Reward of each row (token ids without pads), read at its last token, normalised: [B] reward units.

    Args:
        heads: [B] tokens of each row's query; neighbours with the same one read it once, where the model packs rows.
    """
    device = next(model.parameters()).device
    if supports_packing(model):
        heads = heads or [0] * len(rows)
        tails = [row[head:] for row, head in zip(rows, heads)]
        inputs, _, firsts = pack_shared([row[:head] for row, head in zip(rows, heads)], tails, device)
        last = [first + len(tail) - 1 for first, tail in zip(firsts, tails)]
    else:
        inputs, starts = pack_rows(rows, False, device)
        last = [start + len(row) - 1 for start, row in zip(starts, rows)]
    # Detail: reward at the EOS token [12]
    return model.score(hidden_at(model, inputs, torch.tensor(last, device=device)))[:, 0] + model.config.reward_bias
