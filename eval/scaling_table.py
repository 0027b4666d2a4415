"""The table of `make scaling`: what each size of the toy model reached, on each seed.

Reads   the numbers that `sft_rm_scale.py` and `rlhf_scaling_plot.py` have written beside their figures
Writes  <images>/scaling_table.md, and the same table into the documents that show it
"""

from dataclasses import dataclass
from pathlib import Path

import pandas
from hello_report import between_markers
from read_runs import rounded

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import write_whole

MEANS = {  # of the seeds
    "SFT ROUGE-L": "validation/sft/rouge/rougeL",
    "reward model accuracy, TL;DR": "eval/rm/validation/accuracy",
    "reward model accuracy, CNN/DM": "eval/rm/validation_cnndm/accuracy",
}


@dataclass
class Args:
    images: str = "eval/images"
    """folder of the figures and of their numbers"""
    document: str = "docs/results.md"
    """document that shows the table, between `<!-- TABLE -->` and `<!-- /TABLE -->`, where TABLE is its path"""


def scaling_table(finals: pandas.DataFrame, judged: pandas.DataFrame) -> str:
    """The table in Markdown, sizes from left to right.

    Args:
        finals: rows of `read_runs.COLUMNS`, of SFT and reward models.
        judged: such rows, of judged policies.
    """
    finals = finals[finals["kind"] == "final"]
    wins = judged[(judged["kind"] == "judge") & (judged["metric"] == "win_rate") & (judged["judge"] == "gold")]
    wins = wins[wins["update"].isna()].sort_values("seed")
    sizes = finals[finals["stage"] == "sft"].groupby("size")["parameters"].min().sort_values()
    seeds = finals["seed"].nunique()
    rows = [["", *(f"{size}, {rounded(parameters)}" for size, parameters in sizes.items())]]
    for name, metric in MEANS.items():
        values = finals[finals["metric"] == metric].groupby("size")["value"].mean()
        rows.append([f"{name}, mean of {seeds} seeds", *(f"{values[size]:.3f}" for size in sizes.index)])
    for stage in ("sft", "ppo"):
        of = [wins[(wins["stage"] == stage) & (wins["size"] == size)]["value"] for size in sizes.index]
        rows.append(
            [f"{stage.upper()} win rate, each seed", *(" ".join(map("{:.3f}".format, values)) for values in of)]
        )
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def main(args: Args) -> str:
    """Write the table; returns it."""
    names = ("sft_rm_scale.csv", "rlhf_scaling_plot.csv")
    try:
        table = scaling_table(*(pandas.read_csv(Path(args.images, name)) for name in names))
    except (OSError, ValueError, KeyError) as error:
        refuse("images", f"'{args.images}', which cannot be read ({error})", f"a folder with {' and '.join(names)}")
    written = Path(args.images, "scaling_table.md")
    write_whole(written, table)
    document = Path(args.document)
    if document.is_file():
        write_whole(document, between_markers(document.read_text(encoding="utf-8"), str(written), lambda _: table))
    print(f"{table}table: {written}", flush=True)
    return table


if __name__ == "__main__":
    command_line(main, Args)
