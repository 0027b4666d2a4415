"""Over-optimisation: gold and proxy score against the square root of the KL, and the forms of Gao et al. fitted.

Reads   runs of PPO, RLOO and best of n against reward models of different quality, judged by
        `eval/judge.py --judge gold --updates`; the reward models' runs beside them
Writes  <output_dir>/overoptimization.{md,csv,png}, and the table into the documents that show it
Paper   Gao et al. 2023 (arXiv 2210.10760), section 3.1: with d = sqrt(KL), the gold reward gained is d (alpha - beta d)
        for best of n, and d (alpha - beta log d) for reinforcement learning
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from algorithms import STAGE_NAMES, read_best_of_n, read_trained, write_table
from scipy import stats

from summarize_from_feedback_details.best_of_n import expected_best
from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.figures import drawing, new_figure, save_figure
from summarize_from_feedback_details.common.files import refuse_uncreatable
from summarize_from_feedback_details.common.run_files import read_run

NAME = re.compile(r"(.+)_proxy_(\d+)_([\d.]+)_(\w+)")  # of a run: chain, pairs, share of wrong labels, algorithm
COLUMNS = (
    "proxy accuracy",
    "KL",
    "proxy gain",
    "gold peak",
    "gold at the end",
    "below its peak / s.e.",
    "alpha",
    "beta",
)


@dataclass
class Args:
    runs: tuple[str, ...]
    """names of the runs"""
    runs_dir: str = "runs"
    """folder of the runs"""
    output_dir: str = "docs/images"
    """folder of table and figure"""
    documents: tuple[str, ...] = ("README.md", "docs/results.md")
    """documents that show the table, between `<!-- TABLE -->` and `<!-- /TABLE -->`, where TABLE is its path"""


def read_one(path: Path) -> dict[str, Any]:
    """Points of a run, from the SFT policy on: distance sqrt(KL), gold score, proxy score; and what the table needs."""
    chain, pairs, share, _ = NAME.fullmatch(path.name).groups()
    summary, args = read_run(path)
    proxy, _ = read_run(path.with_name(f"{chain}_proxy_{pairs}_{share}"))
    found = {"stage": summary["stage"], "seed": args["seed"], "proxy": (int(pairs), float(share)),
             "accuracy": proxy["metrics"]["eval/rm/validation/accuracy"]}  # fmt: skip
    if summary["stage"] == "best_of_n":
        samples = pandas.read_parquet(path / "tables/samples.parquet")
        choose, raw = (samples[name].to_numpy().reshape(samples["row"].nunique(), -1)
                       for name in ("penalised", "score"))  # fmt: skip
        read = read_best_of_n(path)
        points = [(math.sqrt(kl), gold, score) for (_, kl, gold, _), score in
                  zip(read["points"], expected_best(choose, raw).mean(0))]  # fmt: skip
        return found | {"points": points, "below": below_the_peak(list(read["by_post"].T))}
    points, tables = [], path / "tables"
    for update, kl, gold, _ in read_trained(path)["points"]:
        file = tables / f"validation_{update}.parquet"
        table = pandas.read_parquet(file if file.exists() else tables / "validation.parquet")
        points.append((math.sqrt(max(0.0, kl)), gold, float(table["score"].mean())))
    judged = path / "judge/gold"
    folders = sorted(judged.glob("update_*"), key=lambda folder: int(folder.name.split("_")[1]))
    scores = [pandas.read_parquet(folder / "verdicts.parquet")["score"].to_numpy() for folder in (*folders, judged)]
    return found | {"points": points, "below": below_the_peak(scores)}


def below_the_peak(scores: list[np.ndarray]) -> tuple[float, float]:
    """How far the last gold score is below the best one on its way, and the standard error.

    The best one is chosen on the even posts and compared on the odd ones, so that choosing does not count as falling.

    Args:
        scores: of each policy on the way, [posts] each; the last one last.
    """
    best = int(np.argmax([each[::2].mean() for each in scores]))
    difference = scores[best][1::2] - scores[-1][1::2]
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def fit(points: list[tuple], form: str) -> tuple[float, float]:
    """alpha and beta of the gold score gained, by least squares: linear in both.

    Args:
        points: (d, gold score, ...), the first at d = 0.
        form: "best of n": d (alpha - beta d); else d (alpha - beta log d).
    """
    start = points[0][1]
    d, gained = np.array([(d, gold - start) for d, gold, *_ in points if d > 0]).T
    X = np.stack([d, -d * d if form == "best of n" else -d * np.log(d)], 1)
    alpha, beta = np.linalg.lstsq(X, gained, rcond=None)[0]
    return float(alpha), float(beta)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    margin = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean:.2f} ± {margin:.2f}"


def summarise_seeds(runs: list[dict[str, Any]], form: str) -> dict[str, str]:
    """One row of the table."""
    each = lambda read, digits=2: " ".join(f"{read(run):.{digits}f}" for run in runs)
    fits = [fit(run["points"], form) for run in runs]
    errors = [run["below"][0] / run["below"][1] if run["below"][1] > 0 else 0.0 for run in runs]
    below = " ".join(f"{value:.1f}" for value in errors)
    return dict(zip(COLUMNS, (
        each(lambda run: run["accuracy"]), each(lambda run: run["points"][-1][0] ** 2, 1),
        each(lambda run: run["points"][-1][2] - run["points"][0][2]),
        each(lambda run: max(gold for _, gold, _ in run["points"])), each(lambda run: run["points"][-1][1]), below,
        interval([alpha for alpha, _ in fits]), interval([beta for _, beta in fits]),
    )))  # fmt: skip


def draw(groups: dict[tuple, list[dict[str, Any]]], path: str) -> None:
    """A panel an algorithm: gold score solid, proxy score dotted, a colour a proxy; the fitted form dashed."""
    import matplotlib

    stages, proxies = list(dict.fromkeys(s for s, _ in groups)), sorted({p for _, p in groups})
    figure = new_figure(4.2 * len(stages), 4.2)
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    colours = dict(zip(proxies, matplotlib.colormaps["plasma"](np.linspace(0.05, 0.85, len(proxies)))))
    for axis, stage in zip(axes, stages):
        for (of, proxy), runs in groups.items():
            for j, run in enumerate(runs if of == stage else []):
                d, gold, score = np.array(run["points"]).T
                label = f"{proxy[0]} pairs, {proxy[1]:.0%} wrong" if j == 0 else None
                axis.plot(d, gold, color=colours[proxy], label=label, linewidth=1.3)
                axis.plot(d, score, ":", color=colours[proxy], linewidth=1, alpha=0.7)
            if of == stage:
                fits = np.mean([fit(run["points"], stage) for run in runs], 0)
                start = np.mean([run["points"][0][1] for run in runs])
                d = np.linspace(1e-3, max(p[0] for run in runs for p in run["points"]), 100)
                form = d * (fits[0] - fits[1] * (d if stage == "best of n" else np.log(d)))
                axis.plot(d, start + form, "--", color=colours[proxy], linewidth=0.8)
        axis.set_title(f"{stage}: gold solid, proxy dotted, fit dashed", fontsize=9)
        axis.set_xlabel("square root of the KL (nats)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize=7)
    save_figure(figure, path, dpi=110)


def main(args: Args) -> pandas.DataFrame:
    """Write table and figure; returns the table."""
    written = Path(args.output_dir, "overoptimization")
    refuse_uncreatable("output_dir", args.output_dir, "overoptimization.csv")
    groups: dict[tuple, list] = {}
    for name in args.runs:
        try:
            run = read_one(Path(args.runs_dir, name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            expected = "a finished, judged run of eval/overoptimization.sh"
            refuse("runs", f"'{name}', which cannot be read ({type(error).__name__}: {error})", expected)
        groups.setdefault((STAGE_NAMES[run["stage"]], run["proxy"]), []).append(run)
    for (stage, proxy), runs in groups.items():  # begin at the SFT policy: one sample of each query, as best of 1
        for run in runs if stage != "best of n" else []:
            same = [r for r in groups.get(("best of n", proxy), []) if r["seed"] == run["seed"]]
            if not same:
                found = f"{stage} of seed {run['seed']} against {proxy}, and no best of n against it"
                refuse("runs", found, "both, since best of 1 is where the others begin")
            run["points"] = [same[0]["points"][0], *run["points"]]
    rows = {
        f"{stage}, {pairs} pairs, {share:.0%} wrong": summarise_seeds(runs, stage)
        for (stage, (pairs, share)), runs in sorted(groups.items())
    }
    table = pandas.DataFrame(rows).T
    with drawing():
        draw(groups, f"{written}.png")
    write_table(table, written, args.documents)
    print(f"figure: {written}.png", flush=True)
    return table


if __name__ == "__main__":
    command_line(main, Args)
