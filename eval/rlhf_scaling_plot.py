"""What PPO gains over SFT: win rate against model size, over seeds; training curves; over-optimisation; length.

Reads   the runs of sft.py and ppo_left_padding.py with the reports of judge.py: run folders, a Weights & Biases project
        (reports still from --runs_dir), or the CSV written here
Writes  eval/images/{rlhf_scale_plot,training_curves,overoptimization,win_rate_by_length}.{png,pdf,csv}
        and eval/images/rlhf_scaling_plot.csv, all numbers of all runs (for --source csv)

    python eval/rlhf_scaling_plot.py
    python eval/rlhf_scaling_plot.py --runs 'pythia-*' --judge gpt --paper

Each seed is a point and no seed is left away; mean and interval are over seeds (95 %, Student's t; one seed has none).
Runs of different --ppo.kl_coef, of different algorithms, or sampled at different temperatures are never averaged. Runs
that cannot be drawn are listed, with the reason, on the terminal and in the CSV files. Published numbers (--paper) have
a panel of their own.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas
from read_runs import ReadArgs, read_runs
from sft_rm_scale import (
    COLOURS,
    LINES,
    MARKERS,
    STYLE,
    WIDTH,
    arms,
    at_temperatures,
    draw_published,
    draw_sizes,
    figure_rows,
    finish,
    not_drawn,
    note_on_others,
    over_seeds,
    panels,
    pick,
    print_results,
    read_published,
    seeds_text,
    size_positions,
    write_all,
)

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.figures import drawing, new_figure

PANELS = {  # metric: label of its panel
    "objective/scores": "score of the reward model",
    "objective/kl": "KL to the SFT policy (nats)",
    "objective/entropy": "entropy (nats per response)",
    "objective/response_length": "response length (tokens)",
    "objective/eos_rate": "responses that end (share)",
}
FEW_POSTS = 20  # a bin of fewer posts is drawn hollow
SMOOTHED = 5  # updates: a path of batch scores is drawn as a rolling mean


@dataclass
class Args(ReadArgs):
    judge: str | None = None
    """whose win rates to draw (default: `gold` where it has judged, else the judge with most runs)"""


def choose_judge(table: pandas.DataFrame, wanted: str | None) -> str | None:
    """The judge to draw; None where nothing is judged yet."""
    counts = table[table["kind"] == "judge"].groupby("judge")["run"].nunique().sort_values(ascending=False)
    if wanted is not None and wanted not in counts:
        known = ", ".join(counts.index) or "none yet: python eval/judge.py"
        refuse("judge", f"'{wanted}', who has judged no run here", f"a judge with reports ({known})")
    return wanted or ("gold" if "gold" in counts else counts.index[0] if len(counts) else None)


def say_how_to_judge(others: pandas.DataFrame, judge: str | None) -> pandas.DataFrame:
    """Finished runs without a report: how to get one."""
    unjudged = others["reason"].astype(str).str.startswith("finished without")
    command = "not judged yet" + (f" by {judge}" if judge else "") + ": python eval/judge.py --run "
    others.loc[unjudged, "reason"] = command + others.loc[unjudged, "run"]
    return others


def note_on_judging(others: pandas.DataFrame) -> str:
    count = others[others["reason"].astype(str).str.startswith("not judged")]["run"].nunique()
    return f"{count} finished run{'s' * (count > 1)} not judged yet (python eval/judge.py)" if count else ""


def series_names(table: pandas.DataFrame) -> dict[str, str]:
    """variant -> name of its series: `PPO`, with its KL coefficient where there are several, or another algorithm."""
    found = sorted(table.loc[table["stage"] == "ppo", "variant"].dropna().unique())
    of_ppo = [variant for variant in found if variant.startswith("kl_coef ")]
    names = {variant: f"PPO, {variant}" if len(of_ppo) > 1 else "PPO" for variant in of_ppo}
    return names | {variant: variant for variant in found if variant not in of_ppo}


def stage_name(rows: pandas.DataFrame, names: dict[str, str]) -> list[str]:
    """The series of each row: what was trained, and at which temperature it was sampled, where there are several."""
    found = ["SFT" if s == "sft" else names.get(variant, "PPO") for s, variant in zip(rows["stage"], rows["variant"])]
    return at_temperatures(found, rows["temperature"])


def in_order(drawn: pandas.DataFrame, table: pandas.DataFrame) -> list[str]:
    """Names of the series that are drawn: SFT, PPO, other algorithms."""
    known = ["SFT", "PPO", *series_names(table).values()]
    return sorted(set(drawn["series"]), key=lambda name: (known.index(name.partition(", T ")[0]), name))


# ----------------------------------------------------------------------------------------------------------------------
# the figures: each gives (figure, rows of its CSV), the means, the runs that are not drawn
def pick_judged(table, judge, metric, by_size=True):
    """`pick` for SFT and PPO together: the judge's numbers on the finished policies."""
    picked = [pick(table, s, "judge", metric, by_size, judge=judge, update=None) for s in ("sft", "ppo")]
    drawn, others = (pandas.concat(parts, ignore_index=True) for parts in zip(*picked))
    drawn["series"] = stage_name(drawn, series_names(table))
    return drawn, say_how_to_judge(others, judge)


