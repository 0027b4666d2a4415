"""The pipeline as a user starts it: `hello_world.sh`, its reuse of finished stages, and its refusals."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pandas
import pytest
from conftest import OFFLINE, ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked files in a folder of their own, with this environment's python."""
    folder = tmp_path_factory.mktemp("hello") / "project"
    folder.mkdir()
    page = ("visualize_tokens.py", "visualize_tokens.html", "released_checkpoints.csv")
    for name in ("hello_world.sh", "summarize_from_feedback_details", "eval", "deepspeed.yaml", *page):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    return folder


def start(folder, **variables) -> subprocess.Popen:
    """`hello_world.sh` in a process group of its own."""
    env = os.environ | OFFLINE | {"PYTHON": sys.executable} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["./hello_world.sh"], cwd=folder, env=env, start_new_session=True, **pipes)


def hello(folder, timeout=400, **variables):
    process = start(folder, **variables)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_smoke_run_then_reuse_then_changed_arguments(copy):
    done = hello(copy, SMOKE="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "will take about" in done.stdout and "What each stage reached" in done.stdout
    numbers = pandas.read_csv(copy / "eval/reports/smoke_seed1.csv", index_col="metric")["smoke_seed1"]
    assert numbers["rm/blind"] < numbers["rm/ceiling"] and numbers["ppo/first_pass_ratio_error"] < 1e-3
    for written in ("smoke_seed1.md", "smoke_seed1.png"):
        assert (copy / "eval/reports" / written).stat().st_size > 100
    for model in ("sft", "reward", "ppo"):
        assert (copy / f"models/smoke_seed1/{model}/model.safetensors").exists()
    for written in ("rlhf_scale_plot.pdf", "rlhf_scale_plot.csv", "rm_scale_plot.png", "tokens.html"):
        assert (copy / "eval/reports/smoke_seed1" / written).stat().st_size > 100
    for side in ("sft", "ppo"):
        assert numbers[f"{side}/win_rate_low"] <= numbers[f"{side}/win_rate"] <= numbers[f"{side}/win_rate_high"]
    assert (copy / "runs/smoke_seed1_ppo/judge/gold_against_smoke_seed1_sft/report.json").exists()
    weights = (copy / "models/smoke_seed1/ppo/model.safetensors").read_bytes()

    again = hello(copy, SMOKE="1", REPORT="0")
    assert again.returncode == 0 and again.stdout.count("reused") == 5, again.stdout

    # one stage's arguments change: it and those that depend on it start again, and what was there is kept
    script = copy / "hello_world.sh"
    script.write_text(script.read_text().replace("--num_normalization_rows 2048", "--num_normalization_rows 100"))
    # it is killed in the middle of PPO, and started again
    killed = start(copy, SMOKE="1", REPORT="0")
    old, until = (copy / "runs/smoke_seed1_ppo/metrics.jsonl").stat().st_ino, time.monotonic() + 200
    while time.monotonic() < until and killed.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if (copy / "runs/smoke_seed1_ppo/metrics.jsonl").stat().st_ino != old:
                break
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    said = killed.communicate()[0]
    assert said.count("reused") == 3 and "== reward: again" in said and "== ppo: again" in said
    changed = hello(copy, SMOKE="1", REPORT="0")
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert changed.stdout.count("reused") == 4 and "== ppo: was interrupted, goes on" in changed.stdout
    assert (copy / "models/smoke_seed1/ppo.old-1/model.safetensors").read_bytes() == weights
    assert (copy / "runs/smoke_seed1_reward.old-1/metrics.jsonl").exists()

    # another PPO run beside the first one, with its own report
    other = hello(copy, SMOKE="1", KL_COEF="0.2")
    assert other.returncode == 0, other.stderr[-3000:]
    assert "run runs/smoke_seed1_kl0.2_ppo" in other.stdout and "smoke_seed1_kl0.2_ppo.old" not in other.stdout
    report = pandas.read_csv(copy / "eval/reports/smoke_seed1_kl0.2_ppo.csv", index_col="metric")["smoke_seed1"]
    assert report["ppo/win_rate_gain_low"] <= report["ppo/win_rate_gain"] <= report["ppo/win_rate_gain_high"]
    assert (copy / "models/smoke_seed1/ppo/model.safetensors").exists()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"SEED": "x"}, "error: SEED: found 'x'; expected a number above 0"),
        ({"SIZE": "huge"}, "error: SIZE: found 'huge'; expected tiny, small, medium or large"),
        ({"KL_COEF": "-1"}, "error: KL_COEF: found '-1'"),
        ({"SMOKE": "yes"}, "error: SMOKE: found 'yes'; expected 0 or 1"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "MICRO": "7"}, "error: MICRO: found 7 on 1 processes"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "PPO_MICRO": "0"}, "error: PPO_MICRO: found '0'"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "SIZE": "tiny"}, "error: SIZE: found 'tiny' with MODEL="),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "SMOKE": "1"}, "error: SMOKE: found 1 with MODEL="),
    ],
)
def test_bad_settings_are_refused(copy, variables, message):
    before = sorted(p.name for p in copy.iterdir())
    done = hello(copy, **variables)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(message)
    assert sorted(p.name for p in copy.iterdir()) == before
