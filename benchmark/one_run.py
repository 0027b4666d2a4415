"""One side of the benchmark on one stage, as a process of its own: a few updates, timed; prints one JSON object.

    python benchmark/one_run.py --side ours --stage ppo --micro 4 --folder workload --work.rows 16

Ours: the stage script itself, its `main`. TRL: its trainer, set up as its documentation says. Both sides are timed by
the same clock at the same places: optimiser steps, `Accelerator.backward`, and the ends of updates.
"""

import contextlib
import json
import math
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
import tyro  # noqa: E402
import workload  # noqa: E402

GROUP = 4  # responses to each query: RLOO and GRPO


@dataclass
class Args:
    side: Literal["ours", "graph", "trl", "transformers"]
    """whose code"""
    stage: Literal["sft", "reward", "ppo", "dpo", "rloo", "grpo", "sampling"]
    """which stage; sampling: all rows' responses at once, each of full length, by our loop or transformers' generate"""
    folder: Path
    """where the models and rows are (`workload.make`)"""
    work: workload.Workload = field(default_factory=lambda: workload.Workload(rows=8))
    """what is computed"""
    batch: int | None = None
    """rows, pairs or episodes of one update (default: all there are, so that each update reads the same ones)"""
    micro: int = 4
    """rows, pairs or episodes of one forward pass"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what the trainer is asked for"""
    lora: bool = False
    """ours: train adapters of rank 16 on frozen weights"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass"""
    sampled: int = 64
    """ours: episodes that are sampled at a time"""
    gpu: bool = False
    """on the GPU, each phase timed to its end there"""
    split_rollout: bool = False
    """ours: time a rollout as prefill, decoding and scoring"""
    saving: bool = True
    """ours: write checkpoint and model after the updates, as users have it"""
    updates: int = 1
    """updates that are timed"""
    warm_up: int = 0
    """updates before them, not timed"""
    count_flops: bool = False
    """count what is really computed, padding included (slower: do not time it)"""
    profile: Path | None = None
    """write the top operators of the timed updates to this file (slower: do not time it)"""


def peak_gb(gpu: bool = False) -> float:
    """Largest memory of this process since the last call, in GiB: on the GPU; or resident, on Linux."""
    if gpu:
        largest = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return largest
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return largest / 2**20


