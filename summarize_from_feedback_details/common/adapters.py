"""LoRA: small trained matrices beside frozen weights (Hu et al. 2021), and several networks that stand on one trunk.

A network here is a tree of modules of its own; trees share the tensors of the trunk, and each has its own adapters, or
none. So nothing is switched on and off, and each is an ordinary model: it packs, samples, shards and recomputes
activations as without LoRA. The layers with adapters are those of `peft`, and adapters are kept in its format.
"""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from summarize_from_feedback_details.common.arguments import refuse
from summarize_from_feedback_details.common.hub import find_file
from summarize_from_feedback_details.common.packed_rows import pack_rows
from summarize_from_feedback_details.common.precision import keep_exact, use_float32_head
from summarize_from_feedback_details.common.run_files import weights_fingerprint
from summarize_from_feedback_details.common.zero import full_weights

FOLDER = "adapter"  # inside the folder of a merged checkpoint
PREFIX = "base_model.model."  # of peft's names
OF_LAYER, NAME = ".base_layer.", ".default."  # of the frozen weight inside a layer of peft; of our one adapter


@dataclass
class LoraParams:
    rank: int = 16
    """rank of each adapter"""
    alpha: int = 32
    """what an adapter adds is multiplied by alpha / rank"""
    target: str = "all-linear"
    """layers that get an adapter: all linear ones of the trunk, or the ends of their names, joined by commas"""


LoraSettings = Annotated[LoraParams, tyro.conf.arg(name="lora")]  # written `--lora.rank` and so on


# ----------------------------------------------------------------------------------------------------------------------
# bad input


def check_lora(args: Any, argument: str) -> None:
    """Refuse settings of LoRA that cannot work.

    Args:
        args: has `lora` and `lora_params`.
        argument: names the model that gets the adapters; has a `..._revision`, too.
    """
    given = args.lora_params
    for name, default in vars(LoraParams()).items():
        if not args.lora and getattr(given, name) != default:
            refuse(f"lora.{name}", f"{getattr(given, name)} without --lora", "--lora as well")
    for name in ("rank", "alpha"):
        if getattr(given, name) < 1:
            refuse(f"lora.{name}", str(getattr(given, name)), "a number above 0")
    if args.lora and given.target != "all-linear":
        path, revision = getattr(args, argument), getattr(args, f"{argument.removesuffix('_path')}_revision")
        config = AutoConfig.from_pretrained(path, revision=None if os.path.isdir(path) else revision)
        with torch.device("meta"):
            trunk = trunk_of(AutoModelForCausalLM.from_config(config))
        names = linear_layers(trunk)
        for target in given.target.split(","):
            if not any(f".{name}".endswith(f".{target}") for name in names):
                there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
                refuse("lora.target", f"'{target}', which '{path}' does not have", f"all-linear, or some of: {there}")


def find_adapter(path: str, revision: str | None) -> str | None:
    """Folder of the adapter that a merged checkpoint (folder or hub id) was made with; None where there is none."""
    try:
        find_file(path, revision, [f"{FOLDER}/adapter_model.safetensors"])
        return os.path.dirname(find_file(path, revision, [f"{FOLDER}/adapter_config.json"]))
    except FileNotFoundError:
        return None


def check_reward_adapter(args: Any) -> None:
    """Refuse a reward model whose adapter belongs to another trunk than the SFT policy."""
    folder = find_adapter(args.reward_model_path, args.reward_model_revision) if args.lora else None
    if folder is not None:
        try:
            kept = json.loads(Path(folder, "adapter_config.json").read_text())["auto_mapping"]["trunk"]
        except (OSError, ValueError, KeyError, TypeError):
            refuse("reward_model_path", f"'{folder}' that does not name its trunk", "an adapter of `reward.py --lora`")
        trunk = trunk_fingerprint(args.sft_model_path, args.sft_model_revision)
        if kept != trunk:
            found = f"'{folder}', an adapter on {kept}, while --sft_model_path '{args.sft_model_path}' is {trunk}"
            refuse("reward_model_path", found, "a reward model that was trained on this SFT policy")


def trunk_fingerprint(path: str, revision: str | None) -> str:
    """A short text that changes with the weights of a checkpoint, in a folder or on the hub."""
    return weights_fingerprint(os.path.dirname(find_file(path, revision, ["config.json"])))


# ----------------------------------------------------------------------------------------------------------------------
# networks


