"""SFT: a base model and reference summaries -> a policy that writes summaries.

Reads   an SFT dataset (`tldr_dataset.py`), a base model
Writes  a policy (`AutoModelForCausalLM`, tokenizer included) in --output_dir; ROUGE and samples in runs/<run_name>
Paper   section 4 (SFT): cross entropy over query and response, one epoch, cosine schedule, ROUGE of sampled summaries

Laptop  python summarize_from_feedback_details/sft.py --base_model models/toy/small \
            --query_dataset data/toy_tokenized/sft
1 GPU   python summarize_from_feedback_details/sft.py --local_micro_batch_size 8
8 GPUs  accelerate launch --config_file deepspeed.yaml summarize_from_feedback_details/sft.py --deepspeed

Dimensions: B rows, Q query tokens, R response tokens, T = Q + R, V vocabulary.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from summarize_from_feedback_details.common.adapters import LoraParams, LoraSettings, add_adapter, check_lora
from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_optimisation,
    check_sizes,
    command_line,
    derive_sizes,
    fill_episodes,
    may_change,
)
from summarize_from_feedback_details.common.check_inputs import (
    check_context,
    check_same_tokenizer,
    check_tokens,
    find_ids,
    find_model,
    find_tokenizer,
    load_rows,
)
from summarize_from_feedback_details.common.checkpoints import Checkpoints, fingerprint
from summarize_from_feedback_details.common.console import print_table
from summarize_from_feedback_details.common.dataset_files import refuse_unwritable_cache
from summarize_from_feedback_details.common.evaluation import (
    evaluating,
    first_rows,
    for_each_row,
    gather_rows,
    print_samples,
    sample_batch,
)
from summarize_from_feedback_details.common.logprobs import token_logprobs
from summarize_from_feedback_details.common.machine import memory_gb
from summarize_from_feedback_details.common.packed_rows import logits_at, pack_rows, supports_packing
from summarize_from_feedback_details.common.policies import load_policy
from summarize_from_feedback_details.common.precision import trunk_dtype
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import strip_pads
from summarize_from_feedback_details.common.training import (
    Gradient,
    epoch_order,
    launch,
    prepare,
    save_model,
)


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("sft")
    """name of the experiment, the first part of the run's name"""
    output_dir: str = may_change("models/sft_policy")
    """folder of the trained policy"""
    seed: int = 44413
    """seed of the data order and of the sampling noise"""
    print_sample_output_freq: int = may_change(200)
    """print a few sampled summaries every so many updates (0: never)"""
    run_eval: bool = True
    """evaluate the base model before and the policy after training, on validation and test"""
    eval_freq: int = may_change(0)
    """also evaluate on validation every so many updates (0: only at the end)"""
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
    """clip the global gradient norm to this (default: no clipping, as in the paper)"""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """optimiser"""
    scheduler: str = "cosine"
    """learning rate schedule, over all updates: linear, cosine (to 0), constant, constant_with_warmup"""
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

    # sizes, in rows; those left out are derived
    world_size: int | None = may_change(None)
    """number of processes; refused when another number was launched"""
    num_train_epochs: int = 1
    """passes over the data"""
    total_episodes: int | None = None
    """rows to train on (default: all rows times --num_train_epochs)"""
    num_updates: int | None = None
    """optimiser updates (default: total_episodes / batch_size, the short last batch included)"""
    local_micro_batch_size: int = may_change(1)
    """rows of one forward pass on one process"""
    gradient_accumulation_steps: int | None = may_change(None)
    """forward passes per update (default: batch_size / (local_micro_batch_size * world_size))"""
    batch_size: int | None = None
    """rows of one update on all processes (default: 128, the paper's)"""
    local_eval_batch_size: int = may_change(32)
    """rows that one process samples at a time in evaluation"""

    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """base model: folder or hub id; its tokenizer is used"""
    base_model_revision: str | None = None
    """hub revision of the base model"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """tokenised SFT dataset: folder or hub id"""
    dataset_revision: str | None = None
    """hub revision of the dataset"""
    response_length: int = 53
    """tokens sampled at most per summary"""
    truncate_token: str = "eos"
    """summaries end after this token: `eos`, or the text of a single token"""
    temperature: float = 0.01
    """sampling temperature in evaluation (0: greedy)"""

    # algorithm
    query_loss_weight: float = 1.0
    """weight of the query's tokens in the loss (0: response tokens only)"""


