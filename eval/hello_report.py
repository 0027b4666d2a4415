"""What a chain of stages reached: a table, its numbers as CSV, and the training curves as a figure.

Reads   runs/<chain>_{sft,reward,ppo} of one or several chains (`hello_world.sh` makes them); with --raw_dirs also the
        toy world's raw rows and what its annotator found (`eval/judge.py`)
Writes  eval/reports/<name>.{csv,md,png}

    python eval/hello_report.py --chains toy_small_seed1 --raw_dirs data/toy_small_seed1_raw
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas
import tyro
from rich.table import Table

from summarize_from_feedback_details.run_folder import print_table, refuse
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


def read_run(path: Path) -> tuple[dict, pandas.DataFrame]:
    """Summary and metrics of a run folder."""
    summary = json.loads((path / "summary.json").read_text())
    return summary, pandas.read_json(path / "metrics.jsonl", lines=True)


def read_judge(run: Path) -> dict[str, float | None]:
    """What the toy world's annotator found (`judge.py`): gold score, win rate, that at equal length; intervals."""
    report = json.loads((run / "judge/gold/report.json").read_text())
    gold = pandas.read_parquet(run / "judge/gold/verdicts.parquet")["score"]
    win_rate = report["win_rate"]
    return {"gold": gold.mean(), "gold_se": gold.std(ddof=1) / math.sqrt(len(gold)), "win_rate": win_rate["mean"],
            "win_rate_low": win_rate["low"], "win_rate_high": win_rate["high"],
            **{f"win_rate_at_equal_length{end}": report["length_controlled_win_rate"][key]
               for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))},
            "reference_gold": report["reference_mean_score"]["mean"],
            "invented": report["invented"]["mean"]}  # fmt: skip


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
    """All numbers of a chain, and its runs: stage -> (summary, metrics)."""
    folders = {stage: Path(runs_dir) / f"{chain}_{ppo_run if stage == 'ppo' else stage}" for stage in STAGES}
    runs = {stage: read_run(folder) for stage, folder in folders.items()}
    final = {stage: summary["metrics"] for stage, (summary, _) in runs.items()}
    ppo = runs["ppo"][1]
    training = ppo[ppo["objective/kl"].notna()] if "objective/kl" in ppo else ppo
    row = {
        "sft/rougeL": final["sft"].get("validation/sft/rouge/rougeL"),
        "sft/rougeL_shuffled": final["sft"].get("validation/shuffled_references/rouge/rougeL"),
        "rm/accuracy": final["reward"].get("eval/rm/validation/accuracy"),
        "rm/accuracy_cnndm": final["reward"].get("eval/rm/validation_cnndm/accuracy"),
        "ppo/score": final["ppo"].get("eval/ppo/validation/score"),
        "ppo/reference_score": final["ppo"].get("eval/ppo/validation/reference_score"),
        "ppo/kl_last": float(training["objective/kl"].iloc[-1]),
        "ppo/kl_k3_smallest_after_first": float(training["objective/kl_k3"].iloc[1:].min()),
        "ppo/kl_smallest_in_standard_errors": float(
            (training["objective/kl"] / training["objective/kl_standard_error"]).iloc[1:].min()
        ),
        "ppo/eos_rate_last": float(training["objective/eos_rate"].iloc[-1]),
        "ppo/first_pass_ratio_error": float(training["policy/first_pass_ratio_error"].max()),
    }
    if raw_dir is not None:
        for stage in ("sft", "ppo"):
            found = read_judge(folders[stage])
            row |= {f"{stage}/{name}": math.nan if value is None else float(value) for name, value in found.items()}
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
    for stage, (summary, _) in runs.items():
        row[f"{stage}/minutes"] = summary["wall_clock_seconds"] / 60
    return row, runs


def draw_curves(runs_by_chain: dict[str, dict], path: Path) -> None:
    """Training curves, one line a chain."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(runs_by_chain)))
    for axis, (title, (stage, metric)) in zip(axes.flat, CURVES.items()):
        for colour, (chain, runs) in zip(colours, runs_by_chain.items()):
            metrics = runs[stage][1]
            if metric in metrics:
                line = metrics[metrics[metric].notna() & (metrics["update"] > 0)]
                smooth = line[metric].rolling(max(1, len(line) // 25), min_periods=1).mean()
                axis.plot(line["update"], smooth, color=colour, label=chain)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if "share" in title:
            axis.set_ylim(0, 1.05)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    columns, runs = {}, {}
    for chain, raw_dir in zip(args.chains, args.raw_dirs or [None] * len(args.chains)):
        columns[chain], runs[chain] = report_chain(chain, args.ppo, args.runs_dir, raw_dir)
    numbers = pandas.DataFrame(columns)
    shown = Table("", *numbers.columns, title="What each stage reached")
    for name, row in numbers.iterrows():
        shown.add_row(str(name), *("-" if pandas.isna(v) else f"{v:.3f}" for v in row))
    print_table(shown)
    name, folder = args.name or args.chains[0], Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    numbers.to_csv(folder / f"{name}.csv", index_label="metric")
    lines = ["| | " + " | ".join(numbers.columns) + " |", "|---|" + "---|" * len(numbers.columns)]
    lines += ["| " + str(n) + " | " + " | ".join("-" if pandas.isna(v) else f"{v:.3f}" for v in r) + " |" for n, r in numbers.iterrows()]  # fmt: skip  # noqa: E501
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    draw_curves(runs, folder / f"{name}.png")
    for chain in args.chains:
        for stage, (summary, _) in runs[chain].items():
            run = Path(args.runs_dir) / f"{chain}_{name_of[stage]}"
            model = json.loads((run / "args.json").read_text())["output_dir"]
            print(f"{stage:7} {summary['state']:9} model {model}   run {run}")
    print(f"report: {folder / name}.md, .csv, .png", flush=True)
    return numbers


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
