"""How a script starts, what a run shows while it works (progress, tables, samples), and what it leaves on the disk."""

import ast
import contextlib
import json
import math
import os
import pty
import re
import stat
import subprocess
import sys
import termios
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import ROOT
from rich.table import Table

from summarize_from_feedback_details import ppo_left_padding as ppo
from summarize_from_feedback_details import reward, sft, tldr_dataset, toy_tldr
from summarize_from_feedback_details.common import checkpoints, console, machine, run_folder
from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    command_line,
    refuse_left_over,
    refuse_settings_of_accelerate,
)
from summarize_from_feedback_details.common.console import Progress, print_table
from summarize_from_feedback_details.common.files import atomic_folder, refuse_unwritable, write_whole
from summarize_from_feedback_details.common.run_files import weights_fingerprint
from summarize_from_feedback_details.common.training import connect

CONTROLS = re.compile(r"[\r\x1b]")

# ---------------------------------------------------------------------------------------------- how every script starts

SCRIPTS = [
    p for folder in ("summarize_from_feedback_details", "eval", ".") for p in sorted((ROOT / folder).glob("*.py"))
]
SCRIPTS = [p for p in [*SCRIPTS, *(ROOT / "benchmark" / f"{n}.py" for n in ("bench", "memory"))]
           if 'if __name__ == "__main__":' in p.read_text()]  # fmt: skip


@dataclass
class Inner:
    folder: str = "x"
    """nested"""


@dataclass
class Arguments(RunArgs):
    """Of a small script."""

    output_dir: str = "x"
    """a folder"""
    data_dir: Path = Path("x")
    """a folder"""
    models: tuple[str, ...] = ()
    """folders, or name=folder"""
    truncate_token: str = "eos"
    """a word, no path"""
    world_size: int | None = None
    """it can be started as several processes"""
    inner: Inner = field(default_factory=Inner)
    """settings"""


def test_there_are_scripts():
    assert len(SCRIPTS) >= 12


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_starts_the_same_way(script):
    """Through `command_line`: what is tested below for a small script holds for all."""
    start = ast.parse(script.read_text()).body[-1]
    calls = [n for n in ast.walk(start) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "command_line"]
    assert [ast.unparse(call.args[0]) for call in calls] == ["main"] and "tyro.cli" not in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_figures_are_drawn_with_a_canvas_of_their_own(script):
    """No pyplot, no backend; matplotlib is first imported inside `drawing`, where MPLBACKEND is overruled."""
    source = script.read_text()
    assert "pyplot" not in source and "seaborn" not in source and ".use(" not in source
    names = [ast.unparse(n) for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [name for name in names if "matplotlib" in name]


def start(monkeypatch, *words: str, main=lambda args: None) -> Arguments:
    """What a small script's `main` is given."""
    found = []
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    command_line(lambda args: (found.append(args), main(args)), Arguments)
    return found[0]


def test_home_is_written_out_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/my/home")
    args = start(monkeypatch, "--output_dir=~/x", "--data_dir", "~", "--models", "sft=~/a", "~/b", "c~d", "e=f~",
                 "g/~/h", "--truncate_token", "~", "--inner.folder", "~/y")  # fmt: skip
    assert (args.output_dir, args.data_dir) == ("/my/home/x", Path("/my/home"))
    assert args.models == ("sft=/my/home/a", "/my/home/b", "c~d", "e=f~", "g/~/h")
    assert args.truncate_token == "~" and args.inner.folder == "/my/home/y"


LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "left, named",
    [
        ({"RANK": "3"}, "RANK"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK"),
        (LAUNCHED | {"MASTER_PORT": ""}, "LOCAL_RANK"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_DEEPSPEED": "True", "RANK": "0"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU"),
        ({"ACCELERATE_USE_CPU": ""}, "ACCELERATE_USE_CPU"),
        # what makes a whole, or does no harm
        ({}, None),
        (LAUNCHED, None),
        (LAUNCHED | {"ACCELERATE_USE_DEEPSPEED": "true"}, None),
        (ALONE, None),
        ({"RANK": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, None),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, None),
    ],
)
def test_variables_of_another_launch(monkeypatch, capsys, left, named):
    for name in (*LAUNCHED, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    if named is None:
        refuse_left_over(several=True)
        if left.get("WORLD_SIZE") != "2":
            return refuse_left_over(several=False)
        named = "WORLD_SIZE"  # a script of one process is not started as several
        with pytest.raises(SystemExit) as stopped:
            refuse_left_over(several=False)
    else:
        with pytest.raises(SystemExit) as stopped:
            start(monkeypatch)
    out, said = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and said.count("\n") == 1
    assert said.startswith(f"error: {named}: found '{left[named]}' in the environment; expected ")
    assert f"`unset {named}`" in said


def test_what_cannot_be_shown_is_replaced(tmp_path):
    """A sample with a curly quote, on both streams, in a locale that has none; a full disk; in one start."""
    (tmp_path / "script.py").write_text(
        "import errno, sys\n"
        "from dataclasses import dataclass\n"
        "from summarize_from_feedback_details.common.arguments import command_line\n"
        "@dataclass\nclass Args:\n    pass\n"
        "def main(args):\n"
        "    print('it\u2019s', 'na\u00efve', '\U0001f600')\n"
        "    print('\u201cquoted\u201d', file=sys.stderr)\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device', 'some/file')\n"
        "command_line(main, Args)\n",
        encoding="utf-8",
    )
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True)
    assert done.stdout == b"it?s na\xefve ?\n"
    assert done.stderr == b"?quoted?\nerror: some/file cannot be written: No space left on device\n"
    assert done.returncode == 1


# ---------------------------------------------------------------------------------------------------- what is written


def test_behind_a_link(tmp_path):
    """A folder is written as a whole, a file as well; the link stays one, and the results are behind it."""
    (tmp_path / "disk/there").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/there")
    for content in ("first", "second"):
        with atomic_folder(str(tmp_path / "link")) as partial:
            (partial / "x.txt").write_text(content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/there/x.txt").read_text() == content
    (tmp_path / "file").symlink_to("disk/there/x.txt")
    write_whole(tmp_path / "file", "third")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "disk/there/x.txt").read_text() == "third"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "file", "link", "there", "x.txt"]


