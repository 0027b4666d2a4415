"""Evaluation: each row of a split once, shared out over the ranks; a policy's responses, as texts and with scores."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from summarize_from_feedback_details.common.check_inputs import find_ids
from summarize_from_feedback_details.common.console import Progress
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.reward_models import read_rewards
from summarize_from_feedback_details.common.run_folder import REQUEUE_ME, stop_wanted
from summarize_from_feedback_details.common.sampling import pad_rows, sample_responses, strip_pads
from summarize_from_feedback_details.common.zero import full_weights


@contextmanager
def evaluating(accelerator: Any, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the unwrapped model: in evaluation mode, whole on every rank, without gradients, in the run's precision.

    Args:
        model: as `accelerator.prepare` returned it.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), full_weights(model), accelerator.autocast():
            yield accelerator.unwrap_model(model)
    finally:
        model.train(was_training)


def for_each_row(lengths: Any, at_once: int, what: str) -> Iterator[list[int]]:
    """Yield numbers of rows, so many at a time and longest first, until this rank has seen its share of all rows.

    Ends early where a signal asked to stop: what is evaluated here is evaluated again. Follow it by `gather_rows`.

    Args:
        lengths: tokens of each row.
        what: what is counted, for the progress.
    """
    state = PartialState()
    mine = sorted(range(len(lengths)), key=lambda i: -lengths[i])[state.process_index :: state.num_processes]
    progress = Progress(what, len(mine), state.is_main_process)
    for start in range(0, len(mine), at_once):
        rows = mine[start : start + at_once]
        yield rows
        progress.step(len(rows))
        if stop_wanted():
            return


def gather_rows(found: list[tuple]) -> list[tuple]:
    """(number of a row, result, ...) of all ranks, in the order of rows, on every rank.

    Raises:
        SystemExit: where a signal asked any rank to stop; all leave together, since one that leaves alone lets the
            others wait for it.
    """
    if any(gather_object([stop_wanted()])):
        raise SystemExit(REQUEUE_ME)
    return sorted(gather_object(found))


def first_rows(rows: Any, number: int | None):
    """So many rows of a dataset, or all there are."""
    return rows.select(range(min(len(rows), number or len(rows))))


class Sample(NamedTuple):
    """A response of a policy to a row's query."""

    query: str
    response: str
    reference: str
    tokens: list[int]  # of the response, without pads
    has_eos: bool


def sample_batch(
    policy: torch.nn.Module, batch: dict, rows: list[int], tokenizer: Any, args: Any, temperature: float
) -> list[Sample]:
    """A response to each row of a batch.

    Args:
        policy: a causal language model, in eval mode.
        batch: columns of the dataset; rows: their numbers, to which the sampling noise belongs.
        args: has `seed`, `response_length` and `truncate_token`.
    """
    ids, device = find_ids(args.truncate_token, tokenizer), next(policy.parameters()).device
    queries = pad_rows([strip_pads(q, ids.pad) for q in batch["query_token"]], ids.pad, "left").to(device)
    keys = episode_keys(args.seed, rows, device)
    responses, _ = sample_responses(policy, queries, keys, ids, args.response_length, temperature)
    texts = tokenizer.batch_decode(responses.tolist(), skip_special_tokens=True)
    references = [text.replace(tokenizer.eos_token, "").strip() for text in batch["reference_response"]]
    tokens = [strip_pads(row, ids.pad) for row in responses.cpu()]
    return [
        Sample(query, text.strip(), reference, real, ids.stop in real)
        for query, text, reference, real in zip(batch["query"], texts, references, tokens)
    ]


def score_policy(
    policy: torch.nn.Module, reward_model: torch.nn.Module | None, rows: Any, tokenizer: Any, args: Any, what: str
) -> dict[str, list]:
    """A response to each row of a split with its score, and the reference's score; inside `evaluating`.

    Args:
        reward_model: None where there is none: all scores are NaN.
        args: see `sample_batch`; also has `eval_temperature` and `local_eval_batch_size`.

    Returns:
        columns `query, response, reference, score, reference_score, response_length, has_eos`, on every rank.
    """
    pad_id, found = tokenizer.pad_token_id, []
    lengths = [len(strip_pads(q, pad_id)) for q in rows["query_token"]]
    for numbers in for_each_row(lengths, args.local_eval_batch_size, f"{what} rows"):
        batch = rows[numbers]
        samples = sample_batch(policy, batch, numbers, tokenizer, args, args.eval_temperature)
        queries, references = (
            [strip_pads(row, pad_id) for row in batch[column]] for column in ("query_token", "reference_response_token")
        )
        scores, reference_scores = (
            read_rewards(reward_model, [q + r for q, r in zip(queries, written)]).tolist()
            if reward_model is not None
            else [math.nan] * len(numbers)
            for written in ([sample.tokens for sample in samples], references)
        )
        for row, sample, *both in zip(numbers, samples, scores, reference_scores):
            found.append((row, *sample[:3], *both, len(sample.tokens), sample.has_eos))
    names = ["query", "response", "reference", "score", "reference_score", "response_length", "has_eos"]
    return dict(zip(names, map(list, zip(*(row[1:] for row in gather_rows(found))))))


def report_scores(stage: str, found: dict[str, list]) -> dict[str, float]:
    """Metrics `eval/<stage>/validation/...` of what `score_policy` found; without scores where there were none."""
    score, reference = np.array(found["score"]), np.array(found["reference_score"])
    scores = {
        f"eval/{stage}/validation/score": float(score.mean()),
        f"eval/{stage}/validation/reference_score": float(reference.mean()),
        f"eval/{stage}/validation/scores_above_reference": float((score > reference).mean()),
    }
    return (scores if np.isfinite(score).all() else {}) | {
        f"eval/{stage}/validation/response_length": float(np.mean(found["response_length"])),
        f"eval/{stage}/validation/eos_rate": float(np.mean(found["has_eos"])),
    }


def print_samples(found: dict[str, list]) -> None:
    """Print responses, with their scores where they have some, beside their references; on rank 0."""
    if PartialState().is_main_process:
        scores = [f" ({score:+.2f})" for score in found.get("score", [])] or [""] * len(found["query"])
        for query, response, score, reference in zip(found["query"], found["response"], scores, found["reference"]):
            policy = f"policy{score}:"
            print(f"{query[-300:]}\n  {policy:10} {response}\n  reference: {reference}", flush=True)
