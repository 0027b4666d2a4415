"""Policies: loading a causal language model to train, to sample from, or to compare with."""

import os

import torch
from transformers import AutoModelForCausalLM

from summarize_from_feedback_details.common.check_inputs import refuse_bad_weights
from summarize_from_feedback_details.common.packed_rows import use_packed_attention
from summarize_from_feedback_details.common.training import disable_dropout


def load_policy(argument: str, path: str, revision: str | None = None):
    """A causal language model in float32, without dropout, that reads packed rows where its architecture can.

    Args:
        argument: the argument's name, for messages.
        path: folder or hub id.
        revision: hub revision, or None; a folder has none.
    """
    model, loaded = AutoModelForCausalLM.from_pretrained(
        path, revision=None if os.path.isdir(path) else revision, dtype=torch.float32, output_loading_info=True
    )
    refuse_bad_weights(argument, path, loaded["missing_keys"], model)
    disable_dropout(model)
    use_packed_attention(model)
    return model