def test_a_run_writes_behind_a_link(world, workdir, capsys):
    """Its results are its own: started again, there is nothing to do; another run does not write there."""
    (workdir / "disk").mkdir()
    (workdir / "link").symlink_to("disk")
    args = world.sft_args("link", run_eval=False, run_name="first")
    sft.main(replace(args))
    assert (workdir / "link").is_symlink() and (workdir / "disk/model.safetensors").exists()
    capsys.readouterr()
    sft.main(replace(args))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sft.main(replace(args, run_name="second"))
    assert "error: --output_dir: found 'link', which holds another run's results" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path, reason",
    [
        ("nowhere/x", "is a link to nowhere ('/not/there')"),
        ("nowhere", "is a link to nowhere ('/not/there')"),
        ("inside/nowhere/x/y", "is a link to nowhere ('../nowhere')"),
        ("loop/x", "is a link to nowhere ('loop')"),
        ("x" * 300, "cannot be written (File name too long)"),
        ("new/" + "x" * 300 + "/y", "cannot be written (File name too long)"),
        (
            "x" * 250,
            "cannot be written (File name too long)",
        ),  # it fits, what it is called while it is written does not
        ("file/x", "and 'file' cannot be written (Not a directory)"),
        ("file", "which is a file"),
        ("/proc/x", "and '/proc' cannot be written"),
        ("/proc/self/fd", "which holds another run's results"),
        ("/dev/shm", "where a file system is mounted"),
        ("~nobody-of-this-name/x", "and no such home directory"),
        ("new/folders", None),
        ("x" * 200, None),
        ("link", None),
        ("link/x", None),
    ],
)
def test_a_place_that_cannot_be_written_is_found_out_before(workdir, capsys, path, reason):
    (workdir / "file").write_text("x")
    (workdir / "nowhere").symlink_to("/not/there")
    (workdir / "loop").symlink_to("loop")
    (workdir / "inside").mkdir()
    (workdir / "inside/nowhere").symlink_to("../nowhere")
    (workdir / "empty").mkdir()
    (workdir / "link").symlink_to("empty")
    if path == "/dev/shm" and (not os.path.ismount(path) or os.listdir(path)):
        pytest.skip("no empty mounted folder")
    before = sorted(workdir.rglob("*"))
    if reason is None:
        refuse_unwritable("output_dir", path)
    else:
        with pytest.raises(SystemExit) as stopped:
            refuse_unwritable("output_dir", path)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and "; expected " in said
        assert said.startswith(f"error: --output_dir: found '{path}', ") and reason in said
    assert sorted(workdir.rglob("*")) == before


