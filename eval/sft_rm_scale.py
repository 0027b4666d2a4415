"""SFT's ROUGE and the reward model's accuracy against model size; accuracy by confidence, batch and policy pair.

Reads   the runs of sft.py and reward.py: run folders, a Weights & Biases project, or the CSV written here
Writes  eval/images/{rouge_score_plot,rm_scale_plot,rm_by_confidence,rm_by_batch,rm_by_policy_pair}.{png,pdf,csv}
        and eval/images/sft_rm_scale.csv, all numbers of all runs (for --source csv)

    python eval/sft_rm_scale.py
    python eval/sft_rm_scale.py --runs 'pythia-*' --paper
    python eval/sft_rm_scale.py --source wandb --wandb_entity my-team

Each seed is a point; mean and interval are over seeds (95 %, Student's t; one seed has no interval). Runs that cannot
be drawn are listed, with the reason, on the terminal and in the CSV files. Published numbers (--paper) have a panel of
their own, where a line joins only those of the same source, judge, temperature and reference.
"""

import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from PIL import Image
from read_runs import ACCURACY, COLUMNS, FINAL, ROUGE, RUN_COLUMNS, ReadArgs, read_runs
from rich.table import Table
from scipy import stats

from summarize_from_feedback_details.common.arguments import command_line
from summarize_from_feedback_details.common.console import print_table
from summarize_from_feedback_details.common.figures import drawing, new_figure
from summarize_from_feedback_details.common.files import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito, without yellow
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
PROTOCOL = ["source", "judge", "temperature", "reference"]  # published numbers are joined where all of these agree
STYLE = {  # fonts and lines that can be read at the width of an A4 page; fonts embedded in the PDF
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8.5, "figure.titlesize": 7.5, "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "text.color": "0.15",
    "axes.labelcolor": "0.15", "axes.edgecolor": "0.15", "xtick.color": "0.15", "ytick.color": "0.15",
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 1.25, "ytick.major.width": 1.25,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.8", "grid.alpha": 0.4, "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "lines.solid_capstyle": "round", "pdf.fonttype": 42,
}  # fmt: skip
WIDTH = 6.3  # inches: the text of an A4 page
LARGEST_PNG = 300_000  # bytes
PAIRS_NEEDED = 10  # comparisons of two policies, for a row in the figure
PAIRS_SHOWN = 16  # policy pairs in the figure; the CSV holds all
SPLITS = {"TL;DR": "validation", "CNN/DM": "validation_cnndm"}


@dataclass
class Args(ReadArgs):
    pass


# ----------------------------------------------------------------------------------------------------------------------
# what is drawn, what is not, and means over seeds (also used by rlhf_scaling_plot.py)
def pick(table: pandas.DataFrame, stage: str, kind: str, metric: str, by_size: bool = True, **where):
    """Rows of a figure: those of finished runs that have the number, and one row, with its reason, for each other run.

    Runs whose stage is unknown (unreadable folders) are among the others of every stage.
    """
    runs = table[(table["stage"] == stage) | ~table["stage"].isin(FINAL)].drop_duplicates("run")
    found = table[(table["stage"] == stage) & (table["kind"] == kind) & (table["metric"] == metric)]
    for column, value in where.items():
        found = found[found[column].isna() if value is None else found[column] == value]
    drawn = found[(found["state"] == "finished") & found["value"].notna()]
    if by_size:
        drawn = drawn[drawn["parameters"].notna()]
    return drawn.copy(), not_drawn(runs, drawn, found, metric).assign(metric=metric)


def not_drawn(
    runs: pandas.DataFrame, drawn: pandas.DataFrame, found: pandas.DataFrame, metric: str
) -> pandas.DataFrame:
    """Those of the runs that are not among the drawn rows, each with its reason; `found`: rows of `metric`, if any."""
    others = runs[~runs["run"].isin(drawn["run"])][RUN_COLUMNS]
    reasons = [why_not(run, found[found["run"] == run.run], metric) for run in others.itertuples()]
    return others.assign(reason=np.array(reasons, dtype=object))


