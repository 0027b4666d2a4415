"""RLOO: queries, an SFT policy and a reward model -> a policy whose summaries score higher, without a value network.

Reads   the SFT dataset's queries (`tldr_dataset.py`), an SFT policy (`sft.py`), a reward model (`reward.py`, or one of
        the original code)
Writes  a policy (`AutoModelForCausalLM`, tokenizer included) in --output_dir; metrics and a table of validation
        responses with scores in runs/<run_name>
Paper   Ahmadian et al. 2024, "Back to Basics" (arXiv 2402.14740): a response is one action, and the other responses to
        the same query are its baseline

Laptop  python summarize_from_feedback_details/rloo.py --base_model models/toy/small \
            --sft_model_path models/sft_policy --reward_model_path models/reward --query_dataset data/toy_tokenized/sft
1 GPU   python summarize_from_feedback_details/rloo.py --local_micro_batch_size 4 --gradient_checkpointing
8 GPUs  accelerate launch --config_file deepspeed.yaml summarize_from_feedback_details/rloo.py --deepspeed

Dimensions: B episodes, k of them for each query, R response tokens.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from summarize_from_feedback_details.common.adapters import LoraParams, LoraSettings
from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_optimisation,
    check_sizes,
    command_line,
    derive_sizes,
    derive_updates,
    drop_revisions,
    may_change,
    refuse,
)
from summarize_from_feedback_details.common.checkpoints import Checkpoints, fingerprint_queries
from summarize_from_feedback_details.common.console import print_metrics
from summarize_from_feedback_details.common.engines import importance_weights, mismatch_metrics
from summarize_from_feedback_details.common.evaluation import evaluating, first_rows, report_scores, score_policy
from summarize_from_feedback_details.common.logprobs import scatter_tokens
from summarize_from_feedback_details.common.machine import memory_gb
from summarize_from_feedback_details.common.packed_rows import supports_packing
from summarize_from_feedback_details.common.policies import ResponsePolicy, load_policy_and_reference
from summarize_from_feedback_details.common.precision import trunk_dtype
from summarize_from_feedback_details.common.reward_models import load_frozen_reward
from summarize_from_feedback_details.common.rollouts import (
    CLOSING_METRICS,
    Prompts,
    find_task,
    gather_in_order,
    objective_metrics,
    roll_out,
    warn,
)
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import strip_pads
from summarize_from_feedback_details.common.text_metrics import text_metrics
from summarize_from_feedback_details.common.training import (
    Gradient,
    epoch_order,
    freeze,
    launch,
    lent,
    prepare,
    save_model,
)

NAMES = ("tokens", "sampled", "logprobs", "ref_logprobs", "scores")  # of what is sampled and computed for a batch


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("rloo")
    """name of the experiment, the first part of the run's name"""
    output_dir: str = may_change("models/rloo_policy")
    """folder of the trained policy"""
    seed: int = 44413
    """seed of the order of queries and of the sampling noise"""
    run_eval: bool = True
    """evaluate on validation after training: a table of responses with their scores"""
    eval_freq: int = may_change(0)
    """also evaluate every so many updates, a table of responses each (0: only at the end)"""
    num_eval_rows: int | None = None
    """rows of the validation split to evaluate on (default: the whole split)"""

    # optimisation
    eps: float = 1e-5
    """epsilon of the optimiser"""
    lr: float = 3e-6
    """peak learning rate"""
    weight_decay: float = 0.01
    """decoupled weight decay (with --optimizer adam: L2)"""
    max_grad_norm: float | None = None
    """clip the global gradient norm to this (default: no clipping)"""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """optimiser"""
    scheduler: str = "linear"
    """learning rate schedule over all updates: linear, cosine (to 0), constant, constant_with_warmup"""
    warm_up_steps: int = 0
    """updates of linear warm-up"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies in it, else fp32"""
    lora: bool = False
    """train adapters (LoRA) on frozen weights instead of all weights: much less memory; they want a learning rate about
    ten times higher"""
    lora_params: LoraSettings = field(default_factory=LoraParams)
    """the adapters' own settings, with --lora: `--lora.rank` and so on"""
    gradient_checkpointing: bool = may_change(False)
    """compute activations again in the backward pass: less memory, about a third more time"""
    offload: bool = may_change(False)
    """keep the reference policy and the reward model in host memory while the policy trains"""

    # sizes, in episodes; those left out are derived
    world_size: int | None = may_change(None)
    """number of processes; refused when another number was launched"""
    total_episodes: int | None = None
    """episodes in all (default: 1,000,000; those that do not fill a last batch are left out)"""
    num_updates: int | None = None
    """updates (default: total_episodes // batch_size)"""
    local_micro_batch_size: int = may_change(16)
    """episodes of one forward pass on one process"""
    gradient_accumulation_steps: int | None = may_change(None)
    """forward passes per update (default: what makes up batch_size)"""
    batch_size: int | None = None
    """episodes of one update on all processes, --rloo_k for each query (default: 512)"""
    local_rollout_forward_batch_size: int = may_change(64)
    """episodes that one process samples at a time"""
    local_eval_batch_size: int | None = may_change(None)
    """rows that one process samples at a time in evaluation (default: local_rollout_forward_batch_size)"""

    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """base model of the policy: folder or hub id; its tokenizer is used"""
    base_model_revision: str | None = None
    """hub revision of the base model"""
    sft_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__sft__tldr"
    """SFT policy to start from: folder or hub id (default: a released one)"""
    sft_model_revision: str | None = "sft__44413__1708611267"
    """hub revision of the SFT policy (a folder has none)"""
    reward_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__reward__tldr"
    """reward model, ours or the original's: folder or hub id (default: a released one)"""
    reward_model_revision: str | None = "reward__44413__1708628552"
    """hub revision of the reward model (a folder has none)"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """tokenised SFT dataset, whose queries are the prompts: folder or hub id"""
    dataset_revision: str | None = None
    """hub revision of the dataset"""
    response_length: int = 53
    """tokens sampled at most per response"""
    truncate_token: str = "eos"
    """responses end after this token: `eos`, or the text of a single token"""
    eval_temperature: float = 0.01
    """sampling temperature in evaluation (0: greedy)"""

    # algorithm
    temperature: float = 0.7
    """divides the logits of old, new and reference log-probabilities alike"""
    rollout_engine: Literal["hf", "hf_graph", "hf_bf16"] = "hf"
    """who samples in training: the policy itself; the same as a CUDA graph; a copy in bf16, for runs in float32"""
    penalty_reward_value: float = -1.0
    """score of a response without the truncate token"""
    non_eos_penalty: bool = True
    """whether a response without the truncate token gets that score"""
    rloo_k: int = 4
    """responses to each query; the mean reward of the others is a response's baseline"""
    kl_coef: float = 0.05
    """beta, weight of the KL penalty in the reward"""
    noptepochs: int = 1
    """passes over each batch, an optimiser step each"""
    ppo_clip: float | None = None
    """clip the ratio of a response's probability to 1 +- this, as PPO does (default: no clipping)"""


