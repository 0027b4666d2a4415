"""Reward model: human comparisons and an SFT policy -> a model that scores summaries.

Reads   comparisons and the SFT dataset (`tldr_dataset.py`), an SFT policy (`sft.py`)
Writes  a reward model (`AutoModelForSequenceClassification`, one label) in --output_dir; accuracies in runs/<run_name>
Paper   section 5 (reward model): -log sigmoid(chosen - rejected) at the EOS token, then normalised on demonstrations

Laptop  python summarize_from_feedback_details/reward.py --base_model models/toy/small \
            --sft_model_path models/sft_policy --query_dataset data/toy_tokenized/sft \
            --label_dataset data/toy_tokenized/comparisons
1 GPU   python summarize_from_feedback_details/reward.py --local_micro_batch_size 8
8 GPUs  accelerate launch --config_file deepspeed.yaml summarize_from_feedback_details/reward.py --deepspeed

Dimensions: B pairs, T tokens, D hidden.

The saved model's `config.reward_bias` makes the mean reward of demonstrations 0: reward = logit + reward_bias.
"""

import math
import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from summarize_from_feedback_details.common.adapters import LoraParams, LoraSettings, add_adapter, check_lora
from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_optimisation,
    check_sizes,
    command_line,
    derive_sizes,
    drop_revisions,
    fill_episodes,
    may_change,
)
from summarize_from_feedback_details.common.check_inputs import (
    check_same_tokenizer,
    check_tokens,
    find_models,
    find_tokenizer,
    load_rows,
    refuse_bad_weights,
)
from summarize_from_feedback_details.common.checkpoints import Checkpoints, fingerprint
from summarize_from_feedback_details.common.comparisons import (
    accuracy_table,
    load_comparisons,
    pair_lengths,
    pair_table,
    print_accuracies,
    report_pairs,
)
from summarize_from_feedback_details.common.console import print_table
from summarize_from_feedback_details.common.evaluation import evaluating, first_rows, for_each_row, gather_rows
from summarize_from_feedback_details.common.machine import memory_gb
from summarize_from_feedback_details.common.packed_rows import (
    hidden_at,
    pack_rows,
    pack_shared,
    supports_packing,
    use_packed_attention,
)
from summarize_from_feedback_details.common.precision import trunk_dtype, use_float32_head
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import strip_pads
from summarize_from_feedback_details.common.training import (
    Gradient,
    disable_dropout,
    epoch_order,
    launch,
    prepare,
    save_model,
)


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("reward")
    """name of the experiment, the first part of the run's name"""
    output_dir: str = may_change("models/reward")
    """folder of the trained reward model"""
    seed: int = 44413
    """seed of the data order and of the head's initial weights"""
    print_sample_output_freq: int = may_change(200)
    """print a few scored pairs every so many updates (0: never)"""
    run_eval: bool = True
    """evaluate on validation and validation_cnndm, before and after training"""
    eval_cnndm: bool = True
    """evaluate on validation_cnndm, too; left out where its articles are longer than the model's context"""
    eval_freq: int = may_change(0)
    """also evaluate every so many updates (0: only before and after training)"""
    num_eval_rows: int | None = None
    """pairs of each split to evaluate on (default: the whole split)"""

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
    shared_prefix: bool = may_change(True)
    """read what chosen and rejected have in common once (where the architecture allows it; same numbers, less work)"""

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
    """pairs of one update on all processes (default: 64, the paper's)"""
    local_eval_batch_size: int = may_change(32)
    """pairs that one process scores at a time in evaluation"""

    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """base model of the policy: folder or hub id; its tokenizer is used"""
    base_model_revision: str | None = None
    """hub revision of the base model"""
    sft_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__sft__tldr"
    """SFT policy to start from: folder or hub id (default: a released one)"""
    sft_model_revision: str | None = "sft__44413__1708611267"
    """hub revision of the SFT policy (a folder has none)"""
    label_dataset: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
    """tokenised comparisons: folder or hub id"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """tokenised SFT dataset, whose references are the demonstrations of the normalisation: folder or hub id"""
    label_dataset_revision: str | None = None
    """hub revision of the comparisons"""
    dataset_revision: str | None = None
    """hub revision of the SFT dataset"""

    # algorithm
    num_normalization_rows: int | None = None
    """demonstrations whose mean reward becomes 0 (default: the whole train split)"""


# ----------------------------------------------------------------------------------------------------------------------
# model and loss


class RewardModel(torch.nn.Module):
    """A sequence-classification model read at chosen positions."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict, ends: torch.Tensor) -> torch.Tensor:
        """Inputs of `pack_rows` or `pack_shared`, positions [N] -> [N] rewards, the normalising constant not added."""
        # Detail: reward at the EOS token [12] - the last real token; scores elsewhere are meaningless
        return self.model.score(hidden_at(self.model, inputs, ends))[:, 0]


