"""Log-probabilities of comparisons by the reference policy, computed once and kept on disk for the next run."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from summarize_from_feedback_details.common.comparisons import read_split
from summarize_from_feedback_details.common.files import refuse_uncreatable
from summarize_from_feedback_details.common.policies import ResponsePolicy
from summarize_from_feedback_details.common.training import lent


def folder_of(args: Any) -> Path:
    """--ref_logprobs_dir, or a folder beside the comparisons."""
    beside = args.label_dataset.rstrip("/") if os.path.isdir(args.label_dataset) else f"data/{args.label_dataset}"
    return Path(args.ref_logprobs_dir or f"{beside}_ref_logprobs")


def check_ref_logprobs(args: Any) -> None:
    """Refuse a folder that cannot be written."""
    refuse_uncreatable("ref_logprobs_dir", folder_of(args), "train_0123456789abcdef.npy")


def path_of(args: Any, split: str, rows: Any, reference: torch.nn.Module, how: str) -> Path:
    """The file for these rows; its name changes with their tokens, the weights, and how the model computes."""
    digest = hashlib.sha256(how.encode())
    for name, weight in reference.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)]
        digest.update(f"{name} {weight.dtype}".encode() + some.float().cpu().numpy().tobytes())
    columns = ["query_token", "query_chosen_token", "query_rejected_token"]
    rows = rows.with_format("numpy", columns=columns)
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for column in columns:
            digest.update(np.ascontiguousarray(part[column], dtype=np.int64).tobytes())
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
    kept = None
    if accelerator.is_main_process:
        how = f"{accelerator.mixed_precision} {accelerator.distributed_type == 'DEEPSPEED'}"
        path = path_of(args, split, rows, reference, how)
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or torn
            kept = np.load(path)
            kept = kept if kept.shape == (len(rows), 2) and np.isfinite(kept).all() else None
    kept = broadcast_object_list([kept])[0]
    if kept is not None:
        return kept
    with accelerator.autocast(), lent(reference, accelerator.device):
        found = read_split(ResponsePolicy(reference), rows, pad_id, args, f"SFT policy, {split}")
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")  # another run may write the same file
        np.save(partial, found)
        partial.replace(path)
        print(f"log-probabilities of the SFT policy: {path}", flush=True)
    return found
