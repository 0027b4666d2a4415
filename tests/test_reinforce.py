"""A new algorithm on `common/` alone: it learns, resumes, runs on two processes, is drawn and shown."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import read_runs
import reinforce_example as reinforce
import torch
from conftest import OFFLINE, ROOT, launch, launch_command
from safetensors.torch import load_file

import visualize_tokens
from summarize_from_feedback_details.common.reward_models import load_reward_model

STAGE = "../tests/reinforce_example"  # as seen from the folder of the stages
CURVES = {"objective/scores", "objective/kl", "objective/entropy", "objective/response_length", "objective/eos_rate"}


def arguments(world, name: str, **changes) -> reinforce.Args:
    models = {"base_model": world.base, "sft_model_path": world.sft, "reward_model_path": world.reward}
    sizes = {"batch_size": 8, "local_micro_batch_size": 4, "num_updates": 3, "num_eval_rows": 8, "response_length": 24}
    names = {"run_name": name, "output_dir": name, "query_dataset": world.sft_rows, "lr": 1e-4}
    return reinforce.Args(**(models | sizes | names | changes))


def test_it_is_short():
    """Lines of its own: what is neither an import nor empty."""
    text = Path(reinforce.__file__).read_text()
    code = text[text.index("@dataclass") :].splitlines()
    assert len([line for line in code if line.strip()]) <= 150


def test_it_learns(world, workdir):
    """The scores of the reward model rise; where all scores are equal, there is no gradient."""
    model = load_reward_model(world.reward)
    model.score.weight.data.zero_()
    model.config.reward_bias = 1.0  # whose mean is exact on every processor
    model.save_pretrained("flat")
    flat = reinforce.main(arguments(world, "flat_run", reward_model_path="flat", kl_coef=0.0, num_updates=1))
    assert flat["train/reinforce/grad_norm"] < 1e-6
    sizes = {"num_updates": 25, "batch_size": 32, "local_micro_batch_size": 32, "lr": 1e-3, "temperature": 1.0}
    reinforce.main(arguments(world, "run", kl_coef=0.0, scheduler="constant", **sizes))
    scores = pandas.read_json("runs/run/metrics.jsonl", lines=True)["objective/scores"].dropna()
    assert scores[-5:].mean() > scores[:2].mean() + 0.8  # 1.2 to 1.3 on seeds 1 to 4


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits_and_runs_on_two_processes(world, workdir, capsys):
    for name in ("whole", "killed", "two"):
        Path(name).mkdir()
    args = arguments(world, "run", num_updates=6, save_freq=1)
    with contextlib.chdir("whole"):
        reinforce.main(replace(args))
    command, env = launch_command(STAGE, args, workdir / "killed")
    process = subprocess.Popen(command, cwd="killed", env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(Path("killed/runs/run/checkpoints").glob("update_*")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path("killed/run").exists()
    with contextlib.chdir("killed"):
        reinforce.main(replace(args))
    assert "going on from" in capsys.readouterr().out
    one, again = (Path(name, "run/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == again
    done = launch(STAGE, replace(args, local_micro_batch_size=2, world_size=2), workdir / "two", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file("two/run/model.safetensors")
    for name, weight in load_file("whole/run/model.safetensors").items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


def test_figures_and_viewer_take_its_run(world, workdir):
    reinforce.main(arguments(world, "run"))
    table, _ = read_runs.read_runs(read_runs.ReadArgs(runs_dir=workdir / "runs"))
    assert set(table["stage"]) == {"ppo"} and set(table.loc[table["kind"] == "curve", "metric"]) >= CURVES
    assert table.loc[table["kind"] == "curve", "episode"].max() == 24
    page = visualize_tokens.main(visualize_tokens.Args(num=1, response_length=8, html="page.html"))
    assert Path("page.html").stat().st_size > 1000 and len(page["posts"]) == 1
    shown = {response["name"] for response in page["posts"][0]["responses"]}
    assert {"sft", "ppo"} <= shown


def test_its_help_is_under_headings():
    script = [sys.executable, ROOT / "tests/reinforce_example.py", "--help"]
    done = subprocess.run(script, env=os.environ | OFFLINE, capture_output=True, text=True)
    assert done.returncode == 0 and "weight of the KL in the reward" in done.stdout
    headings = re.findall(r"─ (\w+) options ─", done.stdout)
    assert headings == ["run", "optimisation", "sizes", "task", "algorithm"]
