"""The job scripts without a cluster: what launch.sh would submit, what it refuses, and that all of them parse."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted([*(ROOT / "sbatches").glob("*.sh"), *(ROOT / "sbatches").glob("*.sbatch")])


def dry_run(*words: str, **env: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "sbatches/launch.sh"), "--dry-run", *words]
    return subprocess.run(command, env=os.environ | {"PYTHON": sys.executable} | env, capture_output=True, text=True)


def test_the_chain():
    done = dry_run("--", "--time=1:00:00")
    assert done.returncode == 0
    submitted = done.stderr.splitlines()
    assert [line.split("/")[-1] for line in submitted] == [
        "sft.sbatch", "reward.sbatch", "ppo_left_padding.sbatch", "eval.sbatch"
    ]  # fmt: skip
    assert all("--array=0-11" in line for line in submitted[:3]) and all("--time=1:00:00" in line for line in submitted)
    for line, before in zip(submitted[1:3], ("sft", "reward")):
        assert f"--dependency=aftercorr:<{before}> --kill-on-invalid-dep=yes" in line
    assert "--dependency=afterany:<ppo_left_padding>" in submitted[3]
    for word in ("watch:", "cancel:", "resume:", "requeue:"):
        assert word in done.stdout


def test_models_seeds_stages_and_prefetch():
    done = dry_run("--models", "a/pythia-1b b/pythia-2.8b", "--seeds", "1 2 3", "--stages", "sft eval", "--prefetch")
    assert done.returncode == 0 and "--array=0-5" in done.stderr and "reward.sbatch" not in done.stderr
    assert 'MODELS="a/pythia-1b b/pythia-2.8b" SEEDS="1 2 3"' in done.stdout
    assert "prefetch a/pythia-1b" in done.stdout and done.stdout.count("prefetch dataset:") == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "x"], "--seeds: found 'x'; expected numbers"),
        (["--seeds", ""], "--seeds: found nothing; expected numbers"),
        (["--models", ""], "--models: found nothing; expected hub ids or folders"),
        (["--models", "a b c"], "--models: found 'a', which is neither a folder nor a hub id"),
        (["--models", "a/m b/m"], "--models: found two that end in 'm'"),
        (
            ["--stages", "ppo_left_padding sft"],
            "--stages: found 'ppo_left_padding sft'; expected some of, in this order",
        ),
        (["--stages", "dpo"], "--stages: found 'dpo'"),
        (["--stages", "reward"], "--stages: found 'reward', and no models/pythia-1b-deduped_44413/sft"),
        (
            ["--stages", "sft ppo_left_padding"],
            "--stages: found 'sft ppo_left_padding', and no models/pythia-1b-deduped_44413/reward",
        ),
        (["--nodes", "0"], "--nodes: found '0'; expected a number above 0"),
        (["--nodes", "3"], "--nodes: found 3, that is 24 processes x 1 rows for sft"),
        (["--nodes"], "--nodes: found nothing; expected a value"),
        (["--gpus", "4"], "--gpus: found an argument that launch.sh does not have"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    done = dry_run(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {message}")


def test_without_slurm_it_says_so(tmp_path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    for tool in ("dirname", "basename", "sort", "uniq", "sed"):
        (tmp_path / tool).symlink_to(subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip())
    env = {"PATH": str(tmp_path), "PYTHON": "python"}
    done = subprocess.run([str(ROOT / "sbatches/launch.sh")], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: sbatch: found no such command here")


def test_job_scripts_have_one_launch_line_and_shared_settings():
    for stage in ("sft", "reward", "ppo_left_padding"):
        text = (ROOT / f"sbatches/{stage}.sbatch").read_text()
        code = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
        assert len(code) == 2 and code[0] == 'source "$SLURM_SUBMIT_DIR/sbatches/common.sh"'
        assert code[1].startswith("launch ")
        for setting in ("--array=0-11", "--gpus-per-node=8", "--signal=B:USR1@300", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {setting}\n" in text
    common = (ROOT / "sbatches/common.sh").read_text()
    for once in ("44413 55513 66613 77713", "pythia-6.9b-deduped", "rows=(1 16 64)", "set -euo pipefail"):
        assert common.count(once) == 1
        assert not [
            s.name for s in SCRIPTS if s.name not in ("common.sh", "on_node.sh", "launch.sh") and once in s.read_text()
        ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_parses(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
