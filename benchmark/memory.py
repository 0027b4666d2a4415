"""Memory of a stage on one GPU (or one CPU process): a formula, the table of the paper's models, a check by measuring.

    python benchmark/memory.py                  the table of docs/cluster.md
    python benchmark/memory.py --measure        run small models here, compare their peaks with the formula
    python benchmark/memory.py --fit ppo_left_padding --model EleutherAI/pythia-6.9b-deduped
                                                what the job scripts ask: arguments that make a stage fit on the GPUs

Bytes; N parameters; the terms are those of docs/cluster.md. Networks: SFT and reward model train one; PPO trains a
policy and a value network and keeps two frozen ones, the reference policy and the reward model; RLOO, GRPO, DPO and
online DPO train the policy alone. With LoRA all of them stand on one frozen trunk, or on two, and only adapters are
trained.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from summarize_from_feedback_details.common.arguments import command_line, refuse  # noqa: E402
from summarize_from_feedback_details.common.console import print_table  # noqa: E402
from summarize_from_feedback_details.common.files import write_json  # noqa: E402

BUCKET = 5e8  # elements of DeepSpeed's reduce bucket (its default), held once per gradient dtype
ROOM = 0.1  # of a card: for what the formula leaves out (measured peaks are within 9 %), CUDA's context, fragments
SAVED_PER_LAYER = 17  # widths of hidden states that one GPT-NeoX layer keeps of a token for the backward pass


@dataclass
class Shape:
    """Of a GPT-NeoX model; of another one, where its parameters are counted."""

    name: str
    layers: int
    hidden: int
    vocabulary: int
    counted: int | None = None  # parameters with the output head
    tied: bool = False  # whether the output head is the embedding

    @property
    def trunk(self) -> float:
        """Parameters without the output head: embedding, layers (12 D^2 + 13 D each), final norm."""
        D = self.hidden
        if self.counted:
            return self.counted - (0 if self.tied else self.vocabulary * D)
        return self.vocabulary * D + self.layers * (12 * D * D + 13 * D) + 2 * D

    @property
    def policy(self) -> float:
        """Parameters with the output head."""
        return self.counted or self.trunk + self.vocabulary * self.hidden

    def adapters(self, rank: int) -> float:
        """Parameters of one network's adapters: rank x (inputs + outputs) of GPT-NeoX's four linear layers."""
        return rank * 16 * self.hidden * self.layers


PYTHIA = {
    "70m": Shape("70M", 6, 512, 50304), "160m": Shape("160M", 12, 768, 50304), "410m": Shape("410M", 24, 1024, 50304),
    "1b": Shape("1B", 16, 2048, 50304), "1.4b": Shape("1.4B", 24, 2048, 50304), "2.8b": Shape("2.8B", 32, 2560, 50304),
    "6.9b": Shape("6.9B", 32, 4096, 50432), "12b": Shape("12B", 36, 5120, 50688),
}  # fmt: skip
PAPER = [PYTHIA[size] for size in ("1b", "2.8b", "6.9b")]


@dataclass
class Layout:
    """How a stage is run."""

    stage: str  # sft, reward, ppo, dpo or rloo
    rows: int  # of one forward pass in training (pairs for reward and dpo)
    tokens: float  # of a row in the mean: rows are packed
    responses: int  # tokens at which logits are taken
    rollout_rows: int = 0  # sampled at a time: PPO's episodes, rows of SFT's evaluation
    processes: int = 1
    zero: int | None = None  # ZeRO stage; None: plain
    width: int = 2  # bytes of a weight: 2 for bf16, 4 for float32
    sums: int = 4  # bytes of an accumulated gradient under ZeRO: 4 for the stages' float32 (ZeRO-2 and 3), 2 for bf16
    checkpointing: bool = False
    offload: bool = False
    # ZeRO: whether gradients are there while activations are at their peak; without ZeRO they always are
    accumulates: bool = True
    lora: int = 0  # rank of the adapters; 0: all weights are trained
    trunks: int = 1  # with LoRA: 2 where PPO's reward model was trained whole


def memory(shape: Shape, layout: Layout) -> dict[str, float]:
    """Bytes of each term on one process; `peak` is the largest of sampling, training and the optimiser's step."""
    w, world = layout.width, layout.processes
    trained = {"reward": shape.trunk, "ppo": shape.policy + shape.trunk}.get(layout.stage, shape.policy)
    samples = layout.stage in ("ppo", "rloo", "dpo")  # DPO's evaluation, and has a reference and a reward model
    frozen = shape.policy + shape.trunk if samples else 0.0
    # --offload: each is on the GPU for its own pass over the rollout, and neither during training
    in_rollout, in_training = (max(shape.policy, shape.trunk), 0.0) if layout.offload else (frozen, frozen)
    shard = world if layout.zero else 1
    held = w  # bytes of a trained weight
    if layout.lora:
        adapters, held = shape.adapters(layout.lora), w if layout.zero else 4
        trained = adapters * (2 if layout.stage == "ppo" else 1)
        frozen = (shape.trunk if layout.stage == "reward" else shape.policy) + (layout.trunks - 1) * shape.trunk
        whole = frozen
        frozen = frozen / (shard if layout.zero == 3 else 1) + (adapters if samples and layout.trunks == 1 else 0)
        in_rollout = in_training = frozen
    weights = held * trained / (shard if layout.zero == 3 else 1)
    # ZeRO-2 and 3 split gradients once they are reduced; until then they stand in a bucket
    bucket = w * min(BUCKET, trained) if layout.zero and world > 1 else 0.0
    gradients = (max(w, layout.sums) if layout.zero else held) * trained / (1 if layout.zero == 1 else shard) + bucket
    # ZeRO steps on one float32 piece: ZeRO-2's float32 sums of bf16 gradients are one; others are copied (bf16: twice)
    stepping = gradients
    if layout.zero in (1, 2) and w == layout.sums:
        stepping += (w if w == 4 else w + 4) * trained / shard
    optimizer = (12 if layout.zero else 8) * trained / shard  # Adam's two moments; ZeRO has float32 masters, too
    T, D, L = layout.tokens, shape.hidden, shape.layers
    saved = layout.rows * T * D * w * (L + SAVED_PER_LAYER if layout.checkpointing else L * SAVED_PER_LAYER)
    networks = 2 if layout.stage == "ppo" else 1  # both are in the graph at the same time
    # once, in the precision of the products: their gradient is written over them
    logits = 0.0 if layout.stage == "reward" else w * layout.rows * layout.responses * shape.vocabulary
    activations = saved * networks
    cache = 0.0 if layout.stage == "reward" else 2.0 * w * L * D * T * layout.rollout_rows
    # ZeRO-3: whole weights while there is sampling or evaluation
    gathered = w * (trained + (whole if layout.lora else 0.0)) if layout.zero == 3 else 0.0
    kept = layout.accumulates or not layout.zero
    train = activations + logits + gradients if kept else max(activations + logits, gradients)
    train += weights + optimizer + w * in_training
    step = weights + optimizer + w * in_training + stepping
    rollout = weights + optimizer + w * in_rollout + cache + gathered
    rollout += 0.0 if layout.zero else gradients  # which ZeRO lets go of at each step
    return {"weights": weights, "frozen": w * frozen, "gradients": gradients, "optimizer": optimizer,
            "activations": activations, "logits": logits, "cache": cache, "train": train, "rollout": rollout,
            "step": step, "peak": max(train, rollout, step)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# what fits

TRIED = {  # in this order; the first costs copies from host memory, the second a third more time
    "sft": [(), ("gradient_checkpointing",)],
    "reward": [(), ("gradient_checkpointing",)],
    "ppo": [(), ("offload",), ("gradient_checkpointing",), ("offload", "gradient_checkpointing")],
    "lora": [(), ("gradient_checkpointing",)],  # of any stage: there is no frozen network to move
}
# accelerate's arguments that change no layout, or that `read_launch` reads
KNOWN = {"config_file", "cpu", "mixed_precision", "num_processes", "num_machines", "machine_rank", "main_process_ip",
         "main_process_port", "rdzv_backend", "same_network", "num_cpu_threads_per_process", "gpu_ids",
         "dynamo_backend", "deepspeed_multinode_launcher", "quiet", "debug"}  # fmt: skip


def shape_of(model: str) -> Shape | None:
    """Sizes of a model by its name, its folder, or the hub's cache; None where none of them tells."""
    named = re.search(r"pythia-(\d+(?:\.\d+)?[mb])(?![a-z0-9])", Path(model).name.lower())
    if named and named[1] in PYTHIA:
        return PYTHIA[named[1]]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        text, counted = config.get_text_config(), sum(p.numel() for p in network.parameters())
        sizes = text.num_hidden_layers, text.hidden_size, text.vocab_size
        return Shape(model, *sizes, counted, text.tie_word_embeddings)
    except Exception:  # whatever is wrong with the model, the stage says it better
        return None


def read_config(file: str) -> dict:
    """A config file of accelerate or DeepSpeed. Refuses what is none."""
    import yaml

    try:
        text = Path(file).read_text()
        found = json.loads(text) if str(file).endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        what = "which holds no settings" if Path(file).is_file() else "which is no file"
        refuse("config_file", f"'{file}', {what}", "a config file of accelerate, or the one of DeepSpeed that it names")
    return found


def read_launch(launch: str) -> dict | str:
    """What accelerate's arguments say of a layout, or why nothing is checked (empty: not everything is on a GPU).

    Words without any argument are Python itself: one process.
    """
    from huggingface_hub.constants import HF_HOME

    unknown = "not known how it is launched, so nothing is checked"
    words = re.sub(r"(--[\w-]+)=", r"\1 ", launch).split()
    options = {name[2:].replace("-", "_"): value for name, value in zip(words, [*words[1:], ""]) if name[:2] == "--"}
    if words and not options:
        return {"width": 4}
    if "cpu" in options:
        return ""
    # without a file accelerate reads the user's default
    own = (f"{HF_HOME}/accelerate/default_config.{ending}" for ending in ("yaml", "json"))
    file = options.get("config_file") or next((path for path in own if Path(path).is_file()), None)
    config = read_config(file) if file else {}
    zero, kind = config.get("deepspeed_config") or {}, config.get("distributed_type")
    elsewhere = [zero.get(f"offload_{what}_device") not in (None, "none") for what in ("optimizer", "param")]
    if config.get("use_cpu") or any(elsewhere):
        return ""
    if options.keys() - KNOWN or kind not in ("DEEPSPEED", "MULTI_GPU", "NO", False, None):  # False: YAML's NO
        return unknown
    if kind != "DEEPSPEED":
        return {"width": 4}
    stage, sums = zero.get("zero_stage", 2), None
    width = 2 if (options.get("mixed_precision") or config.get("mixed_precision")) == "bf16" else 4
    if file := zero.get("deepspeed_config_file"):  # DeepSpeed's own names
        own = read_config(file)
        stage, width = (own.get("zero_optimization") or {}).get("stage", 0), 2
        sums = (own.get("data_types") or {}).get("grad_accum_dtype")
    if stage not in (1, 2, 3):
        return unknown
    in_float32 = stage > 1 if sums is None else sums not in ("bf16", "bfloat16")
    return {"zero": stage, "width": width, "sums": 4 if in_float32 else 2}


def fit(args: "Args") -> tuple[str, str]:
    """Arguments to add to a stage's own so that it fits on the GPUs, and a sentence about them; both may be empty.

    Raises:
        SystemExit: code 2, where it does not fit with any of them.
    """
    stage, name = (
        {"ppo_left_padding": "ppo", "grpo": "rloo", "online_dpo": "rloo"}.get(args.fit, args.fit),
        Path(args.model).name,
    )
    about = f"memory of {stage} with {name}"
    launched = read_launch(args.launch)
    if isinstance(launched, str):
        return "", launched and f"{about}: {launched}"
    shape = shape_of(args.model)
    if shape is None:
        return "", f"{about}: its size is not known here, so nothing is checked"
    given = args.given.replace("=", " ").replace("-", "_").split()  # as tyro does: both spellings, the last one counts
    said = {word.replace("__no_", "__"): not word.startswith("__no_") for word in given}
    value_of = dict(zip(given, given[1:]))
    if value_of.get("__precision") == "fp32":
        launched["width"] = 4
    tokens, responses = {"sft": (562, 562), "reward": (807, 0), "dpo": (807, 318)}.get(
        stage, (565, 53)
    )  # the longest rows
    layout = Layout(stage, args.rows, tokens, responses, args.rollout_rows, args.processes, **launched)
    if said.get("__lora"):
        layout.lora = int(value_of.get("__lora.rank", 16))
        if not layout.zero and value_of.get("__precision") != "fp32":
            layout.width = 2  # a frozen trunk in bf16; whole training keeps float32 weights without DeepSpeed
    needs = {}
    for added in TRIED["lora" if layout.lora else stage if stage in TRIED else "ppo"]:
        if any(said.get(f"__{switch}") is False for switch in added):
            continue
        on = {switch: switch in added or said.get(f"__{switch}", False) for switch in TRIED["ppo"][-1]}
        tried = replace(layout, offload=on["offload"], checkpointing=on["gradient_checkpointing"])
        extra = " ".join(f"--{switch}" for switch in added if f"__{switch}" not in said)
        needs[extra] = memory(shape, tried)["peak"] / 1e9
        fits = needs[extra] <= (1 - ROOM) * args.gpu_gb
        if fits:
            break
    size = f"{needs['']:.0f} GB on each of {args.processes} GPUs"
    size += f", {needs[extra]:.0f} with {extra}" if extra else ""
    if not fits:
        expected = "larger GPUs, more of them, or fewer rows of a forward pass"
        refuse("GPU_GB", f"{args.gpu_gb:g}, and {stage} with {name} takes {size}", expected)
    return extra, f"{about}: {size}; GPU_GB is {args.gpu_gb:g}, so it is added" if extra else ""


def paper_layouts(shape: Shape) -> dict[str, Layout]:
    """The runs of docs/running.md on 8 GPUs of 80 GB, and what else docs/cluster.md speaks of."""
    rows, sampled = {"1B": (16, 64), "2.8B": (4, 32), "6.9B": (1, 4)}[shape.name]
    eight = {"processes": 8, "zero": 2}
    ppo = {"stage": "ppo", "rows": rows, "tokens": 565, "responses": 53, "rollout_rows": sampled}
    return {
        "SFT, ZeRO-2": Layout("sft", 1, 562, 562, sampled, **eight),
        "reward, ZeRO-2": Layout("reward", 1, 807, 0, **eight),
        "PPO, ZeRO-2": Layout(**ppo, **eight),
        "PPO, ZeRO-2, --offload": Layout(**ppo, **eight, offload=True),
        "PPO, ZeRO-3, --offload": Layout(**ppo, processes=8, zero=3, offload=True),
        "PPO, 1 GPU, rows 4, checkpointing, --offload": Layout(
            **ppo | {"rows": 4, "rollout_rows": 16}, checkpointing=True, offload=True, width=4
        ),
    }


LORA_SIZES = [PYTHIA[size] for size in ("1b", "2.8b", "6.9b", "12b")]


def lora_layouts() -> dict[str, Layout]:
    """PPO with adapters of rank 16 on GPUs that people have: docs/lora.md. One trunk but where it is said."""
    ppo = {"stage": "ppo", "tokens": 565, "responses": 53, "lora": 16}
    small = {"rows": 1, "rollout_rows": 8, "checkpointing": True}
    return {
        "1 GPU, micro batch 1, 8 sampled, checkpointing": Layout(**ppo, **small),
        "the same, two trunks": Layout(**ppo, **small, trunks=2),
        "1 GPU, micro batch 4, 16 sampled": Layout(**ppo, rows=4, rollout_rows=16),
        "8 GPUs, ZeRO-2, micro batch 4, 16 sampled": Layout(**ppo, rows=4, rollout_rows=16, processes=8, zero=2),
        "8 GPUs, ZeRO-3, micro batch 4, 16 sampled": Layout(**ppo, rows=4, rollout_rows=16, processes=8, zero=3),
        "SFT, 1 GPU, micro batch 1, 8 sampled, checkpointing": Layout(
            "sft", 1, 562, 562, rollout_rows=8, checkpointing=True, lora=16
        ),
        "reward model, 1 GPU, micro batch 1, checkpointing": Layout("reward", 1, 807, 0, checkpointing=True, lora=16),
    }


# ----------------------------------------------------------------------------------------------------------------------
# measuring

LIBRARIES = Shape("libraries", 1, 64, 1024)  # next to nothing: its peak is what the libraries and the data take
TRUNKS = [Shape("D 768, 8 layers, V 4096", 8, 768, 4096), Shape("D 1024, 8 layers, V 4096", 8, 1024, 4096), Shape("D 1024, 12 layers, V 4096", 12, 1024, 4096)]  # noqa: E501  # fmt: skip
MEASURED = [Shape("D 384, 4 layers", 4, 384, 50304), Shape("D 512, 6 layers", 6, 512, 50304), Shape("D 768, 8 layers", 8, 768, 50304)]  # noqa: E501  # fmt: skip


def measured_layouts() -> dict[str, Layout]:
    """Small runs; tokens are means of the toy world's rows (a random policy samples all 24)."""
    ppo = {"stage": "ppo", "rows": 32, "tokens": 57, "responses": 24, "rollout_rows": 32, "width": 4}
    return {
        "SFT": Layout("sft", 32, 43, 42, width=4),
        "reward": Layout("reward", 32, 91, 0, width=4),
        "PPO": Layout(**ppo),
        "PPO, checkpointing": Layout(**ppo, checkpointing=True),
        "PPO, ZeRO-2 on 2": Layout(**ppo | {"rows": 16, "rollout_rows": 16}, processes=2, zero=2, accumulates=False),
    }


def measured_lora_layouts() -> dict[str, Layout]:
    """PPO where the trunk is most of it: whole, with adapters on one trunk and on two."""
    ppo = {"stage": "ppo", "rows": 8, "tokens": 57, "responses": 24, "rollout_rows": 8, "width": 4}
    return {
        "PPO, whole": Layout(**ppo),
        "PPO, LoRA, one trunk": Layout(**ppo, lora=16),
        "PPO, LoRA, two trunks": Layout(**ppo, lora=16, trunks=2),
    }


@dataclass
class Args:
    measure: bool = False
    """also run small models here and compare"""
    measure_lora: bool = False
    """the same, of PPO with adapters beside PPO of whole networks"""
    output: str | None = None
    """also write the numbers to this JSON file"""

    # for the job scripts: prints arguments to add, then a sentence
    fit: Literal["sft", "reward", "ppo_left_padding", "rloo", "grpo", "dpo", "online_dpo"] | None = None
    """make this stage fit on the GPUs, or refuse"""
    model: str = ""
    """hub id or folder of the base model"""
    gpu_gb: float = 80.0
    """memory of a GPU, in GB"""
    processes: int = 8
    """GPUs"""
    rows: int = 1
    """rows of a forward pass in training"""
    rollout_rows: int = 0
    """rows that are sampled at a time: by PPO, by SFT's evaluation"""
    launch: str = "--config_file deepspeed.yaml"
    """accelerate's arguments"""
    given: str = ""
    """the stage's arguments that are given already"""


def main(args: Args) -> dict:
    """Print the tables; returns all numbers."""
    if args.fit:
        words, why = fit(args)
        print(f"{words}\n{why}")
        return {"fit": words}
    found = {"paper": {}, "lora": {}, "measured": {}}
    shown = Table("GB on each GPU", *(s.name for s in PAPER))
    for name in paper_layouts(PAPER[0]):
        terms = [memory(s, paper_layouts(s)[name]) for s in PAPER]
        found["paper"][name] = {s.name: t for s, t in zip(PAPER, terms)}
        shown.add_row(name, *(f"{t['peak'] / 1e9:.0f}" for t in terms))
    print_table(shown)
    shown = Table("GB on each GPU, LoRA of rank 16, bf16", *(s.name for s in LORA_SIZES))
    for name, layout in lora_layouts().items():
        terms = [memory(s, layout) for s in LORA_SIZES]
        found["lora"][name] = {s.name: t for s, t in zip(LORA_SIZES, terms)}
        shown.add_row(name, *(f"{t['peak'] / 1e9:.1f}" for t in terms))
    print_table(shown)
    if args.measure:
        found["measured"] = measure(MEASURED, measured_layouts())
    if args.measure_lora:
        found["measured"] |= measure(TRUNKS, measured_lora_layouts())
    if args.output:
        write_json(Path(args.output), found)
        print(f"numbers: {args.output}")
    return found


def measure(shapes: list[Shape], layouts: dict[str, Layout]) -> dict:
    """Peaks of real runs against the formula: resident memory above what the libraries alone take."""
    import multiprocessing

    found = {}
    shown = Table("shape", "run", "formula, GB", "measured, GB", "measured / formula")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = {}
        for shape in [LIBRARIES, *shapes]:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(make_world, (work, shape))
            for name, layout in layouts.items():
                predicted = memory(shape, layout)["peak"]
                peak = run_stage(work, layout)
                if shape is LIBRARIES:
                    base[name] = peak - predicted
                    continue
                peak -= base[name]
                found[f"{shape.name}: {name}"] = {"formula": predicted, "measured": peak}
                row = (f"{predicted / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / predicted:.2f}")
                shown.add_row(shape.name, name, *row)
                print(shape.name, name, *row, flush=True)
    print_table(shown)
    return found


def make_world(work: Path, shape: Shape) -> None:
    """The toy world's rows and tokenizer, and random GPT-NeoX models of the shape with Pythia's vocabulary."""
    import torch
    from transformers import (
        AutoTokenizer,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        GPTNeoXForSequenceClassification,
        logging,
    )

    from summarize_from_feedback_details import tldr_dataset, toy_tldr

    logging.disable_progress_bar()
    os.chdir(work)
    if not (work / "rows").exists():
        sizes = {
            "n_sft": 256,
            "n_sft_validation": 16,
            "n_comparisons": 128,
            "n_comparisons_validation": 16,
            "n_cnndm": 4,
        }
        toy_tldr.main(toy_tldr.Args(data_dir=work / "raw", models_dir=work / "toy", sizes=("tiny",), **sizes))
        long = tldr_dataset.TldrHParams(
            length=56, max_sft_response_length=24, max_sft_query_response_length=80, max_rm_response_length=32,
            max_rm_query_response_length=88,
        )  # fmt: skip
        cnndm = tldr_dataset.cnndm_defaults()
        cnndm.length, cnndm.max_rm_response_length, cnndm.max_rm_query_response_length = 128, 32, 160
        tldr_dataset.main(
            tldr_dataset.Args(
                base_model=str(work / "toy/tiny"), sft_dataset=str(work / "raw/sft"), output_dir=str(work / "rows"),
                preference_dataset=str(work / "raw/comparisons"), tldr_params=long, cnndm_params=cnndm,
                check_length_correctness=False,
            )
        )  # fmt: skip
    config = GPTNeoXConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=4 * shape.hidden,
        num_attention_heads=shape.hidden // 64, vocab_size=shape.vocabulary, max_position_embeddings=512,
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(work / "toy/tiny")
    torch.manual_seed(1)
    GPTNeoXForCausalLM(config).save_pretrained(work / "policy")
    tokenizer.save_pretrained(work / "policy")
    config.num_labels = 1
    GPTNeoXForSequenceClassification(config).save_pretrained(work / "reward")
    tokenizer.save_pretrained(work / "reward")
    shutil.rmtree(work / "reward_lora", ignore_errors=True)
    run_stage(work, Layout("reward", 1, 91, 0, width=4, lora=16), output="reward_lora")


def run_stage(work: Path, layout: Layout, output: str | None = None) -> float:
    """Peak resident memory of process 0 in bytes; `output`: folder in `work` that keeps the model."""
    script = {"sft": "sft", "reward": "reward", "ppo": "ppo_left_padding"}[layout.stage]
    run, world = f"{script}_{os.urandom(4).hex()}", layout.processes
    flags = ["--base_model", "policy", "--query_dataset", "rows/sft", "--precision", "fp32", "--no-run_eval"]
    flags += ["--local_micro_batch_size", str(layout.rows), "--batch_size", str(layout.rows * world)]
    flags += ["--output_dir", output or f"out/{run}", "--run_name", run, "--num_updates", "2"]
    flags += ["--print_sample_output_freq", "0"]
    if layout.stage != "sft":
        flags += ["--sft_model_path", "policy"]
    if layout.stage == "reward":
        flags += ["--label_dataset", "rows/comparisons", "--num_normalization_rows", "16", "--no-shared_prefix"]
    if layout.stage == "ppo":
        flags += ["--reward_model_path", "reward_lora" if layout.lora and layout.trunks == 1 else "reward"]
        flags += ["--response_length", str(layout.responses)]
        flags += ["--local_rollout_forward_batch_size", str(layout.rollout_rows), "--ppo.noptepochs", "1"]
    if layout.checkpointing:
        flags += ["--gradient_checkpointing"]
    if layout.lora:
        flags += ["--lora", "--lora.rank", str(layout.lora)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable]
    if layout.zero:
        (work / "zero.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nmixed_precision: 'no'\n"
            f"num_machines: 1\nnum_processes: {world}\ndeepspeed_config:\n  zero_stage: {layout.zero}\n"
            "  gradient_accumulation_steps: 1\n  zero3_init_flag: false\n"
        )
        command += ["-m", "accelerate.commands.launch", "--config_file", "zero.yaml"]
        flags += ["--deepspeed"]
    command += [str(ROOT / f"summarize_from_feedback_details/{script}.py"), *flags]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    lines = [json.loads(line) for line in (work / f"runs/{run}/metrics.jsonl").read_text().splitlines()]
    return max(v for line in lines for k, v in line.items() if k.startswith("memory/")) * 1e9


if __name__ == "__main__":
    command_line(main, Args)
