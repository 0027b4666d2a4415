"""The figures: the numbers behind them against those worked out by hand, and no run lost, whatever became of it."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import OFFLINE, ROOT, STAGES
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(ROOT / "eval"))
import hello_report
import read_runs
import rlhf_scaling_plot
import sft_rm_scale

from summarize_from_feedback_details.common.arguments import command_line

T_3 = 4.302652729911275  # Student's t, 97.5 %, 2 degrees of freedom: three seeds
STAGE_OF = {"sft": "sft", "reward": "reward", "ppo": "ppo_left_padding"}


def write_run(runs, name, stage, *, seed=1, base="EleutherAI/pythia-1b-deduped", state="finished", reason=None,
              parameters=None, final=None, lines=(), accuracy=None, kl_coef=0.05):  # fmt: skip
    """A run folder as the stages write it."""
    folder = runs / name
    (folder / "tables").mkdir(parents=True)
    args = {"seed": seed, "run_name": name, "base_model": base}
    ppo = {"ppo": {"kl_coef": kl_coef, "gamma": 1.0}, "reward_model_path": "models/reward"}
    args |= ppo if stage == "ppo" else {}
    (folder / "args.json").write_text(json.dumps(args))
    summary = {"stage": STAGE_OF[stage], "run_name": name, "state": state, "metrics": final or {}}
    summary |= {"parameters": parameters} if parameters else {}
    summary |= {"reason": reason} if reason else {}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracy is not None:
        columns = ["split", "group", "value", "pairs", "accuracy"]
        pandas.DataFrame(accuracy, columns=columns).to_parquet(folder / "tables/accuracy.parquet")
    return folder


def around(mean, half=0.05):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_report(run, win_rate, judge="gold", update=None, score=None, by_length=(), **more):
    folder = run / "judge" / judge / (f"update_{update}" if update else "")
    folder.mkdir(parents=True, exist_ok=True)
    report = {"judge": judge, "against": "references", "posts": 100, "win_rate": around(win_rate),
              "length_controlled_win_rate": around(win_rate),
              "by_length_ratio": [{"from": a, "to": b, "posts": n, "win_rate": around(w)} for a, b, n, w in by_length],
              } | ({} if score is None else {"mean_score": around(score)}) | more  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))


def sft_final(rouge):
    return {f"validation/sft/rouge/{name}": rouge + i / 10 for i, name in enumerate(("rougeL", "rouge1", "rouge2"))} | {
        "validation/sft/rouge/rougeLsum": rouge
    }


def rm_final(tldr, cnndm):
    return {"eval/rm/validation/accuracy": tldr, "eval/rm/validation_cnndm/accuracy": cnndm}


def ppo_lines(n, score=1.0, kl=10.0, batch=64):
    """Curves that rise linearly to the given values at the last update."""
    return [
        {"update": u, "train/ppo/episode": u * batch, "objective/scores": score * u / n, "objective/kl": kl * u / n,
         "objective/entropy": 40.0, "objective/response_length": 30.0, "objective/eos_rate": 0.9}
        for u in range(1, n + 1)
    ] + [{"update": n + 1, "eval/ppo/validation/score": score}]  # fmt: skip


def ppo_final(lines):
    return {key: value for line in lines for key, value in line.items() if key != "update"}


def ppo_run(runs, name, *, score=1.0, kl=10.0, n=10, **more):
    """A PPO run with curves, finished unless told otherwise."""
    lines = ppo_lines(n, score, kl)
    return write_run(runs, name, "ppo", lines=lines, final=ppo_final(lines), **more)


@pytest.fixture(autouse=True)
def do_not_render(request, monkeypatch):
    """Rendering takes seconds, and the numbers do not need it; `test_files` and the documents' commands render."""
    if request.node.name != "test_files":
        blank = io.BytesIO()
        Image.new("RGB", (8, 8)).save(blank, format="png")
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **more: file.write(blank.getvalue()))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def draw(script, runs_dir, **more):
    """Run a script in this process: (rows behind each figure, folder of the files)."""
    folder = runs_dir.parent / "images"
    args = script.Args(**({"runs_dir": runs_dir, "output_dir": folder} | more))
    script.main(args)
    return {path.stem: pandas.read_csv(path, dtype={"size": str, "at": str}) for path in folder.glob("*.csv")}, folder


def means_of(rows, **where):
    rows = rows[rows["what"] == "mean over seeds"]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# the numbers
def test_mean_and_interval_over_seeds(runs):
    for seed, rouge, accuracy in ((1, 0.20, 0.60), (2, 0.23, 0.62), (3, 0.26, 0.70)):
        write_run(runs, f"a{seed}_sft", "sft", seed=seed, final=sft_final(rouge))
        write_run(runs, f"a{seed}_reward", "reward", seed=seed, final=rm_final(accuracy, 0.5))
    rows, _ = draw(sft_rm_scale, runs)
    rouge = means_of(rows["rouge_score_plot"], metric="validation/sft/rouge/rougeL").iloc[0]
    half = T_3 * 0.03 / math.sqrt(3)  # the sample standard deviation of 0.20, 0.23, 0.26 is 0.03
    assert (rouge["value"], rouge["low"], rouge["high"]) == pytest.approx((0.23, 0.23 - half, 0.23 + half))
    assert rouge["seeds"] == 3 and rouge["interval"] == "seeds"
    accuracy = means_of(rows["rm_scale_plot"], metric="eval/rm/validation/accuracy").iloc[0]
    half = T_3 * math.sqrt(0.0028) / math.sqrt(3)  # deviations -0.04, -0.02, 0.06: variance 0.0056 / 2
    assert (accuracy["value"], accuracy["low"]) == pytest.approx((0.64, 0.64 - half))
    assert sorted(rows["rm_scale_plot"].query("what == 'run'")["value"]) == [0.5, 0.5, 0.5, 0.60, 0.62, 0.70]


