"""Rollouts: a policy's responses to a batch of queries, what other networks say of them, and the metrics of both.

Dimensions: B episodes, R response tokens. Every rank samples its share of the batch; what it finds is gathered in the
order of episodes, so that all ranks go on with the same whole batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from summarize_from_feedback_details.common.adapters import check_lora, check_reward_adapter
from summarize_from_feedback_details.common.check_inputs import (
    TokenIds,
    find_ids,
    find_models,
    find_tokenizer,
    load_queries,
)
from summarize_from_feedback_details.common.engines import ENGINES, is_another
from summarize_from_feedback_details.common.evaluation import for_each_row, gather_rows
from summarize_from_feedback_details.common.logprobs import (
    INVALID_LOGPROB,
    response_logits,
    scatter_tokens,
    token_logprobs,
)
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.reward_models import read_rewards
from summarize_from_feedback_details.common.sampling import pad_rows, strip_pads
from summarize_from_feedback_details.common.training import lent

CLOSING_METRICS = ("objective/scores", "objective/kl", "objective/eos_rate", "objective/response_length",
                   "policy/first_pass_ratio_error")  # fmt: skip


def find_task(args: Any):
    """Refuse models, adapters and data of an algorithm that samples, where they do not fit together.

    Returns:
        (tokenizer, dataset, ids)
    """
    models = find_models(args, base_model="policy", sft_model_path="policy", reward_model_path="reward")
    if hasattr(args, "lora"):
        check_lora(args, "sft_model_path")
        check_reward_adapter(args)
    tokenizer = find_tokenizer("base_model", args.base_model, args.base_model_revision)
    return tokenizer, load_queries(args, tokenizer, models), find_ids(args.truncate_token, tokenizer)


class Prompts(NamedTuple):
    """Queries to sample responses to."""

    queries: list[list[int]]  # B token lists without pads
    rows: np.ndarray  # [B] in the dataset
    episodes: np.ndarray  # [B] numbers, to which the sampling noise belongs

    def share(self, accelerator: Any, together: int = 1) -> tuple["Prompts", list[int]]:
        """This rank's: as many rows on each rank, of similar lengths, longest first; and their places in the batch.

        Args:
            together: so many neighbours share a query, which a rank reads once for those it gets: all, where the
                queries can be shared out evenly.
        """
        rank, world = accelerator.process_index, accelerator.num_processes
        unit = together if len(self.queries) % (together * world) == 0 else 1
        order = sorted(range(0, len(self.queries), unit), key=lambda i: (-len(self.queries[i]), i))
        mine = [i + j for i in order[rank::world] for j in range(unit)]
        return Prompts([self.queries[i] for i in mine], self.rows[mine], self.episodes[mine]), mine


class Responses(NamedTuple):
    """What a policy has written to some prompts."""

    tokens: Tensor  # [B, R] ids, pads after the stop token
    logprobs: Tensor  # [B, R] of who sampled, nats; INVALID_LOGPROB at pads
    mask: Tensor  # [B, R] True at the tokens of the response
    real: list[list[int]]  # B token lists without pads


def gather_in_order(accelerator: Any, columns: Any, mine: list[int]) -> list[Tensor]:
    """Columns of this rank's episodes -> those of the whole batch, in the order of episodes, on every rank."""
    back = accelerator.gather(torch.tensor(mine, device=accelerator.device)).argsort()
    return [accelerator.gather(column)[back] for column in columns]


def chunks(prompts: Prompts, args: Any) -> list[slice]:
    """--local_rollout_forward_batch_size at a time."""
    at_once = args.local_rollout_forward_batch_size
    return [slice(start, start + at_once) for start in range(0, len(prompts.queries), at_once)]


@torch.no_grad()
def respond(
    policy: torch.nn.Module, prompts: Prompts, ids: TokenIds, args: Any, poll: Callable = lambda: None
) -> Responses:
    """A response to each query.

    Args:
        policy: a causal language model, in eval mode, on the device of computing.
        args: has `seed`, `response_length`, `temperature`, `local_rollout_forward_batch_size`; and `rollout_engine` in
            training.
        poll: called before each forward pass that samples.
    """
    device, sampled = next(policy.parameters()).device, []
    sample = ENGINES[getattr(args, "rollout_engine", "hf")](policy)
    for part in chunks(prompts, args):
        poll()
        # Detail: left padding - queries are left-padded, responses right-padded
        query_tokens = pad_rows(prompts.queries[part], ids.pad, "left").to(device)  # [b, Q]
        keys = episode_keys(args.seed, prompts.episodes[part], device)
        sampled.append(sample(query_tokens, keys, ids, args.response_length, args.temperature))
    tokens, logprobs = map(torch.cat, zip(*sampled))  # [B, R] each
    return Responses(tokens, logprobs, tokens != ids.pad, [strip_pads(row, ids.pad) for row in tokens.cpu()])


@torch.no_grad()
def read_logprobs(model: torch.nn.Module, prompts: Prompts, responses: Responses, args: Any) -> Tensor:
    """Log-probabilities [B, R] of the responses' tokens by a causal language model, INVALID_LOGPROB at pads."""
    read = lambda part: response_logits(model, prompts.queries[part], responses.real[part])
    found = [token_logprobs(*read(part), args.temperature) for part in chunks(prompts, args)]
    return scatter_tokens(torch.cat(found), responses.mask, INVALID_LOGPROB)


