"""Who samples in training: the policy itself, or an engine that its weights are handed to, and what this changes.

An engine is a function that takes a policy and gives a sampler with the meaning of `sample_responses`: queries in,
responses and their log-probabilities out. Its weights or arithmetic are its own, so that it draws from a distribution
that is not quite the policy's. The policy then reads the responses again, and what is learned from a token is weighted
by the ratio of the two probabilities.

Dimensions: B episodes, R response tokens.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from summarize_from_feedback_details.common.arguments import refuse
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.decoding import Decoder
from summarize_from_feedback_details.common.sampling import model_inputs, sample, sample_responses

LARGEST_WEIGHT = 2.0


@contextmanager
def refuse_model(engine: str, word: str) -> Iterator[None]:
    """Errors with this word say that a model cannot be sampled from by this engine."""
    try:
        yield
    except RuntimeError as error:
        if word not in str(error):
            raise
        reason = str(error).split("\n")[0]
        refuse("rollout_engine", f"'{engine}' and a model that it cannot sample from ({reason})", "hf")


def cast_copy(policy: torch.nn.Module) -> Callable:
    """The policy in bf16: half of the bytes that decoding reads for each token. Given back after each rollout."""
    cast = {
        id(parameter): torch.nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
        for parameter in policy.parameters()
    }
    twin = copy.deepcopy(policy, cast)

    def sample_from_copy(*given):
        with refuse_model("hf_bf16", "dtype"):
            return sample_responses(twin, *given)

    return sample_from_copy


@torch.no_grad()
def replay(
    policy: torch.nn.Module, queries: Tensor, keys: Tensor, ids: TokenIds, response_length: int, temperature: float
):
    """`sample_responses`, decoding as a CUDA graph; on a CPU what such a graph would replay."""
    decoder = Decoder(policy, model_inputs(queries, ids.pad), response_length, capture=True)
    with refuse_model("hf_graph", "captur"):
        return sample(decoder, keys, ids, temperature)


# another engine, e.g. a vLLM in the same process, is one more function here and its name in the scripts' `Literal`
ENGINES = {
    "hf": lambda policy: partial(sample_responses, policy),
    "hf_graph": lambda policy: partial(replay, policy),
    "hf_bf16": cast_copy,
}
THE_POLICY = ("hf", "hf_graph")  # its own weights and arithmetic


def is_another(args: Any) -> bool:
    """Whether responses are drawn from another distribution than the policy's; never in evaluation."""
    return getattr(args, "rollout_engine", "hf") not in THE_POLICY


def refuse_engine(args: Any, accelerator: Any) -> None:
    """An engine that would gain nothing, or cannot get the weights."""
    plugin, engine = accelerator.state.deepspeed_plugin, getattr(args, "rollout_engine", "hf")
    if engine == "hf_bf16" and accelerator.mixed_precision == "bf16":
        refuse("rollout_engine", "'hf_bf16' with --precision bf16", "hf, which then samples in bf16")
    if engine != "hf" and plugin is not None and plugin.zero_stage == 3:
        refuse("rollout_engine", f"'{engine}' under ZeRO-3", "hf, or ZeRO-2")


def importance_weights(args: Any, logprobs: Tensor, sampled: Tensor) -> Tensor:
    """Truncated importance sampling: min(policy / engine, 2), by which the gain of an action is multiplied.

    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training". 2 is a usual bound.

    Args:
        logprobs, sampled: of the same actions by the policy and by the engine that drew them, nats, of any shape.

    Returns:
        weights of that shape, without gradients; all 1 where the policy itself has sampled.
    """
    if not is_another(args):
        return torch.ones_like(logprobs)
    return torch.exp((logprobs - sampled).detach()).clamp(max=LARGEST_WEIGHT)


def mismatch_metrics(
    args: Any, logprobs: Tensor, sampled: Tensor, mask: Tensor, weights: Tensor | None = None
) -> dict[str, float]:
    """How far an engine is from the policy, over the real tokens; nothing where the policy itself has sampled.

    Args:
        logprobs, sampled, mask: [B, R].
        weights: the importance weights of actions that are not tokens.
    """
    if not is_another(args):
        return {}
    difference = (sampled - logprobs)[mask]
    weights = importance_weights(args, -difference, torch.zeros_like(difference)) if weights is None else weights
    return {
        "engine/kl": float((torch.expm1(-difference) + difference).mean()),  # k3 of engine to policy, nats per token
        "engine/largest_difference": float(difference.abs().max()),  # nats
        "engine/truncated": float((weights >= LARGEST_WEIGHT).float().mean()),  # share of actions
    }