@pytest.fixture
def scripts_that_write(world, workdir):
    """Script -> its `main` with an output of that name; everything else is right."""
    import hello_report
    import judge
    import rlhf_scaling_plot
    import sft_rm_scale

    import visualize_tokens

    runs = workdir / "runs_there"
    runs.mkdir()
    for name in ("sft", "reward"):
        (runs / f"a_{name}").symlink_to(world.folder / f"runs/{name}")
    (runs / "a_ppo").symlink_to(world.folder / "runs/sft")
    (workdir / "table.csv").write_text("query,response,reference\na,b,c\n")
    raw, here = world.folder / "raw", Path("unused")
    return {
        "sft": lambda out: sft.main(world.sft_args(out, run_name="r")),
        "reward": lambda out: reward.main(world.reward_args(out, run_name="r")),
        "ppo": lambda out: ppo.main(world.ppo_args(out, run_name="r")),
        "ppo value": lambda out: ppo.main(world.ppo_args(here, run_name="r", value_output_dir=out)),
        "run name": lambda out: sft.main(world.sft_args(here, run_name=out.replace("/", "_"))),
        "dataset": lambda out: tldr_dataset.main(tldr_dataset.Args(
            base_model=world.base, sft_dataset=str(raw / "sft"), preference_dataset=str(raw / "comparisons"),
            output_dir=out, check_length_correctness=False)),
        "dataset's figures": lambda out: tldr_dataset.main(tldr_dataset.Args(
            base_model=world.base, sft_dataset=str(raw / "sft"), preference_dataset=str(raw / "comparisons"),
            output_dir=str(here), visuals_dir=out, check_length_correctness=False)),
        "toy rows": lambda out: toy_tldr.main(toy_tldr.Args(data_dir=Path(out), models_dir=here)),
        "toy models": lambda out: toy_tldr.main(toy_tldr.Args(data_dir=here, models_dir=Path(out))),
        "judge": lambda out: judge.main(judge.Args(run=("table.csv",), judge="gold", output_dir=out)),
        "sft_rm_scale": lambda out: sft_rm_scale.main(sft_rm_scale.Args(runs_dir=runs, output_dir=Path(out))),
        "rlhf_scaling_plot": lambda out: rlhf_scaling_plot.main(
            rlhf_scaling_plot.Args(runs_dir=runs, output_dir=Path(out))),
        "hello_report": lambda out: hello_report.main(
            hello_report.Args(chains=("a",), runs_dir=str(runs), output_dir=out)),
        "page": lambda out: visualize_tokens.main(visualize_tokens.Args(
            models=(f"sft={world.sft}",), base_model=world.base, query_dataset=world.sft_rows, num=1, html=out)),
    }  # fmt: skip


def test_every_script_finds_it_out_before_any_work(scripts_that_write, workdir, capsys, monkeypatch):
    """Below a link to nowhere, with too long a name, and in a home that is not there."""
    (workdir / "nowhere").symlink_to("/not/there")
    before = sorted(workdir.rglob("*"))
    for name, main in scripts_that_write.items():
        for out in ("nowhere/x", "x" * 300, "~nobody-of-this-name/x"):
            if name == "run name" and out != "x" * 300:
                continue  # a plain name
            with pytest.raises(SystemExit) as stopped:
                main(out)
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("error: --"), (name, out, said)
            assert "link to nowhere" in said or "name too long" in said or "no such home" in said, (name, out, said)
            assert sorted(workdir.rglob("*")) == before, (name, out)


def rights_that_differ(folder: Path, umask: int) -> list[str]:
    """Files and folders whose rights are not what the umask says."""
    wanted = lambda p: (0o777 if p.is_dir() else 0o666) & ~umask
    found = {p: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if not p.is_symlink()}
    # who may run a file is the copied file's own
    return [f"{p} {mode:o}" for p, mode in found.items() if mode & (0o777 if p.is_dir() else 0o666) != wanted(p)]


def test_the_world_follows_the_umask(world):
    """Rows, models, datasets, runs, policies: what each stage of the session's world has written."""
    umask = os.umask(0o022)
    os.umask(umask)
    assert (world.folder / "sft/model.safetensors").exists() and (world.folder / "tokenised/sft").exists()
    assert not rights_that_differ(world.folder, umask)


