"""What a chain of stages reached: a table, its numbers as CSV, and the training curves as a figure.

Reads   runs/<chain>_{sft,reward,ppo} of one or several chains (`hello_world.sh` makes them); with --raw_dirs also the
        toy world's raw rows and what its annotator found (`eval/judge.py`)
Writes  eval/reports/<name>.{csv,md,png}; the numbers of this report that the README and docs/results.md show

    python eval/hello_report.py --chains toy_small_seed1 --raw_dirs data/toy_small_seed1_raw
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from read_runs import number, read_folder
from rich.table import Table

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.console import print_table
from summarize_from_feedback_details.common.figures import drawing, new_figure, save_figure
from summarize_from_feedback_details.common.files import refuse_uncreatable, write_whole
from summarize_from_feedback_details.toy_tldr import annotator_ceiling, blind_accuracy

STAGES = ("sft", "reward", "ppo")
CURVES = {  # title of a panel: (stage, metric)
    "SFT: loss": ("sft", "train/sft/loss"),
    "Reward model: accuracy": ("reward", "train/rm/accuracy"),
    "PPO: score of the reward model": ("ppo", "objective/scores"),
    "PPO: KL to the SFT policy (nats per response)": ("ppo", "objective/kl"),
    "PPO: response length (tokens)": ("ppo", "objective/response_length"),
    "PPO: responses that end (share)": ("ppo", "objective/eos_rate"),
}
# a run of an older version may lack some of them: they are shown as "-"
WANTED = ("update", "objective/kl", "objective/kl_k3", "objective/kl_standard_error", "objective/eos_rate",
          "policy/first_pass_ratio_error")  # fmt: skip


@dataclass
class Args:
    chains: tuple[str, ...]
    """chains to report, e.g. `toy_small_seed1`: their runs are `runs/<chain>_sft` and so on"""
    raw_dirs: tuple[str, ...] = ()
    """for toy chains, the folder of raw rows of each"""
    ppo: str = "ppo"
    """the chain's PPO run: `runs/<chain>_<ppo>`, e.g. `kl0.2_ppo`"""
    runs_dir: str = "runs"
    """folder of the runs"""
    output_dir: str = "eval/reports"
    """folder of the report"""
    name: str | None = None
    """name of the report (default: the first chain)"""
    documents: tuple[str, ...] = ("README.md", "docs/results.md")
    """documents that show numbers of this report, between `<!-- REPORT.md -->` and `<!-- /REPORT.md -->`, where
    REPORT.md is the report's path: the numbers there are replaced"""


def read_run(path: Path) -> dict:
    """A run as `read_runs.read_folder` gives it, with its `lines` as a table of numbers that has every `WANTED` one."""
    run = read_folder(path)
    if run["state"] == "unreadable":
        refuse("chains", f"'{path}', which cannot be read ({run['reason']})", "a run whose files are whole")
    lines = pandas.DataFrame(run["lines"]).apply(pandas.to_numeric, errors="coerce")
    return run | {"lines": lines.reindex(columns=[*lines.columns, *(name for name in WANTED if name not in lines)])}


def read_judge(run: Path) -> dict[str, float]:
    """What the toy world's annotator found (`judge.py`): gold score, win rate, that at equal length; intervals."""
    report = json.loads((run / "judge/gold/report.json").read_text())
    gold = pandas.read_parquet(run / "judge/gold/verdicts.parquet")["score"]
    found = lambda name, key="mean": number((report.get(name) or {}).get(key))
    ends = (("", "mean"), ("_low", "low"), ("_high", "high"))
    return {"gold": gold.mean(), "gold_se": gold.std(ddof=1) / math.sqrt(len(gold)),
            **{f"win_rate{end}": found("win_rate", key) for end, key in ends},
            **{f"win_rate_at_equal_length{end}": found("length_controlled_win_rate", key) for end, key in ends},
            "reference_gold": found("reference_mean_score"), "invented": found("invented")}  # fmt: skip


def read_gain(sft: Path, ppo: Path) -> dict[str, float]:
    """What PPO gained over SFT, post by post: gold score in standard errors of its mean difference, and win rate."""
    gold = [pandas.read_parquet(run / "judge/gold/verdicts.parquet") for run in (sft, ppo)]
    if not gold[0]["query"].equals(gold[1]["query"]):
        refuse("chains", f"{sft.name} and {ppo.name}, judged on other posts", "both judged by the same command")
    gain = gold[1]["score"] - gold[0]["score"]
    row = {"gain_in_standard_errors": gain.mean() / (gain.std(ddof=1) / math.sqrt(len(gain)))}
    paired = ppo / f"judge/gold_against_{sft.name}/report.json"
    if paired.exists() and (difference := json.loads(paired.read_text()).get("win_rate_difference")):
        ends = (("", "mean"), ("_low", "low"), ("_high", "high"))
        row |= {f"win_rate_gain{end}": difference[key] for end, key in ends}
    return row


