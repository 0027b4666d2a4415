"""Interruptions change nothing: a stage stopped at any moment, and started again, ends with the same bits."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from conftest import OFFLINE, command_of
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from summarize_from_feedback_details import checkpoints, ppo_left_padding, reward, run_folder, sft
from summarize_from_feedback_details.checkpoints import Checkpoints
from summarize_from_feedback_details.run_folder import REQUEUE_ME, RunFolder

MAIN = {"sft": sft.main, "reward": reward.main, "ppo_left_padding": ppo_left_padding.main}
STAGE_NAMES = list(MAIN)


def stage_args(world, stage: str, output_dir, **changes):
    """Small arguments with several updates, rows of different lengths and a last batch that does not fill."""
    if stage == "sft":
        args = world.sft_args(output_dir, total_episodes=44, max_grad_norm=1.0)
    elif stage == "reward":
        args = world.reward_args(output_dir, total_episodes=44, max_grad_norm=1.0)
    else:
        args = world.ppo_args(output_dir, num_updates=4, lr=1e-4, nminibatches=2, local_micro_batch_size=2, eval_freq=2)
    return replace(args, save_freq=1, **changes)


def lines(run: Path) -> list[dict]:
    """`metrics.jsonl` without times and memory."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in found]


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, without times and memory."""
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [t for t in reader.Tags()["scalars"] if not t.startswith(("time/", "memory/"))]
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


def assert_same_bits(folder: Path, undisturbed: Path, name: str) -> None:
    """Weights, metrics, TensorBoard and tables of a run are those of the undisturbed one."""
    ours, theirs = load_file(folder / name / "model.safetensors"), load_file(undisturbed / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not [k for k in ours if not torch.equal(ours[k], theirs[k])]
    run, other = folder / "runs" / name, undisturbed / "runs" / name
    assert lines(run) == lines(other)
    assert events(run) == events(other)
    tables = {p.name for p in (other / "tables").iterdir()}
    assert {p.name for p in (run / "tables").iterdir()} == tables
    for table in tables:
        pandas.testing.assert_frame_equal(
            pandas.read_parquet(run / "tables" / table), pandas.read_parquet(other / "tables" / table), check_exact=True
        )
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, other)]
    assert [s["state"] for s in summaries] == ["finished", "finished"]
    assert list(run.parent.parent.glob(".*partial*")) == [] and not (run / "checkpoints").exists()


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """Folder in which each stage ran once from the beginning to the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    here = os.getcwd()
    os.chdir(folder)
    try:
        for stage, main in MAIN.items():
            main(stage_args(world, stage, stage))
    finally:
        os.chdir(here)
    return folder


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_signal_between_any_two_micro_steps(world, workdir, undisturbed, stage, monkeypatch):
    """SIGTERM arrives again and again: each time the run saves and leaves, and goes on where it was."""
    args, asked, sessions = stage_args(world, stage, stage), [0], 0
    real = Checkpoints.stop_asked

    def now_and_then(self):
        asked[0] += 1
        if asked[0] % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Checkpoints, "stop_asked", now_and_then)
    inside = set()
    while True:
        sessions += 1
        assert sessions < 40
        try:
            MAIN[stage](replace(args))
            break
        except SystemExit as error:
            assert error.code == REQUEUE_ME
            assert json.loads(Path(f"runs/{stage}/summary.json").read_text())["state"] == "interrupted"
            inside |= {p.name for p in Path(f"runs/{stage}/checkpoints").iterdir()}
    assert sessions >= 3
    assert stage != "ppo_left_padding" or any("-" in name for name in inside)  # also inside an update
    assert_same_bits(workdir, undisturbed, stage)


MOMENTS = {  # where a process is killed: (stage, owner of the function, its name, at which call)
    "share of a checkpoint": ("sft", Checkpoints, "_write_share", 2),
    "manifest of a checkpoint": ("reward", Checkpoints, "_finish", 3),
    "before a checkpoint's rename": ("ppo_left_padding", checkpoints, "sync_folder", 3),
    "after a checkpoint's rename": ("sft", checkpoints, "sync_folder", 4),
    "before the model is noted": ("reward", RunFolder, "note_written", 1),
    "after the model's rename": ("ppo_left_padding", run_folder, "sync_folder", 1),
    "after the table": ("sft", RunFolder, "log", 8),
    "before the checkpoints' removal": ("reward", Checkpoints, "remove", 1),
    "before the last summary": ("ppo_left_padding", RunFolder, "_write_summary", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_writes(world, workdir, undisturbed, moment, monkeypatch):
    """The moments that a random kill seldom hits: while checkpoints, the model and the summary are written."""
    stage, owner, name, nth = MOMENTS[moment]
    child = os.fork()
    if child == 0:
        real, calls = getattr(owner, name), [0]

        def killed(*a, **k):
            calls[0] += 1
            if calls[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)

        try:
            setattr(owner, name, killed)
            MAIN[stage](stage_args(world, stage, stage))
        finally:
            os._exit(1)  # not reached, where the moment comes
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert json.loads(Path(f"runs/{stage}/summary.json").read_text())["state"] == "running"
    MAIN[stage](stage_args(world, stage, stage))
    assert_same_bits(workdir, undisturbed, stage)


def start(stage, args, cwd):
    return subprocess.Popen(
        command_of(stage, args), cwd=cwd, env=os.environ | OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_sigterm_and_sigkill_of_a_real_process(world, workdir, undisturbed):
    args = stage_args(world, "sft", "sft")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        process = start("sft", args, workdir)
        done = len(list(Path("runs/sft/checkpoints").glob("update_*"))) if Path("runs/sft/checkpoints").exists() else 0
        newest = lambda: max((p.name for p in Path("runs/sft/checkpoints").glob("update_*")), default="")
        before, until = newest(), time.monotonic() + 60
        while newest() == before and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0].decode()
        expected = -signal.SIGKILL if number == signal.SIGKILL else REQUEUE_ME
        assert process.returncode in (expected, 0), output  # 0: it was finished before the signal arrived
        if process.returncode == REQUEUE_ME:
            assert "start the same command again and runs/sft goes on" in output
        assert done <= 2  # --keep
    again = start("sft", args, workdir)
    output = again.communicate(timeout=60)[0].decode()
    assert again.returncode == 0, output
    assert_same_bits(workdir, undisturbed, "sft")