def test_checkpoints_and_value_networks_follow_the_umask(world, workdir, monkeypatch):
    monkeypatch.setattr(checkpoints.Checkpoints, "remove", lambda self: None)
    before = os.umask(0o027)
    try:
        ppo.main(world.ppo_args("policy", value_output_dir="value", num_updates=1, num_eval_rows=4, save_freq=1))
    finally:
        os.umask(before)
    names = {p.name for p in workdir.rglob("*")}
    assert {"rank_00000.safetensors", "model.safetensors", "manifest.json", "events.out.tfevents.0"} <= names
    assert not rights_that_differ(workdir, 0o027)


@pytest.mark.parametrize("content", ["null", "[]", "{}", "7", '{"state": "failed"}', "", "{"])
def test_runs_of_another_form_do_not_stop_a_new_one(world, workdir, content):
    """What stands in another run's summary.json, args.json, typed.json; and a run whose link leads nowhere."""
    for name in ("summary", "args", "typed"):
        (workdir / f"runs/{name}").mkdir(parents=True)
        for file in ("summary", "args", "typed"):
            text = content if file == name else '{"state": "failed", "stage": "sft"}'
            (workdir / f"runs/{name}/{file}.json").write_text(text)
    (workdir / "runs/gone").mkdir()
    (workdir / "runs/gone/summary.json").symlink_to("/not/there")
    args = replace(world.sft_args("policy"), run_name=None)
    assert run_folder.RunFolder(args, "sft").path.name.startswith("sft__")
    for name in ("summary", "args", "typed"):
        assert not run_folder.RunFolder(replace(args, run_name=name), "sft").is_finished()
        with pytest.raises(SystemExit):
            run_folder.RunFolder.refuse_taken(replace(args, run_name=name))


# ------------------------------------------------------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to move: `clock.now += 1.0`."""
    found = SimpleNamespace(now=5000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def work(clock, steps: int, seconds: float, **settings) -> None:
    """So many steps of so many seconds each, with a note."""
    progress = Progress("sft updates", settings.pop("total", steps), **settings)
    for i in range(steps):
        clock.now += seconds
        progress.step(note=f"loss {i + 1}.5")


def test_progress_in_a_file_is_a_plain_line_every_ten_seconds(clock, capsys):
    work(clock, steps=105, seconds=1.0)
    out, err = capsys.readouterr()
    assert not err and not CONTROLS.search(out)
    lines = [re.fullmatch(r"sft updates: (\d+)/105  (\d+) s, (\d+) s left  loss (\d+)\.5", s) for s in out.splitlines()]
    assert all(lines), out
    done, spent, left, notes = zip(*([int(number) for number in line.groups()] for line in lines))
    assert done == spent == notes and left == tuple(105 - n for n in done)  # a second a step
    assert done == (*range(1, 105, 11), 105)  # the first one, after more than ten seconds each, and the last one


def test_progress_of_long_steps_is_a_line_each(clock, capsys):
    work(clock, steps=5, seconds=60.0)
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines()] == ["1/5", "2/5", "3/5", "4/5", "5/5"]


def test_progress_of_a_run_that_goes_on_takes_the_time_of_its_own_steps(clock, capsys):
    """80 of 100 were done before: after one step of 20 s, 19 are left, not a hundredth of what has passed."""
    work(clock, steps=1, seconds=20.0, total=100, done=80)
    assert capsys.readouterr().out.startswith("sft updates: 81/100  20 s, 380 s left")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_silent_on_other_ranks(clock, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    work(clock, steps=20, seconds=30.0, is_main=False)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar_that_is_drawn_again(capsys, monkeypatch):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        progress = Progress("sft updates", 3)
        for loss in ("3.5", "2.5", "1.5"):
            time.sleep(0.15)  # tqdm draws at most every 0.1 s
            progress.step(note=f"loss {loss}")
    shown = b""
    with contextlib.suppress(OSError):  # that is how the other end of a terminal ends
        while part := os.read(reader, 4096):
            shown += part
    os.close(reader)
    shown = shown.decode()
    states = [state.strip() for state in shown.split("\r") if state.strip()]
    for count, share, loss in (("1/3", "33%", "3.5"), ("2/3", "67%", "2.5"), ("3/3", "100%", "1.5")):
        assert any(
            state.startswith("sft updates: ") and all(part in state for part in (count, share, f"loss {loss}"))
            for state in states
        ), states
    assert shown.rstrip("\r\n").count("\n") == 0  # one line, again and again
    assert capsys.readouterr().out == ""  # and no plain lines beside it


# --------------------------------------------------------------------------------------------------------------- tables


def without_spaces(text: str) -> str:
    return re.sub(r"\s", "", text)


def columns_of(table: str) -> list[str]:
    """What stands in each column of a printed table, from top to bottom, without spaces and line breaks."""
    rows = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if line[0] in "│┃"]
    return [without_spaces("".join(column)) for column in zip(*rows)]


