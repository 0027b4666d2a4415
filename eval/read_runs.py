"""Runs -> one table: what each run is, how it ended, and every number that the figures need.

Reads   run folders (`runs/<run>/` with args.json, summary.json, metrics.jsonl, tables/accuracy.parquet and the judges'
        judge/<name>/report.json), a Weights & Biases project, or a CSV that a plot script has written
Gives   a DataFrame with one row a number (COLUMNS below). A run without any number keeps one row, so that none is lost.

`kind` says what a row's number is:
    final     the last value of a metric of the run
    curve     a metric of PPO during training, averaged over windows of updates, at `episode`
    accuracy  of a reward model on the `pairs` of one group: `split`, `group` (batch, confidence, policies), `at`
    judge     what the judge `judge` found; `at`: the length ratio "0.5 to 0.75"; `update`, `kl`: of a run's own path
    none      there is no number
"""

import contextlib
import json
import math
import re
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas

from summarize_from_feedback_details.common.arguments import refuse
from summarize_from_feedback_details.common.files import refuse_uncreatable
from summarize_from_feedback_details.common.run_files import optimises_a_policy, read_lines, read_run

ROOT = Path(__file__).resolve().parent.parent
# stage: `ppo` of all that optimises a policy; variant: what tells such runs apart, a KL coefficient or an algorithm
# temperature: at which the responses that are judged were sampled
RUN_COLUMNS = ["run", "stage", "state", "reason", "seed", "size", "parameters", "kl_coef", "variant", "temperature"]
NUMBER_COLUMNS = ["kind", "metric", "judge", "split", "group", "at", "update", "episode", "kl",
                  "value", "low", "high", "count"]  # fmt: skip
