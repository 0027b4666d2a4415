"""The job scripts without a cluster: what launch.sh would submit, what it refuses, and that all of them parse."""

import os
import re
import shutil
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
    # the largest PPO does not fit on GPUs of 80 GB as it is: --offload is added, and a line says so
    said = "memory of ppo with pythia-6.9b-deduped: 87 GB on each of 8 GPUs, 62 with --offload; GPU_GB is 80"
    assert done.stdout.startswith(said) and done.stdout.count("memory of ") == 1
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


@pytest.fixture
def checkout(tmp_path):
    """What the job scripts need, in a folder of their own; the package itself is installed."""
    for name in ("sbatches", "benchmark", "deepspeed.yaml", "eval"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_in_an_allocation_that_was_opened_elsewhere(tmp_path):
    """salloc's shell has a job's variables: launch.sh is no job; each model is checked with its own rows."""
    shell = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    small = ("--models", "a/pythia-2.8b", "--stages", "sft", "--nodes", "4")
    inside, outside = dry_run(*small, **shell), dry_run(*small)
    assert inside.returncode == 0 and (inside.stdout, inside.stderr) == (outside.stdout, outside.stderr)
    # 16 rows x 64 processes do not divide 512; the 1 row of the second model does
    for models in ("a/pythia-1b b/pythia-6.9b", "b/pythia-6.9b a/pythia-1b"):
        done = dry_run("--models", models, "--nodes", "8", "--stages", "sft reward ppo_left_padding", **shell)
        assert done.returncode == 2 and done.stderr.startswith(
            "error: --nodes: found 8, that is 64 processes x 16 rows"
        )
        assert "for ppo_left_padding of a/pythia-1b;" in done.stderr
    assert not list(tmp_path.iterdir())


def test_site_sh_from_windows(checkout):
    site = "# ours\nexport SITE_PARTITION=gpu\nSEEDS=${SEEDS:-5}\nif true; then\n    PROCESSES_PER_NODE=4\nfi\n"
    (checkout / "sbatches/site.sh").write_bytes(site.replace("\n", "\r\n").encode())
    show = 'source sbatches/common.sh; echo "$SITE_PARTITION|$SEEDS|$PROCESSES_PER_NODE"'
    done = subprocess.run(["bash", "-c", show], cwd=checkout, env={"PATH": os.environ["PATH"]}, capture_output=True)
    assert (done.stdout, done.stderr) == (b"gpu|5|4\n", b"")


def test_what_no_gpu_holds_is_refused():
    done = dry_run("--models", "a/pythia-12b", "--stages", "sft reward ppo_left_padding")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: GPU_GB: found 80, and ppo with pythia-12b takes 149 GB on each of 8 GPUs, 107"
    )
    assert dry_run(GPU_GB="much").stderr.startswith("error: GPU_GB: found 'much'; expected a number")