def draw_win_rates(table, judge, published, places):
    """Win rate against size; runs whose responses were sampled at different temperatures are series of their own."""
    drawn, others = pick_judged(table, judge, "win_rate")
    means = over_seeds(drawn, ["series", "stage", "size", "kl_coef", "variant"]).assign(metric="win_rate", judge=judge)
    figure, (axis,), beside = panels(3.8 if published.empty else 5, 1, 1, published)
    names = in_order(drawn, table) or ["SFT"]
    series = [(n, drawn[drawn["series"] == n], means[means["series"] == n]) for n in names]
    draw_sizes(axis, series, places, even=0.5)
    axis.set_ylim(bottom=0, top=1)
    axis.set_xlabel("parameters")
    axis.set_ylabel("win rate against references" + (f" (judge: {judge})" if judge else ""))
    note = draw_published(beside, published, even=0.5) if beside else ""
    if beside:
        beside.set_ylim(bottom=0, top=1)
    finish(figure, [note_on_judging(others), note_on_others(others, "rlhf_scale_plot"), note])
    rows = figure_rows(drawn, means, others, published)
    return (figure, rows), means.assign(what="win rate, " + means["series"]), others


def mean_curve(runs: list[pandas.DataFrame], points: int = 100) -> pandas.DataFrame:
    """Mean of several runs' curves where at least two of them are: columns episode, value, seeds."""
    grid = np.linspace(min(r["episode"].min() for r in runs), max(r["episode"].max() for r in runs), points)
    values = np.array([np.interp(grid, r["episode"], r["value"], left=np.nan, right=np.nan) for r in runs])
    count = (~np.isnan(values)).sum(0)
    mean = np.nansum(values, 0) / np.maximum(count, 1)
    return pandas.DataFrame({"episode": grid, "value": mean, "seeds": count})[count >= 2]


def draw_curves(table, places):
    """One panel a metric; each run a thin line, the mean of its size and KL coefficient a thick one."""
    from matplotlib.lines import Line2D  # not before `drawing` has begun

    curves = table[(table["kind"] == "curve") & table["value"].notna()]
    curves = curves[curves["episode"].notna() | (curves["variant"] != "best_of_n")]  # which has no episodes
    runs = table[(table["stage"] == "ppo") | table["stage"].isna()].drop_duplicates("run")
    others = not_drawn(runs, curves, curves, "a training curve")
    sizes = [s for s in [*places, None] if s in set(curves["size"])]
    variants = sorted(curves["variant"].dropna().unique())
    figure = new_figure(WIDTH, 4.4)
    axes, means, found = figure.subplots(2, 3).flat, [], {}
    for axis, (metric, label) in zip(axes, PANELS.items()):
        axis.set_title(label)
        axis.set_xlabel("episodes")
        axis.margins(x=0.02)
        axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.ticklabel_format(axis="x", scilimits=(-3, 4))
        for (size, variant), group in curves[curves["metric"] == metric].groupby(["size", "variant"], dropna=False):
            size = None if pandas.isna(size) else size
            of_run = [r.sort_values("episode") for _, r in group.groupby("run")]
            which = variants.index(variant) if len(variants) > 1 and variant in variants else sizes.index(size)
            hue = which if len(sizes) == 1 else sizes.index(size)  # with one size, colour tells the variant
            colour, style = COLOURS[hue % len(COLOURS)], LINES[which % len(LINES)]
            for run in of_run:
                alone = len(of_run) == 1
                look = {"lw": 1.3, "ls": style} if alone else {"lw": 0.6, "alpha": max(0.25, 0.6 - 0.05 * len(of_run))}
                axis.plot(run["episode"], run["value"], color=colour, **look)
                if (state := run["state"].iloc[0]) != "finished":  # where it stands, or where it ended
                    end, marker = run[["episode", "value"]].iloc[-1], {"failed": "x"}.get(state, ">")
                    axis.plot(*end, marker, color=colour, ms=5)
            if len(of_run) > 1:
                mean = mean_curve(of_run)
                axis.plot(mean["episode"], mean["value"], color=colour, ls=style, lw=1.8)
                means.append(
                    mean.assign(
                        size=size, kl_coef=group["kl_coef"].iloc[0], variant=variant, metric=metric, stage="ppo"
                    )
                )
            seeds = group["seed"].nunique() or len(of_run)
            of = f", {variant}" if len(variants) > 1 and variant in variants else ""
            text = f"{size or 'size unknown'}{of} ({seeds} seed{'s' * (seeds > 1)})"
            found[text] = Line2D([], [], color=colour, ls=style, lw=1.8)
        if metric == "objective/eos_rate":
            axis.set_ylim(-0.03, 1.03)
    for state, marker in (("failed", "x"), ("running", ">"), ("interrupted", ">")):
        if (curves["state"] == state).any():
            found[f"{state} here"] = Line2D([], [], color="#444444", marker=marker, ls="", ms=5)
    last = figure.axes[5]
    last.axis("off")
    if found:
        last.legend(found.values(), found.keys(), loc="center", frameon=False, title="thin: a seed; thick: the mean")
    finish(figure, [note_on_others(others, "training_curves")])
    means = pandas.concat(means) if means else curves.iloc[:0]
    return (figure, figure_rows(curves, means, others)), others


