"""Host memory and time of PPO's start: its four networks, whole or with adapters, against the weights that stay.

    python benchmark/loading.py                       two sizes, float32 and bf16; a process for each measurement

`before` is how it was done once: four checkpoints read one after the other into float32.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from memory import ROOT, Shape, make_world
from rich.table import Table

from summarize_from_feedback_details.common.arguments import command_line
from summarize_from_feedback_details.common.console import print_table

SHAPES = [Shape("D 768, 12 layers", 12, 768, 50304), Shape("D 1536, 12 layers", 12, 1536, 50304)]
HOW = ("before", "whole", "LoRA, one trunk", "LoRA, two trunks")


@dataclass
class Args:
    child: str | None = None
    """measure in this process: one of the ways"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """with --child: of computing"""


class Watch(threading.Thread):
    """Largest memory of this process while it is open, in GB: its own, and with the pages of files that it has mapped.

    Those are the checkpoint's, which all processes share and the kernel may drop.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.done, self.own, self.all = threading.Event(), 0.0, 0.0

    def look(self) -> tuple[float, float]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own, all_of_it = (int(lines[name].split()[0]) * 1024 / 1e9 for name in ("RssAnon", "VmRSS"))
        self.own, self.all = max(self.own, own), max(self.all, all_of_it)
        return own, all_of_it

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.look()

    def __enter__(self):
        self.before = self.look()
        self.own, self.all = self.before
        self.start()
        return self

    def __exit__(self, *_):
        self.look()
        self.done.set()
        self.own, self.all = self.own - self.before[0], self.all - self.before[1]


def load(how: str, precision: str) -> dict[str, float]:
    """Load PPO's networks as its `main` does, in the present folder."""
    import torch

    from summarize_from_feedback_details.common.adapters import LoraParams
    from summarize_from_feedback_details.common.policies import load_policy, load_policy_and_reference
    from summarize_from_feedback_details.common.precision import trunk_dtype
    from summarize_from_feedback_details.common.reward_models import load_reward_and_value, load_reward_model
    from summarize_from_feedback_details.common.training import freeze

    lora = how.startswith("LoRA")
    args = SimpleNamespace(
        lora=lora, lora_params=LoraParams(), sft_model_path="policy", sft_model_revision=None,
        reward_model_path="reward_lora" if how == "LoRA, one trunk" else "reward", reward_model_revision=None,
    )  # fmt: skip
    mixed = SimpleNamespace(mixed_precision="bf16" if precision == "bf16" else "no", device=torch.device("cpu"))
    mixed.state = SimpleNamespace(deepspeed_plugin=None)
    start = time.time()
    with Watch() as watch:
        if how == "before":
            networks = [load_policy("x", "policy") for _ in range(2)] + [load_reward_model("reward") for _ in range(2)]
        else:
            dtype = trunk_dtype(args, mixed)
            policy, reference = load_policy_and_reference(args, dtype)
            freeze(reference, mixed, offload=False)
            reward_model, value_model = load_reward_and_value(args, reference, dtype)
            freeze(reward_model, mixed, offload=False)
            networks = [policy, value_model, reference, reward_model]
        seconds = time.time() - start
    there = {p.data_ptr(): p.numel() * p.element_size() for network in networks for p in network.parameters()}
    return {"kept": sum(there.values()) / 1e9, "own": watch.own, "mapped": watch.all, "seconds": seconds}


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(load(args.child, args.precision)))
        return
    import multiprocessing

    shown = Table("shape", "precision", "how", "weights kept, GB", "peak, GB", "with mapped files, GB", "seconds")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(make_world, (Path(folder), shape))
            for precision in ("fp32", "bf16"):
                for how in HOW:
                    command = [sys.executable, __file__, "--child", how, "--precision", precision]
                    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
                    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
                    found = json.loads(done.stdout.splitlines()[-1])
                    cells = [f"{found[name]:.2f}" for name in ("kept", "own", "mapped", "seconds")]
                    print(shape.name, precision, how, *cells, flush=True)
                    shown.add_row(shape.name, precision, how, *cells)
    print_table(shown)


if __name__ == "__main__":
    command_line(main, Args)