def report_chain(chain: str, ppo_run: str, runs_dir: str, raw_dir: str | None) -> tuple[dict[str, float], dict]:
    """All numbers of a chain, and its runs: stage -> run."""
    folders = {stage: Path(runs_dir) / f"{chain}_{ppo_run if stage == 'ppo' else stage}" for stage in STAGES}
    runs = {stage: read_run(folder) for stage, folder in folders.items()}
    final = {stage: run["final"] for stage, run in runs.items()}
    training = runs["ppo"]["lines"].dropna(subset="objective/kl")
    later, last = training.iloc[1:], training.tail(1).mean()
    row = {
        "sft/rougeL": final["sft"].get("validation/sft/rouge/rougeL"),
        "sft/rougeL_shuffled": final["sft"].get("validation/shuffled_references/rouge/rougeL"),
        "rm/accuracy": final["reward"].get("eval/rm/validation/accuracy"),
        "rm/accuracy_cnndm": final["reward"].get("eval/rm/validation_cnndm/accuracy"),
        "ppo/score": final["ppo"].get("eval/ppo/validation/score"),
        "ppo/reference_score": final["ppo"].get("eval/ppo/validation/reference_score"),
        "ppo/kl_last": last["objective/kl"],
        "ppo/kl_k3_smallest_after_first": later["objective/kl_k3"].min(),
        "ppo/kl_smallest_in_standard_errors": (later["objective/kl"] / later["objective/kl_standard_error"]).min(),
        "ppo/eos_rate_last": last["objective/eos_rate"],
        "ppo/first_pass_ratio_error": training["policy/first_pass_ratio_error"].max(),
    }
    row = {name: number(value) for name, value in row.items()}
    if raw_dir is not None:
        for stage in ("sft", "ppo"):
            found = read_judge(folders[stage])
            row |= {f"{stage}/{name}": value for name, value in found.items()}
        row |= {f"ppo/{name}": value for name, value in read_gain(folders["sft"], folders["ppo"]).items()}
        rows = {
            split: [
                json.loads(line) for line in (Path(raw_dir) / f"comparisons/{split}.jsonl").read_text().splitlines()
            ]
            for split in ("train", "validation")
        }
        held_out = [r for r in rows["validation"] if "cnndm" not in r["batch"]]
        row["rm/ceiling"], row["rm/blind"] = annotator_ceiling(held_out), blind_accuracy(rows["train"], held_out)
        row["rm/share_of_the_way"] = (row["rm/accuracy"] - row["rm/blind"]) / (row["rm/ceiling"] - row["rm/blind"])
    for stage, run in runs.items():
        row[f"{stage}/minutes"] = number(run["wall_clock_seconds"]) / 60
    return row, runs


