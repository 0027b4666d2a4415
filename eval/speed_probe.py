"""Say how long the toy run will take here, from one second of work: steps of a small model, forward and backward."""

import time
from dataclasses import dataclass

import torch

from summarize_from_feedback_details.common.arguments import command_line

# calibrated on 2 cores of an AMD EPYC (Zen 5): what the runs took there, and the probe's rate there
MEASURED_RATE = 39.0  # steps per second
MEASURED_MINUTES = {0: 2.8, 1: 0.9}  # of the default run and of the smoke run
FIXED_SHARE = 0.3  # of that time goes into imports, evaluation and writing, which the probe does not see


@dataclass
class Args:
    smoke: int = 0
    """1: the smoke run"""


def steps_per_second(seconds: float = 1.0) -> float:
    """Training steps of a transformer of the toy run's shape (32 rows of 48 tokens, width 96, 3 layers) per second."""
    layer = torch.nn.TransformerEncoderLayer(96, 4, 384, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(32, 48, 96)
    model(x).sum().backward()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        model(x).sum().backward()
        steps += 1
    return steps / (time.perf_counter() - start)


def main(args: Args) -> float:
    """Print and return the estimate, in minutes."""
    rate = steps_per_second()
    minutes = MEASURED_MINUTES[args.smoke] * (FIXED_SHARE + (1 - FIXED_SHARE) * MEASURED_RATE / rate)
    print(f"speed probe: {rate:.0f} steps/s, so this will take about {minutes:.0f} minutes", flush=True)
    return minutes


if __name__ == "__main__":
    command_line(main, Args)