def test_adapters(checkout):
    """LORA=1: in the stages' arguments before those that were given, and in the names of runs and models."""
    show = 'source sbatches/common.sh; echo "$SFT_ARGS|$REWARD_ARGS|$PPO_ARGS|$(name_of a/m 7)"'
    env = {"PATH": os.environ["PATH"], "LORA": "1", "PPO_ARGS": "--lr 1e-4"}
    done = subprocess.run(["bash", "-c", show], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.stdout == "--lora --lr 3e-5 |--lora --lr 3e-5 |--lora --lr 3e-5 --lr 1e-4|m_7_lora\n", done.stderr
    # a model that does not fit when all of its weights are trained
    done = dry_run("--models", "a/pythia-12b", "--stages", "sft reward ppo_left_padding", LORA="1")
    assert done.returncode == 0, done.stderr


def test_what_is_not_known_is_said_and_a_config_file_must_be_there():
    plain = ("--models", "a/pythia-12b", "--stages", "sft reward ppo_left_padding")
    done = dry_run(*plain, ACCELERATE_ARGS="--use_deepspeed --zero_stage 2 --mixed_precision bf16")
    assert done.returncode == 0 and done.stdout.count("not known how it is launched, so nothing is checked\n") == 3
    done = dry_run(*plain, ACCELERATE_ARGS="--config_file gone.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --config_file: found 'gone.yaml', which is no file")


def test_a_job_passes_what_fits(checkout):
    """The launch line of a job, with an srun that only shows its words."""
    (checkout / "bin").mkdir()
    stubs = {"srun": 'echo srun; printf "%s\\n" "$@"', "scontrol": "echo node1 NodeAddr=127.0.0.1"}
    for name, body in stubs.items():
        (checkout / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (checkout / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_NODELIST": "node1", "SEEDS": "1",
           "MODELS": "a/pythia-6.9b-deduped", "PATH": f"{checkout}/bin:{os.environ['PATH']}", "PYTHON": sys.executable}  # noqa: E501  # fmt: skip
    run = lambda stage="ppo_left_padding", **more: subprocess.run(
        ["bash", f"sbatches/{stage}.sbatch"], cwd=checkout, env=job | more, capture_output=True, text=True
    )
    done = run("sft", ROLLOUT="8")
    words = done.stdout.splitlines()  # SFT's evaluation samples the rows that were checked
    assert done.returncode == 0 and words[words.index("--local_eval_batch_size") + 1] == "8"
    done = run("sft", ROLLOUT="100", GPU_GB="40")
    assert done.returncode == 2 and done.stderr.startswith("error: GPU_GB: found 40, and sft with pythia-6.9b-deduped")
    done = run()
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "--offload", done.stderr
    assert "memory of ppo with pythia-6.9b-deduped: 87 GB" in done.stdout
    done = run(PPO_ARGS="--offload")
    assert done.stdout.count("--offload\n") == 1 and "memory of " not in done.stdout  # it fits with what is given
    done = run(MODELS="a/pythia-12b")
    assert (
        done.returncode == 2 and done.stderr.startswith("error: GPU_GB: found 80") and "--offload\n" not in done.stdout
    )
    for stage, flag, value in (("online_dpo", "--local_micro_batch_size", "2"), ("dpo", "--batch_size", "64"),
                               ("rloo", "--local_micro_batch_size", "1"), ("grpo", "--batch_size", "512"),
                               ("best_of_n", "--local_rollout_forward_batch_size", "4")):  # fmt: skip
        done = run(stage)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        assert f"summarize_from_feedback_details/{stage}.py" in words and words[words.index(flag) + 1] == value
        assert "--reward_model_path" in words or stage == "dpo"
    (checkout / "models/pythia-6.9b-deduped_1/reward").mkdir(parents=True)
    assert "models/pythia-6.9b-deduped_1/reward" in run("dpo").stdout


def test_without_slurm_it_says_so(tmp_path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    for tool in ("dirname", "basename", "sort", "uniq", "sed"):
        (tmp_path / tool).symlink_to(subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip())
    env = {"PATH": str(tmp_path), "PYTHON": "python"}
    done = subprocess.run([str(ROOT / "sbatches/launch.sh")], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: sbatch: found no such command here")


def test_job_scripts_have_one_launch_line_and_shared_settings():
    for stage in ("sft", "reward", "ppo_left_padding", "rloo", "grpo", "dpo", "online_dpo", "best_of_n"):
        text = (ROOT / f"sbatches/{stage}.sbatch").read_text()
        code = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
        assert len(code) == 2 and code[0] == 'source "$SLURM_SUBMIT_DIR/sbatches/common.sh"'
        assert code[1].startswith("launch ")
        for setting in ("--array=0-11", "--gpus-per-node=8", "--signal=B:USR1@300", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {setting}\n" in text
    for once, owner in (("44413 55513 66613 77713", "common.sh"), ("pythia-6.9b-deduped", "common.sh"),
                        ("rows=(1 16 64)", "rows_of.sh"), ("(1 1 4)", "rows_of.sh")):  # fmt: skip
        scripts = [*SCRIPTS, ROOT / "hello_world.sh"]
        assert [s.name for s in scripts for _ in range(s.read_text().count(once))] == [owner]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_parses(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