def draw_curves(runs_by_chain: dict[str, dict], path: str) -> None:
    """Training curves, one line a chain."""
    import matplotlib

    figure = new_figure(13, 6.5)
    axes = figure.subplots(2, 3)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(runs_by_chain)))
    for axis, (title, (stage, metric)) in zip(axes.flat, CURVES.items()):
        for colour, (chain, runs) in zip(colours, runs_by_chain.items()):
            metrics = runs[stage]["lines"]
            if metric in metrics:
                line = metrics[metrics[metric].notna() & (metrics["update"] > 0)]
                smooth = line[metric].rolling(max(1, len(line) // 25), min_periods=1).mean()
                axis.plot(line["update"], smooth, color=colour, label=chain)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if "share" in title:
            axis.set_ylim(0, 1.05)
    if axes.flat[0].lines:
        axes.flat[0].legend(fontsize=8)
    save_figure(figure, path, dpi=110)


def shown(value: float) -> str:
    """A number as tables show it."""
    return "-" if pandas.isna(value) else f"{value:.3f}"


def fill_tables(text: str, report: str, numbers: pandas.DataFrame) -> str:
    """A document with the numbers of a report put in: everything else between its markers stays.

    Args:
        text: the document. In a row of a table whose first cell ends with a metric in backticks, the last cells are
            replaced, one for each chain; in a line of the printed table (`│ metric │ 0.1 │`) the first chain's number.
        report: path of the report, as in the markers `<!-- docs/images/toy_seeds.md -->`, `<!-- /docs/... -->`.
        numbers: one row a metric, one column a chain.

    Raises:
        KeyError: a row of the document names a metric that the report does not have.
        ValueError: a row has fewer cells than the report has chains.
    """

    def fill_line(line: str) -> str:
        if printed := re.fullmatch(r"(│ (\S+) +│ )\S+ *│", line):
            return f"{printed[1]}{shown(numbers.loc[printed[2]].iloc[0]):15} │"
        cells = line.split(" | ")
        if not (metric := re.search(r"`(\w+/\w+)`$", cells[0])):
            return line
        if len(cells) <= len(numbers.columns):
            raise ValueError(f"{len(numbers.columns)} chains do not fit into the row {line}")
        return " | ".join([*cells[: -len(numbers.columns)], *map(shown, numbers.loc[metric[1]])]) + " |"

    return between_markers(text, report, lambda found: "\n".join(map(fill_line, found.split("\n"))))


def between_markers(text: str, report: str, change: Callable[[str], str]) -> str:
    """A document with what stands between `<!-- REPORT -->` and `<!-- /REPORT -->` changed."""
    block = re.compile(rf"(?<=<!-- {re.escape(report)} -->\n).*?(?=<!-- /{re.escape(report)} -->)", re.S)
    return block.sub(lambda found: change(found[0]), text)


def main(args: Args) -> pandas.DataFrame:
    """Print the table and write the report; returns the numbers, one column a chain."""
    if args.raw_dirs and len(args.raw_dirs) != len(args.chains):
        refuse("raw_dirs", f"{len(args.raw_dirs)} folders", f"one for each of {len(args.chains)} chains")
    name_of = {stage: args.ppo if stage == "ppo" else stage for stage in STAGES}
    for chain in args.chains:
        for stage in name_of.values():
            if not (Path(args.runs_dir) / f"{chain}_{stage}" / "summary.json").exists():
                refuse("chains", f"no run {args.runs_dir}/{chain}_{stage}", "a chain whose three stages have run")
            judged = Path(args.runs_dir) / f"{chain}_{stage}" / "judge/gold/report.json"
            if args.raw_dirs and stage != "reward" and not judged.exists():
                refuse("chains", f"no {judged}", f"a judged run: python eval/judge.py --run {chain}_{stage}")
    written = Path(args.output_dir, args.name or args.chains[0])
    refuse_uncreatable("output_dir", args.output_dir, f"{written.name}.csv")
    columns, runs = {}, {}
    for chain, raw_dir in zip(args.chains, args.raw_dirs or [None] * len(args.chains)):
        try:
            columns[chain], runs[chain] = report_chain(chain, args.ppo, args.runs_dir, raw_dir)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a judge's files, or raw rows
            refuse("chains", f"'{chain}', which cannot be read ({type(error).__name__}: {error})", "whole files")
    numbers = pandas.DataFrame(columns)
    printed = Table("", *numbers.columns, title="What each stage reached")
    for name, row in numbers.iterrows():
        printed.add_row(str(name), *map(shown, row))
    print_table(printed)
    write_whole(f"{written}.csv", numbers.to_csv(index_label="metric"))
    lines = ["| | " + " | ".join(numbers.columns) + " |", "|---|" + "---|" * len(numbers.columns)]
    lines += [f"| {name} | " + " | ".join(map(shown, row)) + " |" for name, row in numbers.iterrows()]
    write_whole(f"{written}.md", "\n".join(lines) + "\n")
    with drawing():
        draw_curves(runs, f"{written}.png")
    for document in filter(Path.is_file, map(Path, args.documents)):
        before = document.read_text(encoding="utf-8")
        try:
            after = fill_tables(before, f"{written}.md", numbers)
        except (KeyError, ValueError) as error:
            refuse("documents", f"'{document}', whose rows do not fit {written}.md ({error})", "rows of that report")
        if after != before:
            write_whole(document, after)
    for chain in args.chains:
        for stage, run in runs[chain].items():
            path = Path(args.runs_dir) / f"{chain}_{name_of[stage]}"
            print(f"{stage:7} {run['state'] or '-':9} model {run['args'].get('output_dir', '-')}   run {path}")
    print(f"report: {written}.md, .csv, .png", flush=True)
    return numbers


if __name__ == "__main__":
    command_line(main, Args)