COLUMNS = RUN_COLUMNS + NUMBER_COLUMNS
TEXTS = {"run", "stage", "state", "reason", "size", "variant", "kind", "metric", "judge", "split", "group", "at"}
ROUGE = [f"validation/sft/rouge/{name}" for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
ACCURACY = {"TL;DR": "eval/rm/validation/accuracy", "CNN/DM": "eval/rm/validation_cnndm/accuracy"}
CURVES = ["objective/scores", "objective/kl", "objective/entropy", "objective/response_length", "objective/eos_rate"]
FINAL = {"sft": ROUGE, "reward": list(ACCURACY.values()), "ppo": CURVES}
JUDGED = ["win_rate", "length_controlled_win_rate", "mean_score", "reference_mean_score"]
REFERENCES = (None, "references")  # what a report's win rate is against; one against another policy is not read
CURVE_POINTS = 100  # a longer curve is averaged over windows of updates
# left out unless named: smoke runs learn nothing, the others were set aside by the stages and by hello_world.sh
NOT_BY_DEFAULT = ("smoke_*", "*.stopped-*", "*.old-*")


@dataclass
class ReadArgs:
    # the runs
    runs: tuple[str, ...] = ()
    """names of runs, or patterns such as `pythia-1b*` (default: all, but for smoke runs and those set aside)"""
    source: Literal["runs", "wandb", "csv"] = "runs"
    """where the runs are read: run folders, a Weights & Biases project, or a CSV that this script has written"""
    runs_dir: Path = ROOT / "runs"
    """folder of the runs; with --source wandb the judges' reports are still read here"""
    wandb_entity: str | None = None
    """team or user on Weights & Biases (default: your own)"""
    wandb_project_name: str = "tldr_summarize"
    """project on Weights & Biases"""
    csv: Path | None = None
    """with --source csv: the file, `sft_rm_scale.csv` or `rlhf_scaling_plot.csv`"""

    # the figures
    output_dir: Path = ROOT / "eval/images"
    """folder of the figures and of the numbers behind them"""
    paper: bool = False
    """also draw the published numbers (`published_results.csv`), in a panel of their own"""


def number(value: Any) -> float:
    """A float; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# one run, as raw material: what it was asked, how it ended, its metrics
def read_folder(path: Path) -> dict[str, Any]:
    """A run folder; one that cannot be read gives a run of state `unreadable`."""
    try:
        summary, args = read_run(path)
        if not isinstance(args.get("ppo", {}), dict):
            raise ValueError("args.json holds no arguments")
        run = {"run": path.name, "args": args, "accuracy": None}
        run |= {k: summary.get(k) for k in ("stage", "state", "reason", "parameters", "wall_clock_seconds")}
        run |= {"final": summary.get("metrics") or {}, "lines": read_lines(path / "metrics.jsonl")}
        if (path / "tables/accuracy.parquet").exists():
            run["accuracy"] = pandas.read_parquet(path / "tables/accuracy.parquet")
        return run | {"reports": read_reports(path)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        missing = isinstance(error, FileNotFoundError) and f"no {Path(error.filename).name}"
        return {"run": path.name, "state": "unreadable", "reason": missing or f"{type(error).__name__}: {error}"}


def read_reports(path: Path) -> list[tuple[str, int | None, dict]]:
    """The judges' reports on a run against the references: (judge, update; None for the finished policy, report)."""
    found = []
    for file in sorted(path.glob("judge/**/report.json")):
        name = re.fullmatch(r"([^.][^/]*?)(?:/update_(\d+))?", file.parent.relative_to(path / "judge").as_posix())
        if name and ".old-" not in name[1] and (report := json.loads(file.read_text())).get("against") in REFERENCES:
            found.append((name[1], int(name[2]) if name[2] else None, report))
    return found


def read_wandb(args: ReadArgs) -> list[dict[str, Any]]:
    """All runs of a Weights & Biases project."""
    import wandb

    project = f"{args.wandb_entity}/{args.wandb_project_name}" if args.wandb_entity else args.wandb_project_name
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(wandb.Settings().base_url, timeout=10)  # its own client would retry for minutes
        runs = [read_wandb_run(run, args) for run in wandb.Api(timeout=60).runs(project)]
    except (wandb.errors.Error, OSError, ValueError) as error:
        refuse("source", f"wandb, but '{project}' cannot be read ({str(error).splitlines()[0]})",
               "a project that can be reached: `wandb login`, --wandb_entity, --wandb_project_name")  # fmt: skip
    for run in runs:  # there a name may stand for several runs
        if sum(other["name"] == run["name"] for other in runs) > 1:
            run["run"] = f"{run['name']}_{run['id']}"
    return runs


def read_wandb_run(run: Any, args: ReadArgs) -> dict[str, Any]:
    """One run of `wandb.Api().runs(...)`, in the form of `read_folder`."""
    final, config, accuracy = dict(run.summary), dict(run.config), None
    stage = "reward" if "label_dataset" in config else "ppo" if "reward_model_path" in config else "sft"
    if "tables/accuracy" in final:
        with tempfile.TemporaryDirectory() as folder, run.file(final["tables/accuracy"]["path"]).download(folder) as f:
            table = json.load(f)
        accuracy = pandas.DataFrame(table["data"], columns=table["columns"])
    keys = [*CURVES, "train/ppo/episode", "_step"]
    lines = [line | {"update": line["_step"]} for line in run.scan_history(keys=keys)] if stage == "ppo" else []
    state = {"crashed": "failed", "killed": "failed"}.get(run.state, run.state)
    return {"run": run.name, "name": run.name, "id": run.id, "stage": stage, "state": state,
            "reason": None if state == run.state else run.state, "parameters": final.get("parameters"),
            "args": config, "final": final, "lines": lines, "accuracy": accuracy,
            "reports": read_reports(args.runs_dir / run.name)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# sizes
def rounded(parameters: float) -> str:
    """A number of parameters in words: 472000 -> 0.47M, 1011781632 -> 1b."""
    unit, name = (1e6, "M") if parameters < 0.995e9 else (1e9, "b")
    return f"{float(f'{parameters / unit:.2g}'):g}{name}"


def set_sizes(runs: list[dict[str, Any]], runs_dir: Path) -> None:
    """Give each run `parameters` and `size`: the name of its base model's size, equal for all stages of that model."""
    of_base = {}  # the policy's number of parameters counts, also for a reward model of the same base model
    for run in sorted(runs, key=lambda run: run.get("stage") == "reward"):
        base = str(run.get("args", {}).get("base_model"))
        named = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", Path(base).name.lower())
        folder = next((f for f in (Path(base), runs_dir.parent / base) if (f / "toy_tldr.json").exists()), None)
        parameters = number(run.get("parameters"))
        if math.isnan(parameters) and folder is not None:
            parameters = number(json.loads((folder / "toy_tldr.json").read_text()).get("parameters"))
        if math.isnan(parameters) and named:
            parameters = float(named[1]) * {"m": 1e6, "b": 1e9}[named[2]]
        run["parameters"] = parameters
        if not math.isnan(parameters) and base not in of_base:
            of_base[base] = Path(base).name if folder else named[0] if named else rounded(parameters)
        run["size"] = of_base.get(base)


# ----------------------------------------------------------------------------------------------------------------------
# the table
def numbers_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of a run."""
    rows = [{"kind": "final", "metric": m, "value": number(run["final"][m])}
            for m in FINAL[run["stage"]] if m in run["final"]]  # fmt: skip
    lines = pandas.DataFrame(run["lines"])
    curve = lines[lines["objective/kl"].notna()] if "objective/kl" in lines else lines.iloc[:0]
    kl_at = dict(zip(curve.get("update", []), curve.get("objective/kl", [])))
    if run["stage"] == "ppo" and len(curve):
        counted = next((name for name in curve if re.fullmatch(r"train/\w+/episode", name)), "train/ppo/episode")
        curve = curve.rename(columns={counted: "episode"}).reindex(columns=["update", "episode", *CURVES]).astype(float)
        curve = curve.groupby(np.arange(len(curve)) // math.ceil(len(curve) / CURVE_POINTS)).mean()
        for m in CURVES:
            for update, episode, kl, value in curve[["update", "episode", "objective/kl", m]].to_numpy():
                rows.append({"kind": "curve", "metric": m, "update": update, "episode": episode, "kl": kl,
                             "value": value})  # fmt: skip
    for row in [] if run["accuracy"] is None else run["accuracy"].to_dict("records"):
        if row["group"] in ("batch", "confidence", "policies"):
            rows.append({"kind": "accuracy", "metric": "accuracy of a group", "split": row["split"],
                         "group": row["group"], "at": str(row["value"]), "value": row["accuracy"],
                         "count": row["pairs"]})  # fmt: skip
    for judge, update, report in run["reports"]:
        kl = kl_at.get(update) if update is not None else run["final"].get("objective/kl")
        base = {"kind": "judge", "judge": judge, "update": update, "kl": kl}
        for m in JUDGED:
            if report.get(m):
                rows.append(base | {"metric": m, "count": report.get("posts")} | interval(report[m]))
        for part in (report.get("by_length_ratio") or []) if update is None else []:
            ends = (number(part["from"] or 0), number(math.inf if part["to"] is None else part["to"]))
            rows.append(base | {"metric": "win_rate_by_length", "at": "{:g} to {:g}".format(*ends),
                                "count": part["posts"]} | interval(part["win_rate"] or {}))  # fmt: skip
    return rows


def interval(found: dict) -> dict[str, float]:
    return {"value": number(found.get("mean")), "low": number(found.get("low")), "high": number(found.get("high"))}


def tabulate(runs: list[dict[str, Any]], runs_dir: Path) -> pandas.DataFrame:
    """The table of raw runs."""
    set_sizes(runs, runs_dir)
    rows = []
    for run in runs:
        args, found = run.get("args", {}), []
        algorithm, optimises = run.get("stage"), optimises_a_policy({"metrics": run.get("final")}, args)
        run["stage"] = "ppo" if optimises else algorithm
        kl_coef = (args.get("ppo") or {}).get("kl_coef") if optimises else None
        if optimises and kl_coef is None and algorithm not in (None, "ppo", "ppo_left_padding"):
            run["variant"] = algorithm
        elif kl_coef is not None:
            run["variant"] = f"kl_coef {number(kl_coef):g}"
        try:
            found = numbers_of(run) if run["stage"] in FINAL else []
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a report or a table of another form
            run |= {"state": "unreadable", "reason": f"{type(error).__name__}: {error}"}
        known = {c: run.get(c) for c in RUN_COLUMNS} | {"seed": number(args.get("seed")), "kl_coef": number(kl_coef)}
        known["temperature"] = number(args.get("eval_temperature", args.get("temperature")))
        rows += [known | row for row in found or [{"kind": "none"}]]
    return as_table(pandas.DataFrame(rows, columns=COLUMNS))


def as_table(table: pandas.DataFrame) -> pandas.DataFrame:
    """The same table with its columns' types: text or float; infinite is no number."""
    for column in table:
        if column in TEXTS:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
        else:
            table[column] = pandas.to_numeric(table[column]).astype(float).replace([math.inf, -math.inf], math.nan)
    return table


def read_runs(args: ReadArgs) -> tuple[pandas.DataFrame, list[str]]:
    """The table of the chosen runs, and the names of those left out since nobody named them.

    Raises:
        SystemExit: code 2, where an argument is wrong or there is no run.
    """
    refuse_uncreatable("output_dir", args.output_dir, "win_rate_by_length.csv")
    if (args.csv is not None) != (args.source == "csv"):
        refuse("csv", "nothing" if args.csv is None else f"'{args.csv}' with --source {args.source}",
               "the file that a plot script has written, with --source csv")  # fmt: skip
    if args.source == "csv":
        try:
            table = pandas.read_csv(args.csv, dtype=dict.fromkeys(TEXTS, str))
            if "temperature" not in table:  # of an earlier version
                table["temperature"] = math.nan
            if "variant" not in table and "kl_coef" in table:  # of an earlier version: PPO alone
                table["variant"] = table["kl_coef"].map(lambda kl: None if pandas.isna(kl) else f"kl_coef {kl:g}")
            if missing := [name for name in COLUMNS if name not in table]:
                raise ValueError(f"no column {missing[0]}")
            table = as_table(table[COLUMNS])
        except (OSError, ValueError) as error:
            refuse("csv", f"'{args.csv}' ({str(error).splitlines()[0]})", "a file that a plot script has written")
    elif args.source == "wandb":
        table = tabulate(read_wandb(args), args.runs_dir)
    else:
        if not args.runs_dir.is_dir():
            refuse("runs_dir", f"'{args.runs_dir}', which is not a folder", "the folder of the stages' runs")
        folders = [f for f in sorted(args.runs_dir.iterdir()) if f.is_dir() and not f.name.startswith(".")]
        table = tabulate([read_folder(folder) for folder in folders], args.runs_dir)
    names = sorted(set(table["run"]))
    for pattern in args.runs:
        if not any(fnmatch(name, pattern) for name in names):
            refuse("runs", f"'{pattern}', which no run's name matches", f"some of: {', '.join(names) or 'no runs'}")
    chosen = [n for n in names if any(fnmatch(n, p) for p in args.runs)] if args.runs else [
        n for n in names if args.source == "csv" or not any(fnmatch(n, p) for p in NOT_BY_DEFAULT)
    ]  # fmt: skip
    left_out = sorted(set(names) - set(chosen))
    if not chosen and not args.paper:
        where = {"runs": args.runs_dir, "wandb": args.wandb_project_name, "csv": args.csv}[args.source]
        found = f"no run in '{where}'" + (f" but {', '.join(left_out)}" if left_out else "")
        refuse("runs", found, "runs of the stages (`./hello_world.sh` makes some); smoke runs only by their names")
    return table[table["run"].isin(chosen)].reset_index(drop=True), left_out