def init_head(model: torch.nn.Module) -> None:
    """Initialise the scalar head in place."""
    # Detail: head initialisation [11] - weights N(0, 1/sqrt(d+1)); a bias would have zero gradient: there is none
    model.score.float()
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))


def preference_losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected): [B], [B] -> [B] nats (Stiennon et al. 2020, section 3.4)."""
    # Detail: reward model loss
    return -F.logsigmoid(chosen - rejected)


def shared_prefix_rows(pairs: list[tuple[list[int], list[int]]], device: torch.device) -> tuple[dict, list[int]]:
    """Pairs as pieces, common prefix | rest of chosen | rest of rejected: the prefix is read once.

    Both rests continue the prefix and do not see each other, so they score as if they stood alone ("Accelerating Direct
    Preference Optimization with Prefix Sharing", arXiv 2410.20305).

    Returns:
        (inputs, positions [2B] of the last tokens: all chosen, then all rejected).
    """
    heads, tails = [], []
    for pair in pairs:
        p = 0  # the common prefix leaves each at least one token of its own
        while p < min(map(len, pair)) - 1 and pair[0][p] == pair[1][p]:
            p += 1
        heads += [row[:p] for row in pair]
        tails += [row[p:] for row in pair]
    inputs, _, firsts = pack_shared(heads, tails, device)
    ends = [first + len(tail) - 1 for first, tail in zip(firsts, tails)]
    return inputs, [*ends[0::2], *ends[1::2]]


def separate_rows(rows: list[list[int]], packed: bool, device: torch.device) -> tuple[dict, list[int]]:
    """Whole sequences: (inputs, positions of their last tokens)."""
    inputs, starts = pack_rows(rows, packed, device)
    return inputs, [start + len(row) - 1 for start, row in zip(starts, rows)]


def read_pairs(rows: Any, pad_id: int) -> list[tuple[list[int], list[int]]]:
    """Rows of the dataset -> (query + chosen, query + rejected) without pads."""
    both = zip(rows["query_chosen_token"], rows["query_rejected_token"])
    return [(strip_pads(chosen, pad_id), strip_pads(rejected, pad_id)) for chosen, rejected in both]


def pair_rewards(
    model: torch.nn.Module,
    pairs: list[tuple[list[int], list[int]]],
    packed: bool,
    shared_prefix: bool,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of chosen and rejected: ([B], [B]).

    Args:
        model: `RewardModel`, wrapped or not; `packed`: whether it reads packed rows.
        pairs: see `read_pairs`.
        shared_prefix: read what the two have in common once; needs `packed`.
    """
    if shared_prefix:
        inputs, ends = shared_prefix_rows(pairs, device)
    else:
        inputs, ends = separate_rows([row for side in zip(*pairs) for row in side], packed, device)
    rewards = model(inputs, torch.tensor(ends, device=device))  # [2B]
    return rewards[: len(pairs)], rewards[len(pairs) :]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate_pairs(
    accelerator: Any, model: torch.nn.Module, rows: Any, pad_id: int, args: Args, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of every pair of a split: ([rows], [rows]) chosen and rejected, on every rank."""
    lengths, found = pair_lengths(rows), []
    with evaluating(accelerator, model) as scorer:
        packed = supports_packing(scorer.model)
        for part in for_each_row(lengths, args.local_eval_batch_size, f"{what} pairs"):
            pairs = read_pairs(rows[part], pad_id)
            both = pair_rewards(scorer, pairs, packed, packed and args.shared_prefix, accelerator.device)
            found += zip(part, *(rewards.tolist() for rewards in both))
    _, chosen, rejected = zip(*gather_rows(found))
    return np.array(chosen), np.array(rejected)


def score_demonstrations(accelerator: Any, model: torch.nn.Module, rows: Any, pad_id: int, args: Args) -> np.ndarray:
    """Reward of each row's reference, read at its last token: [rows], on every rank."""
    lengths, found = rows["query_reference_response_token_len"], []
    with evaluating(accelerator, model) as scorer:
        for part in for_each_row(lengths, args.local_eval_batch_size, "demonstrations rows"):
            tokens = [strip_pads(row, pad_id) for row in rows[part]["query_reference_response_token"]]
            inputs, ends = separate_rows(tokens, supports_packing(scorer.model), accelerator.device)
            found += zip(part, scorer(inputs, torch.tensor(ends, device=accelerator.device)).tolist())
    return np.array([reward for _, reward in gather_rows(found)])


def report(split: str, rows: Any, chosen: np.ndarray, rejected: np.ndarray):
    """Metrics and table of one evaluated split, see `report_pairs`."""
    losses = preference_losses(torch.tensor(chosen), torch.tensor(rejected))
    return report_pairs("rm", split, rows, (chosen, rejected), losses)


def check_args(args: Args):
    """Refuse what cannot work; fill in what was left out. Returns (tokenizer, comparisons, SFT dataset)."""
    check_sizes(args, positive=("num_train_epochs", "num_normalization_rows"))
    check_optimisation(args)
    derive_sizes(args, default_batch_size=64)
    RunFolder.check(args)
    base, sft = find_models(args, base_model="policy", sft_model_path="policy").values()
    check_lora(args, "sft_model_path")
    tokenizer = find_tokenizer("base_model", args.base_model, args.base_model_revision)
    pairs = load_comparisons(args, tokenizer, sft)
    tokens = ["query_token", "query_reference_response_token"]
    columns = [*tokens, "query", "query_reference_response_token_len"]
    sft_rows = load_rows("query_dataset", args.query_dataset, args.dataset_revision, "sft", columns, ["train"])
    check_tokens("query_dataset", sft_rows, tokens, base["vocab_size"], tokenizer.pad_token_id)
    check_same_tokenizer("query_dataset", sft_rows["train"][0], "query", "query_token", tokenizer)
    fill_episodes(args, len(pairs["train"]))
    RunFolder.refuse_taken(args)
    return tokenizer, pairs, sft_rows


def main(args: Args) -> dict[str, float]:
    """Run the stage; returns the final metrics."""
    # ------------------------------------------------------------------------------------------------------------------
    # sizes
    drop_revisions(args, "sft_model")
    run = RunFolder(args, "reward")
    if run.is_finished():
        return run.final_metrics()
    tokenizer, dataset, sft_dataset = check_args(args)
    accelerator = launch(args, "pairs")
    device, pad_id = accelerator.device, tokenizer.pad_token_id
    train = dataset["train"].with_format("numpy", columns=["query_chosen_token", "query_rejected_token"])
    run.say(f"{args.num_updates} updates over {args.total_episodes} of {len(train)} pairs")

    with run.open(accelerator):
        # --------------------------------------------------------------------------------------------------------------
        # data, model, optimiser
        order = epoch_order(len(train), args.total_episodes, args.seed)
        lengths = pair_lengths(dataset["train"])
        torch.manual_seed(args.seed)
        revision = None if os.path.isdir(args.sft_model_path) else args.sft_model_revision
        dtype = trunk_dtype(args, accelerator)
        scorer, loaded = AutoModelForSequenceClassification.from_pretrained(
            args.sft_model_path, revision=revision, num_labels=1, dtype=dtype, output_loading_info=True
        )
        missing = loaded["missing_keys"] - {"score.weight"}
        refuse_bad_weights("sft_model_path", args.sft_model_path, missing, scorer)
        init_head(scorer)
        use_float32_head(scorer)
        disable_dropout(scorer)
        packed = use_packed_attention(scorer)
        run.parameters = sum(p.numel() for p in scorer.parameters())
        if args.lora:
            add_adapter(scorer, args.lora_params, args.sft_model_path, revision)
        shared = args.shared_prefix and packed
        how = "read once for each pair" if shared else "read twice"
        why = "" if packed or not args.shared_prefix else ": this architecture cannot pack rows"
        run.say(f"the prefix that chosen and rejected share is {how}{why}")
        model = RewardModel(scorer)
        model, optimizer, scheduler = prepare(accelerator, model, args)
        splits = {s: first_rows(rows, args.num_eval_rows) for s, rows in dataset.items() if s != "train"}

        def evaluate_splits(when: str):
            metrics, table = {}, []
            for split, rows in splits.items():
                chosen, rejected = evaluate_pairs(accelerator, model, rows, pad_id, args, f"{when}, {split}")
                found, lines = report(split, rows, chosen, rejected)
                metrics, table = metrics | found, table + lines
                run.table(split, pair_table(rows, chosen, rejected))
            return metrics, table

        sizes = [dataset["train"][f"query_{name}_token_len"] for name in ("chosen", "rejected")]
        data = {"label_dataset": fingerprint(np.concatenate(sizes))}
        checkpoints = Checkpoints(run, accelerator, model, optimizer, scheduler, data)
        resumed = checkpoints.resume()
        if args.run_eval and not resumed.found:
            run.log(0, evaluate_splits("before training")[0])

        # --------------------------------------------------------------------------------------------------------------
        # loop
        model.train()
        for update in run.progress("reward updates", resumed.update + 1, args.num_updates):
            start = time.time()
            rows = order[(update - 1) * args.batch_size : update * args.batch_size]
            sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss, accuracy, tokens
            gradient = Gradient(accelerator, model, optimizer, checkpoints)
            for part, weight in gradient.micro_batches(lengths[rows].tolist(), sort_by_length=not packed):
                pairs = read_pairs(train[rows[part]], pad_id)
                chosen, rejected = pair_rewards(model, pairs, packed, shared, device)
                loss = preference_losses(chosen, rejected).sum() / len(rows)
                gradient.add(loss, {"rows": rows[part], "pairs": pairs})
                right, tokens = (chosen > rejected).sum() / len(rows), sum(len(c) + len(r) for c, r in pairs)
                sums += weight * torch.stack([loss.detach(), right, torch.tensor(tokens, device=device)])
            norm = gradient.step()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            loss, accuracy, tokens = accelerator.reduce(sums, "sum").tolist()
            seconds = time.time() - start
            metrics = {
                "train/rm/loss": loss, "train/rm/accuracy": accuracy, "train/rm/lr": lr, "train/rm/grad_norm": norm,
                "train/rm/episode": min(update * args.batch_size, args.total_episodes),
                "time/rm/samples_per_second": len(rows) / seconds, "time/rm/tokens_per_second": tokens / seconds,
                "memory/rm/peak_gb": memory_gb(device),
            }  # fmt: skip
            if args.run_eval and args.eval_freq and update % args.eval_freq == 0 and update < args.num_updates:
                metrics |= evaluate_splits(f"update {update}")[0]
            if args.print_sample_output_freq and update % args.print_sample_output_freq == 0:
                print_pairs(accelerator, model, dataset["train"][rows[:2]], tokenizer, shared)
            run.log(update, metrics, note=f"loss {loss:.3f} accuracy {accuracy:.2f}")
            checkpoints.after_update(update)

        # --------------------------------------------------------------------------------------------------------------
        # evaluation, normalisation and saving
        checkpoints.save(args.num_updates)
        final, table = {name: run.metrics[name] for name in ("train/rm/loss", "train/rm/accuracy")}, []
        if args.run_eval:
            found, table = evaluate_splits("after training")
            final |= found
            run.table("accuracy", accuracy_table(table))
        # Detail: normalise [15] - the mean reward over demonstrations becomes 0, by a constant in the config
        demonstrations = first_rows(sft_dataset["train"], args.num_normalization_rows)
        before = score_demonstrations(accelerator, model, demonstrations, pad_id, args)
        # Deviates: the original kept it in a class of its own, without which the checkpoint did not load
        scorer.config.reward_bias = -float(before.mean())
        after = before + scorer.config.reward_bias
        for name, values in (("before", before), ("after", after)):
            for statistic in ("mean", "std", "min", "max"):
                final[f"eval/rm/demonstrations/{name}/{statistic}"] = float(getattr(values, statistic)())
        run.log(args.num_updates + 1, final)
        scorer.config.id2label, scorer.config.label2id = {0: "reward"}, {"reward": 0}
        save_model(accelerator, run, model, scorer, tokenizer, args.output_dir)
        if run.is_main:
            print_tables(table, before, after)
        run.deliver({"reward model": args.output_dir, "tables": run.path / "tables"})
    checkpoints.remove()
    return final


def print_pairs(accelerator: Any, model: torch.nn.Module, rows: Any, tokenizer: Any, shared_prefix: bool) -> None:
    """Print the texts and rewards of a few training pairs."""
    pairs = read_pairs(rows, tokenizer.pad_token_id)
    with evaluating(accelerator, model) as scorer:
        rewards = pair_rewards(scorer, pairs, supports_packing(scorer.model), shared_prefix, accelerator.device)
    if accelerator.is_main_process:
        for (chosen, rejected), good, bad in zip(pairs, *(r.tolist() for r in rewards)):
            for name, tokens, reward in (("chosen", chosen, good), ("rejected", rejected, bad)):
                print(f"{name:8} {reward:+.2f}  ...{tokenizer.decode(tokens)[-300:]!r}", flush=True)


def print_tables(table: Any, before: np.ndarray, after: np.ndarray) -> None:
    """The closing tables: accuracies with counts, and the rewards of demonstrations before and after."""
    if table:
        print_accuracies("Reward model accuracy", table)
    shown = Table("rewards of demonstrations", "mean", "std", "min", "max")
    for name, values in (("before normalisation", before), ("after", after)):
        numbers = (values.mean(), values.std(), values.min(), values.max())
        shown.add_row(name, *(f"{number:.3f}" for number in numbers))
    print_table(shown)


if __name__ == "__main__":
    command_line(main, Args)