class Clock:
    """Seconds of the updates, of the phases within them, and the largest memory during each."""

    def __init__(self, gpu: bool = False):
        self.gpu = gpu
        self.marks, self.phases, self.open, self.peaks_gb = [], [], None, []
        self.before = 0.0  # seconds of what was computed once for each row before training: belongs to each update

    def now(self) -> float:
        """Seconds, once the GPU has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def update_ends(self) -> None:
        """Also called once before the first update."""
        self.marks.append(self.now())
        self.peaks_gb.append(peak_gb(self.gpu))  # until here: nothing is saved yet
        self.phases.append({})

    def add(self, phase: str, seconds: float) -> None:
        if self.phases:
            self.phases[-1][phase] = self.phases[-1].get(phase, 0.0) + seconds

    def watch(self) -> None:
        """Time the backward passes and optimiser steps of whatever trainer runs in this process."""
        from accelerate import Accelerator
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self.time(Accelerator, "backward")
        register_optimizer_step_pre_hook(lambda *_: setattr(self, "open", self.now()))
        register_optimizer_step_post_hook(lambda *_: self.add("optimiser", self.now() - self.open))

    def time(self, owner: Any, name: str, phase: str | None = None) -> None:
        """Time each call of a function as a phase (default: of the function's name)."""
        plain = getattr(owner, name)

        def timed(*args, **kwargs):
            start = self.now()
            result = plain(*args, **kwargs)
            self.add(phase or name, self.now() - start)
            return result

        setattr(owner, name, timed)

    def report(self, warm_up: int) -> dict:
        seconds = [b - a + self.before for a, b in zip(self.marks, self.marks[1:])]
        phases = [phase | ({"reference": self.before} if self.before else {}) for phase in self.phases[:-1]]
        for total, parts in zip(seconds, phases):
            if "responding" in parts:  # within the rollout
                responding, prefill, rollout = parts.pop("responding"), parts["prefill"], parts.pop("rollout")
                parts |= {"decoding": responding - prefill, "scoring": rollout - responding}
            parts["forward and the rest"] = total - sum(parts.values())
        return {"seconds": seconds[warm_up:], "phases": phases[warm_up:]}


def run_ours(args: Args, clock: Clock, scratch: str) -> None:
    """The stage's `main`, on a run folder in `scratch`."""
    from summarize_from_feedback_details import dpo, grpo, ppo_left_padding, reward, rloo, sft
    from summarize_from_feedback_details.common import decoding, rollouts
    from summarize_from_feedback_details.common.checkpoints import Checkpoints
    from summarize_from_feedback_details.common.run_folder import RunFolder

    data, models = args.folder.resolve(), args.folder.resolve()
    os.chdir(scratch)
    updates, batch = args.updates + args.warm_up, args.batch or args.work.rows
    common = {
        "run_name": "bench", "output_dir": f"{scratch}/out", "precision": args.precision, "run_eval": False,
        "base_model": str(models / "policy"), "query_dataset": str(data / "sft"), "print_sample_output_freq": 0,
        "local_micro_batch_size": args.micro, "batch_size": batch, "save_freq": 0, "save_minutes": 0.0,
        "lora": args.lora, "gradient_checkpointing": args.gradient_checkpointing,
    }  # fmt: skip
    plain_resume, plain_log = Checkpoints.resume, RunFolder.log

    def resume(self):
        position = plain_resume(self)
        clock.update_ends()
        return position

    def log(self, update, metrics, note=""):
        if update <= updates:
            if (seconds := metrics.get(f"time/{args.stage}/rollout_seconds")) is not None:
                clock.add("rollout", seconds)
            clock.update_ends()
        plain_log(self, update, metrics, note)

    Checkpoints.resume, RunFolder.log = resume, log
    if not args.saving:
        Checkpoints.save = lambda *_: None
        for module in (dpo, grpo, ppo_left_padding, reward, rloo, sft):
            module.save_model = lambda *_: None
    if args.split_rollout:
        clock.time(decoding, "read_queries", "prefill")
        clock.time(rollouts, "respond", "responding")
    length = {"num_train_epochs": math.ceil(updates * batch / args.work.rows), "total_episodes": updates * batch}
    if args.stage not in ("sft", "reward", "ppo"):
        del common["print_sample_output_freq"]
    rollout = {
        "num_updates": updates, "local_rollout_forward_batch_size": args.sampled,
        "sft_model_path": str(models / "policy"), "sft_model_revision": None,
        "reward_model_path": str(models / "reward"), "reward_model_revision": None,
        "response_length": args.work.response_length,
    }  # fmt: skip
    if args.stage == "sft":
        sft.main(sft.Args(**common, **length))
    elif args.stage == "dpo":
        find = dpo.find_ref_logprobs

        def find_and_time(*given):
            start = time.perf_counter()
            found = find(*given)
            clock.before += time.perf_counter() - start  # of the rows of one update: all there are
            return found

        dpo.find_ref_logprobs = find_and_time
        dpo.main(dpo.Args(
            **common, **length, sft_model_path=str(models / "policy"), sft_model_revision=None,
            label_dataset=str(data / "comparisons"), ref_logprobs_dir=f"{scratch}/ref_logprobs",
            local_eval_batch_size=args.micro,
        ))  # fmt: skip
    elif args.stage == "rloo":
        rloo.main(rloo.Args(**common, **rollout, rloo_k=GROUP))
    elif args.stage == "grpo":
        grpo.main(grpo.Args(**common, **rollout, grpo_k=GROUP))
    elif args.stage == "reward":
        reward.main(reward.Args(
            **common, **length, sft_model_path=str(models / "policy"), sft_model_revision=None,
            label_dataset=str(data / "comparisons"), num_normalization_rows=1,
        ))  # fmt: skip
    else:
        ppo_left_padding.main(ppo_left_padding.Args(**common, **rollout))


def run_trl(args: Args, clock: Clock, scratch: str) -> None:
    """TRL's trainer: current for SFT and reward, `trl.experimental.ppo` of the last release that had it for PPO."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    updates, batch = args.updates + args.warm_up, args.batch or args.work.rows

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.update_ends()

        def on_step_end(self, *_, **__):
            clock.update_ends()

    tokenizer = AutoTokenizer.from_pretrained(args.folder / "policy")
    load = lambda kind, name, **kw: kind.from_pretrained(args.folder / name, dtype=torch.float32, **kw)
    rows = datasets.load_dataset("parquet", data_dir=str(args.folder / "sft"), split="train")
    strip = lambda row: [t for t in row if t != workload.PAD]
    common = {
        "output_dir": scratch, "per_device_train_batch_size": args.micro, "learning_rate": 3e-6, "adam_epsilon": 1e-5,
        "gradient_accumulation_steps": batch // args.micro, "weight_decay": 0.01, "report_to": "none",
        "use_cpu": not args.gpu, "bf16": args.precision == "bf16", "save_strategy": "no",
        "gradient_checkpointing": args.gradient_checkpointing, "seed": args.work.seed, "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    if args.stage == "sft":
        from trl import SFTConfig, SFTTrainer

        rows = rows.map(lambda r: {"input_ids": strip(r["query_reference_response_token"])}).select_columns("input_ids")
        trainer = SFTTrainer(
            model=load(AutoModelForCausalLM, "policy"), processing_class=tokenizer, train_dataset=rows,
            args=SFTConfig(**common, max_steps=updates, max_length=None, max_grad_norm=0.0),
            callbacks=[Watch()],
        )  # fmt: skip
    elif args.stage == "reward":
        from trl import RewardConfig, RewardTrainer

        pairs = datasets.load_dataset("parquet", data_dir=str(args.folder / "comparisons"), split="train")
        pairs = pairs.map(
            lambda r: {f"{k}_ids": strip(r[f"query_{k}_token"]) for k in ("chosen", "rejected")}
        ).select_columns(["chosen_ids", "rejected_ids"])
        trainer = RewardTrainer(
            model=load(AutoModelForSequenceClassification, "policy", num_labels=1), processing_class=tokenizer,
            train_dataset=pairs, args=RewardConfig(**common, max_steps=updates, max_length=None, max_grad_norm=0.0),
            callbacks=[Watch()],
        )  # fmt: skip
    elif args.stage == "dpo":
        from trl import DPOConfig, DPOTrainer

        pairs = datasets.load_dataset("parquet", data_dir=str(args.folder / "comparisons"), split="train")

        def texts(row):  # TRL appends the end-of-text token itself
            query = len(strip(row["query_token"]))
            both = {name: strip(row[f"query_{name}_token"])[query:-1] for name in ("chosen", "rejected")}
            return {"prompt": row["query"]} | {name: " " + tokenizer.decode(tokens) for name, tokens in both.items()}

        pairs = pairs.map(texts).select_columns(["prompt", "chosen", "rejected"])
        trainer = DPOTrainer(
            model=load(AutoModelForCausalLM, "policy"), ref_model=load(AutoModelForCausalLM, "policy"),
            processing_class=tokenizer, train_dataset=pairs, callbacks=[Watch()],
            args=DPOConfig(**common, beta=0.05, max_steps=updates, max_length=None, max_grad_norm=0.0),
        )  # fmt: skip
    elif args.stage in ("rloo", "grpo"):
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        config, kind = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[args.stage]
        settings = config(
            **common, beta={"rloo": 0.05, "grpo": 0.04}[args.stage], num_generations=GROUP, temperature=0.7, top_k=0,
            max_completion_length=args.work.response_length, max_steps=updates, max_grad_norm=0.0,
            generation_batch_size=batch,
        )  # fmt: skip
        trainer = kind(
            model=str(args.folder / "policy"), reward_funcs=str(args.folder / "reward"), args=settings,
            processing_class=tokenizer, reward_processing_classes=AutoTokenizer.from_pretrained(args.folder / "reward"),
            train_dataset=rows.rename_column("query", "prompt").select_columns(["prompt"]), callbacks=[Watch()],
        )  # fmt: skip
    else:
        from trl.experimental import ppo

        tokenizer.padding_side = "left"
        rows = rows.map(lambda r: {"input_ids": strip(r["query_token"])}).select_columns("input_ids")
        plain = ppo.ppo_trainer.PolicyAndValueWrapper.forward
        begun = {"update": 0}

        def forward(wrapper, **kwargs):  # called in training only: the first call of an update ends its rollout
            if begun["update"] < len(clock.marks):
                begun["update"] = len(clock.marks)
                clock.add("rollout", clock.now() - clock.marks[-1])
            return plain(wrapper, **kwargs)

        ppo.ppo_trainer.PolicyAndValueWrapper.forward = forward
        trainer = ppo.PPOTrainer(
            args=ppo.PPOConfig(**common, num_ppo_epochs=4, num_mini_batches=1, kl_coef=0.05, missing_eos_penalty=1.0,
                               total_episodes=updates * batch, response_length=args.work.response_length,
                               temperature=0.7, stop_token="eos", num_sample_generations=0),
            processing_class=tokenizer, model=load(AutoModelForCausalLM, "policy"),
            ref_model=load(AutoModelForCausalLM, "policy"),
            reward_model=load(AutoModelForSequenceClassification, "reward", num_labels=1),
            value_model=load(AutoModelForSequenceClassification, "reward", num_labels=1),
            train_dataset=rows, eval_dataset=rows.select([0]), callbacks=[Watch()],
        )  # fmt: skip
    trainer.train()


@torch.no_grad()
def run_sampling(args: Args, clock: Clock) -> None:
    """Responses of full length to all rows at once, in the precision of computing."""
    import pandas
    from transformers import AutoModelForCausalLM

    from summarize_from_feedback_details.common.check_inputs import TokenIds
    from summarize_from_feedback_details.common.engines import replay
    from summarize_from_feedback_details.common.noise import episode_keys
    from summarize_from_feedback_details.common.packed_rows import use_packed_attention
    from summarize_from_feedback_details.common.sampling import model_inputs, pad_rows, sample_responses, strip_pads

    device = torch.device("cuda" if args.gpu else "cpu")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.folder / "policy", dtype=dtype).to(device).eval()
    rows = pandas.read_parquet(args.folder / "sft" / "train.parquet")["query_token"]
    queries = pad_rows([strip_pads(row, workload.PAD) for row in rows], workload.PAD, "left").to(device)
    R = args.work.response_length
    if args.side != "transformers":
        use_packed_attention(model)
    model.generation_config.eos_token_id = None
    inputs, how = model_inputs(queries, workload.PAD), {"do_sample": True, "temperature": 0.7, "top_k": 0}
    del inputs["position_ids"]
    clock.update_ends()
    for _ in range(args.warm_up + args.updates):
        if args.side != "transformers":
            keys = episode_keys(args.work.seed, range(len(queries)), device)
            ids = TokenIds(workload.PAD, -1, workload.WORDS)
            found, _ = (replay if args.side == "graph" else sample_responses)(model, queries, keys, ids, R, 0.7)
        else:
            found = model.generate(**inputs, **how, max_new_tokens=R, pad_token_id=workload.PAD)[:, queries.shape[1] :]
        assert found.shape == (len(queries), R)
        clock.update_ends()


def counting():
    """A counter of the FLOPs of all matrix products and attentions, the CPU's fused attention included."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    aten = torch.ops.aten

    def forward(query, key, value, *_, out_shape=None, **__):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *_, out_shape=None, **__):
        return 2 * sdpa_flop_count(query, key, value)

    mapping = {
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],  # the gradients of TRL's fused head
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def main(args: Args) -> None:
    if not args.gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    clock = Clock(args.gpu)
    clock.watch()
    if args.stage in ("ppo", "rloo", "grpo"):
        workload.force_ends(args.folder)
    run = {"ours": run_ours, "trl": run_trl}.get(args.side)
    if args.stage == "sampling":
        run = lambda args, clock, scratch: run_sampling(args, clock)
    counter = counting() if args.count_flops else contextlib.nullcontext()
    profiler = contextlib.nullcontext()
    if args.profile:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with tempfile.TemporaryDirectory() as scratch, counter, profiler, contextlib.redirect_stdout(sys.stderr):
        run(args, clock, scratch)
    found = clock.report(args.warm_up)
    found["peaks_gb"] = clock.peaks_gb[1:]  # of each update
    found["peak_gb"] = max(clock.peaks_gb)
    found["peak_gb_with_saving"] = max(*clock.peaks_gb, peak_gb(args.gpu))
    found["threads"] = torch.get_num_threads()
    if args.count_flops:
        found["computed_flops"] = counter.get_total_flops() / (args.updates + args.warm_up)
    if args.profile:
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
        args.profile.write_text(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