def test_one_seed_has_no_interval_and_two_runs_of_one_seed_are_one_seed(runs):
    write_run(runs, "a", "sft", seed=1, final=sft_final(0.2))
    write_run(runs, "b", "sft", seed=1, final=sft_final(0.4))
    rows, _ = draw(sft_rm_scale, runs)
    mean = means_of(rows["rouge_score_plot"], metric="validation/sft/rouge/rougeL").iloc[0]
    assert mean["value"] == pytest.approx(0.3) and mean["seeds"] == 1 and np.isnan(mean["low"])
    assert set(rows["rouge_score_plot"].query("what == 'run'")["run"]) == {"a", "b"}


def test_stages_of_one_size_share_a_place(runs):
    base = "models/world/base/small"
    (runs.parent / base).mkdir(parents=True)
    (runs.parent / base / "toy_tldr.json").write_text('{"parameters": 470560}')
    write_run(runs, "a_sft", "sft", base=base, final=sft_final(0.2))
    write_run(runs, "a_reward", "reward", base=base, parameters=460000, final=rm_final(0.6, 0.6))
    write_run(runs, "b_sft", "sft", base="my/own", parameters=470000, final=sft_final(0.2))
    write_run(runs, "b_reward", "reward", base="my/own", parameters=460000, final=rm_final(0.6, 0.6))
    write_run(runs, "c_sft", "sft", base="EleutherAI/pythia-2.8b-deduped", final=sft_final(0.2))
    write_run(runs, "c_ppo", "ppo", base="EleutherAI/pythia-2.8b-deduped", parameters=2775208960)
    table, _ = read_runs.read_runs(read_runs.ReadArgs(runs_dir=runs))
    runs_table = table.drop_duplicates("run").set_index("run")
    assert dict(runs_table["size"]) == {"a_sft": "small", "a_reward": "small", "b_sft": "0.47M", "b_reward": "0.47M",
                                        "c_sft": "2.8b", "c_ppo": "2.8b"}  # fmt: skip
    assert runs_table.loc["a_sft", "parameters"] == 470560 and runs_table.loc["c_sft", "parameters"] == 2.8e9
    places = sft_rm_scale.size_positions(table)
    assert list(places) == ["0.47M", "small", "2.8b"] and places["small"] == 470560


@pytest.mark.parametrize("parameters, text", [(471999, "0.47M"), (70e6, "70M"), (410e6, "410M"), (1011781632, "1b"),
                                              (2.8e9, "2.8b")])  # fmt: skip
def test_rounded_sizes(parameters, text):
    assert read_runs.rounded(parameters) == text