def draw_overoptimization(table, judge, places):
    """Score of the reward model, and the judge's, against the root of KL: a run's path and its last point."""
    judged = table[(table["kind"] == "judge") & (table["judge"] == judge) & (table["stage"] == "ppo")]
    metric = "mean_score" if (judged["metric"] == "mean_score").any() else "win_rate"
    judged = judged[(judged["metric"] == metric) & judged["value"].notna()].sort_values("update")
    proxy = table[(table["kind"] == "curve") & (table["metric"] == "objective/scores") & table["value"].notna()]
    runs = table[(table["stage"] == "ppo") | table["stage"].isna()].drop_duplicates("run")
    variants, drawn = sorted(runs["variant"].dropna().unique()), []
    figure = new_figure(WIDTH, 3.5)
    axes = figure.subplots(1, 2)
    sizes = [s for s in places if s in set(runs["size"])]
    label = {"mean_score": "mean score of the judge", "win_rate": "win rate"}[metric] + (f" ({judge})" if judge else "")
    for axis, rows, name in (
        (axes[0], proxy, f"score of the reward model\n(mean of {SMOOTHED} updates)"),
        (axes[1], judged, label),
    ):
        rows = rows[rows["kl"].notna()].assign(root_kl=lambda r: np.sqrt(r["kl"].clip(lower=0)))  # noise below 0
        for _, run in rows.groupby("run"):
            variant, size = run["variant"].iloc[0], run["size"].iloc[0]
            which = variants.index(variant) if variant in variants else None
            if len(variants) == 1 and size in sizes:  # then colour tells the size
                which = sizes.index(size)
            colour = "#777777" if which is None else COLOURS[which % len(COLOURS)]
            marker = MARKERS[sizes.index(size) % len(MARKERS)] if size in sizes else "*"
            fill = colour if run["state"].iloc[0] == "finished" else "white"
            style = "-" if which is None else LINES[which % len(LINES)]
            path = run[["root_kl", "value"]]
            if len(path) > 2 * SMOOTHED:  # the score of one batch says little
                path = path.rolling(SMOOTHED).mean().dropna()
            axis.plot(*path.T.to_numpy(), color=colour, ls=style, lw=0.8, alpha=0.8)
            axis.plot(*path.iloc[-1], marker, color=colour, ms=5, mfc=fill)
        axis.set_xlabel("square root of KL to the SFT policy")
        axis.set_ylabel(name)
        if not len(rows):
            text = "no run to draw" if axis is axes[0] else "no run judged yet"
            axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="#555555")
        drawn.append(rows)
    for i, variant in enumerate(variants if len(variants) > 1 else []):
        axes[0].plot([], [], color=COLOURS[i % len(COLOURS)], ls=LINES[i % len(LINES)], lw=1.5, label=variant)
    for i, size in enumerate(sizes):
        colour = COLOURS[i % len(COLOURS)] if len(variants) == 1 else "#444444"
        axes[0].plot([], [], MARKERS[i % len(MARKERS)], color=colour, ms=5, label=f"{size}, end of the run")
    if len(runs[runs["state"] != "finished"]):
        axes[0].plot([], [], "o", color="#444444", mfc="white", ms=5, label="not finished")
    others = not_drawn(runs, drawn[0], drawn[0], "a training curve")
    unjudged = say_how_to_judge(not_drawn(runs, drawn[1], drawn[1], f"{metric} at a known KL"), judge)
    others = pandas.concat([others, unjudged])
    finish(figure, [note_on_judging(unjudged), note_on_others(others, "overoptimization")])
    drawn = pandas.concat(drawn)
    rows = figure_rows(drawn, None, others)
    return (figure, rows.assign(root_kl=np.sqrt(rows["kl"].clip(lower=0)) if "kl" in rows else math.nan)), others