def test_a_table_in_a_log_wraps_sentences_and_keeps_names(capsys):
    """Two names of 33 letters fit, as they do not into the 80 columns that rich takes where there is no terminal."""
    name, why = "pythia-6.9b-deduped_seed44413_ppo", " ".join(f"reason{i}" for i in range(40))
    table = Table("run", "against", "why")
    table.add_row(name, name.replace("ppo", "sft"), why)
    print_table(table)
    out = capsys.readouterr().out
    assert name in out and name.replace("ppo", "sft") in out and not CONTROLS.search(out)
    assert columns_of(out)[2] == "why" + without_spaces(why)


@pytest.mark.parametrize(
    "names",
    [
        # what `hello_world.sh`'s first judge prints: SFT, PPO, and PPO on its way
        [f"toy_small_seed1_{policy}" for policy in ("sft", "ppo", *(f"ppo, update {i}" for i in (10, 20, 30, 40)))],
        # there would be room for these, beside a narrower sentence
        [f"EleutherAI_pythia-6.9b-deduped_seed44413_{policy}" for policy in ("sft", "ppo")],
    ],
    ids=["many", "long"],
)
def test_a_table_in_a_log_cuts_nothing(capsys, names):
    numbers = [f"0.{i}17 (0.{i}08 to 0.{i}26)" for i in range(len(names))]
    table, why = Table("", *names, "why"), "one reason and another " * 5
    table.add_row("win rate", *numbers, why)
    print_table(table)
    expected = [without_spaces(name + number) for name, number in zip(names, numbers)]
    assert columns_of(capsys.readouterr().out) == ["winrate", *expected, without_spaces("why" + why)]


# ----------------------------------------------------------------------------------- samples and evaluations on the way


def read_lines(name: str) -> dict[int, dict]:
    """Numbers of a run's metrics.jsonl by update."""
    found = {}
    for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        found[line["update"]] = found.get(line["update"], {}) | line
    return found


def samples_of(name: str) -> dict[int, pandas.DataFrame]:
    paths = Path(f"runs/{name}/tables").glob("samples_*.parquet")
    return {int(path.stem.removeprefix("samples_")): pandas.read_parquet(path) for path in paths}


def test_sft_evaluates_and_samples_on_the_way(world, workdir, capsys):
    sft.main(world.sft_args(workdir / "policy", num_eval_rows=4, eval_freq=1, print_sample_output_freq=2))
    lines = read_lines("policy")
    assert list(lines) == [0, 1, 2, 3, 4, 5]  # before, four updates, the final evaluation
    validated = [update for update, line in lines.items() if "validation/sft/loss" in line]
    assert validated == [1, 2, 3, 5]  # that after the last update is the final one
    names = {"validation/sft/eos_rate", "validation/sft/response_length", "validation/sft/rouge/rougeL"}
    assert all(names <= set(lines[update]) for update in validated)
    assert "test/sft/loss" in lines[5] and not any("test/sft/loss" in lines[update] for update in (1, 2, 3, 4))
    losses = [lines[0]["validation/base/loss"], *(lines[update]["validation/sft/loss"] for update in validated)]
    assert all(after < before for before, after in zip(losses, losses[1:])), losses  # it is the policy of that update

    final, samples = pandas.read_parquet("runs/policy/tables/validation.parquet"), samples_of("policy")
    assert sorted(samples) == [2, 4]
    out = capsys.readouterr().out
    for table in samples.values():
        assert list(table)[:3] == ["query", "response", "reference"] and len(table) == 2
        assert table["query"].tolist() == final["query"][:2].tolist()
        assert table["reference"].tolist() == final["reference"][:2].tolist()
        for row in table.itertuples():
            assert f"{row.query[-300:]}\n  policy:    {row.response}\n  reference: {row.reference}\n" in out
    # those of the last update are of the final policy, those before are not
    pandas.testing.assert_frame_equal(samples[4], final[:2], rtol=0, atol=1e-4)
    assert abs(samples[2]["loss"] - final["loss"][:2]).min() > 1e-3