def test_win_rates_of_all_seeds_by_kl_coef(runs):
    for seed, sft, ppo in ((1, 0.30, 0.20), (2, 0.34, 0.60), (3, 0.38, 0.70)):
        write_report(write_run(runs, f"s{seed}", "sft", seed=seed), sft)
        write_report(ppo_run(runs, f"p{seed}", seed=seed), ppo)
    write_report(ppo_run(runs, "other", seed=1, kl_coef=0.2), 0.9)
    rows, _ = draw(rlhf_scaling_plot, runs)
    rows = rows["rlhf_scale_plot"]
    assert set(rows.query("what == 'run'")["run"]) == {"s1", "s2", "s3", "p1", "p2", "p3", "other"}
    ppo = means_of(rows, stage="ppo", kl_coef=0.05).iloc[0]
    half = T_3 * math.sqrt(0.14 / 2 / 3)  # deviations -0.3, 0.1, 0.2 from 0.5: squares sum to 0.14
    assert (ppo["value"], ppo["low"], ppo["high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert means_of(rows, stage="sft").iloc[0]["value"] == pytest.approx(0.34)
    other = means_of(rows, stage="ppo", kl_coef=0.2).iloc[0]  # one seed: the report's own interval
    assert (other["value"], other["low"], other["high"]) == pytest.approx((0.9, 0.85, 0.95))
    assert other["interval"] == "posts" and other["seeds"] == 1


def test_overoptimization_path_takes_kl_of_its_update(runs):
    run = ppo_run(runs, "p", score=2.0, kl=16.0, n=8)
    write_report(run, 0.6, score=0.5)
    write_report(run, 0.5, score=0.8, update=2)  # KL there: 16 * 2 / 8
    write_report(run, 0.4, judge="gold.old-1", score=9.0)  # set aside by judge.py
    write_report(run, 0.4, judge="two", score=9.0, against="my_sft")
    rows, _ = draw(rlhf_scaling_plot, runs)
    rows = rows["overoptimization"]
    judged = rows[rows["metric"] == "mean_score"].sort_values("kl")
    assert judged[["kl", "root_kl", "value"]].to_numpy() == pytest.approx(np.array([[4, 2, 0.8], [16, 4, 0.5]]))
    proxy = rows[rows["metric"] == "objective/scores"]
    assert len(proxy) == 8 and proxy["root_kl"].max() == 4 and proxy["value"].max() == 2


def test_win_rate_by_length(runs):
    for seed, low in ((1, 0.2), (2, 0.4)):
        bins = [(0.0, 0.5, 30, low), (0.5, 0.9, 5, 0.5), (0.9, None, 40, 0.6), (2.0, 3.0, 0, math.nan)]
        write_report(ppo_run(runs, f"p{seed}", seed=seed), 0.5, by_length=bins)
    rows, _ = draw(rlhf_scaling_plot, runs)
    means = means_of(rows["win_rate_by_length"]).set_index("at")
    assert dict(means["value"]) == pytest.approx({"0 to 0.5": 0.3, "0.5 to 0.9": 0.5, "0.9 to inf": 0.6})
    assert means.loc["0 to 0.5", "count"] == 60 and means.loc["0.5 to 0.9", "count"] == 10


def test_training_curves(runs):
    ppo_run(runs, "a", seed=1, score=1.0, n=1000)
    ppo_run(runs, "b", seed=2, score=3.0, n=1000)
    rows, _ = draw(rlhf_scaling_plot, runs)
    rows = rows["training_curves"].query("metric == 'objective/scores'")
    a = rows[rows["run"] == "a"].sort_values("episode")
    assert len(a) == read_runs.CURVE_POINTS  # windows of ten updates
    assert a["value"].iloc[0] == pytest.approx(0.0055) and a["episode"].iloc[0] == pytest.approx(5.5 * 64)
    mean = means_of(rows)
    assert (mean["seeds"] == 2).all()
    assert mean["value"].to_numpy() == pytest.approx(mean["episode"].to_numpy() / 64000 * 2)


def test_mean_curve_only_where_two_runs_are():
    long = pandas.DataFrame({"episode": [0.0, 10.0], "value": [0.0, 10.0]})
    short = pandas.DataFrame({"episode": [0.0, 5.0], "value": [2.0, 7.0]})
    mean = rlhf_scaling_plot.mean_curve([long, short], points=11)
    assert mean["episode"].tolist() == [0, 1, 2, 3, 4, 5] and mean["value"].tolist() == [1, 2, 3, 4, 5, 6]


def test_accuracy_by_group(runs):
    for seed, right in ((1, 0.6), (2, 0.8)):
        groups = [("validation", "all", "", 50, right), ("validation", "confidence", "9", 20, right),
                  ("validation", "batch", "batch10", 20, 0.5), ("validation", "batch", "batch2", 20, 0.5),
                  ("validation_cnndm", "policies", "ref--sup1", 10, 0.7)]  # fmt: skip
        write_run(runs, f"r{seed}", "reward", seed=seed, final=rm_final(right, 0.5), accuracy=groups)
    write_run(runs, "r3", "reward", seed=3, final=rm_final(0.5, 0.5))  # its table is gone
    rows, _ = draw(sft_rm_scale, runs)
    mean = means_of(rows["rm_by_confidence"]).iloc[0]
    assert (mean["at"], mean["value"], mean["seeds"]) == ("9", pytest.approx(0.7), 2)
    assert set(rows["rm_by_batch"].query("what == 'run'")["at"]) == {"batch2", "batch10"}
    assert means_of(rows["rm_by_policy_pair"]).iloc[0]["at"] == "ref--sup1"
    assert rows["rm_by_batch"].query("what == 'not drawn'")["run"].tolist() == ["r3"]
    assert sft_rm_scale.in_order({"batch10", "batch2", "cnndm0"}) == ["batch2", "batch10", "cnndm0"]


def test_published_numbers(runs):
    write_report(write_run(runs, "s", "sft", final=sft_final(0.2)), 0.3)
    rows, _ = draw(rlhf_scaling_plot, runs, paper=True)
    published = rows["rlhf_scale_plot"].query("what == 'published'")
    one = published.query("series == 'PPO' and size == '1b' and judge == 'GPT-3.5-turbo-0125'")["value"]
    assert one.tolist() == [0.539, 0.222, 0.197, 0.618]
    assert "Huang et al. 2024 (released figures), 4 seeds" in set(published["source"])
    rows, _ = draw(sft_rm_scale, runs, paper=True)
    assert rows["rm_scale_plot"].query("series == 'TL;DR'")["value"].tolist() == [0.629, 0.669, 0.689]
    assert not (draw(sft_rm_scale, runs)[0]["rm_scale_plot"]["what"] == "published").any()


def lines_of(axis) -> list[set]:
    """Of each dotted line: the values that it joins."""
    return [set(line.get_ydata()) for line in axis.lines if line.get_linestyle() == ":" and len(line.get_xdata()) > 1]


def test_published_numbers_stand_apart_and_are_joined_within_a_protocol_only(runs, monkeypatch):
    """A 1B PPO reads 0.46 to 0.63 by judge alone: no line joins what judge, temperature or reference tells apart."""
    figures = []
    monkeypatch.setattr(rlhf_scaling_plot, "finish", lambda figure, notes: figures.append((figure, notes)))
    write_report(write_run(runs, "s", "sft", final=sft_final(0.2)), 0.3)
    draw(rlhf_scaling_plot, runs, paper=True)
    (ours, beside), notes = figures[0][0].axes, figures[0][1]
    assert "published" in beside.get_title() and "not joined" in notes[-1]
    published = sft_rm_scale.read_published(True, ["rlhf_scale_plot"])
    for joined in lines_of(beside):
        of_protocols = [
            joined <= {*group["value"], *group.groupby("size")["value"].mean()}
            for _, group in published.groupby([*sft_rm_scale.PROTOCOL, "series"], dropna=False)
        ]
        assert any(of_protocols), joined
    assert {0.434, 0.407, 0.327} in lines_of(beside) and {0.401, 0.787} in lines_of(beside)
    assert not {0.327, 0.539} & {value for line in ours.lines for value in line.get_ydata()}


def test_runs_sampled_at_several_temperatures_are_series_of_their_own(runs):
    for name, temperature, value in (("a", 0.01, 0.8), ("b", 0.7, 0.6)):
        path = ppo_run(runs, name)
        write_report(path, value)
        args = json.loads((path / "args.json").read_text()) | {"eval_temperature": temperature}
        (path / "args.json").write_text(json.dumps(args))
    rows, _ = draw(rlhf_scaling_plot, runs)
    found = rows["rlhf_scale_plot"].query("what == 'mean over seeds'").set_index("series")["value"]
    assert found.to_dict() == pytest.approx({"PPO, T 0.01": 0.8, "PPO, T 0.7": 0.6})
    for name, temperature, value in (("c", 0.01, 0.3), ("d", 0.7, 0.2)):
        path = write_run(runs, name, "sft", final=sft_final(value))
        args = json.loads((path / "args.json").read_text()) | {"temperature": temperature}
        (path / "args.json").write_text(json.dumps(args))
    rows, _ = draw(sft_rm_scale, runs)
    found = means_of(rows["rouge_score_plot"], metric="validation/sft/rouge/rougeL").set_index("series")["value"]
    assert found.to_dict() == pytest.approx({"SFT, T 0.01": 0.3, "SFT, T 0.7": 0.2})


# ----------------------------------------------------------------------------------------------------------------------
# no run is lost
@pytest.fixture
def troubled(runs):
    """Every state that a run can be in; gives name -> what must be said about it."""
    write_run(runs, "good_sft", "sft", final=sft_final(0.2))
    write_run(runs, "good_reward", "reward", final=rm_final(0.6, 0.6))
    write_report(ppo_run(runs, "good_ppo"), 0.6, score=0.1)
    write_run(runs, "nan_sft", "sft", final=sft_final(math.nan))
    write_run(runs, "no_eval_reward", "reward", final={"train/rm/loss": 0.6})
    write_run(runs, "unknown_size_sft", "sft", base="my/model", final=sft_final(0.2))
    write_run(
        runs, "failed_sft", "sft", state="failed", reason="Killed", final=sft_final(0.9)
    )  # of an evaluation midway
    ppo_run(runs, "unknown_size_ppo", base="my/model")
    write_run(runs, "running_reward", "reward", state="running")
    lines = ppo_lines(6)[:3]
    lines[1] |= {"objective/scores": None}
    write_run(runs, "failed_ppo", "ppo", state="failed", reason="FloatingPointError: not finite", lines=lines,
              final=ppo_final(lines))  # fmt: skip
    running = write_run(runs, "running_ppo", "ppo", state="running", lines=ppo_lines(4)[:2])
    with open(running / "metrics.jsonl", "a") as file:
        file.write('{"update": 3, "objective/sco')  # being written at this moment
    ppo_run(runs, "unjudged_ppo", seed=2)
    torn = write_run(runs, "torn", "sft")
    (torn / "summary.json").write_text('{"stage": "sft", "sta')
    (runs / "notes").mkdir()
    report = ppo_run(runs, "torn_report_ppo") / "judge/gold"
    report.mkdir(parents=True)
    (report / "report.json").write_text('{"win_rate": 0.5}')
    write_run(runs, "smoke_seed1_sft", "sft")
    write_run(runs, "good_sft.stopped-1", "sft")
    return {"nan_sft": "is NaN", "no_eval_reward": "finished without eval/rm", "unknown_size_sft": "size unknown",
            "failed_sft": "failed: Killed", "unknown_size_ppo": "not judged yet",
            "running_reward": "still running", "failed_ppo": "failed: FloatingPointError: not finite",
            "running_ppo": "still running", "unjudged_ppo": "not judged yet by gold: python eval/judge.py --run",
            "torn": "unreadable: JSONDecodeError", "notes": "unreadable: no summary.json",
            "torn_report_ppo": "unreadable: AttributeError"}  # fmt: skip


def test_every_run_is_drawn_or_listed(troubled, runs, capsys):
    rows, _ = draw(sft_rm_scale, runs)
    said = capsys.readouterr().out
    more, _ = draw(rlhf_scaling_plot, runs)
    said += capsys.readouterr().out
    listed = pandas.concat([r.query("what == 'not drawn'") for r in (rows | more).values() if "what" in r])
    for name, reason in troubled.items():
        assert listed[listed["run"] == name]["reason"].str.contains(reason, regex=False).any(), name
        assert name in said
    assert "not asked for (--runs names them): good_sft.stopped-1, smoke_seed1_sft" in said
    everything = {folder.name for folder in runs.iterdir()} - {"good_sft.stopped-1", "smoke_seed1_sft"}
    for all_numbers in (rows["sft_rm_scale"], more["rlhf_scaling_plot"]):
        assert set(all_numbers["run"]) == everything
        assert dict(all_numbers.groupby("run")["state"].first())["failed_ppo"] == "failed"
    # in each figure: all runs of its stages, and those of which nobody knows the stage
    unknown = {"torn", "notes"}
    ppo = {"good_ppo", "failed_ppo", "running_ppo", "unjudged_ppo", "torn_report_ppo", "unknown_size_ppo"}
    sft, reward = (
        {"good_sft", "nan_sft", "unknown_size_sft", "failed_sft"},
        {"good_reward", "no_eval_reward", "running_reward"},
    )
    for name, wanted in (("rouge_score_plot", sft), ("rm_scale_plot", reward), ("rm_by_batch", reward),
                         ("rlhf_scale_plot", sft | ppo), ("training_curves", ppo), ("overoptimization", ppo),
                         ("win_rate_by_length", sft | ppo)):  # fmt: skip
        assert set((rows | more)[name]["run"].dropna()) == wanted | unknown, name
    assert set(rows["rouge_score_plot"].query("what == 'run'")["run"]) == {"good_sft"}  # not what one measured midway
    # what a run that failed or goes on has measured so far is drawn
    curves = more["training_curves"].query("what == 'run' and metric == 'objective/scores'")
    assert curves[curves["run"] == "failed_ppo"]["value"].tolist() == pytest.approx([1 / 6, 3 / 6])
    assert curves[curves["run"] == "running_ppo"]["value"].tolist() == pytest.approx([1 / 4, 2 / 4])


def test_files(troubled, runs):
    """PNG, PDF and CSV of each figure, the PDF with real fonts, nothing half-written, the PNG small."""
    for script in (sft_rm_scale, rlhf_scaling_plot):
        _, folder = draw(script, runs)
    for name in ("rouge_score_plot", "rm_scale_plot", "rm_by_confidence", "rm_by_batch", "rm_by_policy_pair",
                 "rlhf_scale_plot", "training_curves", "overoptimization", "win_rate_by_length"):  # fmt: skip
        png, pdf = (folder / f"{name}.png").read_bytes(), (folder / f"{name}.pdf").read_bytes()
        assert png.startswith(b"\x89PNG") and 5_000 < len(png) < 300_000
        assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and (folder / f"{name}.csv").exists()
    assert len(list(folder.iterdir())) == 9 * 3 + 2


def test_no_judge_at_all(runs):
    write_run(runs, "s", "sft", final=sft_final(0.2))
    write_report(ppo_run(runs, "p"), 0.5, judge="gold.old-1")  # judge.py has set it aside
    rows, _ = draw(rlhf_scaling_plot, runs)
    listed = rows["rlhf_scale_plot"]
    assert set(listed["what"]) == {"not drawn"}
    assert set(listed["reason"]) == {f"not judged yet: python eval/judge.py --run {name}" for name in "sp"}


def test_judge_is_chosen(runs):
    run = write_run(runs, "s", "sft", final=sft_final(0.2))
    write_report(run, 0.3, judge="gpt")
    assert draw(rlhf_scaling_plot, runs)[0]["rlhf_scale_plot"]["value"].iloc[0] == 0.3
    write_report(run, 0.4, judge="gold")
    assert draw(rlhf_scaling_plot, runs)[0]["rlhf_scale_plot"]["value"].iloc[0] == 0.4
    assert draw(rlhf_scaling_plot, runs, judge="gpt")[0]["rlhf_scale_plot"]["value"].iloc[0] == 0.3


def test_smoke_runs_when_named(runs):
    write_run(runs, "smoke_seed1_sft", "sft", final=sft_final(0.2))
    write_run(runs, "other_sft", "sft", final=sft_final(0.3))
    rows, _ = draw(sft_rm_scale, runs, runs=("smoke_*",))
    assert set(rows["rouge_score_plot"]["run"].dropna()) == {"smoke_seed1_sft"}


# ----------------------------------------------------------------------------------------------------------------------
# other sources
@pytest.mark.parametrize("script", [sft_rm_scale, rlhf_scaling_plot])
def test_round_trip_through_csv(troubled, runs, script):
    rows, folder = draw(script, runs)
    again = runs.parent / "again"
    script.main(script.Args(source="csv", csv=folder / f"{script.__name__}.csv", output_dir=again))
    for path in folder.glob("*.csv"):
        pandas.testing.assert_frame_equal(pandas.read_csv(path), pandas.read_csv(again / path.name))


class FakeWandbRun:
    def __init__(self, name, config, summary, state="finished", history=()):
        self.name, self.id, self.config, self.summary, self.state = name, f"id{id(self)}", config, summary, state
        self.history = history

    def scan_history(self, keys):
        return [line for line in self.history if set(keys) <= set(line)]

    def file(self, path):
        class File:
            def download(self, root):
                (Path(root) / "t.json").write_text(
                    '{"columns": ["split", "group", "value", "pairs", "accuracy"],'
                    ' "data": [["validation", "batch", "batch2", 10, 0.7]]}'
                )
                return open(Path(root) / "t.json")

        return File()


def test_from_wandb(runs, monkeypatch):
    import wandb

    base = {"base_model": "EleutherAI/pythia-1b-deduped", "seed": 1}
    table = {"_type": "table-file", "path": "media/table/t.table.json"}
    lines = [line | {"_step": line["update"]} for line in ppo_lines(5)]
    found = [
        FakeWandbRun("s", base, sft_final(0.2)),
        FakeWandbRun("s", base | {"seed": 2}, sft_final(0.4)),
        FakeWandbRun("r", base | {"label_dataset": "x"}, rm_final(0.6, "NaN") | {"tables/accuracy": table}),
        FakeWandbRun(
            "p",
            base | {"reward_model_path": "models/reward", "ppo": {"kl_coef": 0.1}},
            ppo_final(ppo_lines(5)),
            history=lines,
        ),
        FakeWandbRun(
            "dead", base | {"reward_model_path": "models/reward", "ppo": {"kl_coef": 0.1}}, {}, state="crashed"
        ),
    ]
    asked = []

    class Api:
        def __init__(self, **_):
            pass

        def runs(self, project):
            asked.append(project)
            return found

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(read_runs.urllib.request, "urlopen", lambda *a, **k: None)
    write_report(runs / "p", 0.7)  # the judge works on local files
    rows, _ = draw(sft_rm_scale, runs, source="wandb", wandb_entity="team")
    assert asked == ["team/tldr_summarize"]
    assert means_of(rows["rouge_score_plot"], metric="validation/sft/rouge/rougeL")["value"].iloc[0] == pytest.approx(
        0.3
    )
    assert len(set(rows["rouge_score_plot"].query("what == 'run'")["run"])) == 2  # one name, two runs
    assert rows["rm_by_batch"].query("what == 'run'")["at"].tolist() == ["batch2"]
    rows, _ = draw(rlhf_scaling_plot, runs, source="wandb", wandb_entity="team")
    assert rows["rlhf_scale_plot"].query("what == 'run'")["value"].tolist() == [0.7]
    curve = rows["training_curves"].query("run == 'p' and metric == 'objective/kl'")
    assert curve["value"].tolist() == pytest.approx([2, 4, 6, 8, 10])
    dead = rows["training_curves"].query("run == 'dead'").iloc[0]
    assert (dead["state"], dead["reason"]) == ("failed", "failed: crashed")


def test_folders_of_real_stages(world):
    """The runs of the session's tiny world: trained without evaluation, so all of them are listed."""
    table, _ = read_runs.read_runs(read_runs.ReadArgs(runs_dir=world.folder / "runs", runs=("sft", "reward")))
    found = table.drop_duplicates("run").set_index("run")
    assert dict(found["stage"]) == {"sft": "sft", "reward": "reward"} and set(found["state"]) == {"finished"}
    assert set(found["size"]) == {"small"} and found["parameters"].between(1e5, 1e7).all()
    _, others = sft_rm_scale.pick(table, "sft", "final", read_runs.ROUGE[2])
    assert others["reason"].tolist() == ["finished without validation/sft/rouge/rougeL"]


def test_metrics_are_named_as_the_stages_name_them():
    source = (STAGES / "common/rollouts.py").read_text()
    assert all(f'"{name}"' in source for name in read_runs.CURVES)
    for stage, name in (("ppo_left_padding", "ppo"), *((name, name) for name in ("rloo", "grpo", "dpo", "online_dpo"))):
        assert f'"train/{name}/episode"' in (STAGES / f"{stage}.py").read_text()
    assert 'f"eval/{name}/{split}/accuracy"' in (STAGES / "common/comparisons.py").read_text()
    assert 'report_pairs("rm"' in (STAGES / "reward.py").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# as a user starts it
def start(script, *arguments, cwd=ROOT, **env):
    command = [sys.executable, str(script), *map(str, arguments)]
    env = os.environ | OFFLINE | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


@pytest.fixture
def project(tmp_path):
    """A copy of `eval/` with runs beside it, as in the repository."""
    (tmp_path / "eval").mkdir()
    for name in ("read_runs.py", "sft_rm_scale.py", "rlhf_scaling_plot.py", "published_results.csv"):
        (tmp_path / "eval" / name).write_text((ROOT / "eval" / name).read_text())
    write_run(tmp_path / "runs", "a_sft", "sft", final=sft_final(0.2))
    ppo_run(tmp_path / "runs", "a_ppo")
    return tmp_path


@pytest.mark.parametrize("script, where", [("sft_rm_scale.py", "eval"), ("rlhf_scaling_plot.py", ".")])
def test_the_readme_s_commands(project, script, where, tmp_path_factory):
    """Whatever a notebook's environment and a matplotlibrc that wants LaTeX say."""
    settings = tmp_path_factory.mktemp("matplotlib")
    (settings / "matplotlibrc").write_text("text.usetex: True\nbackend: tkagg\nfont.family: no such font\n")
    env = {"MPLCONFIGDIR": str(settings), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    cwd = project / where
    done = start(script if where == "eval" else f"eval/{script}", cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (project / "eval/images" / script.replace(".py", ".csv")).exists()
    assert sorted(p.name for p in project.iterdir()) == ["eval", "runs"]


def test_importing_does_nothing(tmp_path):
    code = "import os, sys; sys.path.insert(0, sys.argv.pop()); sys.argv.append('--no-such-argument')\n"
    code += "import rlhf_scaling_plot, sft_rm_scale; assert not os.listdir('.')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "eval")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def break_run(folder: Path, how: str) -> None:
    """What an older version, a kill, or a full disk leaves of a run."""
    metrics, lines = folder / "metrics.jsonl", (folder / "metrics.jsonl").read_text().splitlines()
    edit = lambda name, change: (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    if how == "half a last line":
        metrics.write_text("\n".join(lines)[:-20])
    elif how == "zeros at the end":
        metrics.write_bytes(metrics.read_bytes() + bytes(100))
    elif how == "no lines":
        metrics.write_text("")
    elif how == "no metrics.jsonl":
        metrics.unlink()
    elif how == "KL all null":
        metrics.write_text("".join(json.dumps(json.loads(s) | {"objective/kl": None}) + "\n" for s in lines))
    elif how == "names of an older version":
        metrics.write_text("".join(json.dumps({"step": 1, "objective/kl": 1.0}) + "\n" for _ in lines))
        edit("summary.json", lambda s: {"stage": s["stage"], "state": s["state"]})
        kept = ("reward_model_path",)  # by which a run that optimises a policy is known; all versions have it
        edit("args.json", lambda a: {"seed": "1", "base_model": None} | {k: a[k] for k in kept if k in a})
    elif how == "words for numbers":
        metrics.write_text("".join(json.dumps({"update": "x", "objective/kl": "y"}) + "\n7\n" for _ in lines))
    elif how == "no summary":
        (folder / "summary.json").write_text('{"stage": ')
    elif how == "another form":
        (folder / "args.json").write_text("[]")


UNREADABLE = ("no summary", "another form")


@pytest.mark.parametrize("how", ["half a last line", "zeros at the end", "no lines", "no metrics.jsonl", "KL all null",
                                 "names of an older version", "words for numbers", *UNREADABLE])  # fmt: skip
def test_broken_and_older_runs(runs, workdir, capsys, how):
    """The report says "-" for what is not there, or in one line what it cannot read; the figures list the run."""
    write_run(runs, "a_sft", "sft", final=sft_final(0.2), lines=[{"update": 1, "train/sft/loss": 2.0}] * 9)
    write_run(runs, "a_reward", "reward", lines=[{"update": 1, "train/rm/accuracy": 0.6}] * 9)
    for name in ("a_ppo", "whole_ppo"):
        ppo_run(runs, name)
    for name in ("a_sft", "a_reward", "a_ppo"):
        break_run(runs / name, how)
    report = hello_report.Args(chains=("a",), runs_dir=str(runs), output_dir=str(workdir / "out"))
    if how in UNREADABLE:
        with pytest.raises(SystemExit) as stopped:
            hello_report.main(report)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and not (workdir / "out").exists()
        assert said.startswith(f"error: --chains: found '{runs}/a_sft', which cannot be read (")
    else:
        numbers = hello_report.main(report)["a"]
        kept = how in ("half a last line", "zeros at the end", "names of an older version")
        assert numbers["ppo/kl_last"] > 0 if kept else math.isnan(numbers["ppo/kl_last"])
        assert (workdir / "out/a.md").exists() and (workdir / "out/a.png").exists()
    for script in (sft_rm_scale, rlhf_scaling_plot):
        rows, _ = draw(script, runs)
    assert "whole_ppo" in set(rows["training_curves"]["run"].dropna())
    listed = rows["training_curves"].query("run == 'a_ppo'")
    assert len(listed) and (how not in UNREADABLE or listed["reason"].str.startswith("unreadable").all())


def test_a_full_disk_is_one_line(runs, tmp_path, monkeypatch):
    """Of a figure: what was there before stays whole, and nothing half-written lies beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        ppo_run(runs, "a_ppo")
        words = ["--runs_dir", str(runs), "--output_dir", str(disk / "images")]
        monkeypatch.setattr(sys, "argv", ["rlhf_scaling_plot.py", *words])
        command_line(rlhf_scaling_plot.main, rlhf_scaling_plot.Args)
        before = {p.name: p.read_bytes() for p in (disk / "images").iterdir()}
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes((free.f_bavail - 2) * free.f_frsize))  # room for the try before, no more
        ppo_run(runs, "b_ppo", n=300)
        with pytest.raises(SystemExit) as stopped:
            command_line(rlhf_scaling_plot.main, rlhf_scaling_plot.Args)
        said = str(stopped.value.code)
        assert said.startswith(f"error: {disk}/images/rlhf_scaling_plot.csv cannot be written: No space left on device")
        assert {p.name: p.read_bytes() for p in (disk / "images").iterdir()} == before
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


BAD = {
    "no folder": ({"runs_dir": "nowhere"}, "error: --runs_dir: found 'nowhere', which is not a folder"),
    "no run of that name": ({"runs": ("a_*", "zzz")}, "error: --runs: found 'zzz', which no run's name matches"),
    "an empty folder": ({"runs_dir": "empty"}, "error: --runs: found no run in 'empty'"),
    "only smoke runs": ({"runs_dir": "smoke"}, "error: --runs: found no run in 'smoke' but smoke_a"),
    "no csv": ({"source": "csv"}, "error: --csv: found nothing; expected"),
    "csv without its source": ({"csv": "good.csv"}, "error: --csv: found 'good.csv' with --source runs"),
    "csv not there": ({"source": "csv", "csv": "x.csv"}, "error: --csv: found 'x.csv' ([Errno 2]"),
    "csv empty": ({"source": "csv", "csv": "void.csv"}, "error: --csv: found 'void.csv' (No columns"),
    "csv of a figure": ({"source": "csv", "csv": "other.csv"}, "error: --csv: found 'other.csv' (no column run)"),
    "csv with words": ({"source": "csv", "csv": "words.csv"}, "error: --csv: found 'words.csv' (Unable to parse"),
    "a file for a folder": ({"output_dir": "void.csv/x"}, "error: --output_dir: found 'void.csv/x', and 'void.csv'"),
    "unknown judge": ({"judge": "me"}, "error: --judge: found 'me', who has judged no run here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(workdir, capsys, case):
    changes, message = BAD[case]
    write_run(workdir / "runs", "a_sft", "sft", final=sft_final(0.2))
    write_run(workdir / "smoke", "smoke_a", "sft")
    (workdir / "empty").mkdir()
    (workdir / "void.csv").write_text("")
    (workdir / "other.csv").write_text("what,value\nrun,1\n")
    line = ["x"] * len(read_runs.COLUMNS)
    (workdir / "words.csv").write_text(",".join(read_runs.COLUMNS) + "\n" + ",".join(line) + "\n")
    before = sorted(workdir.rglob("*"))
    paths = {k: Path(v) if k in ("runs_dir", "csv", "output_dir") else v for k, v in changes.items()}
    with pytest.raises(SystemExit) as stopped:
        rlhf_scaling_plot.main(
            rlhf_scaling_plot.Args(**({"runs_dir": Path("runs"), "output_dir": Path("out")} | paths))
        )
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith(message) and said.err.count("\n") == 1, said.err
    assert "; expected " in said.err and sorted(workdir.rglob("*")) == before


def test_wandb_out_of_reach_is_one_line(tmp_path):
    done = start(ROOT / "eval/sft_rm_scale.py", "--source", "wandb", "--output_dir", tmp_path / "out", cwd=tmp_path,
                 WANDB_BASE_URL="http://127.0.0.1:9")  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --source: found wandb, but 'tldr_summarize' cannot be read")
    assert not (tmp_path / "out").exists()


def test_algorithms_are_series_of_their_own(runs):
    """PPO, RLOO and DPO of one size and seed are not averaged; best of n, without episodes, is not in the curves."""
    for name, value in (("ppo", 0.6), ("rloo", 0.8), ("dpo", 0.7)):
        path = ppo_run(runs, f"my_{name}")
        write_report(path, value)
        if name != "ppo":
            summary, args = (json.loads((path / f"{file}.json").read_text()) for file in ("summary", "args"))
            (path / "summary.json").write_text(json.dumps(summary | {"stage": name}))
            (path / "args.json").write_text(json.dumps({k: v for k, v in args.items() if k != "ppo"}))
            lines = (path / "metrics.jsonl").read_text().replace("train/ppo/", f"train/{name}/")
            (path / "metrics.jsonl").write_text(lines)
    best = write_run(
        runs, "best", "ppo", lines=[{"update": n, "objective/kl": n / 9, "objective/scores": n} for n in (1, 2)]
    )
    (best / "summary.json").write_text((best / "summary.json").read_text().replace("ppo_left_padding", "best_of_n"))
    (best / "args.json").write_text(
        json.dumps({"seed": 1, "reward_model_path": "x", "base_model": "pythia-1b-deduped"})
    )
    rows, _ = draw(rlhf_scaling_plot, runs)
    found = rows["rlhf_scale_plot"].query("what == 'mean over seeds'").set_index("series")["value"]
    assert found.to_dict() == pytest.approx({"PPO": 0.6, "rloo": 0.8, "dpo": 0.7})
    curves = rows["training_curves"].query("what == 'run' and kind == 'curve'")
    assert set(curves["run"]) == {"my_ppo", "my_rloo", "my_dpo"} and curves["episode"].notna().all()
