"""Algorithms beside each other: a table, and a figure of the gold score against the square root of the KL.

Reads   runs of one world that `eval/judge.py --judge gold --updates` has judged, and best-of-n runs of the same seeds
Writes  <output_dir>/<name>.{md,csv,png}, and the table into the documents that show it
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from hello_report import between_markers
from intervals import mean_interval

from summarize_from_feedback_details.best_of_n import expected_best
from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.figures import drawing, new_figure, save_figure
from summarize_from_feedback_details.common.files import refuse_uncreatable, write_whole
from summarize_from_feedback_details.common.run_files import read_lines, read_run
from summarize_from_feedback_details.toy_tldr import gold_score

STAGE_NAMES = {"ppo_left_padding": "PPO", "rloo": "RLOO", "grpo": "GRPO", "online_dpo": "online DPO", "dpo": "DPO",
               "best_of_n": "best of n"}  # fmt: skip
REACHED = 2.8  # the gold score whose time is reported
COLUMNS = ("win rate", "gold score", "proxy score", "KL", "words", "invented", "seconds", f"s to {REACHED}", "GB",
           "gain / s.e.")  # fmt: skip


@dataclass
class Args:
    runs: tuple[str, ...]
    """names of the runs"""
    runs_dir: str = "runs"
    """folder of the runs"""
    output_dir: str = "docs/images"
    """folder of table and figure"""
    name: str = "algorithms"
    """their name"""
    documents: tuple[str, ...] = ("README.md", "docs/results.md", "docs/algorithms.md")
    """documents that show the table, between `<!-- TABLE -->` and `<!-- /TABLE -->`, where TABLE is its path"""


def read_report(folder: Path) -> dict[str, Any]:
    """What the gold judge has written about a table."""
    return json.loads((folder / "report.json").read_text())


def training_seconds(lines: list[dict]) -> dict[int, float]:
    """update -> seconds of rollouts and training up to it; evaluation does not count."""
    found, total, episodes = {}, 0.0, 0.0
    for line in lines:
        times = {name.split("/")[-1]: value for name, value in line.items() if name.startswith("time/")}
        total += sum(times.get(f"{what}_seconds", 0.0) for what in ("rollout", "training", "reference"))
        if "samples_per_second" in times:  # DPO: pairs seen so far, and how many a second
            seen = next(value for name, value in line.items() if name.endswith("/episode"))
            total += (seen - episodes) / times["samples_per_second"]
            episodes = seen
        found[line["update"]] = total
    return found


def read_trained(path: Path) -> dict[str, Any]:
    """A run of an algorithm that trains: its points (update, KL, gold score, seconds), and its final numbers."""
    lines = read_lines(path / "metrics.jsonl")
    kl = {line["update"]: line["objective/kl"] for line in lines if line.get("objective/kl") is not None}
    memory = [value for line in lines for name, value in line.items() if name.startswith("memory/")]
    seconds, gold = training_seconds(lines), path / "judge/gold"
    last = max(update for update in seconds if any(name.startswith("time/") for name in _line(lines, update)))
    tables = {int(folder.name.split("_")[1]): folder for folder in gold.glob("update_*")} | {last: gold}
    points = []
    for update, folder in sorted(tables.items()):
        # rollouts of the next update are of the policy that was evaluated; DPO measures it in the evaluation itself
        near = [kl[u] for u in (update + 1, update) if u in kl]
        points.append((update, near[0], read_report(folder)["mean_score"]["mean"], seconds[update]))
    return {"points": points, "seconds": seconds[last], "GB": max(memory)}


def _line(lines: list[dict], update: int) -> dict:
    return next(line for line in lines if line["update"] == update)


def read_best_of_n(path: Path) -> dict[str, Any]:
    """A run of best of n: its points (n, KL, expected gold score of the best by proxy, nan), and its final numbers."""
    samples, best, curve = (
        pandas.read_parquet(path / f"tables/{name}.parquet") for name in ("samples", "validation", "best_of_n")
    )
    posts = [query.partition("\n\nPOST: ")[2].rpartition("\n\nTL;DR:")[0] for query in best["query"]]
    golds = [gold_score(posts[row], text)["score"] for row, text in zip(samples["row"], samples["response"])]
    shape = len(best), -1
    by_post = expected_best(samples["penalised"].to_numpy().reshape(shape), np.array(golds).reshape(shape))
    points = [(n, k, g, math.nan) for n, k, g in zip(curve["n"], curve["kl"], by_post.mean(0))]
    # one sample of each post: what the SFT policy does at this temperature, to compare the trained ones with
    first = np.array(golds).reshape(shape)
    return {"points": points, "seconds": read_run(path)[0]["wall_clock_seconds"], "GB": math.nan,
            "sft": dict(zip(best["query"], first.mean(1))), "by_post": by_post}  # fmt: skip


def read_one(path: Path) -> dict[str, Any]:
    """All that the table and the figure need of a run."""
    summary, args = read_run(path)
    found = read_best_of_n(path) if summary["stage"] == "best_of_n" else read_trained(path)
    verdicts = pandas.read_parquet(path / "judge/gold/verdicts.parquet")
    table = pandas.read_parquet(path / "tables/validation.parquet")
    return found | {
        "stage": summary["stage"], "seed": args["seed"], "lr": args.get("lr"), "verdicts": verdicts,
        "proxy": float(table["score"].mean()), "kl": found["points"][-1][1],
    }  # fmt: skip


def summarise_seeds(runs: list[dict[str, Any]], sft: dict[int, dict[str, float]]) -> dict[str, str]:
    """One row of the table: means of the seeds; of the win rate the interval over all their posts.

    Args:
        sft: seed -> query -> mean gold score of the SFT policy's samples.
    """
    verdicts = [run["verdicts"].assign(post=f"{run['seed']} " + run["verdicts"]["query"]) for run in runs]
    whole = pandas.concat(verdicts)
    mean = lambda column: f"{whole[column].mean():.2f}"
    win = mean_interval(whole["outcome"], whole["post"], 2000, 1)
    of_runs = lambda name, digits: f"{np.mean([run[name] for run in runs]):.{digits}f}"
    reached = [next((p[3] for p in run["points"] if p[2] >= REACHED), math.nan) for run in runs]
    gains = []
    for run in runs:
        start = sft.get(run["seed"])
        difference = run["verdicts"]["score"] - run["verdicts"]["query"].map(start) if start else np.array([math.nan])
        error = difference.std() / math.sqrt(len(difference))
        gains.append(float(difference.mean() / error) if error else math.nan)
    shown = lambda values, digits: " ".join("-" if math.isnan(v) else f"{v:.{digits}f}" for v in values)
    numbers = (f"{win['mean']:.3f} ({win['low']:.3f} to {win['high']:.3f})", mean("score"), of_runs("proxy", 2),
               of_runs("kl", 2), f"{whole['response_words'].mean():.1f}", mean("invented"), of_runs("seconds", 0),
               shown(reached, 0), of_runs("GB", 2).replace("nan", "-"), shown(gains, 0))  # fmt: skip
    return dict(zip(COLUMNS, numbers))


def draw(groups: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Gold score against the square root of the KL: a colour an algorithm, a line a seed; best of n dashed."""
    import matplotlib

    figure = new_figure(7.5, 5)
    axis, colours = figure.subplots(), matplotlib.colormaps["tab20" if len(groups) > 10 else "tab10"].colors
    starts = {run["seed"]: run["points"][0][2] for run in groups.get(STAGE_NAMES["best_of_n"], [])}
    for i, (name, runs) in enumerate(groups.items()):
        for j, run in enumerate(runs):
            points = [(0.0, starts[run["seed"]])] if run["seed"] in starts else []
            points += [(math.sqrt(max(0.0, p[1])), p[2]) for p in run["points"]]
            dashed = (
                {"linestyle": "--", "color": "black"} if name == STAGE_NAMES["best_of_n"] else {"color": colours[i]}
            )
            axis.plot(*zip(*points), label=name if j == 0 else None, alpha=0.8, linewidth=1.3, **dashed)
            if name != STAGE_NAMES["best_of_n"]:
                axis.plot(*points[-1], "o", markersize=4, color=colours[i])
    axis.set_xlabel("square root of the KL to the SFT policy (nats)")
    axis.set_ylabel("gold score of validation responses")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save_figure(figure, path, dpi=110)


