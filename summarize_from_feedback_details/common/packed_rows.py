"""Rows of different lengths in one forward pass without a pad: one behind the other, each seeing itself only.

A batch of B rows becomes one row of all their tokens, [1, T1 + T2 + ...]. Everything that a transformer does to each
token by itself (projections, MLP, norms) then works on real tokens only; attention is the one place where rows must not
see each other, and transformers lets a model's attention be replaced. A piece may also stand behind an earlier one and
see it, too: a query that two responses share is read once ("Accelerating Direct Preference Optimization with Prefix
Sharing", arXiv 2410.20305).

Nothing here knows about RLHF. Architectures that do not let their attention be replaced read padded rows instead: the
same numbers, more work.
"""

from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple

import torch
import transformers  # whose parts are imported where they are used, and not for --help: half of its time

NAME = "packed"


class Varlen(NamedTuple):
    """What a kernel for rows of different lengths asks of P pieces."""

    query_starts: torch.Tensor  # [P + 1] where each piece begins among the tokens, and their number; int32
    key_starts: torch.Tensor  # [P + 1] where what it sees begins among the keys
    longest_query: int
    longest_key: int
    keys: torch.Tensor | None  # tokens whose keys these are, one behind the other; None: each once, in order


class Pieces(list):
    """Pieces of one packed row: (tokens, number of the earlier piece that it continues, or None) of each."""

    made: Varlen | None = None  # once for all layers

    def varlen(self, device: torch.device) -> Varlen:
        """For `varlen_attention`: each piece sees what it continues, if anything, and itself."""
        if self.made is not None:
            return self.made
        sizes = [size for size, _ in self]
        starts = [0, *accumulate(sizes)]
        seen = [size + (sizes[before] if before is not None else 0) for size, before in self]
        keys = None
        if seen != sizes:
            spans = [[*([] if before is None else [before]), i] for i, (_, before) in enumerate(self)]
            keys = [at for span in spans for i in span for at in range(starts[i], starts[i + 1])]
            keys = torch.tensor(keys, device=device)
        as_starts = lambda lengths: torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.made = Varlen(as_starts(sizes), as_starts(seen), max(sizes), max(seen), keys)
        return self.made


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    pieces: Pieces | None = None,
    **kwargs,
):
    """Causal attention within each piece, and from it to the piece that it continues; without `pieces`, plain SDPA.

    On a GPU all pieces are one call, where the kernel takes them (`takes_varlen`); else each is a call of its own.

    On a CPU, bf16 rows are converted to float32 for attention: torch's bf16 backward pass keeps 4 MB for each new
    length, and is slower than the conversion.

    Args:
        query, key, value: [1, heads, tokens of all pieces, head width].

    Returns:
        ([1, tokens, heads, head width], None), as transformers expects.
    """
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    if pieces is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    if query.device.type == "cpu" and query.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):  # which would convert them back
            wide = (states.float() for states in (query, key, value))
            out, weights = packed_attention(module, *wide, attention_mask, pieces, **kwargs)
        return out.to(query.dtype), weights
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # as it does itself for SDPA; rotary leaves float32
        query, key, value = (states.to(torch.get_autocast_dtype("cuda")) for states in (query, key, value))
    if takes_varlen(query, key, value):
        return varlen_attention(query, key, value, pieces, **kwargs), None
    sizes, window = [size for size, _ in pieces], kwargs.get("sliding_window")
    # a copy of its own lets go of a joint query-key-value projection, three times its size, before the backward pass
    queries, keys, values = (states.split(sizes, 2) for states in (query, key, value.contiguous()))
    out = []
    for i, (size, before) in enumerate(pieces):
        k, v, mask = keys[i], values[i], None  # no mask: causal, by the kernel that computes half of the scores
        earlier = sizes[before] if before is not None else 0
        if earlier:
            k, v = torch.cat([keys[before], k], 2), torch.cat([values[before], v], 2)
        if earlier or (window is not None and window < size):
            mask = torch.ones(1, 1, size, earlier + size, dtype=torch.bool, device=k.device).tril(earlier)
            if window is not None:
                mask = mask.triu(earlier - window + 1)
        out.append(sdpa(module, queries[i], k, v, mask, **kwargs)[0])
    return torch.cat(out, 1), None