# ----------------------------------------------------------------------------------------------------------------------
# loss


def leave_one_out_advantages(rewards: Tensor, k: int) -> Tensor:
    """Reward minus the mean reward of the other k - 1 responses to the same query (equation 8): [B] -> [B].

    >>> leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), k=3).tolist()
    [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]
    """
    of_query = rewards.reshape(-1, k)
    return (of_query - (of_query.sum(1, keepdim=True) - of_query) / (k - 1)).flatten()


def rloo_losses(new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """Policy loss of each response, which is one action: [B] nats, [B] nats, [B] -> [B].

    Its gradient at the first pass, where the ratio is 1, is that of REINFORCE: advantage times the gradient of the
    response's log-probability.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    losses = -advantages * ratio
    return losses if clip is None else torch.max(losses, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip))


def check_args(args: Args):
    """Refuse what cannot work; fill in what was left out. Returns (tokenizer, dataset, ids)."""
    positive = ("response_length", "temperature", "local_rollout_forward_batch_size", "noptepochs", "ppo_clip")
    check_sizes(args, positive, at_least_zero=("eval_temperature", "kl_coef"))
    if args.rloo_k < 2:
        refuse("rloo_k", str(args.rloo_k), "at least 2: a response's baseline is the reward of others")
    check_optimisation(args)
    derive_sizes(args, default_batch_size=512)
    if args.batch_size % args.rloo_k:
        refuse("batch_size", str(args.batch_size), f"a multiple of --rloo_k {args.rloo_k}")
    derive_updates(args)
    args.local_eval_batch_size = args.local_eval_batch_size or args.local_rollout_forward_batch_size
    RunFolder.check(args)
    found = find_task(args)
    RunFolder.refuse_taken(args)
    return found


def main(args: Args) -> dict[str, float]:
    """Run the stage; returns the final metrics."""
    # ------------------------------------------------------------------------------------------------------------------
    # sizes
    drop_revisions(args, "sft_model", "reward_model")
    run = RunFolder(args, "rloo")
    if run.is_finished():
        return run.final_metrics()
    tokenizer, dataset, ids = check_args(args)
    accelerator = launch(args, "episodes")
    device, in_float32, k = accelerator.device, accelerator.mixed_precision == "no", args.rloo_k
    run.say(f"{args.num_updates} updates, {args.batch_size // k} queries x {k} responses each")

    with run.open(accelerator):
        # --------------------------------------------------------------------------------------------------------------
        # data, models, optimiser
        train = dataset["train"].with_format("numpy", columns=["query_token"])
        texts = dataset["train"].select_columns(["query", "reference_response"])
        validation = first_rows(dataset["validation"], args.num_eval_rows)
        order = epoch_order(len(train), args.num_updates * args.batch_size // k, args.seed).repeat(k)
        torch.manual_seed(args.seed)
        dtype = trunk_dtype(args, accelerator)
        policy, ref_policy = load_policy_and_reference(args, dtype)
        freeze(ref_policy, accelerator, args.offload)
        reward_model = freeze(load_frozen_reward(args, ref_policy, dtype), accelerator, args.offload)
        run.parameters = sum(p.numel() for p in ref_policy.parameters())
        packed = supports_packing(policy) and supports_packing(reward_model)
        model, optimizer, scheduler = prepare(accelerator, ResponsePolicy(policy), args)

        def evaluate(what: str) -> dict[str, list]:
            with evaluating(accelerator, model) as trained, lent(reward_model, device):
                return score_policy(trained.model, reward_model, validation, tokenizer, args, what)

        # --------------------------------------------------------------------------------------------------------------
        # loop
        checkpoints = Checkpoints(run, accelerator, model, optimizer, scheduler, fingerprint_queries(train))
        resumed = checkpoints.resume()
        for update in run.progress("rloo updates", resumed.update + 1, args.num_updates):
            start, inside = time.time(), resumed.inside(update)
            episodes = np.arange((update - 1) * args.batch_size, update * args.batch_size)
            queries = [strip_pads(q, ids.pad) for q in train[order[episodes]]["query_token"]]
            ratio_error = torch.zeros(1, device=device)
            if inside:
                ratio_error.copy_(inside.shared["ratio_error"])
                columns = [inside.shared[name].to(device) for name in NAMES]
            else:
                prompts, mine = Prompts(queries, order[episodes], episodes).share(accelerator, together=k)
                with evaluating(accelerator, model) as whole:
                    networks = whole.model, ref_policy, reward_model
                    found = roll_out(networks, prompts, not in_float32, ids, args, checkpoints.poll)
                columns = gather_in_order(accelerator, (found[0].tokens, found[0].logprobs, *found[1:]), mine)
            tokens, sampled, logprobs, ref_logprobs, scores = columns
            mask, contains_stop = tokens != ids.pad, (tokens == ids.stop).any(1)  # [B, R], [B]
            if args.non_eos_penalty:
                scores = torch.where(contains_stop, scores, torch.full_like(scores, args.penalty_reward_value))
            kl = (logprobs - ref_logprobs) * mask
            advantages = leave_one_out_advantages(scores - args.kl_coef * kl.sum(1), k)  # [B]
            trusted = importance_weights(args, (logprobs * mask).sum(1), (sampled * mask).sum(1))  # [B]
            rollout_seconds = time.time() - start
            model.train()
            lengths = [len(q) + int(n) for q, n in zip(queries, mask.sum(1).tolist())]
            for step in range(inside.step if inside else 0, args.noptepochs):

                def state() -> tuple[dict, dict]:
                    worst = accelerator.gather(ratio_error).max().reshape(1)
                    return dict(zip(NAMES, columns)) | {"ratio_error": worst}, {}

                checkpoints.mark(update - 1, step, state)
                gradient = Gradient(accelerator, model, optimizer, checkpoints)
                for mb, _ in gradient.micro_batches(lengths, not packed, together=k):
                    mb_queries, real = [queries[i] for i in mb], [strip_pads(tokens[i].cpu(), ids.pad) for i in mb]
                    new = scatter_tokens(model(mb_queries, real, args.temperature), mask[mb], 0.0)  # [b, R]
                    old = logprobs[mb] * mask[mb]
                    losses = rloo_losses(new.sum(1), old.sum(1), (advantages * trusted)[mb], args.ppo_clip)
                    gradient.add(losses.sum() / args.batch_size, {"queries": mb_queries, "tokens": tokens[mb]})
                    error = (torch.exp((new - old).detach()) - 1.0).abs().max()
                    ratio_error = torch.max(ratio_error, error) if step == 0 else ratio_error
                grad_norm = gradient.step()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()

            # what happened
            seconds = time.time() - start
            metrics = objective_metrics(scores, contains_stop, mask, logprobs, kl, -args.kl_coef * kl)
            metrics = {name: float(value) for name, value in metrics.items()} | {
                "policy/first_pass_ratio_error": float(accelerator.gather(ratio_error).max()),
                "objective/advantage_std": float(advantages.std(unbiased=False)),
                "train/rloo/lr": lr, "train/rloo/grad_norm": grad_norm, "train/rloo/episode": update * args.batch_size,
                "time/rloo/rollout_seconds": rollout_seconds, "time/rloo/training_seconds": seconds - rollout_seconds,
                "time/rloo/episodes_per_second": args.batch_size / seconds, "memory/rloo/peak_gb": memory_gb(device),
            } | mismatch_metrics(args, logprobs, sampled, mask, trusted)  # fmt: skip
            metrics |= text_metrics(texts[order[episodes]], tokens, tokenizer)
            if run.is_main:
                warn(update, metrics, in_float32)
            if args.run_eval and args.eval_freq and update % args.eval_freq == 0 and update < args.num_updates:
                found = evaluate(f"update {update}, validation")
                run.table(f"validation_{update}", found)
                metrics |= report_scores("rloo", found)
            run.log(update, metrics, f"score {metrics['objective/scores']:.3f} kl {metrics['objective/kl']:.3f}")
            checkpoints.after_update(update)

        # --------------------------------------------------------------------------------------------------------------
        # evaluation and saving
        checkpoints.save(args.num_updates)
        paths = {"policy": args.output_dir}
        if args.run_eval:
            found = evaluate("policy, validation")
            paths["table"] = run.table("validation", found)
            run.log(args.num_updates + 1, report_scores("rloo", found))
        save_model(accelerator, run, model, policy, tokenizer, args.output_dir)
        if run.is_main:
            print_metrics("RLOO", run.metrics, CLOSING_METRICS)
        run.deliver(paths)
    checkpoints.remove()
    return dict(run.metrics)


if __name__ == "__main__":
    command_line(main, Args)