@torch.no_grad()
def read_scores(reward_model: torch.nn.Module, prompts: Prompts, responses: Responses, args: Any) -> Tensor:
    """Reward [B] of each query and response."""
    rows = [query + response for query, response in zip(prompts.queries, responses.real)]
    heads = list(map(len, prompts.queries))
    return torch.cat([read_rewards(reward_model, rows[part], heads[part]) for part in chunks(prompts, args)])


@torch.no_grad()
def roll_out(
    networks: tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module | None], prompts: Prompts, recompute: bool,
    ids: TokenIds, args: Any, poll: Callable = lambda: None,
) -> tuple[Responses, Tensor, Tensor, Tensor]:  # fmt: skip
    """A response to each query, its log-probabilities [B, R] by the policy and by the reference, its score [B].

    Args:
        networks: policy, reference policy and reward model; each of the last two is on the device for its own pass, see
            `lent`. Without a reward model all scores are 0.
        recompute: compute the policy's log-probs again by the forward pass of training instead of taking those of
            sampling: in bf16 the two differ by rounding, and the first-pass ratio has to be 1. Those of an engine are
            always computed again.
        poll: called before each forward pass that samples.
    """
    policy, reference, reward_model = networks
    responses = respond(policy, prompts, ids, args, poll)
    recompute = recompute or is_another(args)
    logprobs = read_logprobs(policy, prompts, responses, args) if recompute else responses.logprobs
    with lent(reference, logprobs.device):
        ref_logprobs = read_logprobs(reference, prompts, responses, args)
    if reward_model is None:
        return responses, logprobs, ref_logprobs, torch.zeros(len(logprobs), device=logprobs.device)
    with lent(reward_model, logprobs.device):
        scores = read_scores(reward_model, prompts, responses, args)
    return responses, logprobs, ref_logprobs, scores


def objective_metrics(
    scores: Tensor, contains_stop: Tensor, mask: Tensor, logprobs: Tensor, kl: Tensor, non_score_rewards: Tensor
) -> dict[str, Tensor]:
    """Metrics `objective/...` of a batch of episodes; means are over all episodes.

    Args:
        scores, contains_stop: [B]; mask: [B, R] True at real tokens.
        logprobs, kl, non_score_rewards: [B, R], anything at other tokens; kl is the k1 estimate of each token.
    """
    per_episode = (kl * mask).sum(1)  # [B] nats
    # the same KL by an estimate that is never negative (k3, Schulman 2020, "Approximating KL divergence")
    kl_k3 = ((torch.expm1(-kl) + kl) * mask).sum(1)
    non_score = (non_score_rewards * mask).sum(1)
    standard_error = per_episode.std(unbiased=False) / math.sqrt(len(per_episode))
    return {
        "objective/scores": scores.mean(), "objective/scores_std": scores.std(unbiased=False),
        "objective/kl": per_episode.mean(), "objective/kl_standard_error": standard_error,
        "objective/kl_k3": kl_k3.mean(),
        "objective/entropy": (-logprobs * mask).sum(1).mean(),
        "objective/non_score_reward": non_score.mean(), "objective/score_total": (scores + non_score).mean(),
        "objective/eos_rate": contains_stop.float().mean(),
        "objective/response_length": mask.sum(1).float().mean(),
    }  # fmt: skip


@torch.no_grad()
def measure_policy(
    networks: tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module | None], rows: Any, recompute: bool,
    ids: TokenIds, args: Any, what: str,
) -> dict[str, float]:  # fmt: skip
    """Metrics `objective/...` of a policy that was not trained on its own responses: of one to each query of a split.

    Scores have no penalty, and are left out without a reward model. Inside `evaluating`.

    Args:
        networks, recompute: see `roll_out`.
        rows: of a dataset, with the column `query_token`.
        args: see `respond`; also has `local_eval_batch_size`.
    """
    queries, found = [strip_pads(q, ids.pad) for q in rows["query_token"]], []
    for part in for_each_row(list(map(len, queries)), args.local_eval_batch_size, f"{what}, KL rows"):
        prompts = Prompts([queries[i] for i in part], np.array(part), np.array(part))
        responses, logprobs, ref_logprobs, scores = roll_out(networks, prompts, recompute, ids, args)
        stops = (responses.tokens == ids.stop).any(1)
        found += zip(part, *(column.tolist() for column in (scores, stops, responses.mask, logprobs, ref_logprobs)))
    scores, stops, mask, logprobs, ref_logprobs = map(torch.tensor, list(zip(*gather_rows(found)))[1:])
    kl = (logprobs - ref_logprobs) * mask
    metrics = objective_metrics(scores, stops, mask, logprobs, kl, torch.zeros_like(kl))
    left_out = ("non_score_reward", "score_total", *(("scores", "scores_std") if networks[2] is None else ()))
    return {name: float(value) for name, value in metrics.items() if name.split("/")[1] not in left_out}


def warn(update: int, metrics: dict[str, float], in_float32: bool) -> None:
    """Say loudly that a number is impossible for correct code: ratio not 1 at the first pass, or negative KL.

    Args:
        in_float32: whether everything is computed in float32; bf16 has a wider tolerance.
    """
    error, tolerance = metrics["policy/first_pass_ratio_error"], 1e-3 if in_float32 else 0.1
    if error > tolerance:
        print(f"WARNING: update {update}: the first-pass ratio is off 1 by {error:.2g} (> {tolerance})", flush=True)
    kl, noise = metrics["objective/kl"], 4 * metrics["objective/kl_standard_error"] + (1e-4 if in_float32 else 0.05)
    if kl < -noise:
        print(f"WARNING: update {update}: KL {kl:.4f} is negative beyond its noise of {noise:.4f}", flush=True)
