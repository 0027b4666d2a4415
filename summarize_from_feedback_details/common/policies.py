"""Policies: loading a causal language model to train, to sample from, or to compare with."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from summarize_from_feedback_details.common.adapters import add_adapter, copy_trained, share_weights
from summarize_from_feedback_details.common.check_inputs import refuse_bad_weights
from summarize_from_feedback_details.common.logprobs import response_logits, token_logprobs
from summarize_from_feedback_details.common.packed_rows import use_packed_attention
from summarize_from_feedback_details.common.training import disable_dropout


def load_policy(argument: str, path: str, revision: str | None = None, dtype: torch.dtype = torch.float32):
    """A causal language model, without dropout, that reads packed rows where its architecture can.

    Args:
        argument: the argument's name, for messages.
        path: folder or hub id.
        revision: hub revision, or None; a folder has none.
    """
    model, loaded = AutoModelForCausalLM.from_pretrained(
        path, revision=None if os.path.isdir(path) else revision, dtype=dtype, output_loading_info=True
    )
    refuse_bad_weights(argument, path, loaded["missing_keys"], model)
    disable_dropout(model)
    use_packed_attention(model)
    return model


def load_policy_and_reference(args: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the policy to train, the reference policy), both the SFT policy at the start; its weights are read once.

    Args:
        args: has `sft_model_path`, `sft_model_revision`, `lora` and `lora_params`.
        dtype: precision of the weights.
    """
    path, revision = args.sft_model_path, args.sft_model_revision
    policy = load_policy("sft_model_path", path, revision, dtype)
    if not args.lora:
        return policy, copy_trained(policy)
    reference = share_weights(policy)  # the trunk alone
    add_adapter(policy, args.lora_params, path, revision)
    return policy, reference


class ResponsePolicy(torch.nn.Module):
    """A causal language model that is asked for log-probabilities of responses."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, queries: list[list[int]], responses: list[list[int]], temperature: float) -> torch.Tensor:
        """Log-probabilities [N] of the N tokens of the responses, one row behind the other, in nats."""
        return token_logprobs(*response_logits(self.model, queries, responses), temperature)
