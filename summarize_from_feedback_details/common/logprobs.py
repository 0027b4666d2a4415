"""Log-probabilities of the tokens of responses, and means over real tokens.

Dimensions: B rows, R response tokens, N real tokens of all rows, V vocabulary.
"""

from typing import Any

import torch

from summarize_from_feedback_details.common.packed_rows import logits_at, pack_rows, pack_shared, supports_packing

INVALID_LOGPROB = 1.0  # stands at positions without a real token; masked wherever numbers are taken


def response_positions(
    model: torch.nn.Module, queries: list[list[int]], responses: list[list[int]], counts: list[int]
) -> tuple[dict, torch.Tensor]:
    """Inputs of a model, and the positions in its output before the first `counts` tokens of each response.

    A model that reads packed rows reads a query once that neighbours have in common: k responses to a query of 300
    tokens are 300 + 50 k tokens, not 350 k.
    """
    device = next(model.parameters()).device
    if supports_packing(model):
        inputs, ends, firsts = pack_shared(queries, responses, device)
    else:
        inputs, starts = pack_rows([q + r for q, r in zip(queries, responses)], False, device)
        firsts = [start + len(q) for start, q in zip(starts, queries)]
        ends = [first - 1 for first in firsts]
    before = [[end, *range(first, first + n - 1)][:n] for end, first, n in zip(ends, firsts, counts)]
    return inputs, torch.tensor([i for each in before for i in each], device=device)


def response_logits(
    policy: torch.nn.Module, queries: list[list[int]], responses: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] that predict the N tokens of the responses, and these tokens [N]."""
    inputs, before = response_positions(policy, queries, responses, list(map(len, responses)))
    return logits_at(policy, inputs, before), torch.tensor([i for r in responses for i in r], device=before.device)


class TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float):
        logprobs, totals = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        for part in row_slices(logits):
            scaled = logits[part].float() / temperature
            totals[part] = scaled.logsumexp(-1)
            logprobs[part] = scaled.gather(1, targets[part, None])[:, 0] - totals[part]
        ctx.save_for_backward(logits, targets, totals)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        logits, targets, totals = ctx.saved_tensors
        grad = grad / ctx.temperature
        for part in row_slices(logits):
            softmax = (logits[part].float() / ctx.temperature).sub_(totals[part, None]).exp_()
            gradient = softmax.mul_(-grad[part, None])
            gradient.scatter_add_(1, targets[part, None], grad[part, None])
            logits[part] = gradient.to(logits.dtype)
        return logits, None, None


def row_slices(logits: torch.Tensor) -> list[slice]:
    """Slices of rows of [N, V] logits, so small that the intermediate results of one stay in the cache of a CPU."""
    rows = max(1, 2 ** (20 if logits.device.type == "cpu" else 27) // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of tokens at this temperature: [N, V], [N] -> [N] nats.

    The same as `-F.cross_entropy(logits.float() / temperature, targets, reduction="none")`, without its three copies of
    the logits: the backward pass writes their gradient over them, so it can be run only once.
    """
    # Detail: temperature - divides the logits of old, new and reference log-probs alike
    return TokenLogprobs.apply(logits, targets, temperature)


@torch.no_grad()
def token_entropies(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy of each next-token distribution: [N, V] -> [N] nats."""
    entropies = torch.empty(len(logits), device=logits.device)
    for part in row_slices(logits):
        logprobs = (logits[part].float() / temperature).log_softmax(-1)
        entropies[part] = -(logprobs.exp() * logprobs).sum(-1)
    return entropies


def scatter_tokens(values: torch.Tensor, mask: torch.Tensor, fill: float) -> torch.Tensor:
    """Numbers of real tokens, one row behind the other, to their places: [N], [B, R] with N True -> [B, R]."""
    return torch.full(mask.shape, fill, device=mask.device).masked_scatter(mask, values.float())


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values where `mask` is True: [...], [...] -> []."""
    return (values * mask).sum() / mask.sum()


def masked_var(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Variance of the values where `mask` is True: [...], [...] -> []."""
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * mask.sum() / (mask.sum() - 1) if unbiased else variance


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Values with variance 1 (biased estimate) and, with `shift_mean`, mean 0 over `mask`: [...] -> [...]."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask, unbiased=False) + 1e-8)
    return whitened if shift_mean else whitened + mean
