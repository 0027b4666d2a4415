"""The table of `make scaling`: what each size of the toy model reached, and what the largest gained over the smallest.

Reads   the numbers that `sft_rm_scale.py` and `rlhf_scaling_plot.py` have written beside their figures
Writes  <images>/scaling_table.md, and the same table into the documents that show it
"""

from dataclasses import dataclass
from pathlib import Path

import pandas
from hello_report import between_markers
from read_runs import rounded
from scipy import stats

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import write_whole

SHOWN = {  # name -> (stage, metric)
    "SFT: ROUGE-L": ("sft", "validation/sft/rouge/rougeL"),
    "reward model: accuracy": ("reward", "eval/rm/validation/accuracy"),
    "reward model: accuracy, CNN/DM": ("reward", "eval/rm/validation_cnndm/accuracy"),
    "SFT: gold score": ("sft", "mean_score"),
    "PPO: gold score": ("ppo", "mean_score"),
    "SFT: gold win rate": ("sft", "win_rate"),
    "PPO: gold win rate": ("ppo", "win_rate"),
}


@dataclass
class Args:
    images: str = "eval/images"
    """folder of the figures and of their numbers"""
    document: str = "docs/results.md"
    """document that shows the table, between `<!-- TABLE -->` and `<!-- /TABLE -->`, where TABLE is its path"""


def seeds_interval(values: pandas.Series) -> str:
    """Mean and 95 % interval (Student's t) of one value a seed; of one seed the value alone."""
    if len(values) < 2:
        return f"{values.mean():.3f}"
    mean, half = values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def scaling_table(finals: pandas.DataFrame, judged: pandas.DataFrame) -> str:
    """The table in Markdown, sizes from left to right; the last column compares the ends seed by seed.

    Args:
        finals: rows of `read_runs.COLUMNS`, of SFT and reward models.
        judged: such rows, of judged policies.
    """
    finals = finals[finals["kind"] == "final"]
    judged = judged[(judged["kind"] == "judge") & (judged["judge"] == "gold") & judged["update"].isna()]
    numbers = pandas.concat([finals, judged])
    sizes = finals[finals["stage"] == "sft"].groupby("size")["parameters"].min().sort_values()
    seeds, ends = finals["seed"].nunique(), (sizes.index[-1], sizes.index[0])
    rows = [[f"mean of {seeds} seeds (95 % interval)", *(f"{size}, {rounded(n)}" for size, n in sizes.items())]]
    rows[0].append(" minus ".join(ends))
    for name, (stage, metric) in SHOWN.items():
        found = numbers[(numbers["stage"] == stage) & (numbers["metric"] == metric)]
        of = found.pivot(index="seed", columns="size", values="value")
        rows.append([name, *(seeds_interval(of[size].dropna()) for size in sizes.index)])
        rows[-1].append(seeds_interval((of[ends[0]] - of[ends[1]]).dropna()))
    lines = [f"| {' | '.join(row)} |" for row in rows]
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
