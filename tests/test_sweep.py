"""Learning rates beside each other: a run repeated at another rate, with nothing else changed."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas
import pytest
import sweep
from conftest import to_flags

from summarize_from_feedback_details import sft


def test_flags_are_those_that_were_typed(world):
    args = world.ppo_args("models/p", lr=3e-5, lora=True)
    args.ppo.kl_coef, args.lora_params.rank = 0.2, 8
    flags = sweep.as_flags(json.loads(json.dumps(asdict(args), default=str)))
    assert flags == to_flags(args)  # as the tests launch stages
    for flag, value in (("--lr", "3e-05"), ("--ppo.kl_coef", "0.2"), ("--lora.rank", "8")):
        assert flags[flags.index(flag) + 1] == value
    assert "--lora" in flags and "--no-push_to_hub" in flags


def test_a_run_at_another_rate(world, workdir, capsys):
    sft.main(world.sft_args("models/first", lr=1e-3, run_name="first", num_eval_rows=8))
    arguments = sweep.Args(runs=("first",), scales=(3.0,), output_dir="out", documents=())
    table = sweep.main(arguments)
    assert list(table["lr"]) == ["0.001", "0.003"] and list(table.index) == ["first", "first_lr0.003"]
    first, other = (json.loads(Path("runs", name, "args.json").read_text()) for name in table.index)
    assert {name for name in first if first[name] != other[name]} == {"lr", "run_name", "output_dir"}
    assert other["output_dir"] == "models/first_lr0.003" and Path(other["output_dir"], "model.safetensors").exists()
    finals = [json.loads(Path("runs", name, "summary.json").read_text())["metrics"] for name in table.index]
    assert list(table["reached"]) == [final["validation/sft/rouge/rougeL"] for final in finals]
    assert finals[0]["validation/sft/loss"] != finals[1]["validation/sft/loss"]
    written = pandas.read_csv("out/sweep.csv", index_col="run")
    assert list(written.index) == list(table.index) and Path("out/sweep.md").exists()
    before = Path("runs/first_lr0.003/metrics.jsonl").stat().st_mtime_ns
    assert sweep.main(arguments).equals(table)  # nothing is trained twice
    assert Path("runs/first_lr0.003/metrics.jsonl").stat().st_mtime_ns == before
    # made of other inputs: set aside
    typed = json.loads(Path("runs/first/typed.json").read_text())
    Path("runs/first/typed.json").write_text(json.dumps(typed | {"warm_up_steps": 3}))
    command = sweep.repeat(Path("runs/first"), "sft", "lr", 0.003)
    assert command[command.index("--warm_up_steps") + 1] == "3"
    for path in ("runs/first_lr0.003", "models/first_lr0.003"):
        assert not Path(path).exists() and Path(f"{path}.old-1").is_dir()
    assert "was made of other inputs: now" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        sweep.main(sweep.Args(runs=("none",), output_dir="out"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: --runs: found 'none'") and said.count("\n") == 1
