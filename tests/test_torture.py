"""SIGKILL at random moments: the same command again, and the bits are those of a run that nothing stopped.

`make torture` runs all trials (TRIALS of each stage) and prints a table; `make test` kills a run in test_reinforce.py.
"""

import functools
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import launch, launch_command
from test_resume import STAGE_NAMES, compare_runs, stage_args

TRIALS = 20
MOMENTS = Counter()  # where the kills of this session fell


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """stage -> folder of a run that nothing stopped, and how long it took: [begin, end] of its training and saving."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(stage: str):
        command, env = launch_command(stage, long_args(world, stage), folder)
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        start, begin = time.monotonic(), None
        while process.poll() is None:
            if begin is None and (folder / f"runs/{stage}/metrics.jsonl").exists():
                begin = time.monotonic() - start
            time.sleep(0.005)
        assert process.returncode == 0
        return folder, begin, time.monotonic() - start

    return run


def long_args(world, stage: str):
    """Enough updates that training, and not the start, takes the time."""
    if stage == "ppo_left_padding":
        return stage_args(world, stage, stage, num_updates=16)
    return stage_args(world, stage, stage, total_episodes=None, num_updates=25 if stage == "reward" else 50)


def phase(cwd: Path, stage: str) -> str:
    """What a process that was just killed was doing, from what it left behind."""
    run = cwd / "runs" / stage
    if (run / "checkpoints/.partial").exists():
        return "writing a checkpoint"
    if (cwd / f".{stage}.partial").exists() or (cwd / f".{stage}.old").exists():
        return "writing the model"
    if (cwd / stage).exists():
        return "after the model"
    return "training" if (run / "metrics.jsonl").exists() else "starting"


@pytest.mark.torture
@pytest.mark.parametrize(
    "stage, trial",
    [(stage, trial) for stage in STAGE_NAMES for trial in range(TRIALS)],
)
def test_sigkill(world, workdir, whole, stage, trial):
    folder, begin, end = whole(stage)
    rng = random.Random(f"{stage} {trial}")
    args = long_args(world, stage)
    # every fourth trial waits for a half-written checkpoint, every fourth for a half-written model
    sign = {1: Path(f"runs/{stage}/checkpoints/.partial"), 3: Path(f".{stage}.partial")}.get(trial % 4)
    for _ in range(rng.randint(1, 3)):
        command, env = launch_command(stage, args, workdir)
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        moment = time.monotonic() + rng.uniform(begin, end)
        seen, wanted = 0, rng.randint(1, 6) if trial % 4 == 1 else 1
        while process.poll() is None and (sign is not None or time.monotonic() < moment):
            if sign is not None and sign.exists():
                seen += 1
                if seen >= wanted:
                    time.sleep(rng.uniform(0, 0.004))
                    break
                while sign.exists() and process.poll() is None:
                    time.sleep(0.0005)
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            MOMENTS[stage, phase(workdir, stage)] += 1
    done = launch(stage, args, workdir)
    assert done.returncode == 0, done.stderr
    compare_runs(workdir / "runs" / stage, folder / "runs" / stage, workdir / stage, folder / stage)
    MOMENTS[stage, "trials with the same bits"] += 1


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        columns = ["starting", "training", "writing a checkpoint", "writing the model", "after the model"]
        columns.append("trials with the same bits")
        print("\nkills by what the stage was doing, and trials (of which each has 1 to 3 kills)")
        print("\n| stage | " + " | ".join(columns) + " |")
        print("|---|" + "---|" * len(columns))
        for stage in STAGE_NAMES:
            print(f"| {stage} | " + " | ".join(str(MOMENTS[stage, c]) for c in columns) + " |")