def why_not(run, found: pandas.DataFrame, metric: str) -> str:
    if run.state != "finished":
        meaning = {"running": "still running, or killed"}.get(run.state, run.state)
        return f"{meaning}: {run.reason}" if run.reason else str(meaning)
    if found["value"].notna().any():
        return "size unknown: neither summary.json nor the base model's name tells its parameters"
    return f"{metric} is NaN" if len(found) else f"finished without {metric}"


def over_seeds(rows: pandas.DataFrame, by: list[str]) -> pandas.DataFrame:
    """Mean and 95 % interval (Student's t) over seeds of `value` in each group; runs of one seed count once, averaged.

    Returns:
        One row a group: `by`, value, low, high, seeds, count (posts or pairs, summed), interval: "seeds"; "posts" where
        one seed has an interval of its own; otherwise none.
    """
    found = []
    for key, group in rows.groupby(by, sort=False, dropna=False):
        each = group.groupby(group["seed"].astype(object).where(group["seed"].notna(), group["run"]))["value"].mean()
        low, high, over = group["low"].mean(), group["high"].mean(), "posts"
        if len(each) > 1:
            half = stats.t.ppf(0.975, len(each) - 1) * each.std() / len(each) ** 0.5
            low, high, over = each.mean() - half, each.mean() + half, "seeds"
        found.append({**dict(zip(by, key)), "value": each.mean(), "low": low, "high": high, "seeds": len(each),
                      "count": group["count"].sum(), "interval": None if np.isnan(low) else over})  # fmt: skip
    return pandas.DataFrame(found, columns=[*by, "value", "low", "high", "seeds", "count", "interval"])


def at_temperatures(names: list[str], temperatures: pandas.Series) -> list[str]:
    """Names of series, with the temperature that responses were sampled at where there are several of them."""
    if temperatures.nunique() < 2:
        return names
    return [f"{name}, T {t:g}" if t == t else name for name, t in zip(names, temperatures)]


def size_positions(table: pandas.DataFrame) -> dict[str, float]:
    """Where each size stands on the axis: its policies' parameters, so that all stages of one size share a place."""
    runs = table[table["size"].notna()].drop_duplicates("run")
    places = {}
    for size, group in runs.groupby("size"):
        policies = group[group["stage"] != "reward"]
        places[size] = (policies if len(policies) else group)["parameters"].median()
    return dict(sorted(places.items(), key=lambda place: place[1]))


def figure_rows(drawn, means, others, published=None) -> pandas.DataFrame:
    """The CSV of a figure: each run, the means over seeds, the published numbers, and why others are not drawn."""
    parts = {"run": drawn, "mean over seeds": means, "published": published, "not drawn": others}
    parts = [p.assign(what=what) for what, p in parts.items() if p is not None and len(p)]
    rows = pandas.concat([p.dropna(axis=1, how="all") for p in parts]) if parts else pandas.DataFrame(columns=["what"])
    order = ["what", "series", *COLUMNS, "seeds", "interval", "plus_minus", "reference", "posts", "source"]
    return rows.reindex(columns=[c for c in order if c in {*rows, "run", "reason", "value", "low", "high"}])


def read_published(wanted: bool, figures: list[str]) -> pandas.DataFrame:
    rows = pandas.read_csv(Path(__file__).with_name("published_results.csv"))
    return rows[rows["figure"].isin(figures if wanted else [])]


# ----------------------------------------------------------------------------------------------------------------------
# drawing (also used by rlhf_scaling_plot.py)
def seeds_text(means: pandas.DataFrame) -> str:
    few, many = int(means["seeds"].min()), int(means["seeds"].max())
    return f"{few} seed{'s' * (few > 1)}" if few == many else f"{few} to {many} seeds"


def arms(means: pandas.DataFrame) -> np.ndarray:
    """Lengths of the error bars, down and up: [2, rows]; 0 where there is no interval."""
    both = [means["value"] - means["low"], means["high"] - means["value"]]
    return np.nan_to_num(np.array(both, dtype=float)).clip(min=0)


