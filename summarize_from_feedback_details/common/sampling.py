"""Responses to queries, sampled over the KV cache with random numbers that belong to each episode.

Dimensions: B rows, Q query tokens, R response tokens, T = Q + R, V vocabulary.
"""

import math
from typing import Any

import numpy as np
import torch

from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.decoding import Decoder
from summarize_from_feedback_details.common.logprobs import INVALID_LOGPROB
from summarize_from_feedback_details.common.noise import gumbel_noise

# tokens between two looks at which rows have ended: on a GPU each look waits for what is being computed
LOOK_EVERY = {"cpu": 1, "cuda": 8}


def pad_rows(rows: list[list[int]], pad_id: int, side: str) -> torch.Tensor:
    """Lists of token ids -> [B, longest], padded on one side only as far as needed."""
    longest = max(map(len, rows))
    if side == "left":
        return torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], dtype=torch.long)
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], dtype=torch.long)


def strip_pads(row: Any, pad_id: int) -> list[int]:
    """The real tokens of a padded row."""
    row = np.asarray(row)
    return row[row != pad_id].tolist()


def model_inputs(tokens: torch.Tensor, pad_id: int) -> dict[str, torch.Tensor]:
    """What a model needs to read [B, T] tokens so that padding, left or right, changes nothing.

    Pads are masked and replaced by id 0 (theirs may lie outside the embedding); positions count real tokens only, for
    models with absolute positions.
    """
    mask = tokens != pad_id  # [B, T]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # [B, T]
    return {"input_ids": tokens.masked_fill(~mask, 0), "attention_mask": mask.long(), "position_ids": positions}


def first_true_indices(bools: torch.Tensor) -> torch.Tensor:
    """Index of the first True along the last axis, or its length where there is none: [..., N] -> [...]."""
    n = bools.shape[-1]
    return torch.where(bools, torch.arange(n, device=bools.device), n).min(dim=-1).values


def truncate_response(responses: torch.Tensor, stop_id: int, pad_id: int) -> torch.Tensor:
    """Replace everything after the first stop token by pads: [B, R] -> [B, R]."""
    # Detail: EOS trick - all tokens are sampled with EOS allowed, what stands after it is cut off
    ends = first_true_indices(responses == stop_id).unsqueeze(-1)  # [B, 1]
    after = torch.arange(responses.shape[1], device=responses.device) > ends
    return responses.masked_fill(after, pad_id)


@torch.no_grad()
def sample_responses(
    model: torch.nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor | None,
    ids: TokenIds,
    response_length: int,
    temperature: float,
):
    """Sample a response to each query over the KV cache, one forward pass per position.

    Args:
        model: a causal language model, in eval mode.
        queries: [B, Q] token ids, left-padded.
        keys: [B], see `episode_keys`; not read at temperature 0.
        response_length: R, tokens at most.
        temperature: divides the logits; 0 takes the most likely token.

    Returns:
        responses [B, R], pads after the first stop token, and the log-probabilities [B, R] of the drawn tokens at this
        temperature (over all ids, as `token_logprobs` computes them), INVALID_LOGPROB at pads.
    """
    return sample(Decoder(model, model_inputs(queries, ids.pad), response_length), keys, ids, temperature)


@torch.no_grad()
def sample(decoder: Decoder, keys: torch.Tensor | None, ids: TokenIds, temperature: float):
    """`sample_responses` of what has read the queries.

    Rows that have ended leave the batch once half of it has; nothing that is kept depends on when.
    """
    logits, B, response_length = decoder.logits, len(decoder.logits), decoder.room
    device = logits.device
    look_every = LOOK_EVERY.get(device.type, 8)
    responses = torch.full((B, response_length), ids.pad, device=device)  # [B, R]
    logprobs = torch.full((B, response_length), INVALID_LOGPROB, device=device)  # [B, R]
    rows = torch.arange(B, device=device)  # [b] that are read still
    alive = torch.ones_like(rows, dtype=torch.bool)  # [b] whether they go on
    for t in range(response_length):
        logits = logits.float() / (temperature or 1.0)
        allowed = logits.clone()
        # Deviates: the original could draw the pad or an id outside the tokenizer, and took it for padding
        allowed[:, ids.vocab_size :] = -math.inf
        if ids.pad < logits.shape[1]:
            allowed[:, ids.pad] = -math.inf
        if temperature > 0:  # argmax(logits + Gumbel noise) is a draw from the softmax
            allowed += gumbel_noise(keys, t, logits.shape[1])
        drawn = allowed.argmax(-1)  # [b]
        responses[rows, t] = drawn
        logprobs[rows, t] = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        # tokens after EOS influence nothing that is kept: sampling may stop there
        alive &= drawn != ids.stop
        if t + 1 == response_length:
            break
        if (t + 1) % look_every == 0:
            going = int(alive.sum())
            if not going:
                break
            if 2 * going <= len(rows) and decoder.rows_can_leave:
                stay = alive.nonzero()[:, 0]
                decoder.keep(stay)
                rows, alive, drawn = rows[stay], alive[stay], drawn[stay]
                keys = None if keys is None else keys[stay]
        logits = decoder(drawn)
    responses = truncate_response(responses, ids.stop, ids.pad)
    return responses, logprobs.masked_fill(responses == ids.pad, INVALID_LOGPROB)
