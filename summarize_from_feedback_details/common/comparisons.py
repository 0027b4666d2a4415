"""Comparisons of two responses to one query: loading and reading them, and how often scores agree with people.

Scores may be a reward model's, or the implicit rewards of a policy.
"""

import os
from typing import Any

import numpy as np
import torch
from rich.table import Table

from summarize_from_feedback_details.common.check_inputs import (
    check_context,
    check_same_tokenizer,
    check_tokens,
    context_of,
    load_rows,
)
from summarize_from_feedback_details.common.console import print_table
from summarize_from_feedback_details.common.evaluation import for_each_row, gather_rows
from summarize_from_feedback_details.common.sampling import strip_pads


def load_comparisons(args: Any, tokenizer: Any, model: dict):
    """The comparisons of --label_dataset; refuses those that do not fit the tokenizer or the model.

    Args:
        args: has `label_dataset`, `label_dataset_revision`, `run_eval` and `eval_cnndm`.
        model: configuration of the checkpoint `sft_model_path`, see `find_model`.

    Returns:
        split -> datasets.Dataset: train, and where it is evaluated validation and validation_cnndm; the last is left
        out where its articles are longer than the model's context.
    """
    tokens = ["query_token", "query_chosen_token", "query_rejected_token"]
    columns = [*tokens, "query", "query_chosen_token_len", "query_rejected_token_len"]
    splits = ["train", "validation"] if args.run_eval else ["train"]
    splits += ["validation_cnndm?"] if args.run_eval and args.eval_cnndm else []
    revision = args.label_dataset_revision
    pairs = load_rows("label_dataset", args.label_dataset, revision, "comparisons", columns, splits)
    longest = {}
    for split, rows in pairs.items():
        found = check_tokens("label_dataset", {split: rows}, tokens, model["vocab_size"], tokenizer.pad_token_id)
        longest[split] = max(found.values())
    if longest.get("validation_cnndm", 0) > context_of(model):
        if os.environ.get("RANK", "0") == "0":
            found = f"{longest['validation_cnndm']} tokens, the model's context {context_of(model)}"
            print(f"validation_cnndm is left out: its longest row has {found}", flush=True)
        del pairs["validation_cnndm"], longest["validation_cnndm"]
    check_context("sft_model_path", args.sft_model_path, model, max(longest.values()), "the longest query and response")
    check_same_tokenizer("label_dataset", pairs["train"][0], "query", "query_token", tokenizer)
    return pairs


def pair_lengths(rows: Any) -> np.ndarray:
    """Tokens of both sequences of each pair: [rows]."""
    return np.asarray(rows["query_chosen_token_len"]) + np.asarray(rows["query_rejected_token_len"])


