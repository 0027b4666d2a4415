"""The table of `make real`, from run folders whose numbers are known; and what the script asks for."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas
import pytest
import real_report
from conftest import OFFLINE, ROOT

POSTS = [f"SUBREDDIT: r/a\n\nTITLE: t\n\nPOST: my boss sold my bike number {i}\n\nTL;DR:" for i in range(12)]
REFERENCE = "my boss sold it"


def write_run(name: str, seed: int, tables: dict[str, pandas.DataFrame], lines: tuple[dict, ...] = ()) -> Path:
    run = Path("runs", name)
    (run / "tables").mkdir(parents=True)
    for table, rows in tables.items():
        rows.to_parquet(run / f"tables/{table}.parquet")
    (run / "summary.json").write_text(json.dumps({"state": "finished", "wall_clock_seconds": 120.0}))
    (run / "args.json").write_text(json.dumps({"seed": seed}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def responses(texts: list[str], posts: list[str] = POSTS) -> pandas.DataFrame:
    table = pandas.DataFrame({"query": posts, "response": texts})
    return table.assign(reference=REFERENCE, has_eos=[True] * 9 + [False] * 3)


@pytest.fixture
def chain(workdir):
    """SFT says half of each reference, the base model nothing of it; PPO copies the post."""
    half, nothing, copied = (responses([text] * 12) for text in ("my boss", "no idea", "my boss sold my bike number"))
    tables = {"validation": half, "test": half, "base_validation": nothing, "base_test": nothing}
    sft = write_run("c_sft", 1, tables)
    lines = [{"update": 1, "objective/kl": 0.0, "objective/kl_standard_error": 0.0}, {"update": 2, "train/x": 1.0},
             {"update": 2, "objective/kl": 1.5, "objective/kl_standard_error": 0.25}]  # fmt: skip
    ppo = write_run("c_ppo", 1, {"validation": copied}, lines)
    for seed, right in ((1, 9), (2, 6), (3, 6)):
        pairs = {"query": POSTS, "chosen_reward": [1.0] * right + [-1.0] * (12 - right), "rejected_reward": 0.0}
        write_run("c_reward" if seed == 1 else f"c_reward_seed{seed}", seed, {"validation": pandas.DataFrame(pairs)})
    for run, score in ((sft, 0.0), (ppo, 2.0)):
        for judge, factor in (("reward", 1.0), ("reward_seed2", -0.5)):
            verdicts = pandas.DataFrame({"query": POSTS, "score": score * factor, "outcome": float(run == ppo)})
            (run / f"judge/{judge}").mkdir(parents=True)
            verdicts.sample(frac=1, random_state=1).to_parquet(run / f"judge/{judge}/verdicts.parquet")
    return "c"


def test_the_table_by_hand(chain):
    found = real_report.main(real_report.Args(chains=(chain,), output_dir="out", documents=()))[chain]
    numbers = {row: float(cell.split()[0]) for row, cell in found.items()}
    assert numbers["posts of validation and test"] == 24 and numbers["ROUGE-L: base model"] == 0
    # 2 of 2 and 2 of 4 words: F = 2 / 3
    assert numbers["ROUGE-L: SFT"] == numbers["ROUGE-L: gain of SFT"] == pytest.approx(2 / 3, abs=1e-3)
    assert [numbers[f"reward model: accuracy, seed {seed}"] for seed in (1, 2, 3)] == [0.75, 0.5, 0.5]
    assert numbers["reward model: accuracy, mean of 3 seeds"] == pytest.approx(7 / 12, abs=1e-3)
    assert "[0.5" in found["reward model: accuracy, seed 1"]  # an interval is beside it
    assert numbers["PPO minus SFT: score of the reward model it was trained with"] == 2
    assert numbers["PPO minus SFT: score of one that it never saw"] == -1
    assert numbers["SFT: share of 4-grams copied from the post"] == 0
    assert numbers["PPO: share of 4-grams copied from the post"] == 1
    assert numbers["PPO: words"] == 6 and numbers["PPO: responses that end"] == 0.75
    assert found["PPO: KL to SFT, nats, last update"] == "1.50 (s.e. 0.25)" and numbers["PPO: updates"] == 2
    assert numbers["minutes, ppo"] == 2 and Path("out/real.md").read_text().count("\n") == len(found) + 2


def test_runs_that_were_set_aside_do_not_count(chain):
    before = real_report.main(real_report.Args(chains=(chain,), output_dir="out", documents=()))
    for other in ("c_reward.old-1", "c_reward_seed2.old-1", "c_reward_lr1e-06"):
        shutil.copytree("runs/c_reward_seed3", f"runs/{other}")
    assert real_report.main(real_report.Args(chains=(chain,), output_dir="out", documents=())).equals(before)


def test_seeds_are_in_the_order_of_their_numbers(chain):
    shutil.copytree("runs/c_reward_seed3", "runs/c_reward_seed10")
    assert [run.name for run in real_report.other_seeds(chain)] == [f"c_reward_seed{seed}" for seed in (2, 3, 10)]


def test_what_is_missing_is_said(chain, capsys):
    Path("runs/c_ppo/judge/reward_seed2/verdicts.parquet").unlink()
    with pytest.raises(SystemExit) as stop:
        real_report.main(real_report.Args(chains=(chain,), output_dir="out"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: --chains: found 'c'") and said.count("\n") == 1


@pytest.mark.parametrize(
    "variables, message",
    [
        ({}, "error: POSTS and COMPARISONS: found '' and ''; expected folders of raw rows, or ROWS=2000"),
        ({"POSTS": "p"}, "error: POSTS and COMPARISONS: found 'p' and ''"),
        ({"ROWS": "9", "SWEEP": "yes"}, "error: SWEEP: found 'yes'"),
        ({"ROWS": "9", "LORAS": "2"}, "error: LORAS: found '2'"),
        ({"ROWS": "9", "SWEEP": "1", "MODEL": "m"}, "error: POSTS: found '' with SWEEP=1"),
    ],
)  # fmt: skip
def test_make_real_says_what_it_needs(variables, message):
    env = {k: v for k, v in os.environ.items() if k not in ("POSTS", "COMPARISONS", "ROWS")} | OFFLINE | variables
    done = subprocess.run([ROOT / "eval/real.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