# ----------------------------------------------------------------------------------------------------------------------
# loss


def sft_losses(logprobs: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Cross entropy of each row, the weighted mean over its tokens.

    Detail: SFT loss [9] - over query and response, mean per sequence, then over sequences (the released runs used micro
    batch 1, which is that).

    Args:
        logprobs, weights: [N] of the rows' tokens, one row behind the other.
        counts: how many of them belong to each of the B rows.

    Returns:
        [B] nats per token.
    """
    rows = zip(logprobs.split(counts), weights.split(counts))
    return torch.stack([-(row * weight).sum() / weight.sum().clamp(min=1e-8) for row, weight in rows])


def read_rows(rows: Any, pad_id: int) -> list[tuple[list[int], int]]:
    """Rows of the dataset -> (tokens of query and response without pads, how many of them are the response's)."""
    joined = (strip_pads(row, pad_id) for row in rows["query_reference_response_token"])
    labels = rows["query_reference_response_token_response_label"]
    return [(tokens, len(strip_pads(label, pad_id))) for tokens, label in zip(joined, labels)]


class Policy(torch.nn.Module):
    """A causal language model that is asked for log-probabilities of given tokens."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict, at: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Inputs of `pack_rows`, positions [N] that predict, the tokens [N] there -> log-probabilities [N] in nats."""
        return token_logprobs(logits_at(self.model, inputs, at), targets, 1.0)


def batch_losses(
    model: torch.nn.Module,
    rows: list[tuple[list[int], int]],
    query_loss_weight: float,
    packed: bool,
    device: torch.device,
):
    """Loss of each row, see `read_rows`: [B]. Logits are computed only where a weight is not 0.

    Tokens of the response weigh 1, those of the query `query_loss_weight`; nothing predicts a row's first token.

    Args:
        model: `Policy`, wrapped or not; `packed`: whether it reads packed rows.
    """
    inputs, starts = pack_rows([tokens for tokens, _ in rows], packed, device)
    at, targets, weights, counts = [], [], [], []
    for start, (tokens, R) in zip(starts, rows):
        T = len(tokens)
        first = 1 if query_loss_weight > 0 else max(1, T - R)
        at += range(start + first - 1, start + T - 1)
        targets += tokens[first:]
        weights += [query_loss_weight if t < T - R else 1.0 for t in range(first, T)]
        counts.append(T - first)
    at, targets, weights = (torch.tensor(column, device=device) for column in (at, targets, weights))
    return sft_losses(model(inputs, at, targets), weights, counts)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate_policy(
    accelerator: Any, model: torch.nn.Module, rows: Any, tokenizer: Any, args: Args, what: str
) -> dict[str, list]:
    """Loss and a sampled summary for each row of a split.

    Returns:
        columns `query, response, reference, loss, response_length, has_eos`, in the rows' order, on every rank.
    """
    lengths, at_once, found = rows["query_reference_response_token_len"], args.local_micro_batch_size, []
    with evaluating(accelerator, model) as policy:
        for numbers in for_each_row(lengths, args.local_eval_batch_size, f"{what} rows"):
            batch = rows[numbers]
            # as many at a time as in training: logits of all positions need more room than sampling does
            given = read_rows(batch, tokenizer.pad_token_id)
            losses = []
            for start in range(0, len(given), at_once):
                part, packed = given[start : start + at_once], supports_packing(policy.model)
                losses += batch_losses(policy, part, args.query_loss_weight, packed, accelerator.device).tolist()
            samples = sample_batch(policy.model, batch, numbers, tokenizer, args, args.temperature)
            for row, sample, loss in zip(numbers, samples, losses):
                found.append((row, *sample[:3], loss, len(sample.tokens), sample.has_eos))
    names = ["query", "response", "reference", "loss", "response_length", "has_eos"]
    return dict(zip(names, map(list, zip(*(row[1:] for row in gather_rows(found))))))


def rouge_scores(predictions: list[str], references: list[str]) -> dict[str, list[float]]:
    """ROUGE-1/2/L/Lsum F-measures of each row."""
    import evaluate  # here, since it imports the pipelines of transformers: two seconds, and --help does without

    rouge = evaluate.load(str(Path(__file__).parent / "rouge"), keep_in_memory=True)
    return rouge.compute(predictions=predictions, references=references)


def rouge_means(predictions: list[str], references: list[str]) -> dict[str, float]:
    """The mean of `rouge_scores` over all rows."""
    # Deviates: the original took the mean of per-batch values
    return {name: float(np.mean(values)) for name, values in rouge_scores(predictions, references).items()}


def report(split: str, rows: dict[str, list]) -> dict[str, float]:
    """Metrics of one evaluated split, named `<split>/sft/...`."""
    scores = {f"{split}/sft/rouge/{k}": v for k, v in rouge_means(rows["response"], rows["reference"]).items()}
    scores[f"{split}/sft/loss"] = float(np.mean(rows["loss"]))
    scores[f"{split}/sft/eos_rate"] = float(np.mean(rows["has_eos"]))
    scores[f"{split}/sft/response_length"] = float(np.mean(rows["response_length"]))
    return scores


def check_args(args: Args):
    """Refuse what cannot work; fill in what was left out. Returns (tokenizer, dataset)."""
    check_sizes(args, ("response_length", "num_train_epochs"), at_least_zero=("temperature", "query_loss_weight"))
    check_optimisation(args)
    derive_sizes(args, default_batch_size=128)
    RunFolder.check(args)
    refuse_unwritable_cache()  # `evaluate` keeps the module of ROUGE there
    config = find_model("base_model", args.base_model, args.base_model_revision, "policy")
    check_lora(args, "base_model")
    tokenizer = find_tokenizer("base_model", args.base_model, args.base_model_revision)
    tokens = ["query_token", "query_reference_response_token", "query_reference_response_token_response_label"]
    columns = [*tokens, "query", "reference_response", "query_reference_response_token_len"]
    splits = ["train", "validation", "test"] if args.run_eval else ["train", "validation?", "test?"]
    dataset = load_rows("query_dataset", args.query_dataset, args.dataset_revision, "sft", columns, splits)
    longest = check_tokens("query_dataset", dataset, tokens, config["vocab_size"], tokenizer.pad_token_id)
    check_same_tokenizer("query_dataset", dataset["train"][0], "query", "query_token", tokenizer)
    longest = max(longest["query_token"] + args.response_length, longest["query_reference_response_token"])
    check_context("base_model", args.base_model, config, longest, "the longest query and its response")
    fill_episodes(args, len(dataset["train"]))
    find_ids(args.truncate_token, tokenizer)
    RunFolder.refuse_taken(args)
    return tokenizer, dataset


def main(args: Args) -> dict[str, float]:
    """Run the stage; returns the final metrics."""
    # ------------------------------------------------------------------------------------------------------------------
    # sizes
    run = RunFolder(args, "sft")
    if run.is_finished():
        return run.final_metrics()
    tokenizer, dataset = check_args(args)
    accelerator = launch(args, "rows")
    device, pad_id = accelerator.device, tokenizer.pad_token_id
    train = dataset["train"].with_format("numpy")
    run.say(f"{args.num_updates} updates over {args.total_episodes} of {len(train)} rows")

    with run.open(accelerator):
        # --------------------------------------------------------------------------------------------------------------
        # data, model, optimiser
        order = epoch_order(len(train), args.total_episodes, args.seed)
        lengths = np.asarray(train["query_reference_response_token_len"])
        torch.manual_seed(args.seed)
        dtype = trunk_dtype(args, accelerator)
        policy = load_policy("base_model", args.base_model, args.base_model_revision, dtype)
        run.parameters = sum(p.numel() for p in policy.parameters())
        if args.lora:
            add_adapter(policy, args.lora_params, args.base_model, args.base_model_revision)
        packed = supports_packing(policy)
        run.say(f"rows are read {'packed' if packed else 'padded: this architecture cannot pack them'}")
        model = Policy(policy)
        model, optimizer, scheduler = prepare(accelerator, model, args)
        splits = {s: first_rows(dataset[s], args.num_eval_rows) for s in ("validation", "test") if s in dataset}
        data = {"query_dataset": fingerprint(lengths)}
        checkpoints = Checkpoints(run, accelerator, model, optimizer, scheduler, data)
        resumed = checkpoints.resume()
        if args.run_eval and not resumed.found:
            before = {}
            for split, rows in splits.items():
                base = evaluate_policy(accelerator, model, rows, tokenizer, args, f"base model, {split}")
                run.table(f"base_{split}", base)
                shuffled = rouge_means(base["reference"][1:] + base["reference"][:1], base["reference"])
                before |= {f"{split}/shuffled_references/rouge/{k}": v for k, v in shuffled.items()}
                before |= {k.replace("/sft/", "/base/"): v for k, v in report(split, base).items()}
            run.log(0, before)

        # --------------------------------------------------------------------------------------------------------------
        # loop
        model.train()
        for update in run.progress("sft updates", resumed.update + 1, args.num_updates):
            start = time.time()
            rows = order[(update - 1) * args.batch_size : update * args.batch_size]
            sums = torch.zeros(2, device=device, dtype=torch.float64)  # loss, real tokens
            gradient = Gradient(accelerator, model, optimizer, checkpoints)
            for part, weight in gradient.micro_batches(lengths[rows].tolist(), sort_by_length=not packed):
                batch = read_rows(train[rows[part]], pad_id)
                losses = batch_losses(model, batch, args.query_loss_weight, packed, device)
                loss = losses.sum() / len(rows)
                gradient.add(loss, {"rows": rows[part], "batch": batch})
                tokens = torch.tensor(sum(len(row) for row, _ in batch), device=device)
                sums += weight * torch.stack([loss.detach(), tokens])
            norm = gradient.step()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            loss, tokens = accelerator.reduce(sums, "sum").tolist()
            seconds = time.time() - start
            metrics = {
                "train/sft/loss": loss, "train/sft/lr": lr, "train/sft/grad_norm": norm,
                "train/sft/episode": min(update * args.batch_size, args.total_episodes),
                "time/sft/samples_per_second": len(rows) / seconds, "time/sft/tokens_per_second": tokens / seconds,
                "memory/sft/peak_gb": memory_gb(device),
            }  # fmt: skip
            if args.eval_freq and update % args.eval_freq == 0 and update < args.num_updates and "validation" in splits:
                found = evaluate_policy(accelerator, model, splits["validation"], tokenizer, args, "validation")
                metrics |= report("validation", found)
            if args.print_sample_output_freq and update % args.print_sample_output_freq == 0 and "validation" in splits:
                few = first_rows(splits["validation"], 2 * args.world_size)
                found = evaluate_policy(accelerator, model, few, tokenizer, args, "samples")
                print_samples(found)
                run.table(f"samples_{update}", found)
            run.log(update, metrics, note=f"loss {loss:.3f}")
            checkpoints.after_update(update)

        # --------------------------------------------------------------------------------------------------------------
        # evaluation and saving
        checkpoints.save(args.num_updates)
        final, paths, references = {"train/sft/loss": run.metrics["train/sft/loss"]}, {}, {}
        if args.run_eval:
            for split, rows in splits.items():
                found = evaluate_policy(accelerator, model, rows, tokenizer, args, f"policy, {split}")
                final |= report(split, found)
                paths[f"{split} table"] = run.table(split, found)
                references[split] = rouge_means(found["reference"], found["reference"])
            run.log(args.num_updates + 1, final)
        save_model(accelerator, run, model, policy, tokenizer, args.output_dir)
        if run.is_main and args.run_eval:
            print_table(closing_table(run.metrics, references))
        run.deliver({"policy": args.output_dir, **paths})
    checkpoints.remove()
    return final


def closing_table(metrics: dict[str, float], references: dict[str, dict[str, float]]) -> Table:
    """ROUGE of the base model, of references of other posts, of the policy, and of the references, for each split.

    Args:
        references: split -> ROUGE of its references against themselves.
    """
    rouge = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    shown = Table("split", "summaries", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "loss", "EOS", title="SFT")
    who = {"base": "base model", "shuffled_references": "references, shuffled", "sft": "SFT policy"}
    for split, of_references in references.items():
        rows = {}
        for group, name in who.items():
            values = [metrics.get(f"{split}/{group}/rouge/{k}") for k in rouge]
            rows[name] = values + [metrics.get(f"{split}/{group}/{k}") for k in ("loss", "eos_rate")]
        rows["references"] = [of_references[k] for k in rouge] + [None, None]
        for name, values in rows.items():
            shown.add_row(split, name, *("-" if v is None else f"{v:.3f}" for v in values))
    return shown


if __name__ == "__main__":
    command_line(main, Args)
