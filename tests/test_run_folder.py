"""What a run shows while it works: progress, tables, warnings, samples and evaluations on the way."""

import contextlib
import json
import math
import os
import pty
import re
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from rich.table import Table

from summarize_from_feedback_details import ppo_left_padding as ppo
from summarize_from_feedback_details import reward, run_folder, sft
from summarize_from_feedback_details.run_folder import Progress, print_table

CONTROLS = re.compile(r"[\r\x1b]")

# ------------------------------------------------------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to move: `clock.now += 1.0`."""
    found = SimpleNamespace(now=5000.0)
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: found.now))
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
    ppo.warn(3, RIGHT | {"policy/first_pass_ratio_error": 2.0, "objective/kl": -1.0}, exact=False)
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
