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
from conftest import launch, launch_command
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
    compare_runs(folder / "runs" / name, undisturbed / "runs" / name, folder / name, undisturbed / name)


def compare_runs(run: Path, other: Path, model: Path, other_model: Path) -> None:
    ours, theirs = load_file(model / "model.safetensors"), load_file(other_model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not [k for k in ours if not torch.equal(ours[k], theirs[k])]
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


def interrupt(stage, args, cwd, number, processes=1, zero=None) -> tuple[int, str]:
    """Start a stage, send a signal as soon as it has written a new checkpoint; returns exit code and output."""
    newest = lambda: max((p.name for p in (cwd / f"runs/{args.run_name}/checkpoints").glob("update_*")), default="")
    before = newest()
    command, env = launch_command(stage, args, cwd, processes, zero)
    # a group of its own, all of which gets the signal: as Slurm does, and a launcher passes only some signals on
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    until = time.monotonic() + 120
    while newest() == before and time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, number)
    return process.wait(timeout=120), process.stdout.read().decode()


@pytest.mark.slow
def test_signals_of_a_real_process(world, workdir, undisturbed):
    args = stage_args(world, "ppo_left_padding", "ppo_left_padding")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        code, output = interrupt("ppo_left_padding", args, workdir, number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else REQUEUE_ME), output
        assert number == signal.SIGKILL or "start the same command again and runs/ppo_left_padding goes on" in output
        kept = len(list(Path("runs/ppo_left_padding/checkpoints").glob("update_*")))
        assert kept <= 2 + (number == signal.SIGKILL)  # --keep, and one more when killed before it is removed
    done = launch("ppo_left_padding", args, workdir)
    assert done.returncode == 0, done.stderr
    assert_same_bits(workdir, undisturbed, "ppo_left_padding")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, 2])
def test_several_processes(world, workdir, undisturbed, zero):
    """The same bits on the same number of ranks; on another number, and under another wrapper, equal to 1e-5."""
    stage = "ppo_left_padding"
    two = {"local_micro_batch_size": 1, "world_size": 2, "deepspeed": zero is not None}
    for name in ("whole", "stopped"):
        args = stage_args(world, stage, name, **two)
        if name == "stopped":
            code, output = interrupt(stage, args, workdir, signal.SIGTERM, 2, zero)
            assert code != 0, output
            assert json.loads(Path("runs/stopped/summary.json").read_text())["state"] == "interrupted", output
        done = launch(stage, args, workdir, 2, zero)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert name == "whole" or "going on from runs/stopped/checkpoints/update_0000000" in done.stdout
    compare_runs(Path("runs/stopped"), Path("runs/whole"), Path("stopped"), Path("whole"))

    # begun by two processes, finished by one; begun by one, finished by two
    for name, begins, ends in (("to_one", (2, zero), (1, None)), ("to_two", (1, None), (2, zero))):
        for processes, wrapper in (begins, ends):
            layout = two if processes == 2 else {}
            args = stage_args(world, stage, name, **layout)
            if (processes, wrapper) == begins:
                interrupt(stage, args, workdir, signal.SIGTERM, processes, wrapper)
                assert json.loads(Path(f"runs/{name}/summary.json").read_text())["state"] == "interrupted"
            else:
                done = launch(stage, args, workdir, processes, wrapper)
                assert done.returncode == 0 and "going on from" in done.stdout, done.stdout + done.stderr
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (Path(name), undisturbed / stage))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
        tables = (Path(f"runs/{name}"), undisturbed / "runs" / stage)
        responses = [pandas.read_parquet(run / "tables/validation.parquet")["response"].tolist() for run in tables]
        assert responses[0] == responses[1]
