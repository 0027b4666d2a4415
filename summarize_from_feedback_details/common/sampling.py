"""Responses to queries, sampled over the KV cache with random numbers that belong to each episode.

Dimensions: B rows, Q query tokens, R response tokens, T = Q + R, V vocabulary.
"""

import inspect
import math
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.logprobs import INVALID_LOGPROB
from summarize_from_feedback_details.common.noise import gumbel_noise
from summarize_from_feedback_details.common.packed_rows import pack_rows, supports_packing

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

    Rows that have ended leave the batch once half of it has; nothing that is kept depends on when.

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
    inputs = model_inputs(queries, ids.pad)
    mask = F.pad(inputs["attention_mask"], (0, response_length), value=1)  # [b, T]
    positions = inputs["position_ids"][:, -1:]  # [b, 1] of the last token
    logits, cache, past = read_queries(model, inputs, response_length)  # [B, V]
    # transformers asks at each token whether all of a mask is True, and a GPU is waited for; not of one with its shape
    finished = supports_packing(model) and all(type(layer) is RoomyLayer for layer in cache.layers)
    B, look_every = len(queries), LOOK_EVERY.get(queries.device.type, 8)
    responses = queries.new_full((B, response_length), ids.pad)  # [B, R]
    logprobs = torch.full((B, response_length), INVALID_LOGPROB, device=queries.device)  # [B, R]
    rows = torch.arange(B, device=queries.device)  # [b] that are read still
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
            if 2 * going <= len(rows) and all(type(layer) in ROWS_CAN_LEAVE for layer in cache.layers):
                stay = alive.nonzero()[:, 0]
                cache.batch_select_indices(stay)
                rows, alive, drawn, mask, positions = (part[stay] for part in (rows, alive, drawn, mask, positions))
                keys = None if keys is None else keys[stay]
        seen, positions = mask[:, : queries.shape[1] + t + 1], positions + 1
        seen = seen[:, None, None].bool() if finished else seen
        logits = model(input_ids=drawn[:, None], attention_mask=seen, position_ids=positions, **past).logits[:, -1]
    responses = truncate_response(responses, ids.stop, ids.pad)
    return responses, logprobs.masked_fill(responses == ids.pad, INVALID_LOGPROB)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, [B, heads, tokens, head width], with room behind them: more are written in place.

    transformers' own layer copies all of them for each token that is added.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = [F.pad(states, (0, 0, 0, room)) for states in (keys, values)]
        self.keys, self.values = (states[:, :, : keys.shape[2]] for states in self.room)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for states, more in zip(self.room, (key_states, value_states)):
            states[:, :, begin:end] = more
        self.keys, self.values = (states[:, :, :end] for states in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.room = [states[indices] for states in self.room]
        self.keys, self.values = (states[:, :, : self.keys.shape[2]] for states in self.room)


# other layers may hold more than keys and values
ROWS_CAN_LEAVE = (RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer)


def read_queries(model: torch.nn.Module, inputs: dict, room: int) -> tuple[torch.Tensor, DynamicCache, dict]:
    """Read left-padded queries before sampling, without their pads where the model packs.

    Args:
        inputs: `input_ids`, `attention_mask`, `position_ids`, [B, Q] each.
        room: tokens that will be sampled at most.

    Returns:
        logits [B, V] that predict the next token; the cache, left-padded as the queries are; the model's arguments
        that hold it.
    """
    cache = DynamicCache(config=model.config)
    # transformers 5.24 renamed the argument
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    past = {name: cache, "use_cache": True}
    # layers of a sliding window keep the last tokens of what they read, whichever row's these are
    if supports_packing(model) and all(type(layer) is DynamicLayer for layer in cache.layers):
        queries, Q = inputs["input_ids"], inputs["input_ids"].shape[1]
        rows = [row[Q - n :] for row, n in zip(queries.tolist(), inputs["attention_mask"].sum(1).tolist())]
        copies = [len(list(same)) for _, same in groupby(rows)]  # neighbours that are the same are read once
        rows = [row for row, _ in groupby(rows)]
        packed, starts = pack_rows(rows, True, queries.device)
        last = torch.tensor([start + len(row) - 1 for start, row in zip(starts, rows)], device=queries.device)
        logits = model(**packed, **past, logits_to_keep=last).logits[0]
        logits = logits.repeat_interleave(torch.tensor(copies, device=queries.device), 0)
        pad = lambda states: torch.cat(
            [
                F.pad(part, (0, 0, Q - part.shape[2], 0)).expand(n, -1, -1, -1)
                for part, n in zip(states.split(list(map(len, rows)), 2), copies)
            ]
        )
    else:
        logits = model(**inputs, **past, logits_to_keep=1).logits[:, -1]
        pad = lambda states: states
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(pad(layer.keys), pad(layer.values), room)
    return logits, cache, past
