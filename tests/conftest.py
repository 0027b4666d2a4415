"""A tiny toy world, tokenised, with a checkpoint of SFT and one of the reward model, made once; ways to run stages."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
STAGES = ROOT / "summarize_from_feedback_details"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# scripts that are not part of the package, for tests to import
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

# the first import of the hub's client reads these; no test may reach for the network
os.environ.update(OFFLINE)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared (real rows, tokenizer, golden numbers) is not here")
    return SHARED


class World:
    """Paths of the tiny toy world, and small arguments for each stage on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base, self.data = str(folder / "models/small"), str(folder / "tokenised")
        self.other_base = str(folder / "models/medium")
        self.sft_rows, self.pairs = f"{self.data}/sft", f"{self.data}/comparisons"
        self.sft, self.reward = str(folder / "sft"), str(folder / "reward")

    common = {"lr": 1e-3, "precision": "fp32", "weight_decay": 0.0, "print_sample_output_freq": 0}

    def sft_args(self, output_dir, **changes):
        from summarize_from_feedback_details.sft import Args

        sizes = {"batch_size": 8, "local_micro_batch_size": 4, "total_episodes": 32, "local_eval_batch_size": 64}
        task = {"base_model": self.base, "query_dataset": self.sft_rows, "response_length": 24, "num_eval_rows": 20}
        names = {"output_dir": str(output_dir), "run_name": Path(output_dir).name}
        return Args(**(self.common | sizes | task | names | changes))

    def reward_args(self, output_dir, **changes):
        from summarize_from_feedback_details.reward import Args

        sizes = {"batch_size": 8, "local_micro_batch_size": 4, "total_episodes": 32, "local_eval_batch_size": 64}
        task = {"base_model": self.base, "sft_model_path": self.sft, "label_dataset": self.pairs}
        task |= {"query_dataset": self.sft_rows, "num_eval_rows": 40, "num_normalization_rows": 40}
        names = {"output_dir": str(output_dir), "run_name": Path(output_dir).name}
        return Args(**(self.common | sizes | task | names | changes))

    def ppo_args(self, output_dir, **changes):
        from summarize_from_feedback_details.ppo_left_padding import Args

        sizes = {"batch_size": 8, "local_micro_batch_size": 4, "num_updates": 2, "local_rollout_forward_batch_size": 4}
        task = {"base_model": self.base, "sft_model_path": self.sft, "reward_model_path": self.reward}
        task |= {"query_dataset": self.sft_rows, "response_length": 24, "num_eval_rows": 20}
        names = {"output_dir": str(output_dir), "run_name": Path(output_dir).name}
        return Args(**(self.common | sizes | task | names | changes))

    def easy_task(self) -> dict:
        """All scores are 0, but -1 without EOS, and the policy is untrained: any seed learns to end its responses."""
        from summarize_from_feedback_details.common.reward_models import load_reward_model

        folder = self.folder.with_name(f"{self.folder.name}_flat_reward")
        if not folder.exists():
            shutil.copytree(self.reward, folder)
            model = load_reward_model(self.reward)
            model.score.weight.data.zero_()
            model.config.reward_bias = 0.0
            model.save_pretrained(folder)
        return {"sft_model_path": self.base, "reward_model_path": str(folder), "temperature": 1.0, "lr": 3e-3,
                "batch_size": 32, "local_micro_batch_size": 32, "local_rollout_forward_batch_size": 32}  # fmt: skip

    def rloo_args(self, output_dir, **changes):
        from summarize_from_feedback_details.rloo import Args

        return self.group_args(Args, output_dir, **({"rloo_k": 4} | changes))

    def grpo_args(self, output_dir, **changes):
        from summarize_from_feedback_details.grpo import Args

        return self.group_args(Args, output_dir, **({"grpo_k": 4} | changes))

    def online_dpo_args(self, output_dir, **changes):
        from summarize_from_feedback_details.online_dpo import Args

        return self.group_args(Args, output_dir, **changes)

    def best_of_n_args(self, output_dir, **changes):
        from summarize_from_feedback_details.best_of_n import Args

        task = {"base_model": self.base, "sft_model_path": self.sft, "reward_model_path": self.reward, "best_of": 4}
        task |= {"query_dataset": self.sft_rows, "response_length": 24, "num_eval_rows": 20, "precision": "fp32"}
        return Args(**(task | {"queries_at_once": 8, "run_name": Path(output_dir).name} | changes))

    def dpo_args(self, output_dir, **changes):
        from summarize_from_feedback_details.dpo import Args

        sizes = {"batch_size": 8, "local_micro_batch_size": 4, "total_episodes": 32, "local_eval_batch_size": 64}
        task = {"base_model": self.base, "sft_model_path": self.sft, "reward_model_path": self.reward}
        task |= {"label_dataset": self.pairs, "query_dataset": self.sft_rows, "response_length": 24}
        names = {"output_dir": str(output_dir), "run_name": Path(output_dir).name, "num_eval_rows": 20}
        names["ref_logprobs_dir"] = str(Path(output_dir).absolute().parent / "ref_logprobs")
        common = {name: value for name, value in self.common.items() if name != "print_sample_output_freq"}
        return Args(**(common | sizes | task | names | changes))

    def group_args(self, args, output_dir, **changes):
        sizes = {"batch_size": 8, "local_micro_batch_size": 4, "num_updates": 2, "local_rollout_forward_batch_size": 4}
        task = {"base_model": self.base, "sft_model_path": self.sft, "reward_model_path": self.reward}
        task |= {"query_dataset": self.sft_rows, "response_length": 24, "num_eval_rows": 20}
        names = {"output_dir": str(output_dir), "run_name": Path(output_dir).name}
        common = {name: value for name, value in self.common.items() if name != "print_sample_output_freq"}
        return args(**(common | sizes | task | names | changes))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world with its SFT policy and its reward model (a few updates each: they know a little, not nothing)."""
    from summarize_from_feedback_details import reward, sft, tldr_dataset, toy_tldr

    folder = tmp_path_factory.mktemp("world")
    here = os.getcwd()
    os.chdir(folder)
    try:
        sizes = {
            "n_sft": 400,
            "n_sft_validation": 60,
            "n_comparisons": 200,
            "n_comparisons_validation": 80,
            "n_cnndm": 20,
        }
        toy_tldr.main(
            toy_tldr.Args(data_dir=folder / "raw", models_dir=folder / "models", sizes=("small", "medium"), **sizes)
        )
        world = World(folder)
        tldr_dataset.main(
            tldr_dataset.Args(
                base_model=world.base,
                sft_dataset=str(folder / "raw/sft"),
                preference_dataset=str(folder / "raw/comparisons"),
                output_dir=world.data,
                tldr_params=tldr_dataset.TldrHParams(
                    length=56, max_sft_response_length=24, max_sft_query_response_length=80,
                    max_rm_response_length=32, max_rm_query_response_length=88,
                ),
                cnndm_params=replace(
                    tldr_dataset.cnndm_defaults(),
                    length=128, max_rm_response_length=32, max_rm_query_response_length=160,
                ),
                check_length_correctness=False,
            )
        )  # fmt: skip
        sft.main(world.sft_args(world.sft, lr=3e-3, batch_size=16, total_episodes=400, run_eval=False))
        reward.main(world.reward_args(world.reward, run_eval=False))
    finally:
        os.chdir(here)
    return world


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder of its own for the runs of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def to_flags(args) -> list[str]:
    """The command line of an Args: what differs from the defaults, nested fields included."""
    flags = []
    for f in (f for f in fields(args) if f.init):
        value = getattr(args, f.name)
        if is_dataclass(value):
            prefix = f"--{f.name.replace('lora_params', 'lora')}."
            flags += [flag.replace("--", prefix, 1) if flag.startswith("--") else flag for flag in to_flags(value)]
        elif isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{f.name}")
        elif isinstance(value, tuple):
            flags += [f"--{f.name}", *map(str, value)] if value else []
        elif value is not None:
            flags += [f"--{f.name}", str(value)]
    return flags


def launch_command(stage: str, args, cwd: Path, processes: int = 1, zero: int | None = None):
    """Command and environment of a stage as a user would run it, see `command_of`."""
    return command_of([str(STAGES / f"{stage}.py"), *to_flags(args)], cwd, processes, zero)


def command_of(script: list[str], cwd: Path, processes: int, zero: int | None):
    """Command and environment of a script: plain python, torchrun, or accelerate with DeepSpeed.

    zero: ZeRO stage; None without DeepSpeed.
    """
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | OFFLINE
    if zero is not None:
        config = cwd / f"zero{zero}_cpu.yaml"
        config.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
            f"num_processes: {processes}\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: {port}\n"
            f"deepspeed_config:\n  zero_stage: {zero}\n  gradient_accumulation_steps: 1\n"
            "  offload_optimizer_device: none\n  offload_param_device: none\n  zero3_init_flag: false\n"
        )
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *script]
    elif processes > 1:
        env["ACCELERATE_USE_CPU"] = "true"
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
        command = [sys.executable, *torchrun, *script]
    else:
        command = [sys.executable, *script]
    return command, env


def launch(stage: str, args, cwd: Path, processes: int = 1, zero: int | None = None, timeout: int = 400):
    """Run a stage to its end, see `launch_command`."""
    command, env = launch_command(stage, args, cwd, processes, zero)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


# several scripts, one after the other, in the same processes: starting them costs more than they do
ONE_AFTER_ANOTHER = """
import json, runpy, sys
from accelerate.state import AcceleratorState
from summarize_from_feedback_details.common import arguments
leave, arguments._leave_group = arguments._leave_group, lambda: None
for command in json.load(open(sys.argv[1])):
    sys.argv = command
    AcceleratorState._reset_state()
    runpy.run_path(command[0], run_name="__main__")
leave()
"""


def launch_all(jobs: list[tuple], cwd: Path, processes: int, zero: int | None = None, timeout: int = 400):
    """Run (stage, args) one after the other, see `launch`."""
    (cwd / "commands.json").write_text(json.dumps([[str(STAGES / f"{s}.py"), *to_flags(args)] for s, args in jobs]))
    (cwd / "one_after_another.py").write_text(ONE_AFTER_ANOTHER)
    command, env = command_of([str(cwd / "one_after_another.py"), "commands.json"], cwd, processes, zero)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
