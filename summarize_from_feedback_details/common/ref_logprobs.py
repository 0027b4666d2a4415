"""Log-probabilities of comparisons by the reference policy, computed once and kept on disk for the next run."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from summarize_from_feedback_details.common.comparisons import read_split
from summarize_from_feedback_details.common.files import refuse_uncreatable, write_whole
from summarize_from_feedback_details.common.policies import ResponsePolicy
from summarize_from_feedback_details.common.run_files import weights_fingerprint
from summarize_from_feedback_details.common.training import lent


def folder_of(args: Any) -> Path:
    """--ref_logprobs_dir, or a folder beside the comparisons."""
    beside = args.label_dataset.rstrip("/") if os.path.isdir(args.label_dataset) else f"data/{args.label_dataset}"
    return Path(args.ref_logprobs_dir or f"{beside}_ref_logprobs")


def check_ref_logprobs(args: Any) -> None:
    """Refuse a folder that cannot be written."""
    refuse_uncreatable("ref_logprobs_dir", folder_of(args), "train_0123456789abcdef.npy")


def path_of(args: Any, split: str, rows: Any, precision: str) -> Path:
    """The file for these rows; its name changes with the model's weights, the precision and the rows' tokens."""
    model = weights_fingerprint(args.sft_model_path), args.sft_model_revision, precision
    digest = hashlib.sha256(repr(model).encode())
    rows = rows.with_format("numpy", columns=["query_token", "query_chosen_token", "query_rejected_token"])
    for start in range(0, len(rows), 1000):
        for column in rows[start : start + 1000].values():
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    return folder_of(args) / f"{split}_{digest.hexdigest()[:16]}.npy"


@torch.no_grad()
def find_ref_logprobs(
    accelerator: Any, reference: torch.nn.Module, rows: Any, split: str, pad_id: int, args: Any
) -> np.ndarray:
    """Log-probabilities of chosen and rejected by the reference policy: [rows, 2] nats, on every rank.

    Args:
        args: has `sft_model_path`, `sft_model_revision`, `label_dataset`, `ref_logprobs_dir` and
            `local_eval_batch_size`.
    """
    path = path_of(args, split, rows, accelerator.mixed_precision)
    kept = np.load(path) if accelerator.is_main_process and path.exists() else None
    kept = broadcast_object_list([kept])[0]
    if kept is not None:
        return kept
    with accelerator.autocast(), lent(reference, accelerator.device):
        found = read_split(ResponsePolicy(reference), rows, pad_id, args, f"SFT policy, {split}")
    if accelerator.is_main_process:
        np.save(content := io.BytesIO(), found)
        write_whole(path, content.getvalue())
        print(f"log-probabilities of the SFT policy: {path}", flush=True)
    return found