def read_comparisons(rows: Any, pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of the dataset -> (queries, responses) without pads, chosen and rejected of a pair behind one another.

    A query ends where both sequences still are what it is: that of a CNN/DM row ends in a line break, which they do not
    have. A response has at least one token.
    """
    queries, responses = [], []
    for row in zip(rows["query_token"], rows["query_chosen_token"], rows["query_rejected_token"]):
        query, *both = (strip_pads(tokens, pad_id) for tokens in row)
        n = min(len(os.path.commonprefix([query, *both])), *(len(whole) - 1 for whole in both))
        queries += [query[:n], query[:n]]
        responses += [whole[n:] for whole in both]
    return queries, responses


def count_cut_off(dataset: dict[str, Any], tokenizer: Any) -> None:
    """Print how many responses of each split have no end-of-text token: they were longer than the dataset's limit."""
    for split, rows in dataset.items():
        columns = rows.with_format("numpy", columns=["query_chosen_token", "query_rejected_token"])[:].values()
        last = [[strip_pads(row, tokenizer.pad_token_id)[-1] for row in column] for column in columns]
        cut = [sum(token != tokenizer.eos_token_id for token in column) for column in last]
        print(f"{split}: {cut[0]} chosen and {cut[1]} rejected of {len(rows)} pairs do not end with EOS", flush=True)


def pair_logprobs(policy: torch.nn.Module, queries: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """Log-probability of each response, [B, 2] nats: chosen and rejected. Their query is read once.

    Args:
        policy: `ResponsePolicy`, wrapped or not.
        queries, responses: 2B each, see `read_comparisons`.
    """
    # Deviates: the original failed with more than one pair in a micro batch
    logprobs = policy(queries, responses, 1.0).split(list(map(len, responses)))
    return torch.stack([part.sum() for part in logprobs]).reshape(-1, 2)


def read_split(policy: torch.nn.Module, rows: Any, pad_id: int, args: Any, what: str) -> np.ndarray:
    """`pair_logprobs` of all pairs of a split, on every rank: [rows, 2]; inside `evaluating`, or without gradients.

    Args:
        args: has `local_eval_batch_size`.
    """
    found, lengths = [], pair_lengths(rows)
    rows = rows.with_format("numpy", columns=["query_token", "query_chosen_token", "query_rejected_token"])
    for part in for_each_row(lengths, args.local_eval_batch_size, f"{what} pairs"):
        found += zip(part, pair_logprobs(policy, *read_comparisons(rows[part], pad_id)).tolist())
    return np.array([pair for _, pair in gather_rows(found)])


def group_columns(rows: Any) -> dict[str, list]:
    """What accuracies are reported by: batch, split, confidence, policy pair; those that the dataset has."""
    groups = {name: list(rows[name]) for name in ("batch", "split") if name in rows.column_names}
    if "extra" in rows.column_names:
        groups["confidence"] = [e.get("confidence") if isinstance(e, dict) else None for e in rows["extra"]]
    if {"chosen_policy", "rejected_policy"} <= set(rows.column_names):
        both = zip(rows["chosen_policy"], rows["rejected_policy"])
        groups["policies"] = ["--".join(sorted(map(str, pair))) for pair in both]
    return groups


def pair_table(rows: Any, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Columns of a table of pairs: their texts and groups, and both scores."""
    texts = {c: list(rows[c]) for c in ("query", "chosen", "rejected") if c in rows.column_names}
    return texts | group_columns(rows) | {"chosen_reward": chosen, "rejected_reward": rejected}


def report_pairs(
    name: str, split: str, rows: Any, scores: tuple[np.ndarray, np.ndarray], losses: torch.Tensor
) -> tuple[dict[str, float], list[tuple]]:
    """Metrics `eval/<name>/<split>/...` and a table (split, group, value, pairs, accuracy) of one evaluated split.

    Args:
        scores: of chosen and of rejected, [rows] each; losses: [rows].
    """
    # Detail: report - accuracy varies a lot between batches and grows with the annotator's confidence
    # Deviates: each pair counts once; the original's evaluation repeated rows to fill its last batch
    chosen, rejected = scores
    correct = chosen > rejected
    metrics = {
        f"eval/{name}/{split}/accuracy": float(correct.mean()),
        f"eval/{name}/{split}/loss": float(losses.mean()),
        f"eval/{name}/{split}/margin": float((chosen - rejected).mean()),
        f"eval/{name}/{split}/pairs": float(len(correct)),
    }
    table = [(split, "all", "", len(correct), float(correct.mean()))]
    for group, values in group_columns(rows).items():
        values = np.array(["?" if v is None else str(v) for v in values])
        for value in sorted(set(values)):
            among = correct[values == value]
            table.append((split, group, value, len(among), float(among.mean())))
    return metrics, table


def accuracy_table(table: list[tuple]) -> dict[str, list]:
    """Columns of the table that `report_pairs` makes."""
    return dict(zip(("split", "group", "value", "pairs", "accuracy"), map(list, zip(*table))))


def print_accuracies(title: str, table: list[tuple]) -> None:
    """Print what `report_pairs` has found, without pairs of policies that are rare."""
    shown = Table("split", "by", "value", "pairs", "accuracy", title=title)
    for split, group, value, pairs, accuracy in table:
        if group != "policies" or pairs >= max(20, 0.02 * table[0][3]):
            shown.add_row(split, group, value, str(pairs), f"{accuracy:.3f}")
    print_table(shown)