def draw_lengths(table, judge, places):
    """Win rate by response length over reference length (words), a panel a size."""
    drawn, others = pick_judged(table, judge, "win_rate_by_length", by_size=False)
    means = over_seeds(drawn, ["series", "stage", "size", "kl_coef", "variant", "at"]).assign(
        metric="win_rate_by_length"
    )
    sizes = [s for s in places if s in set(drawn["size"])] or [None]
    bins = sorted(set(drawn["at"]), key=lambda b: float(b.split()[0]))
    columns = min(3, len(sizes))
    figure = new_figure(WIDTH, 2.2 * math.ceil(len(sizes) / columns) + 1)
    axes = figure.subplots(math.ceil(len(sizes) / columns), columns, sharey=True, squeeze=False).flat
    for axis, size in zip(axes, sizes):
        for i, name in enumerate(in_order(drawn, table)):
            rows = means[(means["series"] == name) & (means["size"] == size)].set_index("at")
            rows = rows.loc[[b for b in bins if b in rows.index]].reset_index()
            x = [bins.index(b) + 0.08 * (i - 0.5) for b in rows["at"]]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            if not len(rows):
                continue
            axis.errorbar(x, rows["value"], arms(rows), color=colour, lw=1.2, capsize=2,
                          ls=LINES[i % len(LINES)], label=name)  # fmt: skip
            for place, value, posts in zip(x, rows["value"], rows["count"]):
                axis.plot(place, value, marker, color=colour, ms=5, mfc="white" if posts < FEW_POSTS else colour)
        axis.axhline(0.5, color="#999999", lw=0.8, ls=(0, (1, 2)))
        axis.set_ylim(-0.03, 1.03)
        names = [b.replace(" to ", "-").replace("-inf", "+") for b in bins]
        axis.set_xticks(range(len(bins)), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_title(f"{size} ({seeds_text(means[means['size'] == size])})" if size else "")
        axis.set_xlabel("words, response / reference")
        if size is None:
            axis.text(0.5, 0.5, "no run judged yet", transform=axis.transAxes, ha="center", color="#555555")
    for axis in list(figure.axes)[len(sizes) :]:
        axis.axis("off")
    figure.supylabel("win rate" + (f" (judge: {judge})" if judge else ""), fontsize=8)
    hollow = f"Hollow: fewer than {FEW_POSTS} posts. Bars: over seeds; of one seed: over posts." if len(drawn) else ""
    finish(figure, [hollow, note_on_judging(others), note_on_others(others, "win_rate_by_length")])
    return (figure, figure_rows(drawn, means, others)), others


def main(args: Args) -> dict[str, pandas.DataFrame]:
    """Draw and write everything; returns the rows behind each figure."""
    with drawing(**STYLE):
        return draw_all(args)


def draw_all(args: Args) -> dict[str, pandas.DataFrame]:
    table, left_out = read_runs(args)
    judge = choose_judge(table, args.judge)
    published = read_published(args.paper, ["rlhf_scale_plot"])
    places = size_positions(table[table["stage"].isin(["sft", "ppo"])])
    figures, others = {}, [None] * 4
    figures["rlhf_scale_plot"], means, others[0] = draw_win_rates(table, judge, published, places)
    figures["training_curves"], others[1] = draw_curves(table, places)
    figures["overoptimization"], others[2] = draw_overoptimization(table, judge, places)
    figures["win_rate_by_length"], others[3] = draw_lengths(table, judge, places)
    print_results(f"Win rate against references, judge {judge or '(none yet)'}", means, pandas.concat(others), left_out)
    write_all(figures, table, "rlhf_scaling_plot", args.output_dir)
    return {name: rows for name, (_, rows) in figures.items()}


if __name__ == "__main__":
    command_line(main, Args)
