"""Gumbel noise from a counter: that of one token is a function of (seed, episode, position, vocabulary id).

The same words on CPU and GPU, for any batch, without a state and without a loop over rows. The mixers are published
bijections of whole words: SplitMix64 (Steele, Lea and Flood, 2014) for keys, "lowbias32" (Wellons, Prospecting for Hash
Functions, 2018) for what is done once per vocabulary id.

Dimensions: B rows, V vocabulary.
"""

import torch

NOISE = "of a counter, 1"  # a run that has begun with other noise is not gone on with
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: steps of a counter that fall apart


def signed(constant: int, bits: int) -> int:
    """The same bits as torch's signed integers hold them; their products and sums wrap around."""
    return constant - (1 << bits) if constant >> (bits - 1) else constant


def xor_shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """In place, x ^ (x >> by), with zeros coming in from the left."""
    bits = torch.iinfo(x.dtype).bits
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (bits - by)) - 1))


def mix64(x: torch.Tensor) -> torch.Tensor:
    """int64 of any shape -> the same shape; in place."""
    xor_shift(x, 30).mul_(signed(0xBF58476D1CE4E5B9, 64))
    xor_shift(x, 27).mul_(signed(0x94D049BB133111EB, 64))
    return xor_shift(x, 31)


def episode_keys(seed: int, episodes: list[int], device: torch.device) -> torch.Tensor:
    """One key per episode: int64 [B]."""
    numbers = torch.tensor([int(i) for i in episodes], dtype=torch.int64, device=device)
    start = mix64(torch.tensor([signed((seed + 1) * GOLDEN % 2**64, 64)], device=device))
    return mix64(numbers.add_(1).mul_(signed(GOLDEN, 64)).add_(start))


def gumbel_noise(keys: torch.Tensor, position: int, V: int) -> torch.Tensor:
    """Independent standard Gumbel numbers for all ids at one position: int64 [B] -> float32 [B, V].

    argmax(logits + noise) is then a draw from softmax(logits). The largest that can occur is 22.2.
    """
    keys = mix64(keys + signed((position + 1) * GOLDEN % 2**64, 64))
    first, second = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    x = torch.arange(V, dtype=torch.int32, device=keys.device).mul_(signed(0x9E3779B1, 32)) + first
    # a word has 32 bits and a key 64: half of it comes in between, else rows would repeat each other, shifted
    xor_shift(x, 16).mul_(0x7FEB352D).add_(second)
    xor_shift(x, 15).mul_(signed(0x846CA68B, 32))
    xor_shift(x, 16).bitwise_and_(2**31 - 1)
    # (0, 1), never 1; finest near 0, where the numbers are that win
    uniform = x.float().add_(0.5).mul_((1 - 2**-24) / 2**31)
    return uniform.neg_().log1p_().neg_().log_().neg_()