def trunk_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its head."""
    return getattr(model, model.base_model_prefix, model)


def linear_layers(trunk: torch.nn.Module) -> list[str]:
    """Names of the layers that an adapter can stand beside; in a model with fused experts, those outside its MLPs.

    There peft would put adapters on the experts, too, where it finds linear layers of the experts' old names.
    """
    experts = any(parameter.dim() == 3 for parameter in trunk.parameters())
    layers = [name for name, module in trunk.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return [name for name in layers if not (experts and {"mlp", "feed_forward"} & set(name.split(".")))]


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Another tree of modules over the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def copy_trained(model: torch.nn.Module) -> torch.nn.Module:
    """Another network, with copies of the parameters that are trained, over the same frozen ones."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    if hasattr(twin, "score"):
        keep_exact(twin.score.weight)
    return twin


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether `add_adapter` or `read_adapter` was called on this network."""
    return hasattr(model, "adapter_config")


def add_adapter(model: torch.nn.Module, lora: LoraParams, path: str, revision: str | None) -> None:
    """Freeze a network and put trained adapters beside the weights of its trunk. They add 0 at the start.

    A head with one label is trained whole.

    Args:
        model: as `load_policy` or `load_reward_model` gave it.
        path, revision: where its trunk is from; noted in the adapter's configuration.
    """
    from peft import LoraConfig

    names = linear_layers(trunk_of(model))
    if lora.target != "all-linear":
        names = [name for name in names if any(f".{name}".endswith(f".{end}") for end in lora.target.split(","))]
    # Detail: dropout off - also of adapters
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        lora_dropout=0.0,
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        base_model_name_or_path=os.path.basename(path) if os.path.isabs(path) else path,
        revision=None if os.path.isdir(path) else revision,
        # peft reads this entry only where there is no task type
        auto_mapping={"trunk": trunk_fingerprint(path, revision)},
    )
    _inject(model, config)


def read_adapter(model: torch.nn.Module, folder: str) -> None:
    """Put an adapter that was saved on a network, with its head."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False  # or peft freezes what it puts there
    _inject(model, config)
    saved = load_file(Path(folder, "adapter_model.safetensors"))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = saved[PREFIX + name.replace(NAME, ".")].float()


def _inject(model: torch.nn.Module, config: Any) -> None:
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(config, trunk_of(model))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # in the trunk's precision a small step would be lost
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    model.adapter_config = config


def reward_model_on(policy: torch.nn.Module, path: str, revision: str | None) -> torch.nn.Module:
    """The reward model that `reward.py --lora` trained on this policy, over the policy's own weights.

    Args:
        policy: as `load_policy` gave it, without adapters.
        path, revision: folder or hub id of the merged reward model, which holds its adapter.
    """
    folder = find_adapter(path, revision)
    saved = AutoConfig.from_pretrained(path, revision=None if os.path.isdir(path) else revision)
    trunk = share_weights(trunk_of(policy))
    trunk.config.num_labels, trunk.config.reward_bias = 1, saved.reward_bias
    trunk.config.id2label, trunk.config.label2id = saved.id2label, saved.label2id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(trunk.config)
    setattr(model, model.base_model_prefix, trunk)
    model.config = trunk.config
    head = load_file(Path(folder, "adapter_model.safetensors"))[f"{PREFIX}score.weight"]
    model.score.weight = torch.nn.Parameter(head.float().to(trunk.device))
    use_float32_head(model)
    read_adapter(model, folder)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# saving


def merge_adapters(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Weights of a network with adapters -> (those of the plain network that computes the same, the adapter's).

    Args:
        state: its weights by name, whole; merged in float32, in host memory.
    """
    scale = model.adapter_config.lora_alpha / model.adapter_config.r
    merged, adapter = {}, {}
    for name, weight in state.items():
        weight = weight.to("cpu", torch.float32)
        if ".lora_" in name or name.startswith("score."):
            adapter[PREFIX + name.replace(NAME, ".")] = weight
        if ".lora_" in name:
            continue
        layer, _, kind = name.rpartition(OF_LAYER)
        if layer and kind == "weight":
            a, b = (state[f"{layer}.lora_{x}{NAME}weight"].to("cpu", torch.float32) for x in "AB")
            change = scale * (b @ a)
            weight = weight + (change.T if model.get_submodule(layer).fan_in_fan_out else change)
        merged[name.replace(OF_LAYER, ".")] = weight
    return merged, {name: weight.contiguous() for name, weight in adapter.items()}


def save_adapter(model: torch.nn.Module, adapter: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter in peft's format."""
    config = copy.deepcopy(model.adapter_config)
    if hasattr(model, "score"):
        config.modules_to_save = ["score"]
    config.inference_mode = True
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def check_merged(accelerator: Any, wrapped: torch.nn.Module, model: torch.nn.Module, path: str) -> None:
    """Print the largest difference of outputs between a network with adapters and the merged checkpoint at `path`."""
    vocabulary = model.config.vocab_size
    rows = [[(7 + row + 31 * t) % vocabulary for t in range(n)] for row, n in enumerate((64, 48, 32))]
    read = lambda m: m.score(trunk_of(m)(**inputs, use_cache=False).last_hidden_state) if score else m(**inputs).logits
    inputs, score = pack_rows(rows, False, next(model.parameters()).device)[0], hasattr(model, "score")
    was_training = model.training
    with full_weights(wrapped), accelerator.autocast():
        here = read(model.eval()).float().cpu()
    model.train(was_training)
    if accelerator.is_main_process:
        plain = type(model).from_pretrained(path, dtype=torch.float32)
        inputs = pack_rows(rows, False, torch.device("cpu"))[0]
        mask = inputs["attention_mask"].bool()
        there = read(plain.eval())
        largest = float((here - there)[mask].abs().max())
        what = "rewards" if score else "logits"
        spread = float(there[mask].std())
        print(
            f"merged in float32: its {what} differ by {largest:.2g} at most from those with adapters, on "
            f"{sum(map(len, rows))} tokens (standard deviation of the {what}: {spread:.2g})",
            flush=True,
        )
    accelerator.wait_for_everyone()
