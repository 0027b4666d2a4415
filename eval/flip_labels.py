"""Fewer and worse comparisons: the first so many of a tokenised dataset, a share of their labels the wrong way round.

Reads   tokenised comparisons (`tldr_dataset.py`)
Writes  a copy in --output_dir; the validation splits are not changed
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from summarize_from_feedback_details.common.arguments import check_sizes, command_line, refuse
from summarize_from_feedback_details.common.check_inputs import load_rows
from summarize_from_feedback_details.common.files import atomic_folder, refuse_uncreatable


@dataclass
class Args:
    label_dataset: str
    """tokenised comparisons: folder or hub id"""
    output_dir: str
    """folder of the copy"""
    pairs: int = 2000
    """pairs of the split train"""
    flipped: float = 0.3
    """share of them whose chosen and rejected summaries change places"""
    seed: int = 1
    """which pairs"""


def flip(rows, chosen: set[int]):
    """The dataset with chosen and rejected exchanged in some rows."""
    names = {name: name.replace("chosen", "rejected") for name in rows.column_names if "chosen" in name}
    names |= {other: name for name, other in names.items()}

    def exchange(row: dict, number: int) -> dict:
        return {name: row[names[name]] for name in names} if number in chosen else {name: row[name] for name in names}

    return rows.map(exchange, with_indices=True)


def main(args: Args) -> None:
    """Write the copy."""
    check_sizes(args, positive=("pairs",), at_least_zero=("seed",), shares=("flipped",))
    if Path(args.output_dir).exists():
        refuse("output_dir", f"'{args.output_dir}', which is there already", "a new folder")
    refuse_uncreatable("output_dir", args.output_dir)
    needed = ["query_token", "query_chosen_token", "query_rejected_token"]
    optional = ["validation?", "validation_cnndm?"]
    splits = load_rows("label_dataset", args.label_dataset, None, "comparisons", needed, ["train", *optional])
    if args.pairs > len(splits["train"]):
        refuse("pairs", str(args.pairs), f"at most {len(splits['train'])}, those of '{args.label_dataset}'")
    order = np.random.default_rng(args.seed).permutation(args.pairs)
    chosen = set(order[: round(args.flipped * args.pairs)].tolist())
    splits["train"] = flip(splits["train"].select(range(args.pairs)), chosen)
    with atomic_folder(args.output_dir) as folder:
        (folder / "data").mkdir()
        for split, rows in splits.items():
            rows.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))
    print(f"{args.pairs} pairs, {len(chosen)} of them flipped: {args.output_dir}", flush=True)


if __name__ == "__main__":
    command_line(main, Args)
