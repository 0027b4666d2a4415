"""What checkpoints cost: the share of SFT's time on the toy world at the default --save_freq. Run `make hello` first.

python benchmark/checkpoint_cost.py
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from summarize_from_feedback_details import sft  # noqa: E402
from summarize_from_feedback_details.common import checkpoints  # noqa: E402
from summarize_from_feedback_details.common.arguments import refuse  # noqa: E402


@dataclass
class Args:
    chain: str = "toy_small_seed1"
    """chain of `hello_world.sh` whose data and base model are used"""


def main(args: Args) -> float:
    """Train as `hello_world.sh` does; print and return the share of the time that went into checkpoints."""
    data, base = ROOT / "data" / args.chain / "sft", ROOT / "models" / args.chain / "base/small"
    if not data.exists() or not base.exists():
        refuse("chain", f"no {data} or no {base}", "a chain that `make hello` has run")
    real, spent = checkpoints.Checkpoints.save, []

    def save(self, *position):
        start = time.monotonic()
        real(self, *position)
        spent.append(time.monotonic() - start)

    checkpoints.Checkpoints.save = save
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.monotonic()
        sft.main(
            sft.Args(
                base_model=str(base), query_dataset=str(data), output_dir="policy", run_name="cost", lr=3e-3, eps=1e-8,
                warm_up_steps=20, weight_decay=0.0, max_grad_norm=1.0, precision="fp32", query_loss_weight=0.0,
                response_length=24, num_train_epochs=2, total_episodes=19200, batch_size=32, local_micro_batch_size=32,
                local_eval_batch_size=128, print_sample_output_freq=0,
            )
        )  # fmt: skip
        total = time.monotonic() - start
        os.chdir(ROOT)
    share = sum(spent) / total
    print(f"{len(spent)} checkpoints: {sum(spent):.2f} s of {total:.1f} s, {100 * share:.2f} %")
    return share


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
