"""Interruptions change nothing: a stage stopped at any moment, and started again, ends with the same bits."""

import json
import math
import os
import shutil
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

from summarize_from_feedback_details import dpo, grpo, online_dpo, ppo_left_padding, reward, rloo, sft
from summarize_from_feedback_details.common import checkpoints, files, run_files, zero
from summarize_from_feedback_details.common.checkpoints import Checkpoints
from summarize_from_feedback_details.common.precision import choose_precision
from summarize_from_feedback_details.common.run_folder import REQUEUE_ME, RunFolder

MAIN = {
    "sft": sft.main,
    "reward": reward.main,
    "ppo_left_padding": ppo_left_padding.main,
    "rloo": rloo.main,
    "grpo": grpo.main,
    "dpo": dpo.main,
    "online_dpo": online_dpo.main,
}
STAGE_NAMES = list(MAIN)
LONG = pytest.mark.torture


def stage_args(world, stage: str, output_dir, **changes):
    """Small arguments with several updates, rows of different lengths and a last batch that does not fill."""
    if stage == "sft":
        args = world.sft_args(output_dir, total_episodes=44, max_grad_norm=1.0)
    elif stage == "reward":
        args = world.reward_args(output_dir, total_episodes=44, max_grad_norm=1.0)
    elif stage == "dpo":
        args = world.dpo_args(output_dir, total_episodes=44, max_grad_norm=1.0, eval_freq=3)
    elif stage == "online_dpo":
        args = world.online_dpo_args(output_dir, num_updates=4, lr=1e-4, local_micro_batch_size=4, eval_freq=2)
    elif stage in ("rloo", "grpo"):
        of_stage = getattr(world, f"{stage}_args")
        args = of_stage(output_dir, num_updates=4, lr=1e-4, noptepochs=2, local_micro_batch_size=4, eval_freq=2)
    else:
        args = world.ppo_args(output_dir, num_updates=4, lr=1e-4, nminibatches=2, local_micro_batch_size=2, eval_freq=2)
    return replace(args, **{"save_freq": 1} | changes)


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


def stop_again_and_again(stage: str, args, monkeypatch) -> set[str]:
    """SIGTERM at every third question whether to stop: the run saves, leaves, and goes on where it was.

    Returns:
        names of the checkpoints of all stops.
    """
    asked, sessions, found = [0], 0, set()
    real = Checkpoints.stop_asked

    def now_and_then(self):
        asked[0] += 1
        if asked[0] % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Checkpoints, "stop_asked", now_and_then)
    while True:
        sessions += 1
        assert sessions < 40
        try:
            MAIN[stage](replace(args))
            break
        except SystemExit as error:
            assert error.code == REQUEUE_ME
            assert json.loads(Path(f"runs/{stage}/summary.json").read_text())["state"] == "interrupted"
            found |= {p.name for p in Path(f"runs/{stage}/checkpoints").iterdir()}
    assert sessions >= 3
    return found


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_signal_between_any_two_micro_steps(world, workdir, undisturbed, stage, monkeypatch):
    # no other checkpoints than those of the stops: they must hold the place where each stop was
    inside = stop_again_and_again(stage, stage_args(world, stage, stage, save_freq=0), monkeypatch)
    assert stage != "ppo_left_padding" or any("-" in name for name in inside)  # also inside an update
    assert_same_bits(workdir, undisturbed, stage)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_signal_in_the_first_update(world, workdir, stage, monkeypatch):
    """What was evaluated before training is not evaluated, nor logged, again."""
    args, asked, real = stage_args(world, stage, stage), [0], Checkpoints.stop_asked

    def at_once(self):
        asked[0] += 1
        if asked[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Checkpoints, "stop_asked", at_once)
    with pytest.raises(SystemExit) as stopped:
        MAIN[stage](replace(args))
    assert stopped.value.code == REQUEUE_ME
    metrics = Path(f"runs/{stage}/metrics.jsonl")
    before = metrics.read_text()
    assert before and {json.loads(line)["update"] for line in before.splitlines()} == {0}
    MAIN[stage](replace(args))
    assert metrics.read_text().startswith(before)
    assert [json.loads(line)["update"] for line in metrics.read_text().splitlines()].count(0) == len(
        before.splitlines()
    )