def write_table(table: pandas.DataFrame, written: Path, documents: tuple[str, ...]) -> None:
    """Write <written>.csv and .md, and the table into the documents that have its markers; print it.

    Args:
        table: of texts; its index is the first column.
    """
    write_whole(f"{written}.csv", table.to_csv(index_label="run"))
    lines = [f"| | {' | '.join(table.columns)} |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in zip(table.index, table.to_numpy())]
    text = "\n".join(lines) + "\n"
    write_whole(f"{written}.md", text)
    for document in filter(Path.is_file, map(Path, documents)):
        before = document.read_text(encoding="utf-8")
        after = between_markers(before, f"{written}.md", lambda _: text)
        if after != before:
            write_whole(document, after)
    print(f"{text}table: {written}.md, {written}.csv", flush=True)


def main(args: Args) -> pandas.DataFrame:
    """Write table and figure; returns the table."""
    written = Path(args.output_dir, args.name)
    refuse_uncreatable("output_dir", args.output_dir, f"{args.name}.csv")
    runs = []
    for name in args.runs:
        try:
            runs.append(read_one(Path(args.runs_dir, name)))
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            expected = "a finished run that was judged: python eval/judge.py --judge gold --updates --run ..."
            refuse("runs", f"'{name}', which cannot be read ({type(error).__name__}: {error})", expected)
    sft = {run["seed"]: run["sft"] for run in runs if "sft" in run}
    several = len({(run["stage"], run["lr"]) for run in runs}) > len({run["stage"] for run in runs})
    groups: dict[str, list] = {}
    for run in runs:
        label = STAGE_NAMES.get(run["stage"], run["stage"]) + (f", lr {run['lr']:g}" if several and run["lr"] else "")
        groups.setdefault(label, []).append(run)
    table = pandas.DataFrame({name: summarise_seeds(found, sft) for name, found in groups.items()}).T
    with drawing():
        draw(groups, f"{written}.png")
    write_table(table, written, args.documents)
    print(f"figure: {written}.png", flush=True)
    return table


if __name__ == "__main__":
    command_line(main, Args)