def test_reward_evaluates_on_the_way(world, workdir):
    reward.main(world.reward_args(workdir / "rm", num_eval_rows=12, eval_freq=1))
    lines = read_lines("rm")
    assert list(lines) == [0, 1, 2, 3, 4, 5]
    for split, pairs in (("validation", 12), ("validation_cnndm", 12)):
        found = {u: line[f"eval/rm/{split}/loss"] for u, line in lines.items() if f"eval/rm/{split}/loss" in line}
        assert list(found) == [0, 1, 2, 3, 5] and len(set(found.values())) == 5
        assert all(0 <= lines[u][f"eval/rm/{split}/accuracy"] <= 1 for u in found)
        assert all(lines[u][f"eval/rm/{split}/pairs"] == pairs for u in found)
    assert all("train/rm/loss" in lines[u] for u in (1, 2, 3, 4))


def test_ppo_samples_on_the_way(world, workdir, capsys):
    ppo.main(world.ppo_args(workdir / "policy", num_eval_rows=4, print_sample_output_freq=1))
    final, samples = pandas.read_parquet("runs/policy/tables/validation.parquet"), samples_of("policy")
    assert sorted(samples) == [1, 2] and list(read_lines("policy")) == [1, 2, 3]
    out = capsys.readouterr().out
    for table in samples.values():
        assert list(table)[:5] == ["query", "response", "reference", "score", "reference_score"] and len(table) == 2
        assert table["reference"].tolist() == final["reference"][:2].tolist()
        for row in table.itertuples():
            assert f"{row.query[-300:]}\n  policy ({row.score:+.2f}): {row.response}\n" in out
    pandas.testing.assert_frame_equal(samples[2], final[:2], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- PPO's warnings

RIGHT = {"policy/first_pass_ratio_error": 0.0, "objective/kl": 0.0, "objective/kl_standard_error": 0.01}


@pytest.mark.parametrize(
    "found, exact, message",
    [
        ({}, True, None),
        ({"policy/first_pass_ratio_error": 0.01}, True, "the first-pass ratio is off 1 by 0.01 (> 0.001)"),
        ({"policy/first_pass_ratio_error": 0.0009}, True, None),
        ({"policy/first_pass_ratio_error": 0.01}, False, None),
        ({"policy/first_pass_ratio_error": 0.11}, False, "the first-pass ratio is off 1 by 0.11 (> 0.1)"),
        ({"objective/kl": -1.0}, True, "KL -1.0000 is negative beyond its noise of 0.0401"),
        ({"objective/kl": -1.0}, False, "KL -1.0000 is negative beyond its noise of 0.0900"),
        ({"objective/kl": -0.08}, True, "KL -0.0800 is negative beyond its noise of 0.0401"),
        ({"objective/kl": -0.08}, False, None),
        ({"objective/kl": -0.03}, True, None),
        ({"objective/kl": -0.08, "objective/kl_standard_error": 0.02}, True, None),  # more noise
        ({"objective/kl": 5.0}, True, None),
    ],
)
def test_ppo_warns_of_impossible_numbers(capsys, found, exact, message):
    ppo.warn(17, RIGHT | found, exact)
    assert capsys.readouterr().out == (f"WARNING: update 17: {message}\n" if message else "")


def test_ppo_warns_of_both(capsys):
    ppo.warn(3, RIGHT | {"policy/first_pass_ratio_error": 2.0, "objective/kl": -1.0}, in_float32=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("WARNING: update 3: ") for line in lines)


def test_ppo_warns_while_it_runs(world, workdir, capsys, monkeypatch):
    """Log-probabilities of sampling that are off by 0.5 nats: the ratio of the first pass is exp(-0.5), KL negative."""
    rollout = ppo.make_rollout

    def off(*given):
        found = rollout(*given)
        wrong = torch.where(found.logprobs == ppo.INVALID_LOGPROB, found.logprobs, found.logprobs - 0.5)
        return found._replace(logprobs=wrong)

    monkeypatch.setattr(ppo, "make_rollout", off)
    ppo.main(world.ppo_args(workdir / "policy", num_updates=1, run_eval=False))
    error = math.exp(0.5) - 1
    out = capsys.readouterr().out
    assert f"WARNING: update 1: the first-pass ratio is off 1 by {error:.2g} (> 0.001)" in out
    assert re.search(r"WARNING: update 1: KL -\d+\.\d{4} is negative beyond its noise of ", out)


def test_memory_that_fragments_is_given_back():
    """What is freed is kept for the next update, until the process has grown by a twentieth."""
    machine.keep_freed_memory()
    blocks = [torch.ones(250_000) for _ in range(300)]  # 300 MB
    most = machine.resident_bytes()
    del blocks[::2]  # holes of 1 MB
    assert machine.give_back_fragments(0) > 0.95 * most  # the first call only looks
    assert machine.give_back_fragments(most) == most
    assert machine.give_back_fragments(most // 2) == 0
    assert machine.resident_bytes() < most - 100e6 and len(blocks) == 150


def test_what_is_kept_of_every_shape_is_limited(monkeypatch):
    """oneDNN's cache and torch's above it; what the user has set stays."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    machine.keep_freed_memory()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("128", "7")


def test_threads_beside_busy_cores_are_told_of(capsys):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        machine.warn_of_busy_cores()  # one thread waits for nobody
        assert capsys.readouterr().out == ""
        torch.set_num_threads(2)
        machine.warn_of_busy_cores()
        assert "OMP_NUM_THREADS=1" in capsys.readouterr().out
    finally:
        torch.set_num_threads(1)
        for process in busy:
            process.kill()
            process.wait()


def test_the_fingerprint_of_weights_sees_every_large_matrix(tmp_path):
    """Any byte of a small file; a change of half a percent anywhere in a large one."""
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, size in ((small, 500_000), (large, 40_000_000)):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(size))
    found = {weights_fingerprint(str(small)), weights_fingerprint(str(large))}
    written = ((small, (0, 250_001, 499_999), 1), (large, (7_000_000, 20_000_000, 39_700_000), 200_000))
    for folder, places, width in written:
        for place in places:
            with open(folder / "model.safetensors", "r+b") as file:
                file.seek(place)
                file.write(b"x" * width)
            found.add(weights_fingerprint(str(folder)))
    assert len(found) == 8
    assert weights_fingerprint("somebody/model") == "somebody/model"


def test_other_errors_of_accelerate_are_not_hidden(monkeypatch):
    for name, value in (("DYNAMO_BACKEND", "NO"), ("DYNAMO_MODE", "default"), ("GRADIENT_ACCUMULATION_STEPS", "1")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for said in (
        "CUDA error: no kernel image",
        "default process group has not been initialized",
        "1",
        "retrying 1 of 3",
    ):
        refuse_settings_of_accelerate(RuntimeError(said))  # which then goes on


@pytest.mark.parametrize(
    "name, value",
    [("DYNAMO_BACKEND", "foo"), ("GRADIENT_ACCUMULATION_STEPS", "x"), ("TORCH_DEVICE", "foo"), ("DEBUG_MODE", "maybe")],
)
def test_settings_that_accelerate_does_not_know(monkeypatch, capsys, name, value):
    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(SystemExit) as stopped:
        connect(SimpleNamespace(world_size=1, precision="fp32", deepspeed=False))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: ACCELERATE_{name}: found '{value}' in the environment;")
    assert said.count("\n") == 1 and f"`unset ACCELERATE_{name}`" in said


def test_an_argument_that_an_older_version_did_not_have():
    """It had its default then: a finished run of that version is the same one, and of another value another."""
    args = ppo.Args(seed=3)
    saved = json.loads(json.dumps(asdict(args)))
    del saved["rollout_engine"], saved["ppo"]["whiten_rewards"]
    assert run_folder.differences(args, saved, asdict(args)) == {}
    other = replace(args, rollout_engine="hf_graph", ppo=ppo.PpoHParams(whiten_rewards=True))
    expected = {"rollout_engine": ("hf", "hf_graph"), "ppo.whiten_rewards": (False, True)}
    assert run_folder.differences(other, saved, asdict(other)) == expected