def test_the_step_of_the_optimiser_is_where_its_parameters_are():
    """Fused AdamW reads it there: on GPUs, one on the CPU would be an illegal address."""
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    zero.set_whole_tensors(model, optimizer, lambda key: torch.zeros(1), 5)
    assert all(value.device.type == "meta" for state in optimizer.state.values() for value in state.values())


def test_numbers_that_are_not_finite_are_null(tmp_path):
    files.write_json(tmp_path / "a.json", {"metrics": {"a": math.nan, "b": [math.inf, 1.0]}})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == {"metrics": {"a": None, "b": [None, 1.0]}}
    assert math.isnan(run_files.read_metrics({"a": None, "b": 2.0})["a"])


MOMENTS = {  # where a process is killed: (stage, owner of the function, its name, at which call)
    "share of a checkpoint": ("sft", Checkpoints, "_write_share", 2),
    "manifest of a checkpoint": ("reward", Checkpoints, "_finish", 3),
    "before a checkpoint's rename": ("ppo_left_padding", checkpoints, "sync_folder", 3),
    "after a checkpoint's rename": ("sft", checkpoints, "sync_folder", 4),
    "before the model is noted": ("reward", RunFolder, "note_written", 1),
    "after the model's rename": ("ppo_left_padding", files, "sync_folder", 1),
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
    state = json.loads(Path(f"runs/{stage}/summary.json").read_text())["state"]
    assert state == ("finished" if name == "remove" else "running")
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
@pytest.mark.parametrize("zero", [pytest.param(None, marks=LONG), 2, pytest.param(3, marks=LONG)])
def test_several_processes(world, workdir, undisturbed, zero, tmp_path_factory, monkeypatch, capsys):
    """The same bits on the same number of ranks; equal to 1e-5 where one process goes on, without DeepSpeed."""
    stage, elsewhere = "ppo_left_padding", tmp_path_factory.mktemp("moved") / "copy"
    two = {"local_micro_batch_size": 1, "world_size": 2, "deepspeed": zero is not None}
    for name in ("whole", "stopped"):
        args = stage_args(world, stage, name, **two)
        if name == "stopped":
            code, output = interrupt(stage, args, workdir, signal.SIGTERM, 2, zero)
            assert code != 0, output
            assert json.loads(Path("runs/stopped/summary.json").read_text())["state"] == "interrupted", output
            shutil.copytree(workdir, elsewhere)
        done = launch(stage, args, workdir, 2, zero)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert name == "whole" or "going on from runs/stopped/checkpoints/update_0000000" in done.stdout
    compare_runs(Path("runs/stopped"), Path("runs/whole"), Path("stopped"), Path("whole"))
    monkeypatch.chdir(elsewhere)
    ppo_left_padding.main(stage_args(world, stage, "stopped"))
    assert "going on from runs/stopped/checkpoints/update_0000000" in capsys.readouterr().out
    compare_with_one_process("stopped", undisturbed, stage)


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("zero", [2, 3])
def test_float32_masters_of_a_run_in_bf16(world, workdir, zero):
    """The same bits: weights, and the heads and biases that compute in float32 beside DeepSpeed's bf16."""
    if choose_precision("auto") != "bf16":
        pytest.skip("this CPU does not multiply in bf16")
    stage, two = "ppo_left_padding", {"local_micro_batch_size": 1, "world_size": 2, "deepspeed": True}
    for name in ("whole", "stopped"):
        args = stage_args(world, stage, name, precision="bf16", value_output_dir=f"{name}_value", **two)
        if name == "stopped":
            code, output = interrupt(stage, args, workdir, signal.SIGTERM, 2, zero)
            assert json.loads(Path("runs/stopped/summary.json").read_text())["state"] == "interrupted", output
        done = launch(stage, args, workdir, 2, zero)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    compare_runs(Path("runs/stopped"), Path("runs/whole"), Path("stopped"), Path("whole"))
    found = [load_file(f"{name}_value/model.safetensors") for name in ("stopped", "whole")]
    assert all(torch.equal(found[0][key], weight) for key, weight in found[1].items())
    biases = [json.loads(Path(f"{n}_value/config.json").read_text())["reward_bias"] for n in ("stopped", "whole")]
    assert biases[0] == biases[1]


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("zero", [None, 2, 3])
def test_begun_by_one_process_and_finished_by_two(world, workdir, undisturbed, zero):
    """Under another wrapper: equal to 1e-5."""
    stage, args = "ppo_left_padding", stage_args(world, "ppo_left_padding", "moved")
    interrupt(stage, args, workdir, signal.SIGTERM)
    assert json.loads(Path("runs/moved/summary.json").read_text())["state"] == "interrupted"
    args = replace(args, local_micro_batch_size=1, world_size=2, deepspeed=zero is not None)
    done = launch(stage, args, workdir, 2, zero)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stdout + done.stderr
    compare_with_one_process("moved", undisturbed, stage)


def compare_with_one_process(name: str, undisturbed: Path, stage: str) -> None:
    """Weights to 1e-5 and the same responses as a run of one process that nothing stopped."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (Path(name), undisturbed / stage))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    tables = (Path("runs") / name, undisturbed / "runs" / stage)
    responses = [pandas.read_parquet(run / "tables/validation.parquet")["response"].tolist() for run in tables]
    assert responses[0] == responses[1]


# ----------------------------------------------------------------------------------------------------------------------
# damage


def stop_after(stage, args, updates: int, monkeypatch) -> Path:
    """Run a stage until so many updates are done and saved; returns its folder of checkpoints."""
    real = Checkpoints.after_update

    def after_update(self, update):
        if update == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "after_update", after_update)
        with pytest.raises(SystemExit) as stopped:
            MAIN[stage](args)
    assert stopped.value.code == REQUEUE_ME
    return Path(f"runs/{args.run_name}/checkpoints")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit flipped": flip_a_bit,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    world, workdir, undisturbed, damage, file, monkeypatch, capsys
):
    folder = stop_after("sft", stage_args(world, "sft", "sft"), 4, monkeypatch)
    assert sorted(p.name for p in folder.iterdir()) == ["update_00000003", "update_00000004"]
    DAMAGE[damage](folder / "update_00000004" / file)
    sft.main(stage_args(world, "sft", "sft"))
    said = capsys.readouterr().out
    assert "update_00000004 is damaged (" in said and "kept as update_00000004.damaged-1" in said
    assert "going on from runs/sft/checkpoints/update_00000003" in said
    assert_same_bits(workdir, undisturbed, "sft")


def test_all_checkpoints_damaged_begins_again(world, workdir, undisturbed, monkeypatch, capsys):
    folder = stop_after("reward", stage_args(world, "reward", "reward"), 3, monkeypatch)
    for checkpoint in folder.iterdir():
        (checkpoint / "manifest.json").write_text("{")
    reward.main(stage_args(world, "reward", "reward"))
    assert capsys.readouterr().out.count("is damaged (manifest.json cannot be read") == 2
    assert_same_bits(workdir, undisturbed, "reward")


@pytest.fixture
def small_disk(workdir):
    """A folder on a file system of its own, of 48 MB, at `runs`."""
    Path("runs").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", "runs"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield Path("runs")
    subprocess.run(["mount", "-o", "remount,rw", "runs"], capture_output=True)
    subprocess.run(["umount", "--lazy", "runs"], check=True)


def test_disk_full(world, workdir, undisturbed, small_disk, monkeypatch, capsys):
    args = stage_args(world, "sft", "sft")
    folder = stop_after("sft", args, 3, monkeypatch)
    free = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 2_000_000))  # a checkpoint has 5.6 MB
    with pytest.raises(SystemExit) as stopped:
        sft.main(stage_args(world, "sft", "sft"))
    said = str(stopped.value.code)
    assert "update_00000004 cannot be written: " in said and "No space left on device" in said
    assert "the last good one is runs/sft/checkpoints/update_00000003" in said and said.count("\n") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["update_00000002", "update_00000003"]
    with pytest.raises(SystemExit, match="cannot be written"):  # again, with the disk still full
        sft.main(stage_args(world, "sft", "sft"))
    filler.unlink()
    capsys.readouterr()
    sft.main(stage_args(world, "sft", "sft"))
    assert "going on from runs/sft/checkpoints/update_00000003" in capsys.readouterr().out
    assert_same_bits(workdir, undisturbed, "sft")


def test_a_disk_without_any_room(world, workdir, undisturbed, small_disk, monkeypatch):
    """Not even a line of metrics fits: one line says so, and nothing is lost."""
    stop_after("ppo_left_padding", stage_args(world, "ppo_left_padding", "ppo_left_padding"), 2, monkeypatch)
    free = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(SystemExit) as stopped:
        ppo_left_padding.main(stage_args(world, "ppo_left_padding", "ppo_left_padding"))
    said = str(stopped.value.code)
    assert "cannot be written: No space left on device" in said and said.count("\n") == 0
    filler.unlink()
    ppo_left_padding.main(stage_args(world, "ppo_left_padding", "ppo_left_padding"))
    assert_same_bits(workdir, undisturbed, "ppo_left_padding")


def test_a_folder_made_read_only(world, workdir, undisturbed, small_disk, monkeypatch, capsys):
    stop_after("reward", stage_args(world, "reward", "reward"), 3, monkeypatch)
    subprocess.run(["mount", "-o", "remount,ro", "runs"], check=True)
    with pytest.raises(SystemExit) as stopped:
        reward.main(stage_args(world, "reward", "reward"))
    assert stopped.value.code == 2
    assert "error: --run_name: found 'runs/reward', which cannot be written" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", "runs"], check=True)
    reward.main(stage_args(world, "reward", "reward"))
    assert_same_bits(workdir, undisturbed, "reward")


def test_a_folder_made_read_only_in_the_middle(world, workdir, undisturbed, monkeypatch):
    folder = stop_after("sft", stage_args(world, "sft", "sft"), 3, monkeypatch)
    done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True)  # root may write all the rest
    if done.returncode:
        pytest.skip(f"no folder can be made immutable here: {done.stderr.strip()}")
    try:
        with pytest.raises(SystemExit, match="update_00000004 cannot be written: Operation not permitted; the"):
            sft.main(stage_args(world, "sft", "sft"))
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    assert sorted(p.name for p in folder.iterdir()) == ["update_00000002", "update_00000003"]
    sft.main(stage_args(world, "sft", "sft"))
    assert_same_bits(workdir, undisturbed, "sft")


def test_a_clock_set_back(world, workdir, undisturbed, monkeypatch):
    """What was written seems to come from the future: names, not dates, tell which checkpoint is the newest."""
    stop_after("sft", stage_args(world, "sft", "sft"), 3, monkeypatch)
    later = time.time() + 3 * 24 * 3600
    for path in Path("runs").rglob("*"):
        os.utime(path, (later - path.name.endswith("3") * 1e6,) * 2)  # the newest one looks the oldest
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 365 * 24 * 3600)
    sft.main(stage_args(world, "sft", "sft"))
    assert_same_bits(workdir, undisturbed, "sft")
    assert json.loads(Path("runs/sft/summary.json").read_text())["wall_clock_seconds"] >= 0


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs Debian's package faketime")
def test_a_process_whose_clock_is_set_back(world, workdir, undisturbed, monkeypatch):
    """The same with no patch: the whole process, its libraries and its file dates live a year ago."""
    args = stage_args(world, "sft", "sft")
    stop_after("sft", args, 3, monkeypatch)
    command, env = launch_command("sft", args, workdir)
    command = ["faketime", "-f", "-365d", *command]
    done = subprocess.run(command, cwd=workdir, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert_same_bits(workdir, undisturbed, "sft")
    written = EventAccumulator("runs/sft/tensorboard").Reload().Scalars("train/sft/loss")
    assert written[2].wall_time - 300 * 86400 > written[-1].wall_time  # the clock was set back, in the middle


# ----------------------------------------------------------------------------------------------------------------------
# what may change, and what must not


def test_what_was_left_out_is_an_argument_too(world, workdir, monkeypatch, capsys):
    """A limit that was given and is not given now changes the result; so does a model that was trained again."""
    args = stage_args(world, "sft", "sft", run_name=None)
    folder = stop_after("sft", replace(args, run_name="first"), 2, monkeypatch)
    with pytest.raises(SystemExit):
        sft.main(replace(args, run_name="first", max_grad_norm=None))
    assert "--max_grad_norm (1.0 there, None now)" in capsys.readouterr().err
    sft.main(replace(args, output_dir="other", max_grad_norm=None))  # no run of these arguments: a new one
    assert (folder / "update_00000002").exists() and "going on" not in capsys.readouterr().out
    shutil.copytree(world.sft, "policy")
    args = stage_args(world, "reward", "reward", sft_model_path="policy")
    stop_after("reward", args, 2, monkeypatch)
    shutil.copy(Path("other/model.safetensors"), "policy/model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        reward.main(stage_args(world, "reward", "reward", sft_model_path="policy"))
    assert stopped.value.code == 2 and "error: --sft_model_path: found weights" in capsys.readouterr().err
    shutil.copytree(world.reward, "judge")
    args = stage_args(world, "ppo_left_padding", "ppo_left_padding", reward_model_path="judge")
    stop_after("ppo_left_padding", replace(args), 1, monkeypatch)
    flip_a_bit(Path("judge/model.safetensors"))
    with pytest.raises(SystemExit) as stopped:
        ppo_left_padding.main(replace(args))
    assert stopped.value.code == 2


CHANGES = {
    "sft": {"seed": 2, "lr": 2e-3, "batch_size": 16, "num_train_epochs": 2, "temperature": 0.5, "max_grad_norm": 2.0,
            "scheduler": "linear", "weight_decay": 0.1, "query_loss_weight": 0.5, "response_length": 20},
    "reward": {"seed": 2, "eps": 1e-6, "num_normalization_rows": 30, "warm_up_steps": 2},
    "ppo_left_padding": {"nminibatches": 1, "temperature": 0.9, "non_eos_penalty": False, "penalty_reward_value": -2.0},
    "rloo": {"rloo_k": 2, "kl_coef": 0.1, "ppo_clip": 0.2},
    "grpo": {"grpo_k": 2, "normalise_std": False, "length_normalisation": False, "cliprange": 0.3},
    "dpo": {"beta": 0.2, "ipo": True, "label_smoothing": 0.1, "temperature": 0.5},
    "online_dpo": {"beta": 0.2, "ipo": True, "label_smoothing": 0.1, "penalty_reward_value": -2.0},
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_arguments_that_change_the_result_are_refused(world, workdir, stage, monkeypatch, capsys):
    stop_after(stage, stage_args(world, stage, stage), 2, monkeypatch)
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    for name, value in CHANGES[stage].items():
        args = stage_args(world, stage, stage)
        was = getattr(args, name)
        with pytest.raises(SystemExit) as stopped:
            MAIN[stage](replace(args, **{name: value}))
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and f"--{name} ({was} there, {value} now)" in said, said
    if stage == "ppo_left_padding":
        args = stage_args(world, stage, stage)
        with pytest.raises(SystemExit):
            MAIN[stage](replace(args, ppo=replace(args.ppo, kl_coef=0.1)))
        assert "--ppo.kl_coef (0.05 there, 0.1 now)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_layout_and_logging_may_change(world, workdir, undisturbed, stage, monkeypatch):
    stop_after(stage, stage_args(world, stage, stage), 2, monkeypatch)
    micro = 2 if stage == "online_dpo" else 1  # whose pairs stay together
    args = stage_args(world, stage, stage, local_micro_batch_size=micro, local_eval_batch_size=7, keep=1)
    printing = {"print_sample_output_freq": 2} if hasattr(args, "print_sample_output_freq") else {}
    args = replace(args, output_dir="elsewhere", save_freq=0, **printing)
    if stage == "reward":
        args = replace(args, shared_prefix=False)
    MAIN[stage](args)
    ours, theirs = load_file("elsewhere/model.safetensors"), load_file(undisturbed / stage / "model.safetensors")
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


def test_other_data_under_the_same_name_is_refused(world, workdir, monkeypatch, capsys):
    shutil.copytree(world.sft_rows, "rows")
    stop_after("sft", stage_args(world, "sft", "sft", query_dataset="rows"), 2, monkeypatch)
    file = next(Path("rows").glob("**/train*.parquet"))
    frame = pandas.read_parquet(file)
    frame.iloc[::-1].to_parquet(file)
    with pytest.raises(SystemExit) as stopped:
        sft.main(stage_args(world, "sft", "sft", query_dataset="rows"))
    assert stopped.value.code == 2 and "error: --query_dataset: found 400 rows, " in capsys.readouterr().err
    summary = json.loads(Path("runs/sft/summary.json").read_text())
    assert summary["state"] == "interrupted" and "requeue" not in summary  # to be cured, not to be queued again


@pytest.mark.slow
def test_two_processes_on_one_run(world, workdir, undisturbed):
    args = stage_args(world, "ppo_left_padding", "ppo_left_padding")
    command, env = launch_command("ppo_left_padding", args, workdir)
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Path("runs/ppo_left_padding/metrics.jsonl").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it still goes on, however slowly
    second = launch("ppo_left_padding", args, workdir)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert second.stderr.startswith("error: --run_name: found 'runs/ppo_left_padding', a run that still goes on")
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    assert_same_bits(workdir, undisturbed, "ppo_left_padding")


def test_the_same_command_again(world, workdir, monkeypatch, capsys):
    """Without a run name an unfinished run is found; with one, a finished run is left as it is."""
    args = stage_args(world, "sft", "sft", run_name=None, seed=3)
    folder = stop_after("sft", replace(args, run_name="first"), 2, monkeypatch)
    sft.main(stage_args(world, "sft", "other", run_name=None, seed=4))  # another seed is another run
    assert (folder / "update_00000002").exists()
    final = sft.main(replace(args))
    assert "going on from runs/first" in capsys.readouterr().out and len(list(Path("runs").iterdir())) == 2
    weights = Path("sft/model.safetensors").read_bytes()
    found = sft.main(replace(args, run_name="first"))
    assert "runs/first is finished already, with these arguments: nothing to do" in capsys.readouterr().out
    assert {k: found[k] for k in final} == final and Path("sft/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_finished_run_is_left_as_it_is(world, workdir, stage, capsys):
    final = MAIN[stage](stage_args(world, stage, stage))
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(".").rglob("*") if p.is_file()}
    found = MAIN[stage](stage_args(world, stage, stage))
    assert f"runs/{stage} is finished already" in capsys.readouterr().out
    assert {k: found[k] for k in final} == final
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(".").rglob("*") if p.is_file()} == before


def test_weights_and_biases_goes_on_in_the_same_run(world, workdir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = stage_args(world, "sft", "sft", track=True)
    stop_after("sft", args, 2, monkeypatch)
    sft.main(replace(args))
    folders = sorted(Path("runs/sft/wandb").glob("offline-run-*"))
    run_id = json.loads(Path("runs/sft/wandb.json").read_text())["id"]
    assert len(folders) == 2 and all(f.name.split("-")[3] == run_id for f in folders)
