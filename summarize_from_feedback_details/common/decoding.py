"""One more token of each row at a time, over a cache of keys and values.

Dimensions: B rows, b of them that are read still, Q query tokens, R response tokens, T = Q + R, V vocabulary.
"""

import inspect
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from summarize_from_feedback_details.common.packed_rows import pack_rows, supports_packing


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, [B, heads, tokens, head width], with room behind them: more are written in place.

    transformers' own layer copies all of them for each token that is added.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = [F.pad(states, (0, 0, 0, room)) for states in (keys, values)]
        self.keys, self.values = (states[:, :, : keys.shape[2]] for states in self.room)
        self.place: torch.Tensor | None = None  # [1] where the next token goes; then all of the room is read, masked

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.place is not None:
            for states, more in zip(self.room, (key_states, value_states)):
                states.index_copy_(2, self.place, more)
            return self.room
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for states, more in zip(self.room, (key_states, value_states)):
            states[:, :, begin:end] = more
        self.keys, self.values = (states[:, :, :end] for states in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.room = [states[indices] for states in self.room]
        self.keys, self.values = (states[:, :, : self.keys.shape[2]] for states in self.room)


# other layers may hold more than keys and values
ROWS_CAN_LEAVE = {RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer}


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


class Decoder:
    """Reads left-padded queries, and then one more token of each row at a time.

    Args:
        model: a causal language model, in eval mode.
        inputs: `input_ids`, `attention_mask`, `position_ids`, [B, Q] each.
        room: R, tokens that will be read at most.
        capture: read with fixed shapes at fixed places: the whole room behind the queries, of which what is not written
            yet is masked. On CUDA this is captured once as a graph and replayed for each token, so that Python and
            launches cost nothing. No row leaves. Models that are not read packed, or have sliding windows, decode as
            without it.

    Attributes:
        logits: [B, V] that predict the first token.
    """

    def __init__(self, model: torch.nn.Module, inputs: dict, room: int, capture: bool = False):
        self.model, self.room, queries = model, room, inputs["attention_mask"]
        self.logits, self.cache, self.past = read_queries(model, inputs, room)
        self.mask = F.pad(queries, (0, room), value=1)  # [b, T]
        self.positions = inputs["position_ids"][:, -1:].clone()  # [b, 1] of the last token that was read
        self.length = queries.shape[1]  # tokens of a row so far
        # transformers asks of each mask whether all of it is True, and a GPU is waited for; not of one in its own shape
        layers = set(map(type, self.cache.layers))
        self.finished = supports_packing(model) and layers == {RoomyLayer}
        self.capture = capture and self.finished
        self.rows_can_leave = layers <= ROWS_CAN_LEAVE and not self.capture
        if self.capture:
            self.graph: torch.cuda.CUDAGraph | None = None
            self.tokens = torch.empty_like(self.positions)  # [b, 1]
            self.place = torch.tensor([self.length], device=self.mask.device)
            self.written = F.pad(self.mask[:, : self.length], (0, self.mask.shape[1] - self.length))
            self.written = self.written[:, None, None].bool()  # [b, 1, 1, T]
            for layer in self.cache.layers:
                layer.place = self.place

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows from now on."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def __call__(self, drawn: torch.Tensor) -> torch.Tensor:
        """The last tokens [b] -> logits [b, V] that predict the next ones."""
        self.length += 1
        self.positions += 1
        if self.capture:
            self.tokens.copy_(drawn[:, None])
            self.written.index_fill_(3, self.place, True)
            logits = self.replay() if drawn.is_cuda else self.read(self.tokens, self.written)
            self.place += 1
            return logits
        mask = self.mask[:, : self.length]
        return self.read(drawn[:, None], mask[:, None, None].bool() if self.finished else mask)

    def read(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": self.positions}
        return self.model(**inputs, **self.past).logits[:, -1]

    def replay(self) -> torch.Tensor:
        if self.graph is None:
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # what is made at a first call is not captured; the token is written again
                self.read(self.tokens, self.written)
            here.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.replayed = self.read(self.tokens, self.written)
        self.graph.replay()
        return self.replayed
