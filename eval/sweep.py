"""Finished runs again with other values of one argument, the learning rate or the seed, and what each reached.

    python eval/sweep.py --runs toy_small_seed4_sft toy_small_seed4_ppo --scales 0.3 3
    python eval/sweep.py --runs my_reward --argument seed --values 2 3

Reads   runs/<run>, whose other arguments are kept, but for the run's name and the folders of its models
Writes  runs/<run>_<argument><value> with models beside the first one's, and <output_dir>/<name>.{md,csv}

The same command goes on after a stop: a finished run is not trained again.
"""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas
from algorithms import write_table
from hello_report import number, shown

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import refuse_uncreatable
from summarize_from_feedback_details.common.run_files import find_run

ROOT, RUNS = Path(__file__).resolve().parent.parent, Path("runs")
REACHED = {  # stage -> what its runs are compared by, the more the better, and what is shown beside it
    "sft": ("validation/sft/rouge/rougeL", "validation/sft/loss"),
    "reward": ("eval/rm/validation/accuracy", "eval/rm/validation/loss"),
    "ppo_left_padding": ("eval/ppo/validation/score", "objective/kl"),
}


@dataclass
class Args:
    runs: tuple[str, ...]
    """names of finished runs of sft.py, reward.py or ppo_left_padding.py"""
    argument: str = "lr"
    """which argument"""
    scales: tuple[float, ...] = (0.3, 3.0)
    """multiples of each run's own value"""
    values: tuple[float, ...] = ()
    """values, in the place of --scales"""
    jobs: int = 1
    """runs that are trained at the same time"""
    judge: Literal["gold"] | None = None
    """judge whose mean score is shown beside policies: gold, in the toy world"""
    output_dir: str = "docs/images"
    """folder of the table"""
    name: str = "sweep"
    """its name"""
    documents: tuple[str, ...] = ("docs/results.md",)
    """documents that show the table, between `<!-- TABLE -->` and `<!-- /TABLE -->`, where TABLE is its path"""


def as_flags(args: dict[str, Any], prefix: str = "") -> list[str]:
    """The command line of a run's typed.json."""
    flags = []
    for name, value in args.items():
        if isinstance(value, dict):
            flags += as_flags(value, f"{prefix}{name.replace('lora_params', 'lora')}.")
        elif isinstance(value, bool):
            flags.append(f"--{prefix}{'' if value else 'no-'}{name}")
        elif isinstance(value, list):
            flags += [f"--{prefix}{name}", *map(str, value)] if value else []
        elif value is not None:
            flags += [f"--{prefix}{name}", str(value)]
    return flags


def repeat(run: Path, stage: str, argument: str, value: float | int) -> list[str]:
    """The command that repeats a run with another value of an argument; what it made of other inputs is set aside."""
    args, suffix = json.loads((run / "typed.json").read_text()), f"_{argument}{value:g}"
    args |= {argument: value, "run_name": run.name + suffix, "push_to_hub": False}
    made = {name: f"{args[name]}{suffix}" for name in ("output_dir", "value_output_dir") if args.get(name)}
    args |= made
    again = run.with_name(args["run_name"])
    if again.is_dir() and json.loads((again / "typed.json").read_text()) != args:
        for path in filter(Path.exists, map(Path, (again, *made.values()))):
            n = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.old-{n}").exists())
            path.rename(path.with_name(f"{path.name}.old-{n}"))
            print(f"{path} was made of other inputs: now {path}.old-{n}", flush=True)
    del args["models"]
    script = ROOT / f"summarize_from_feedback_details/{stage}.py"
    return [sys.executable, str(script), *as_flags(args)]


def train(command: list[str], log: Path) -> bool:
    """Run a stage to its end; whether it came there."""
    with open(log, "a") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    name = log.stem
    print(f"{name}: done" if not done.returncode else f"{name}: FAILED, see {log}", flush=True)
    return not done.returncode


def row_of(path: Path, stage: str, judge: str | None) -> dict[str, Any]:
    """What a run reached."""
    summary, _ = find_run(path) or ({}, {})
    final = summary["metrics"] if summary.get("state") == "finished" else {}
    best, beside = REACHED[stage]
    row = {"by": best.split("/")[-1], "reached": number(final.get(best)), "loss or KL": number(final.get(beside))}
    report = path / f"judge/{judge}/report.json"
    if report.exists():
        row[judge] = number(json.loads(report.read_text())["mean_score"]["mean"])
    return row


def main(args: Args) -> pandas.DataFrame:
    """Train, judge, and write the table; returns it."""
    refuse_uncreatable("output_dir", args.output_dir, f"{args.name}.csv")
    if args.jobs < 1:
        refuse("jobs", str(args.jobs), "a number above 0")
    jobs, rows = [], {}
    for name in args.runs:
        summary, of_run = find_run(RUNS / name) or ({}, {})
        if summary.get("state") != "finished" or summary.get("stage") not in REACHED:
            refuse("runs", f"'{name}', {summary.get('stage')} {summary.get('state')}", "a finished run of a stage")
        if not (RUNS / name / "typed.json").exists() or of_run.get("deepspeed"):
            refuse("runs", f"'{name}', of an earlier version or of several processes", "a run of one process")
        own = of_run.get(args.argument)
        if isinstance(own, bool) or not isinstance(own, (int, float)):
            refuse("argument", f"'{args.argument}', which is {own!r} in {name}", "an argument of the stage, a number")
        values = args.values or [own * scale for scale in args.scales]
        for value in sorted({own, *map(type(own), values)}):
            again = name if value == own else f"{name}_{args.argument}{value:g}"
            rows[again] = (summary["stage"], value)
            if again != name:
                jobs.append((name, summary["stage"], value, Path("logs/sweep", f"{again}.log")))
    commands = [(repeat(RUNS / name, stage, args.argument, value), log) for name, stage, value, log in jobs]
    os.makedirs("logs/sweep", exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        trained = list(pool.map(train, *zip(*commands)))
    policies = [
        name
        for name, (stage, _) in rows.items()
        if stage != "reward" and (RUNS / name / "tables/validation.parquet").exists()
    ]
    if args.judge and policies:
        judge = [sys.executable, str(ROOT / "eval/judge.py"), "--judge", args.judge, "--run", *policies]
        if code := subprocess.run(judge).returncode:
            sys.exit(code)
    found = {
        name: {args.argument: f"{value:g}"} | row_of(RUNS / name, stage, args.judge)
        for name, (stage, value) in rows.items()
    }
    table = pandas.DataFrame(found).T
    write_table(
        table.map(lambda cell: cell if isinstance(cell, str) else shown(cell)),
        Path(args.output_dir, args.name),
        args.documents,
    )
    if not all(trained):
        sys.exit(1)
    return table


if __name__ == "__main__":
    command_line(main, Args)
