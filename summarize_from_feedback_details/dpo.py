"""DPO: human comparisons and an SFT policy -> a policy that prefers what people prefer, without a reward model.

Reads   comparisons and the SFT dataset's queries (`tldr_dataset.py`), an SFT policy (`sft.py`); a reward model
        (`reward.py`), where one is given, scores responses in evaluation
Writes  a policy (`AutoModelForCausalLM`, tokenizer included) in --output_dir; accuracies and a table of validation
        responses in runs/<run_name>; log-probabilities of the SFT policy beside the comparisons, for the next run
Paper   Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290), equation 7; IPO: Azar et al. 2023
        (arXiv 2310.12036), equation 17; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences"

Laptop  python summarize_from_feedback_details/dpo.py --base_model models/toy/small --sft_model_path models/sft_policy \
            --label_dataset data/toy_tokenized/comparisons --query_dataset data/toy_tokenized/sft
1 GPU   python summarize_from_feedback_details/dpo.py --local_micro_batch_size 4 --gradient_checkpointing
8 GPUs  accelerate launch --config_file deepspeed.yaml summarize_from_feedback_details/dpo.py --deepspeed

Dimensions: B pairs.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from summarize_from_feedback_details.common.adapters import LoraParams, LoraSettings, check_lora, check_reward_adapter
from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_optimisation,
    check_sizes,
    command_line,
    derive_sizes,
    drop_revisions,
    fill_episodes,
    may_change,
    refuse,
)
from summarize_from_feedback_details.common.check_inputs import find_ids, find_models, find_tokenizer, load_queries
from summarize_from_feedback_details.common.checkpoints import Checkpoints, fingerprint
from summarize_from_feedback_details.common.comparisons import (
    accuracy_table,
    count_cut_off,
    load_comparisons,
    pair_lengths,
    pair_logprobs,
    pair_table,
    print_accuracies,
    read_comparisons,
    read_split,
    report_pairs,
)
from summarize_from_feedback_details.common.console import print_metrics
from summarize_from_feedback_details.common.evaluation import evaluating, first_rows, report_scores, score_policy
from summarize_from_feedback_details.common.machine import memory_gb
from summarize_from_feedback_details.common.packed_rows import supports_packing
from summarize_from_feedback_details.common.policies import ResponsePolicy, load_policy_and_reference
from summarize_from_feedback_details.common.precision import trunk_dtype
from summarize_from_feedback_details.common.ref_logprobs import check_ref_logprobs, find_ref_logprobs
from summarize_from_feedback_details.common.reward_models import load_frozen_reward
from summarize_from_feedback_details.common.rollouts import measure_policy
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.training import (
    Gradient,
    epoch_order,
    freeze,
    launch,
    lent,
    prepare,
    save_model,
)

NUMBERS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")  # `train/dpo/...` of each update
CLOSING_METRICS = ("train/dpo/loss", "train/dpo/accuracy")


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("dpo")
    """name of the experiment, the first part of the run's name"""
    output_dir: str = may_change("models/dpo_policy")
    """folder of the trained policy"""
    seed: int = 44413
    """seed of the data order, and of the sampling noise in evaluation"""
    run_eval: bool = True
    """evaluate after training: accuracies on validation and validation_cnndm, a table of responses, the KL"""
    eval_cnndm: bool = True
    """evaluate on validation_cnndm, too; left out where its articles are longer than the model's context"""
    eval_freq: int = may_change(0)
    """also evaluate every so many updates, a table of responses each (0: only at the end)"""
    num_eval_rows: int | None = None
    """rows of each split to evaluate on (default: the whole split)"""

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
    scheduler: str = "cosine"
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
    """keep the SFT policy and the reward model in host memory while the policy trains"""

    # sizes, in pairs; those left out are derived
    world_size: int | None = may_change(None)
    """number of processes; refused when another number was launched"""
    num_train_epochs: int = 1
    """passes over the data"""
    total_episodes: int | None = None
    """pairs to train on (default: all pairs times --num_train_epochs)"""
    num_updates: int | None = None
    """optimiser updates (default: total_episodes / batch_size, the short last batch included)"""
    local_micro_batch_size: int = may_change(1)
    """pairs of one forward pass on one process"""
    gradient_accumulation_steps: int | None = may_change(None)
    """forward passes per update (default: batch_size / (local_micro_batch_size * world_size))"""
    batch_size: int | None = None
    """pairs of one update on all processes (default: 64)"""
    local_eval_batch_size: int = may_change(32)
    """pairs that one process reads, or responses that it samples, at a time in evaluation"""
    local_rollout_forward_batch_size: int = may_change(64)
    """responses that one process reads at a time in evaluation"""

    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """base model of the policy: folder or hub id; its tokenizer is used"""
    base_model_revision: str | None = None
    """hub revision of the base model"""
    sft_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__sft__tldr"
    """SFT policy to start from, which is also the reference: folder or hub id (default: a released one)"""
    sft_model_revision: str | None = "sft__44413__1708611267"
    """hub revision of the SFT policy (a folder has none)"""
    reward_model_path: str | None = may_change(None)
    """reward model that scores responses in evaluation: folder or hub id (default: none)"""
    reward_model_revision: str | None = may_change(None)
    """hub revision of the reward model (a folder has none)"""
    label_dataset: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
    """tokenised comparisons: folder or hub id"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """tokenised SFT dataset, to whose validation queries responses are sampled in evaluation: folder or hub id"""
    label_dataset_revision: str | None = None
    """hub revision of the comparisons"""
    dataset_revision: str | None = None
    """hub revision of the SFT dataset"""
    response_length: int = 53
    """tokens sampled at most per response"""
    truncate_token: str = "eos"
    """sampled responses end after this token: `eos`, or the text of a single token"""
    temperature: float = 0.7
    """sampling temperature of the responses whose KL is measured"""
    eval_temperature: float = 0.01
    """sampling temperature of the table of responses (0: greedy)"""

    # algorithm
    beta: float = 0.05
    """how far the policy may go from the SFT policy: the weight of the KL in the objective that DPO solves"""
    ipo: bool = False
    """IPO's squared loss in the place of DPO's: it does not push pairs that are already far enough apart"""
    label_smoothing: float = 0.0
    """probability that a label is wrong (conservative DPO); not with --ipo"""
    ref_logprobs_dir: str | None = may_change(None)
    """where log-probabilities of the SFT policy are kept (default: `<label_dataset>_ref_logprobs`, for a dataset of the
    hub below `data/`)"""


# ----------------------------------------------------------------------------------------------------------------------
# loss


def dpo_losses(margins: Tensor, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> Tensor:
    """Loss of each pair from log(pi / ref) of chosen minus that of rejected: [B] nats -> [B]."""
    if ipo:
        return (margins - 1 / (2 * beta)) ** 2
    right, wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def check_args(args: Args):
    """Refuse what cannot work; fill in what was left out. Returns (tokenizer, comparisons, SFT dataset or None)."""
    positive = ("num_train_epochs", "beta", "response_length", "temperature", "local_rollout_forward_batch_size")
    check_sizes(args, positive, at_least_zero=("eval_temperature",), shares=("label_smoothing",))
    if args.ipo and args.label_smoothing:
        refuse("label_smoothing", f"{args.label_smoothing} with --ipo", "0")
    check_optimisation(args)
    derive_sizes(args, default_batch_size=64)
    RunFolder.check(args)
    kinds = {"base_model": "policy", "sft_model_path": "policy"}
    models = find_models(args, **kinds, **({"reward_model_path": "reward"} if args.reward_model_path else {}))
    check_lora(args, "sft_model_path")
    if args.reward_model_path:
        check_reward_adapter(args)
    tokenizer = find_tokenizer("base_model", args.base_model, args.base_model_revision)
    pairs = load_comparisons(args, tokenizer, models["sft_model_path"])
    queries = load_queries(args, tokenizer, models) if args.run_eval else None
    check_ref_logprobs(args)
    fill_episodes(args, len(pairs["train"]))
    RunFolder.refuse_taken(args)
    return tokenizer, pairs, queries


def main(args: Args) -> dict[str, float]:
    """Run the stage; returns the final metrics."""
    # ------------------------------------------------------------------------------------------------------------------
    # sizes
    drop_revisions(args, "sft_model")
    run = RunFolder(args, "dpo")
    if run.is_finished():
        return run.final_metrics()
    tokenizer, dataset, queries = check_args(args)
    accelerator, ids = launch(args, "pairs"), find_ids(args.truncate_token, tokenizer)
    device, pad_id, in_float32 = accelerator.device, ids.pad, accelerator.mixed_precision == "no"
    run.say(f"{args.num_updates} updates over {args.total_episodes} of {len(dataset['train'])} pairs")

    with run.open(accelerator):
        # --------------------------------------------------------------------------------------------------------------
        # data, models, optimiser
        order = epoch_order(len(dataset["train"]), args.total_episodes, args.seed)
        used, order = np.unique(order, return_inverse=True)  # from here on, `order` counts the rows that are used
        dataset |= {"train": dataset["train"].select(used)}
        dataset |= {s: first_rows(rows, args.num_eval_rows) for s, rows in dataset.items() if s != "train"}
        lengths, columns = pair_lengths(dataset["train"]), ["query_token", "query_chosen_token", "query_rejected_token"]
        train = dataset["train"].with_format("numpy", columns=columns)
        if run.is_main:
            count_cut_off(dataset, tokenizer)
        torch.manual_seed(args.seed)
        dtype = trunk_dtype(args, accelerator)
        policy, ref_policy = load_policy_and_reference(args, dtype)
        freeze(ref_policy, accelerator, args.offload)
        run.parameters = sum(p.numel() for p in ref_policy.parameters())
        reward_model = load_frozen_reward(args, ref_policy, dtype) if args.reward_model_path and args.run_eval else None
        reward_model = reward_model and freeze(reward_model, accelerator, args.offload)
        start = time.time()
        ref = {split: find_ref_logprobs(accelerator, ref_policy, rows, split, pad_id, args)
               for split, rows in dataset.items()}  # fmt: skip
        reference_seconds = time.time() - start
        if not args.run_eval:
            ref_policy = None  # nothing more is asked of it
        packed = supports_packing(policy)
        model, optimizer, scheduler = prepare(accelerator, ResponsePolicy(policy), args)

        def evaluate(when: str) -> tuple[dict[str, float], list[tuple]]:
            metrics, table = {}, []
            for split, rows in dataset.items():
                if split != "train":
                    with evaluating(accelerator, model) as trained:
                        found = read_split(trained, rows, pad_id, args, f"{when}, {split}") - ref[split]
                    rewards = args.beta * found.T  # implicit, [2, rows]
                    margins = torch.tensor(found[:, 0] - found[:, 1])
                    losses = dpo_losses(margins, args.beta, args.label_smoothing, args.ipo)
                    numbers, lines = report_pairs("dpo", split, rows, rewards, losses)
                    metrics, table = metrics | numbers, table + lines
                    run.table(f"pairs_{split}", pair_table(rows, *rewards))
            validation, networks = first_rows(queries["validation"], args.num_eval_rows), (ref_policy, reward_model)
            with evaluating(accelerator, model) as trained:
                with lent(reward_model, device):
                    found = score_policy(
                        trained.model, reward_model, validation, tokenizer, args, f"{when}, validation"
                    )
                numbers = measure_policy((trained.model, *networks), validation, not in_float32, ids, args, when)
            run.table(when.replace("update ", "validation_").replace("after training", "validation"), found)
            return metrics | report_scores("dpo", found) | numbers, table

        # --------------------------------------------------------------------------------------------------------------
        # loop
        sizes = [dataset["train"][f"query_{name}_token_len"] for name in ("chosen", "rejected")]
        data = {"label_dataset": fingerprint(np.concatenate(sizes))}
        checkpoints = Checkpoints(run, accelerator, model, optimizer, scheduler, data)
        resumed = checkpoints.resume()
        model.train()
        for update in run.progress("dpo updates", resumed.update + 1, args.num_updates):
            start = time.time()
            rows = order[(update - 1) * args.batch_size : update * args.batch_size]
            sums = torch.zeros(len(NUMBERS), device=device, dtype=torch.float64)
            gradient = Gradient(accelerator, model, optimizer, checkpoints)
            for part, weight in gradient.micro_batches(lengths[rows].tolist(), sort_by_length=not packed):
                mb_queries, responses = read_comparisons(train[rows[part]], pad_id)
                ref_logprobs = torch.tensor(ref["train"][rows[part]], device=device, dtype=torch.float32)
                ratios = pair_logprobs(model, mb_queries, responses) - ref_logprobs  # [b, 2] log(pi / ref)
                margins = ratios[:, 0] - ratios[:, 1]
                losses = dpo_losses(margins, args.beta, args.label_smoothing, args.ipo)
                batch = {"rows": used[rows[part]], "queries": mb_queries, "responses": responses}
                gradient.add(losses.sum() / len(rows), batch)
                chosen, rejected = args.beta * ratios.detach().T
                numbers = (losses.detach(), margins.detach() > 0, chosen - rejected, chosen, rejected)
                sums += weight * torch.stack([value.double().sum() for value in numbers]) / len(rows)
            grad_norm = gradient.step()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            sums, seconds = accelerator.reduce(sums, "sum").tolist(), time.time() - start
            metrics = {f"train/dpo/{name}": value for name, value in zip(NUMBERS, sums)} | {
                "train/dpo/lr": lr, "train/dpo/grad_norm": grad_norm,
                "train/dpo/episode": min(update * args.batch_size, args.total_episodes),
                "time/dpo/samples_per_second": len(rows) / seconds, "memory/dpo/peak_gb": memory_gb(device),
            }  # fmt: skip
            metrics |= {"time/dpo/reference_seconds": reference_seconds} if update == 1 else {}
            if args.run_eval and args.eval_freq and update % args.eval_freq == 0 and update < args.num_updates:
                metrics |= evaluate(f"update {update}")[0]
            note = "loss {:.3f} accuracy {:.2f} margin {:.3f}".format(*sums[:3])
            run.log(update, metrics, note=note)
            checkpoints.after_update(update)

        # --------------------------------------------------------------------------------------------------------------
        # evaluation and saving
        checkpoints.save(args.num_updates)
        table = []
        if args.run_eval:
            metrics, table = evaluate("after training")
            run.table("accuracy", accuracy_table(table))
            run.log(args.num_updates + 1, metrics)
        save_model(accelerator, run, model, policy, tokenizer, args.output_dir)
        if run.is_main and table:
            print_accuracies("Accuracy of the implicit reward", table)
            print_metrics("DPO", run.metrics, CLOSING_METRICS)
        run.deliver({"policy": args.output_dir, "tables": run.path / "tables"})
    checkpoints.remove()
    return dict(run.metrics)


if __name__ == "__main__":
    command_line(main, Args)
