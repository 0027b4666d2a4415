"""One GPU at Pythia's shapes: seconds by phase, share of the peak, memory beside the formula. `make bench-gpu`.

    make bench-gpu                                          all cells; stops after 9 minutes, goes on the next time
    python benchmark/gpu.py --stages ppo --shapes 1b        some of them
    python benchmark/gpu.py --smoke                         four tiny cells, on whatever this is

Random weights, rows of real lengths, responses that end where those of real rows do; no network. Every measurement is a
process of its own (`one_run.py`); TRL is measured where it is importable. What is measured is kept in
<output_dir>/runs.json at once.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from bench import TRL_PPO, cpu_name
from memory import PYTHIA, ROOM, Layout, memory
from workload import Workload, make, matmul_peak, real_tokens, useful_flops

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import write_json

HERE = Path(__file__).resolve().parent
HEADS = {"410m": 16, "1b": 8, "2.8b": 32, "6.9b": 32, "tiny": 2}
MEAN_ROW, MEAN_RESPONSE = 370, 40  # tokens, of the workload
# dense bf16 FLOP/s by the data sheets; of another card the measured peak alone is used
DATA_SHEET = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}
PHASES = ("rollout", "prefill", "decoding", "scoring", "forward and the rest", "backward", "optimiser")
Stage = Literal["sft", "reward", "ppo", "sampling"]


class Cell(NamedTuple):
    """One measurement."""

    stage: str
    shape: str
    side: str = "ours"
    lora: bool = False
    rows: int = 64  # of an update
    micro: int = 16  # of a forward pass in training
    sampled: int = 64  # at a time
    checkpointing: bool = False

    @property
    def name(self) -> str:
        how = [f"micro batch {self.micro}"] if self.stage != "sampling" else []
        how += ["LoRA"] * self.lora + ["checkpointing"] * self.checkpointing
        return ", ".join([f"{self.stage} {self.shape}, {self.rows} rows, {self.side}", *how])

    @property
    def work(self) -> Workload:
        if self.shape == "tiny":
            return Workload(rows=self.rows, query=0.05, hidden=64, layers=2, heads=2)
        shape = PYTHIA[self.shape]
        return Workload(rows=self.rows, hidden=shape.hidden, layers=shape.layers, heads=HEADS[self.shape])

    def formula(self) -> float:
        """Bytes by benchmark/memory.py."""
        # without DeepSpeed, trained weights are in float32, and a frozen trunk in bf16
        width = 2 if self.lora else 4
        pair = self.stage == "reward"
        tokens, responses = (MEAN_ROW + MEAN_RESPONSE, 0) if pair else (MEAN_ROW, MEAN_RESPONSE)
        layout = Layout(
            self.stage, self.micro, tokens, MEAN_ROW if self.stage == "sft" else responses,
            self.sampled if self.stage == "ppo" else 0, width=width, lora=16 * self.lora,
            checkpointing=self.checkpointing,
        )  # fmt: skip
        return memory(PYTHIA[self.shape], layout)["peak"]


def cells() -> list[Cell]:
    """What is measured, the most asked for first."""
    small = {"rows": 16, "micro": 1, "sampled": 8, "checkpointing": True}
    found = [
        Cell("ppo", "1b", rows=512),
        Cell("ppo", "1b", rows=512, lora=True),
        *(Cell("sampling", "1b", side) for side in ("ours", "graph", "transformers")),
        *(Cell("ppo", "1b", side, rows=64, micro=4) for side in ("ours", "trl")),
        Cell("ppo", "6.9b", lora=True, **small),
    ]
    for shape in ("1b", "410m", "2.8b"):
        found += [Cell(stage, shape, lora=lora) for stage in ("sft", "reward") for lora in (False, True)]
    found += [Cell(stage, "1b", "trl") for stage in ("sft", "reward")]
    found += [Cell("ppo", shape, lora=lora) for shape in ("410m", "2.8b") for lora in (False, True)]
    return found


SMOKE = [
    Cell("ppo", "tiny", lora=True, rows=4, micro=2, sampled=4),
    Cell("reward", "tiny", rows=4, micro=2, checkpointing=True),
    *(Cell("sampling", "tiny", side, rows=4) for side in ("graph", "transformers")),
]


@dataclass
class Args:
    stages: tuple[Stage, ...] = ("ppo", "sampling", "sft", "reward")
    """what to measure"""
    shapes: tuple[Literal["410m", "1b", "2.8b", "6.9b"], ...] = ("410m", "1b", "2.8b", "6.9b")
    """of which sizes"""
    minutes: float = 9.0
    """stop after so many; the same command goes on"""
    output_dir: Path | None = None
    """folder of the results (default: `benchmark/results/<date>-<gpu>`)"""
    smoke: bool = False
    """tiny cells, also without a GPU"""


def measure(cell: Cell, folder: Path, gpu: bool, seconds: float) -> dict:
    """The result of `one_run.py`, or why there is none: {"failed": a line}; empty: not done in so many seconds."""
    start = time.monotonic()
    try:
        if not (folder / "made.json").exists():
            # a process of its own, or the GPU would keep what it takes
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply_async(make, (cell.work, folder, cell.lora)).get(seconds)
    except multiprocessing.TimeoutError:
        return {}
    except (RuntimeError, OSError) as error:  # out of memory, out of disk
        return {"failed": f"models were not made: {' '.join(str(error).split())[:200]}"}
    command = [sys.executable, HERE / "one_run.py", "--side", cell.side, "--stage", cell.stage, "--folder", folder,
               "--micro", cell.micro, "--sampled", cell.sampled, "--warm_up", 1, "--updates", 1, "--no-saving",
               "--precision", "bf16" if gpu else "fp32"]  # fmt: skip
    for name, value in asdict(cell.work).items():
        command += [f"--work.{name}", value]
    given = {"lora": cell.lora, "gradient_checkpointing": cell.checkpointing, "gpu": gpu}
    given["split_rollout"] = cell.side == "ours" and cell.stage == "ppo"
    command += [f"--{name}" for name, value in given.items() if value]
    environment = os.environ | ({"PYTHONPATH": str(TRL_PPO)} if (cell.side, cell.stage) == ("trl", "ppo") else {})
    try:
        left = seconds - (time.monotonic() - start)
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict[str, dict], known: list[Cell], machine: dict) -> list[str]:
    """Lines of Markdown."""
    peak, sheet = machine["peak_flops"], machine["data_sheet_flops"]
    lines = [
        f"# {machine['name']}, torch {machine['torch']}", "",
        f"Products of two large matrices: {peak / 1e12:.3g} TFLOP/s"
        + (f"; the data sheet says {sheet / 1e12:.0f}." if sheet else "."), "",
        "Seconds of one update after another one. Share of the peak: FLOPs that real tokens need in training, by the "
        f"seconds of training and {'the data sheet' if sheet else 'the measured peak'}. Memory: allocated, GB.", "",
        f"| cell | seconds | {' | '.join(PHASES)} | tokens/s | share of the peak | memory | formula |",
        "|---" * (len(PHASES) + 6) + "|",
    ]  # fmt: skip
    for cell in known:
        run = found.get(cell.name, {"failed": "not measured"})
        if "failed" in run:
            lines.append(f"| {cell.name} | {run['failed']} |" + " |" * (len(PHASES) + 4))
            continue
        (seconds,), (phases,) = run["seconds"], run["phases"]
        if "prefill" in phases:
            phases = phases | {"rollout": sum(phases[name] for name in PHASES[1:4])}
        row = [f"{seconds:.2f}", *(f"{phases[name]:.2f}" if name in phases else "" for name in PHASES)]
        if cell.stage == "sampling":
            row = [f"{seconds:.2f}", *[""] * len(PHASES), f"{cell.rows * cell.work.response_length / seconds:.0f}", ""]
        else:
            training = sum(phases.get(name, 0.0) for name in PHASES[4:])
            flops = useful_flops(cell.stage, cell.work, lora=cell.lora)["training"]
            row += [f"{real_tokens(cell.stage, cell.work) / seconds:.0f}", f"{flops / training / (sheet or peak):.0%}"]
        by_formula = cell.side == "ours" and cell.stage != "sampling" and cell.shape in PYTHIA
        row += [f"{run['peak_gb'] * 2**30 / 1e9:.1f}", f"{cell.formula() / 1e9:.1f}" if by_formula else ""]
        lines.append(f"| {cell.name} | {' | '.join(row)} |")
    return lines


def main(args: Args) -> dict[str, dict]:
    """Measure what is missing, write the report; returns all measurements by name."""
    gpu, start = torch.cuda.is_available(), time.monotonic()
    if not gpu and not args.smoke:
        refuse("smoke", "False, and there is no GPU here", "a GPU, or --smoke: tiny cells on the CPU")
    name = torch.cuda.get_device_name() if gpu else cpu_name()
    short = "-".join(word for word in name.lower().replace("(r)", "").split() if word not in ("cpu", "@"))
    folder = args.output_dir or HERE / "results" / f"{time.strftime('%Y-%m-%d')}-{short}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    planned = [c for c in (SMOKE if args.smoke else cells()) if args.smoke or c.shape in args.shapes]
    planned = [c for c in planned if args.smoke or c.stage in args.stages]
    machine = {
        "name": name, "torch": torch.__version__,
        "peak_flops": matmul_peak(gpu, 8192 if gpu else 512, 2.0 if gpu else 0.2, "cuda" if gpu else "cpu"),
        "data_sheet_flops": next((flops for card, flops in DATA_SHEET.items() if card in name), None),
    }  # fmt: skip
    if gpu:
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_properties(0).total_memory if gpu else float("inf")
    with tempfile.TemporaryDirectory() as scratch:
        for i, cell in enumerate(planned):
            if "seconds" in found.get(cell.name, {}):
                continue
            left = 60 * args.minutes - (time.monotonic() - start)
            if left < 30:
                break
            if cell.side == "trl" and not (importlib.util.find_spec("trl") or TRL_PPO.exists()):
                found[cell.name] = {"failed": "TRL is not installed"}
            elif cell.shape in PYTHIA and cell.formula() > (1 - ROOM) * card:
                found[cell.name] = {"failed": f"takes {cell.formula() / 1e9:.0f} GB by the formula"}
            else:
                work = Path(scratch) / f"{cell.shape}-{cell.rows}-{cell.lora}"
                print(f"{cell.name} ...", flush=True)
                result = measure(cell, work, gpu, left)
                if not any((c.shape, c.rows, c.lora) == (cell.shape, cell.rows, cell.lora) for c in planned[i + 1 :]):
                    shutil.rmtree(work, ignore_errors=True)  # tens of GB
                if not result:
                    break  # no time is left
                found[cell.name] = result
            write_json(file, found)
            took = found[cell.name].get("seconds")
            print(f"{cell.name}: {f'{took[0]:.2f} s' if took else found[cell.name]['failed']}", flush=True)
    known = [cell for cell in (*cells(), *SMOKE) if cell in planned or cell.name in found]
    (folder / "README.md").write_text("\n".join(report(found, known, machine)) + "\n")
    missing = [cell.name for cell in planned if cell.name not in found]
    print(f"{len(planned) - len(missing)} of {len(planned)} cells; report: {folder}/README.md")
    if missing:
        print("the same command goes on with the others")
    return found


if __name__ == "__main__":
    command_line(main, Args)