def draw_sizes(axis, series: list[tuple], places, even: float | None = None) -> None:
    """Value against size: for each (label, runs, means) each run a small point, the mean with its interval.

    `even`: where a dotted line marks an even chance.
    """
    first = (1 - len(series)) / 2  # around the tick
    decades = max(np.log10(max(places.values()) / min(places.values())), 0.5) if places else 1
    for i, (label, drawn, means) in enumerate(series):
        x_of = lambda rows, shift: [places[s] * 10 ** (0.03 * decades * (first + i + shift)) for s in rows["size"]]
        means = means.assign(place=means["size"].map(places)).sort_values("place")
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        drawn = drawn[drawn.groupby("size")["run"].transform("count") > 1]  # one run is its own mean
        axis.plot(x_of(drawn, 0.5), drawn["value"], marker, color=colour, ms=3, mfc="white", mew=0.8)
        if len(means):
            look = {"color": colour, "marker": marker, "ms": 5, "lw": 1.2, "capsize": 2.5, "ls": LINES[i % len(LINES)]}
            label = f"{label} ({seeds_text(means)})"
            axis.errorbar(x_of(means, 0), means["value"], arms(means), label=label, **look)
    mark_sizes(axis, places, even)
    if not any(len(drawn) for _, drawn, _ in series):
        axis.text(0.5, 0.5, "no run to draw", transform=axis.transAxes, ha="center", color="#555555")


def mark_sizes(axis, places: dict[str, float], even: float | None) -> None:
    """A logarithmic axis with the names of the sizes at their places, and a share upwards."""
    axis.set_xscale("log")
    decades = max(np.log10(max(places.values()) / min(places.values())), 0.5) if places else 1
    if places:
        names, near = {}, 0.08 * decades * axis.get_gridspec().ncols
        for size, place in places.items():
            below = any(abs(np.log10(place / places[s])) < near and names[s][0] != "\n" for s in names)
            text = f"{size}\n{place / 1e6:.3g}M" if place < 1e9 and not re.search(r"\dm$", size, re.I) else size
            names[size] = "\n" * below + text  # one row lower, so that neighbours do not overlap
        axis.set_xticks(list(places.values()), list(names.values()))
        axis.set_xlim(min(places.values()) / 10 ** (0.15 * decades), max(places.values()) * 10 ** (0.15 * decades))
    axis.minorticks_off()
    if even is not None:
        axis.axhline(even, color="#999999", lw=0.8, ls=(0, (1, 2)))
    low, high = axis.get_ylim()
    axis.set_ylim(max(0, low), min(1, high))  # all that is drawn here is a share; of two seeds the interval is wide


def draw_published(axis, published: pandas.DataFrame, even: float | None = None) -> str:
    """Published numbers: a colour a protocol, a marker a series; a line joins numbers of one series and one protocol.

    Returns:
        the note that says what is not joined; empty where there is one protocol.
    """
    places = dict(sorted(published[["size", "parameters"]].itertuples(index=False), key=lambda place: place[1]))
    markers = dict(zip(dict.fromkeys(published["series"]), (*MARKERS, "<", ">", "p", "h")))
    protocols = published.groupby(PROTOCOL, sort=False, dropna=False)
    for i, (protocol, of_protocol) in enumerate(protocols):
        source, judge, temperature, _ = ("" if pandas.isna(part) else str(part) for part in protocol)
        parts = [re.split(r" \(|, ", source)[0], judge, f"T {temperature}" if temperature else ""]
        colour = (*COLOURS, "#882255")[i % 8]
        axis.plot([], [], "s", color=colour, ms=5, label=", ".join(filter(None, parts)))
        for name, rows in of_protocol.groupby("series", sort=False):
            look = {"color": colour, "ls": ":", "lw": 1}
            middle = rows.groupby("size", sort=False)[["value", "plus_minus"]].mean().reset_index()
            middle = middle.assign(place=middle["size"].map(places)).sort_values("place")
            axis.errorbar(middle["place"], middle["value"], middle["plus_minus"].fillna(0), **look)
            axis.plot([places[s] for s in rows["size"]], rows["value"], markers[name], color=colour, ms=4, mfc="white")
    for name, marker in markers.items() if len(markers) > 1 else ():
        axis.plot([], [], marker, color="#444444", ms=4, mfc="white", label=name)
    mark_sizes(axis, places, even)
    axis.set_title("published")
    axis.set_xlabel("parameters")
    count = len(protocols)
    return (
        f"Published numbers of {count} protocols (source, judge, sampling temperature, reference): not comparable, and "
        "not joined by lines."
        if count > 1
        else ""
    )