def takes_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's kernel for rows of different lengths (FlashAttention) computes this: not in float32."""
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    same = query.dtype == key.dtype == value.dtype and query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    return same and value.shape[-1] == width <= 256 and width % 8 == 0


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Pieces, **kwargs
) -> torch.Tensor:
    """`packed_attention` as one call of `torch.nn.attention.varlen`: [1, tokens, heads, head width]."""
    from torch.nn.attention.varlen import varlen_attn

    if not isinstance(pieces, Pieces):  # DistributedDataParallel makes plain lists of them
        pieces = Pieces(pieces)
    asked, window = pieces.varlen(query.device), kwargs.get("sliding_window")
    value = value.contiguous()  # see `packed_attention`
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, head width]
    if asked.keys is not None:
        key, value = key[asked.keys], value[asked.keys]
    # the last token of a piece sees the last key, and so on: (tokens seen before it, and after it)
    out = varlen_attn(
        query, key, value, asked.query_starts, asked.key_starts, asked.longest_query, asked.longest_key,
        scale=kwargs.get("scaling"), window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[None]


def supports_packing(model: torch.nn.Module) -> bool:
    """Whether `use_packed_attention` found that this model reads packed rows."""
    return getattr(model.config, "_attn_implementation", None) == NAME


@torch.no_grad()
def use_packed_attention(model: torch.nn.Module) -> bool:
    """Let a freshly loaded model read packed rows, if its architecture does so exactly; returns whether it does.

    Tried on a few tokens: two rows of different lengths, and two more that continue a third. A model that reads no
    padded rows either ends the program.
    """
    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    masks.register(NAME, masks["sdpa"])  # of padded rows
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each length anew, for tens of milliseconds
    before, was_training = model.config._attn_implementation, model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            # no row holds a pad; the one of the config may be the end-of-text token, whose embedding is trained, too
            module.padding_idx = None
    trunk, device = getattr(model, model.base_model_prefix, model), next(model.parameters()).device
    a, b, c = (list(range(1, 1 + n)) for n in (5, 9, 3))
    read = lambda inputs: trunk(**inputs, use_cache=False).last_hidden_state[0]
    try:
        alone = [read(pack_pieces([(row, None)], device, packed=False)) for row in (c, b, a + b, a + c)]
        expected = torch.cat([*alone[:3], alone[3][len(a) :]])
        model.set_attn_implementation(NAME)
        found = read(pack_pieces([(c, None), (b, None), (a, None), (b, 2), (c, 2)], device))
        tolerance = 1e-3 if found.dtype == torch.float32 else 0.05
        same = supports_packing(model) and bool((found - expected).abs().max() <= tolerance * expected.abs().max())
    except Exception:  # whatever an architecture raises that takes no `pieces`, or needs more than SDPA can do
        same = False
    if not same:
        model.set_attn_implementation(before)
        try:
            trunk(**pack_rows([b, c], False, device)[0], use_cache=False)
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise SystemExit(f"error: a {type(model).__name__} that cannot read rows of token ids ({why})") from None
    model.train(was_training)
    return same


def pack_pieces(pieces: list[tuple[list[int], int | None]], device: torch.device, packed: bool = True) -> dict:
    """Pieces, [(token ids, number of the earlier piece that it continues, or None)] -> inputs of a model."""
    positions = []
    for tokens, before in pieces:
        first = len(pieces[before][0]) if before is not None else 0
        positions += range(first, first + len(tokens))
    inputs = {
        "input_ids": torch.tensor([[token for tokens, _ in pieces for token in tokens]], device=device),
        "position_ids": torch.tensor([positions], device=device),
    }
    if packed:
        inputs["pieces"] = Pieces((len(tokens), before) for tokens, before in pieces)
        # a mask of four dimensions is left alone by transformers, which else would look for rows in the positions
        inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=device)
    return inputs


def pack_shared(
    heads: list[list[int]], tails: list[list[int]], device: torch.device
) -> tuple[dict, list[int], list[int]]:
    """Rows of a head and a tail, one behind the other; neighbours with the same head read it once.

    Args:
        heads: B lists of token ids; an empty one is shared by nobody.
        tails: B lists of token ids, none of them empty where its head is shared.

    Returns:
        (inputs of a model, [B] numbers of the heads' last tokens in its output, [B] numbers of the tails' first ones).
    """
    pieces, ends, firsts, total = [], [], [], 0
    for head, rows in groupby(zip(heads, tails), key=itemgetter(0)):
        rows = [tail for _, tail in rows]
        shared = len(pieces) if head and len(rows) > 1 else None
        if shared is not None:
            pieces.append((head, None))
            total += len(head)
        end = total - 1
        for tail in rows:
            piece = tail if shared is not None else head + tail
            pieces.append((piece, shared))
            total += len(piece)
            firsts.append(total - len(tail))
            ends.append(end if shared is not None else firsts[-1] - 1)
    return pack_pieces(pieces, device), ends, firsts


def pack_rows(rows: list[list[int]], packed: bool, device: torch.device) -> tuple[dict, list[int]]:
    """Rows of token ids -> (inputs of a model, number of each row's first token in its output, flattened).

    Args:
        rows: B lists of token ids, without pads.
        packed: one behind the other; otherwise [B, T] with pads on the right, masked, id 0.
    """
    if packed:
        starts = [0]
        for row in rows[:-1]:
            starts.append(starts[-1] + len(row))
        return pack_pieces([(row, None) for row in rows], device), starts
    T = max(map(len, rows))
    padded = lambda values: torch.tensor([[*v, *[0] * (T - len(v))] for v in values], device=device)
    inputs = {
        "input_ids": padded(rows),
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "position_ids": padded([range(len(row)) for row in rows]),
    }
    return inputs, [i * T for i in range(len(rows))]


def logits_at(model: torch.nn.Module, inputs: dict, at: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of a causal language model at these positions [N] of its flattened output."""
    if "pieces" in inputs:
        # flattened, not indexed: the gradient of an index would be a second copy of the logits
        return model(**inputs, logits_to_keep=at, use_cache=False).logits.flatten(0, 1)
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[at]


def hidden_at(model: torch.nn.Module, inputs: dict, at: torch.Tensor) -> torch.Tensor:
    """Last hidden states [N, D] at these positions [N] of the flattened output, after the final norm."""
    trunk = getattr(model, model.base_model_prefix)
    return trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[at]
