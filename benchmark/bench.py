"""Our stages beside TRL's trainers, in one run on this machine: time, memory, FLOPs, profiles, scaling. `make bench`.

    make bench                                             all of it (about 80 minutes on 2 fast cores)
    .venv-bench/bin/python benchmark/bench.py --steps beside --repetitions 1

Every measurement is a process of its own (`one_run.py`); the two sides alternate. What is measured is kept in
<output_dir>/runs.json at once: started again, the same command measures only what is missing.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

os.environ.setdefault("TQDM_DISABLE", "1")  # of the libraries that write the workload
import torch  # noqa: E402
from workload import Workload, make, matmul_peak, real_tokens, trunk_flops, useful_flops  # noqa: E402

from summarize_from_feedback_details.common.arguments import command_line  # noqa: E402
from summarize_from_feedback_details.common.figures import drawing, new_figure, save_figure  # noqa: E402

HERE = Path(__file__).resolve().parent
TRL_PPO = HERE.parent / ".venv-bench" / "trl-ppo"  # the last release that had PPO, see the Makefile
ROWS = {"sft": 8, "reward": 8, "ppo": 16}  # of an update
UNIT = {"sft": "rows", "reward": "pairs", "ppo": "episodes"}
CELLS = [("sft", 1), ("sft", 4), ("reward", 1), ("reward", 4), ("ppo", 4)]  # (stage, micro batch)
COLORS = {"TRL": "#b8b8b8", "ours": "#0072b2", "ours, bf16": "#d55e00"}
# what is asked of a ratio, and what is aimed for: (name, at least, aim for)
TARGETS = {
    "PPO, fp32": (2.0, 2.5), "PPO, bf16 against TRL's fp32": (3.5, 5.0),
    "RM, each at its better micro batch": (1.5, 1.75), "RM, micro batch 4": (1.9, 2.2),
    "SFT, each at its better micro batch": (1.2, 1.4), "SFT, micro batch 4": (1.5, 1.8),
}  # fmt: skip
SCALED = {  # of a smaller workload, so that 13 points of three stages take minutes
    "query": [("query", f) for f in (0.25, 0.5, 1.0, 1.5)],
    "response": [("response", f) for f in (0.5, 1.0, 2.0, 3.0)],
    "batch": [("rows", f) for f in (4, 8, 12, 16)],
    "model": [("hidden", f) for f in (256, 384, 512, 768)],
}
# what becomes of memory in a long run: other rows in each update, of the same lengths all in all
LONG = {"rows": 1600, "hidden": 64, "layers": 2, "heads": 2}
LONG_UPDATES = {"ours": 200, "trl": 30}
LONG_ROWS = {"sft": 8, "reward": 8, "ppo": 4}  # of an update
# of other algorithms, each beside TRL 1.16: (algorithm, micro batch) -> rows or queries that there are, batch
ALTERNATIVES = {("dpo", 1): (8, 8), ("dpo", 4): (8, 8), ("rloo", 4): (4, 16), ("grpo", 4): (4, 16)}
ASKED = {"dpo": 1.8, "rloo": 2.0, "grpo": 2.0}  # times as fast; memory at most 0.8
Step = Literal["flops", "profile", "beside", "memory", "scaling", "alternatives"]


@dataclass
class Args:
    output_dir: Path | None = None
    """folder of the results (default `benchmark/results/<date>-<cpu>`)"""
    steps: tuple[Step, ...] = ("flops", "profile", "beside", "memory", "scaling", "alternatives")
    """what to measure; the report is made of whatever has been measured"""
    repetitions: int = 3
    """how often each side is timed"""
    query: float = 1.0
    """factor on the lengths of queries (a quick try: 0.1)"""
    hidden: int = 512
    """width of the models, 64 per head"""
    layers: int = 6
    """layers of the models"""


def cpu_name() -> str:
    """Model of the processor, for people."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Runs:
    """All measurements so far, in one file; each has a key that says what was measured."""

    def __init__(self, folder: Path, scratch: Path):
        self.file, self.scratch, self.found = folder / "runs.json", scratch, {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.found = json.loads(self.file.read_text())

    def measure(self, side: str, stage: str, micro: int, work: Workload, key: str, **options) -> dict:
        """The result of `one_run.py`, measured now if it is not there."""
        key = f"{key} {stage} micro {micro} {side} {options.get('precision', 'fp32')}"
        if key in self.found:
            return self.found[key]
        folder = self.scratch / "-".join(f"{value}" for value in asdict(work).values())
        make(work, folder)
        command = [sys.executable, HERE / "one_run.py", "--side", side, "--stage", stage, "--micro", micro,
                   "--folder", folder]  # fmt: skip
        for name, value in {**{f"work.{k}": v for k, v in asdict(work).items()}, **options}.items():
            command += [f"--{name}"] if value is True else [f"--{name}", value]
        environment = os.environ | ({"PYTHONPATH": str(TRL_PPO)} if (side, stage) == ("trl", "ppo") else {})
        start = time.time()
        done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: {key}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        self.found[key] = result = json.loads(done.stdout.splitlines()[-1])
        self.file.write_text(json.dumps(self.found, indent=1))
        seconds = " ".join(f"{s:.2f}" for s in result["seconds"])
        print(f"{key}: {seconds} s, {result['peak_gb']:.2f} GB ({time.time() - start:.0f} s in all)", flush=True)
        return result

    def all_of(self, key: str) -> list[dict]:
        """Measurements whose key is `<repetition> <key>`."""
        return [run for name, run in self.found.items() if re.fullmatch(rf"repetition \d+ {re.escape(key)}", name)]


def measure(args: Args, runs: Runs) -> None:
    base = Workload(rows=8, query=args.query, hidden=args.hidden, layers=args.layers, heads=max(1, args.hidden // 64))
    if "flops" in args.steps:
        for stage, micro in CELLS:
            for side in ("ours", "trl"):
                runs.measure(side, stage, micro, replace(base, rows=ROWS[stage]), "flops", count_flops=True)
    if "profile" in args.steps:
        for stage in ROWS:
            file = runs.file.parent / f"profile_{stage}.txt"
            runs.measure("ours", stage, 4, replace(base, rows=ROWS[stage]), "profile", profile=file)
    if "beside" in args.steps:
        for i in range(args.repetitions):
            key = f"repetition {i + 1}"
            if f"{key} peak" not in runs.found:
                runs.found[f"{key} peak"] = {"fp32": matmul_peak(), "bf16": matmul_peak(True) if has_bf16() else None}
            for stage, micro in CELLS:
                work = replace(base, rows=ROWS[stage])
                warm_up = 0 if stage == "ppo" else 1  # an update of PPO is 16 forward and backward passes
                for side in ("ours", "trl") if i % 2 == 0 else ("trl", "ours"):
                    runs.measure(side, stage, micro, work, key, warm_up=warm_up)
                if stage == "ppo" and has_bf16():
                    runs.measure("ours", stage, micro, work, key, precision="bf16")
    if "memory" in args.steps:
        work = Workload(**LONG, query=args.query)
        for stage in ROWS:
            for side, precision in (("ours", "fp32"), ("ours", "bf16"), ("trl", "fp32")):
                if (precision == "fp32" or has_bf16()) and (side == "ours" or TRL_PPO.is_dir()):
                    sizes = {"updates": LONG_UPDATES[side], "batch": LONG_ROWS[stage]}
                    runs.measure(side, stage, 4, work, "long", precision=precision, **sizes)
    if "scaling" in args.steps:
        for stage in reversed(ROWS):
            for name, value in (point for points in SCALED.values() for point in points):
                work = replace(replace(base, rows=4), **{name: value})
                work = replace(work, heads=max(1, work.hidden // 64))
                runs.measure("ours", stage, 4, work, f"scaling {name} {value}", warm_up=0 if stage == "ppo" else 1)
    if "alternatives" in args.steps:
        for i in range(args.repetitions):
            for (stage, micro), (rows, batch) in ALTERNATIVES.items():
                for side in ("ours", "trl") if i % 2 == 0 else ("trl", "ours"):
                    key, warm_up = f"repetition {i + 1}", int(stage == "dpo")
                    runs.measure(side, stage, micro, replace(base, rows=rows), key, warm_up=warm_up, batch=batch)


# ----------------------------------------------------------------------------------------------------------------------
# report


def mean_of(runs: list[dict], read=lambda run: statistics.mean(run["seconds"])) -> float:
    return statistics.mean(map(read, runs))


def ratio(theirs: list[dict], ours: list[dict]) -> tuple[float, float, float]:
    """How many times faster: the mean's, the least and the most of pairs of the same repetition."""
    pairs = [t["seconds"][-1] / o["seconds"][-1] for t, o in zip(theirs, ours)]
    return mean_of(theirs) / mean_of(ours), min(pairs), max(pairs)


def comparisons(runs: Runs) -> dict[str, tuple[list[dict], list[dict], str, str]]:
    """Name of TARGETS -> (TRL's runs, ours, key of TRL's FLOPs, key of ours)."""
    of = lambda stage, micro, side, precision="fp32": runs.all_of(f"{stage} micro {micro} {side} {precision}")
    found = {}
    for stage, name in (("reward", "RM"), ("sft", "SFT")):
        best = {side: min((1, 4), key=lambda m, s=side: mean_of(of(stage, m, s))) for side in ("trl", "ours")}
        for what, micros in (("each at its better micro batch", best), ("micro batch 4", {"trl": 4, "ours": 4})):
            keys = [f"flops {stage} micro {micros[side]} {side} fp32" for side in ("trl", "ours")]
            found[f"{name}, {what}"] = (of(stage, micros["trl"], "trl"), of(stage, micros["ours"], "ours"), *keys)
    keys = [f"flops ppo micro 4 {side} fp32" for side in ("trl", "ours")]
    found["PPO, fp32"] = (of("ppo", 4, "trl"), of("ppo", 4, "ours"), *keys)
    if of("ppo", 4, "ours", "bf16"):
        found["PPO, bf16 against TRL's fp32"] = (of("ppo", 4, "trl"), of("ppo", 4, "ours", "bf16"), *keys)
    return {name: found[name] for name in TARGETS if name in found}


def report(args: Args, runs: Runs) -> str:
    """The report in Markdown."""
    folder, peaks = runs.file.parent, [run for name, run in runs.found.items() if name.endswith("peak")]
    peak = {p: max(run[p] for run in peaks) if peaks[0][p] else None for p in ("fp32", "bf16")}
    base = Workload(rows=8, query=args.query, hidden=args.hidden, layers=args.layers, heads=max(1, args.hidden // 64))
    queries, responses = replace(base, rows=16).query_lengths(), replace(base, rows=16).response_lengths(0)
    packages = ("torch", "transformers", "accelerate", "datasets", "trl")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = next(run["threads"] for name, run in runs.found.items() if name.startswith("repetition 1 sft"))
    bf16 = f"{peak['bf16'] / 1e9:.0f} in bf16" if peak["bf16"] else "no native bf16: left out"
    lines = [
        f"# Beside TRL on {cpu_name()}", "",
        f"`make bench`; {threads} threads, matrix product of 2048 x 2048: {peak['fp32'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{bf16}.",
        f"Python {platform.python_version()}, {versions}; TRL's PPO is that of 1.12.0, the last release that had it.",
        "",
        f"Workload: GPT-NeoX of width {args.hidden}, {args.layers} layers, vocabulary 50304, random weights; queries "
        f"of {queries.min()} to {queries.max()} tokens (mean {queries.mean():.0f}), responses of {responses.min()} to "
        f"{responses.max()} (mean {responses.mean():.0f}, their ends forced on both sides); dropout off, AdamW, no "
        "gradient checkpointing. The same rows in every update on both sides: 8 rows (SFT), 8 pairs (RM), 16 episodes "
        "x 4 passes (PPO). Both sides compute in float32 but where bf16 is named (TRL's PPO ignores `bf16=True` on a "
        "CPU). Timed: an update after one that is not (PPO: the first one, on both sides).", "",
        "## Ratios", "",
        f"Time of TRL / time of ours, the mean of {len(peaks)} repetitions (least to most of one repetition). It is "
        "the product of computing fewer positions (FLOPs of TRL / FLOPs of ours, counted while running) and of "
        "computing them faster.", "",
        "| | ratio | spread | fewer FLOPs | faster | at least | aim for |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (theirs, ours, their_flops, our_flops) in comparisons(runs).items():
        value, low, high = ratio(theirs, ours)
        fewer = runs.found[their_flops]["computed_flops"] / runs.found[our_flops]["computed_flops"]
        least, aim = TARGETS[name]
        cells = [f"**{value:.2f}x**", f"{low:.2f} to {high:.2f}", f"{fewer:.2f}x", f"{value / fewer:.2f}x"]
        lines.append(f"| {name} | {' | '.join(cells)} | {least}x | {aim}x |")
    lines += ["", "## Memory", "",
              "Peak of each side's process until its last update ends, before anything is saved.", "",
              "| | TRL, GB | ours, GB | ours / TRL |", "|---|---|---|---|"]  # fmt: skip
    for stage, micro in CELLS:
        gb = [mean_of(runs.all_of(f"{stage} micro {micro} {s} fp32"), lambda r: r["peak_gb"]) for s in ("trl", "ours")]
        lines.append(f"| {stage}, micro batch {micro} | {gb[0]:.2f} | {gb[1]:.2f} | {gb[1] / gb[0]:.2f} |")
    lines += ["", *memory_of_long_runs(runs)]
    if runs.all_of("dpo micro 4 ours fp32"):
        lines += ["", *alternatives(runs)]
    lines += ["", "## Each stage", "",
              "Seconds of an update by phase; real tokens per second (of each pass over a row, pads not counted); "
              "useful FLOPs (`workload.useful_flops`) of the training phases as a share of the matrix-product peak.",
              "",
              "| | seconds | rollout | backward | optimiser | forward and the rest | per second | tokens/s | of peak |",
              "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for stage, micro in CELLS:
        work = replace(base, rows=ROWS[stage])
        for side, precision in (("trl", "fp32"), ("ours", "fp32"), ("ours", "bf16")):
            found = runs.all_of(f"{stage} micro {micro} {side} {precision}")
            if not found:
                continue
            seconds = mean_of(found)
            phase = lambda name, found=found: mean_of(found, lambda run: run["phases"][-1].get(name, 0.0))
            names = ("rollout", "backward", "optimiser", "forward and the rest")
            share = useful_flops(stage, work)["training"] / (seconds - phase("rollout")) / peak[precision]
            who = ("TRL" if side == "trl" else side) + (", bf16" if precision == "bf16" else "")
            cells = [f"{stage}, micro batch {micro}, {who}", f"{seconds:.2f}"]
            cells += [f"{phase(name):.2f}" if phase(name) else "" for name in names]
            speeds = [f"{ROWS[stage] / seconds:.2f} {UNIT[stage]}", f"{real_tokens(stage, work) / seconds:.0f}"]
            lines.append(f"| {' | '.join([*cells, *speeds, f'{share:.0%}'])} |")
    lines += ["", "Figures: `bars.png`, `scaling.png`; profiles: `profile_<stage>.txt` (operators by their own time); "
              "every measurement: `runs.json`.", ""]  # fmt: skip
    text = "\n".join(lines)
    (folder / "README.md").write_text(text)
    return text


def memory_of_long_runs(runs: Runs) -> list[str]:
    """Lines of the report: does memory grow with the updates?"""
    shown = (1, 20, 30, 200)
    lines = ["## Memory of long runs", "",
             f"Peak during one update, GB: GPT-NeoX of width {LONG['hidden']}, {LONG['layers']} layers; 8 other "
             "rows or pairs, or 4 other episodes, in each update, so that hardly a number of tokens comes twice. The "
             "last column compares the largest peak of the last 50 updates with that of the first 50: single ones also "
             "depend on when freed memory was given back.", "",
             "| | " + " | ".join(f"update {n}" for n in shown) + " | 200 / 20 | largest |",
             "|---" * (len(shown) + 3) + "|"]  # fmt: skip
    for name, run in runs.found.items():
        if name.startswith("long "):
            _, stage, _, micro, side, precision = name.split()
            peaks = run["peaks_gb"]
            cells = [f"{peaks[n - 1]:.2f}" if n <= len(peaks) else "" for n in shown]
            growth = ["", ""]
            if len(peaks) >= 200:
                growth = [f"{peaks[199] / peaks[19]:.2f}", f"{max(peaks[150:200]) / max(peaks[:50]):.2f}"]
            who = "TRL" if side == "trl" else "ours"
            lines.append(f"| {stage}, micro batch {micro}, {who}, {precision} | {' | '.join([*cells, *growth])} |")
    return lines


def alternatives(runs: Runs) -> list[str]:
    """Lines of the report: DPO, RLOO and GRPO beside TRL's trainers."""
    lines = ["## Other algorithms", "",
             "An update of 8 pairs (DPO) or of 4 queries x 4 responses (RLOO, GRPO), float32, one pass over it; "
             "workload and both sides as `make bench` has them. DPO's time includes the reference's log-probabilities: "
             "of ours, which computes them once before training, those of the update's pairs.", "",
             "| | TRL, s | ours, s | ratio | spread | asked | TRL, GB | ours, GB | ours / TRL |",
             "|---" * 9 + "|"]  # fmt: skip
    for stage, micro in ALTERNATIVES:
        theirs, ours = (runs.all_of(f"{stage} micro {micro} {side} fp32") for side in ("trl", "ours"))
        if theirs and ours:
            value, low, high = ratio(theirs, ours)
            gb = [mean_of(found, lambda run: run["peak_gb"]) for found in (theirs, ours)]
            cells = [f"{stage}, micro batch {micro}", f"{mean_of(theirs):.2f}", f"{mean_of(ours):.2f}"]
            cells += [f"**{value:.2f}x**", f"{low:.2f} to {high:.2f}", f"{ASKED[stage]}x"]
            lines.append(f"| {' | '.join([*cells, *(f'{g:.2f}' for g in gb), f'{gb[1] / gb[0]:.2f}'])} |")
    return lines


def draw(runs: Runs) -> None:
    """`bars.png`: time and memory of both sides; `scaling.png`: our cost against four sizes, each at four points."""
    folder = runs.file.parent
    if runs.all_of("ppo micro 4 ours fp32"):
        figure = new_figure(10, 3.6)
        axes = figure.subplots(1, 2)
        for axis, title, read in (
            (axes[0], "seconds per update, TRL = 1", lambda run: run["seconds"][-1]),
            (axes[1], "peak memory, TRL = 1", lambda run: run["peak_gb"]),
        ):
            for x, (stage, micro) in enumerate(CELLS):
                bars = {"TRL": f"{stage} micro {micro} trl fp32", "ours": f"{stage} micro {micro} ours fp32"}
                bars["ours, bf16"] = f"{stage} micro {micro} ours bf16"
                bars = {name: runs.all_of(key) for name, key in bars.items() if runs.all_of(key)}
                unit = mean_of(bars["TRL"], read)
                for i, (name, found) in enumerate(bars.items()):
                    values = [read(run) / unit for run in found]
                    at, mean = x + 0.28 * (i - 1), statistics.mean(values)
                    label = name if (stage, i) in (("ppo", 2), ("sft", 0), ("sft", 1)) and x in (0, 4) else None
                    axis.bar(at, mean, 0.26, color=COLORS[name], edgecolor="black", linewidth=0.5, label=label,
                             hatch="//" if "bf16" in name else None)  # fmt: skip
                    axis.plot([at] * len(values), values, "k.", markersize=3)
                    axis.annotate(f"{mean:.2f}", (at, mean), ha="center", va="bottom", fontsize=7)
            axis.set_xticks(range(len(CELLS)), [f"{s}\nmicro batch {m}" for s, m in CELLS], fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels())}
        axes[1].legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="upper left", ncols=3)
        axes[1].set_ylim(0, 1.25)
        save_figure(figure, folder / "bars.png", dpi=150)
    if any(name.startswith("scaling") for name in runs.found):
        figure = new_figure(12, 3.3)
        axes = figure.subplots(1, 4)
        for axis, (what, points) in zip(axes, SCALED.items()):
            for stage, marker in zip(ROWS, "os^"):
                xs, ys = [], []
                for name, value in points:
                    run = runs.found.get(f"scaling {name} {value} {stage} micro 4 ours fp32")
                    work = replace(Workload(rows=4), **{name: value})
                    x = {"query": work.query_lengths().mean(), "response": work.response_lengths(0).mean(),
                         "rows": value, "hidden": trunk_flops(work, 1) / 2e6}[name]  # fmt: skip
                    if run:
                        xs.append(x)
                        ys.append(run["seconds"][-1] / value if name == "rows" else run["seconds"][-1] / 4)
                if xs:
                    axis.plot(xs, ys, marker=marker, label=stage)
            labels = {"query": "query, tokens (mean)", "response": "response, tokens (mean)",
                      "batch": "rows of an update", "model": "parameters of the layers, million"}  # fmt: skip
            axis.set(xlabel=labels[what], xlim=(0, None), ylim=(0, None))
            axis.grid(alpha=0.3, linewidth=0.4)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("seconds per row, pair or episode")
        axes[0].legend(frameon=False, fontsize=8)
        save_figure(figure, folder / "scaling.png", dpi=150)


def main(args: Args) -> None:
    if args.repetitions < 1:
        sys.exit(f"error: --repetitions: found {args.repetitions}, expected a positive number")
    if not TRL_PPO.is_dir() and not set(args.steps) <= {"memory", "alternatives"}:
        sys.exit("error: TRL is not installed; expected `make bench`, which installs it")
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|@.*|cpu|processor", " ", cpu_name().lower())).strip("-")
    folder = args.output_dir or HERE / "results" / f"{time.strftime('%Y-%m-%d')}-{slug}"
    print(f"results: {folder}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(folder, Path(scratch))
        measure(args, runs)
    if any(name.startswith("repetition") for name in runs.found) and any(n.startswith("flops") for n in runs.found):
        print(report(args, runs))
    elif "alternatives" in args.steps:
        text = "\n".join([f"# Beside TRL {version('trl')} on {cpu_name()}", "", *alternatives(runs)])
        (folder / "alternatives.md").write_text(text + "\n")
        print(text)
    elif "memory" in args.steps:
        text = "\n".join(memory_of_long_runs(runs))
        (folder / "memory.md").write_text(text + "\n")
        print(text)
    with drawing():
        draw(runs)
    print("\n".join(f"{path}" for path in sorted(folder.iterdir())))


if __name__ == "__main__":
    command_line(main, Args)