def panels(height: float, rows: int, columns: int, published: pandas.DataFrame):
    """A figure with a grid of axes for our own numbers, and one at the right for published ones, where there are any.

    Returns:
        (figure, axes, axis of the published numbers or None)
    """
    figure, more = new_figure(WIDTH, height), int(len(published) > 0)
    grid = figure.add_gridspec(rows, columns + more)
    axes = [figure.add_subplot(grid[i, j]) for i in range(rows) for j in range(columns)]
    return figure, axes, figure.add_subplot(grid[:, columns]) if more else None


def finish(figure, notes: list[str]) -> None:
    """One legend below the panels, and the notes above them."""
    found, published = {}, {}
    for axis in figure.axes:
        legend = published if axis.get_title() == "published" else found
        legend |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    if found:
        ncols = 1 if published else max(1, min(4, 100 // (8 + max(map(len, found)))))
        place = "outside lower left" if published else "outside lower center"
        figure.legend(found.values(), found.keys(), loc=place, ncols=ncols, frameon=False)
    if published:
        figure.legend(published.values(), published.keys(), loc="outside lower right", ncols=1 + (len(published) > 4),
                      frameon=False, title="published", fontsize=6.5)  # fmt: skip
    if notes := [note for note in notes if note]:
        text = "\n".join(textwrap.fill(note, 110) for note in notes)
        figure.suptitle(text, x=0.01, ha="left", color="#444444")


def note_on_others(others: pandas.DataFrame, name: str) -> str:
    """The visible note on runs that a figure does not show."""
    runs = sorted(set(others["run"]))
    if not runs:
        return ""
    return f"Not drawn: {', '.join(runs[:3])}{f' and {len(runs) - 3} more' if len(runs) > 3 else ''} (why: {name}.csv)"


def write_all(figures: dict[str, tuple[Any, pandas.DataFrame]], table: pandas.DataFrame, name: str, folder: Path):
    """Write PNG, PDF and CSV of each figure and the table of all runs, each file whole or not at all."""
    contents = {f"{name}.csv": table.to_csv(index=False, float_format="%.10g").encode()}
    for figure_name, (figure, rows) in figures.items():
        for dpi in (300, 200, 100):
            full, png = io.BytesIO(), io.BytesIO()
            figure.savefig(full, format="png", dpi=dpi)
            Image.open(full).convert("RGB").quantize(128).save(png, format="png", optimize=True, dpi=(dpi, dpi))
            if png.tell() < LARGEST_PNG:
                break
        pdf = io.BytesIO()
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
        contents |= {f"{figure_name}.png": png.getvalue(), f"{figure_name}.pdf": pdf.getvalue(),
                     f"{figure_name}.csv": rows.to_csv(index=False, float_format="%.10g").encode()}  # fmt: skip
    for file, content in contents.items():
        write_whole(folder / file, content)
    for figure_name in figures:
        print(f"figure: {folder / figure_name}.png, .pdf, .csv")
    print(f"all numbers of all runs: {folder / name}.csv", flush=True)


def print_results(title: str, means: pandas.DataFrame, others: pandas.DataFrame, left_out: list[str]) -> None:
    """The closing tables: the means, the runs that are not drawn, the runs that nobody named."""
    shown = Table("what", "size", "mean", "95 % interval over", "seeds", title=title)
    for row in means.itertuples():
        between = "-" if np.isnan(row.low) else f"{row.low:.4f} to {row.high:.4f}, {row.interval}"
        shown.add_row(row.what, str(row.size), f"{row.value:.4f}", between, str(row.seeds))
    print_table(shown)
    if len(others):
        reasons = others.groupby(["run", "reason"], sort=False)["state"].first().reset_index()
        shown = Table("run", "state", "why", title="Not drawn, in one figure or all")
        for row in reasons.itertuples():
            shown.add_row(row.run, str(row.state), row.reason)
        print_table(shown)
    if left_out:
        print(f"not asked for (--runs names them): {', '.join(left_out)}")


# ----------------------------------------------------------------------------------------------------------------------
# the figures
def draw_rouge(table, published, places):
    published = published[published["figure"] == "rouge_score_plot"]
    figure, axes, beside = panels(4.6, 2, 2, published)
    all_drawn, all_others, all_means = [], [], []
    for axis, metric in zip(axes, ROUGE):
        drawn, others = pick(table, "sft", "final", metric)
        drawn["series"] = at_temperatures(["SFT"] * len(drawn), drawn["temperature"])
        means = over_seeds(drawn, ["series", "size"]).assign(metric=metric, stage="sft")
        names = sorted(set(drawn["series"])) or ["SFT"]
        draw_sizes(axis, [(n, drawn[drawn["series"] == n], means[means["series"] == n]) for n in names], places)
        axis.set_title("ROUGE-" + metric.removeprefix(ROUGE[0][:-1]))
        axis.set_ylabel("F1 against the reference")
        all_drawn, all_others, all_means = [*all_drawn, drawn], [*all_others, others], [*all_means, means]
    for axis in axes[2:]:
        axis.set_xlabel("parameters")
    drawn, others, means = (pandas.concat(parts) for parts in (all_drawn, all_others, all_means))
    note = draw_published(beside, published) if beside else ""
    finish(figure, [note_on_others(others, "rouge_score_plot"), note])
    return (figure, figure_rows(drawn, means, others, published)), means.assign(what=means["metric"]), others


def draw_accuracy(table, published, places):
    published = published[published["figure"] == "rm_scale_plot"]
    figure, (axis,), beside = panels(3.4, 1, 1, published)
    series, all_others = [], []
    for data, metric in ACCURACY.items():
        drawn, others = pick(table, "reward", "final", metric)
        means = over_seeds(drawn, ["size"]).assign(metric=metric, stage="reward")
        series, all_others = [*series, (data, drawn, means)], [*all_others, others]
    draw_sizes(axis, series, places, even=0.5)
    axis.set_xlabel("parameters")
    axis.set_ylabel("accuracy on held-out comparisons")
    drawn, means, others = (pandas.concat([s[1] for s in series]), pandas.concat([s[2] for s in series]),
                            pandas.concat(all_others))  # fmt: skip
    note = draw_published(beside, published, even=0.5) if beside else ""
    finish(figure, [note_on_others(others, "rm_scale_plot"), note])
    return (figure, figure_rows(drawn, means, others, published)), means.assign(what=means["metric"]), others


def in_order(values) -> list[str]:
    """Names in natural order: batch2 before batch10."""
    return sorted(values, key=lambda v: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", v)])


def draw_groups(table, group: str, label: str, name: str, places):
    """Accuracy by confidence (upwards), or batch or policies (to the right); a panel a split, a colour a size."""
    drawn, others = pick(table, "reward", "accuracy", "accuracy of a group", group=group)
    means = over_seeds(drawn, ["split", "group", "at", "size"])
    counts = drawn.groupby(["split", "at"])["count"].max() if len(drawn) else {}
    values = {}
    for split in SPLITS.values():
        found = in_order(set(drawn.loc[drawn["split"] == split, "at"]))
        if group == "policies":
            often = [v for v in found if counts[split, v] >= PAIRS_NEEDED]
            found = sorted(often or found, key=lambda v: -counts[split, v])[:PAIRS_SHOWN]
        values[split] = found
    upright, rows = group == "confidence", [max(1, len(v)) for v in values.values()]
    height = 2.8 if upright else 1.5 + 0.2 * sum(rows)
    figure = new_figure(WIDTH, height)
    axes = figure.subplots(1, 2, sharey=True) if upright else figure.subplots(2, 1, height_ratios=rows, sharex=True)
    sizes = [s for s in places if s in set(drawn["size"])]
    lowest = max(0, min(0.5, drawn["value"].min()) - 0.05) - 0.03
    for axis, (title, split) in zip(axes, SPLITS.items()):
        at = {v: float(v) if upright and v.replace(".", "").isdigit() else i for i, v in enumerate(values[split])}
        for i, size in enumerate(sizes):
            shift = min(0.25, 0.6 / len(sizes)) * (i - (len(sizes) - 1) / 2)
            here = lambda rows: rows[(rows["split"] == split) & (rows["size"] == size) & rows["at"].isin(at)]
            points, middle = here(drawn), here(means).assign(place=lambda m: m["at"].map(at)).sort_values("place")
            if not len(middle):
                continue
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            pairs = ((points["at"].map(at) + shift, points["value"]), (middle["place"] + shift, middle["value"]))
            (x, y), (x_mean, y_mean) = pairs if upright else [pair[::-1] for pair in pairs]
            axis.plot(x, y, ls="", ms=2.2, mfc="white", mew=0.6, alpha=0.7, **look)
            look_of_mean = look | {"label": size}
            axis.errorbar(x_mean, y_mean, **{"yerr" if upright else "xerr": arms(middle)}, ms=4, capsize=1.5, lw=0.9,
                          ls=LINES[i % len(LINES)] if upright else "", **look_of_mean)  # fmt: skip
        names = [v if upright else f"{v}  ({counts[split, v]:.0f})" for v in at]
        (axis.set_xticks if upright else axis.set_yticks)(list(at.values()), names)
        (axis.axhline if upright else axis.axvline)(0.5, color="#999999", lw=0.8, ls=(0, (1, 2)))
        (axis.set_ylim if upright else axis.set_xlim)(lowest, 1.03)
        if not upright:
            axis.set_ylim(max(1, len(at)) - 0.4, -0.6)
        axis.set_title(title)
        if not at:
            axis.text(0.5, 0.5, "no run to draw", transform=axis.transAxes, ha="center", va="center", color="#555555")
    (axes[0].set_ylabel if upright else axes[1].set_xlabel)("accuracy")
    for axis in axes if upright else []:
        axis.set_xlabel(label)
    figure.supylabel("" if upright else label, fontsize=8)
    hidden = sum(drawn.loc[drawn["split"] == s, "at"].nunique() - len(v) for s, v in values.items())
    more = f"The most compared pairs; {hidden} more in {name}.csv" if hidden else ""
    finish(figure, [more, note_on_others(others, name)])
    return (figure, figure_rows(drawn, means, others)), others


def main(args: Args) -> dict[str, pandas.DataFrame]:
    """Draw and write everything; returns the rows behind each figure."""
    with drawing(**STYLE):
        return draw_all(args)


def draw_all(args: Args) -> dict[str, pandas.DataFrame]:
    table, left_out = read_runs(args)
    published = read_published(args.paper, ["rouge_score_plot", "rm_scale_plot"])
    places = size_positions(table[table["stage"].isin(["sft", "reward"])])
    figures = {}
    figures["rouge_score_plot"], rouge, others = draw_rouge(table, published, places)
    figures["rm_scale_plot"], accuracy, more = draw_accuracy(table, published, places)
    others = [others, more]
    for name, group, label in (("rm_by_confidence", "confidence", "confidence (1, 9: sure; 4, 6: nearly equal)"),
                               ("rm_by_batch", "batch", "batch of comparisons (pairs)"),
                               ("rm_by_policy_pair", "policies", "the two summaries' policies (pairs)")):  # fmt: skip
        figures[name], more = draw_groups(table, group, label, name, places)
        others.append(more)
    print_results("SFT and reward model", pandas.concat([rouge, accuracy]), pandas.concat(others), left_out)
    # curves are not drawn here: the last point of each stands for it
    table = table[(table["kind"] != "curve") | ~table.duplicated(["run", "kind", "metric"], keep="last")]
    write_all(figures, table, "sft_rm_scale", args.output_dir)
    return {name: rows for name, (_, rows) in figures.items()}


if __name__ == "__main__":
    command_line(main, Args)
