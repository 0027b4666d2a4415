"""The pipeline as a user starts it: `hello_world.sh`, its reuse of finished stages, and its refusals."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas
import pytest
import tyro
from accelerate.commands.launch import launch_command_parser
from conftest import OFFLINE, ROOT

from summarize_from_feedback_details import toy_tldr
from summarize_from_feedback_details.common.arguments import derive_sizes


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked files in a folder of their own, with this environment's python."""
    folder = tmp_path_factory.mktemp("hello") / "project"
    folder.mkdir()
    page = ("visualize_tokens.py", "visualize_tokens.html", "released_checkpoints.csv")
    folders = ("summarize_from_feedback_details", "eval", "benchmark", "sbatches")
    for name in ("hello_world.sh", "deepspeed.yaml", *folders, *page):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    return folder


def start(folder, **variables) -> subprocess.Popen:
    """`hello_world.sh` in a process group of its own."""
    env = os.environ | OFFLINE | {"PYTHON": sys.executable} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["./hello_world.sh"], cwd=folder, env=env, start_new_session=True, **pipes)


def hello(folder, timeout=400, **variables):
    process = start(folder, **variables)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_smoke_run_then_another_ppo_killed_on_its_way(copy):
    """All stages for real; which of them run again, and when, is asked below of the script alone."""
    # as a notebook's terminal has it: matplotlib itself would refuse a backend that is not installed
    done = hello(copy, SMOKE="1", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "will take about" in done.stdout and "What each stage reached" in done.stdout
    numbers = pandas.read_csv(copy / "eval/reports/smoke_seed1.csv", index_col="metric")["smoke_seed1"]
    assert numbers["rm/blind"] < numbers["rm/ceiling"] and numbers["ppo/first_pass_ratio_error"] < 1e-3
    for written in ("smoke_seed1.md", "smoke_seed1.png"):
        assert (copy / "eval/reports" / written).stat().st_size > 100
    for model in ("sft", "reward", "ppo"):
        assert (copy / f"models/smoke_seed1/{model}/model.safetensors").exists()
    for written in ("rlhf_scale_plot.pdf", "rlhf_scale_plot.csv", "rm_scale_plot.png", "tokens.html"):
        assert (copy / "eval/reports/smoke_seed1" / written).stat().st_size > 100
    for side in ("sft", "ppo"):
        assert numbers[f"{side}/win_rate_low"] <= numbers[f"{side}/win_rate"] <= numbers[f"{side}/win_rate_high"]
    assert (copy / "runs/smoke_seed1_ppo/judge/gold_against_smoke_seed1_sft/report.json").exists()
    assert numbers["ppo/win_rate_gain_low"] <= numbers["ppo/win_rate_gain"] <= numbers["ppo/win_rate_gain_high"]
    weights = (copy / "models/smoke_seed1/ppo/model.safetensors").read_bytes()

    # another PPO run beside the first one, killed in the middle and started again
    killed, until = start(copy, SMOKE="1", KL_COEF="0.2"), time.monotonic() + 200
    while time.monotonic() < until and killed.poll() is None:
        if (copy / "runs/smoke_seed1_kl0.2_ppo/metrics.jsonl").exists():
            break
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    said = killed.communicate()[0]
    assert said.count("reused") == 4 and said.count("== kl0.2_ppo") == 1, said
    other = hello(copy, SMOKE="1", KL_COEF="0.2", REPORT="0")
    assert other.returncode == 0, other.stderr[-3000:]
    assert other.stdout.count("reused") == 4 and "== kl0.2_ppo: was interrupted, goes on" in other.stdout
    assert not [p for top in ("runs", "models/smoke_seed1") for p in (copy / top).glob("*.old-*")]
    assert (copy / "models/smoke_seed1/ppo/model.safetensors").read_bytes() == weights
    umask = os.umask(0o022)
    os.umask(umask)
    made = [p for top in ("runs", "models", "data", "eval/reports", "dataset_visuals") for p in (copy / top).rglob("*")]
    rights = {p: p.stat().st_mode & 0o666 for p in made if p.is_file()}
    assert len(rights) > 50 and set(rights.values()) == {0o666 & ~umask}
    # the tables in the log are whole
    assert all(f"smoke_seed1_{name}" in done.stdout for name in ("sft", "ppo")) and "…" not in done.stdout


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"SEED": "x"}, "error: SEED: found 'x'; expected a number above 0"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "error: ACCELERATE_USE_CPU: found 'maybe' in the environment"),
        ({"SIZE": "huge"}, "error: SIZE: found 'huge'; expected nano, tiny, small, medium or large"),
        ({"KL_COEF": "-1"}, "error: KL_COEF: found '-1'"),
        ({"LORA_RANK": "8"}, "error: LORA_RANK: found '8'; expected a number above 0, with LORA=1"),
        ({"LORA_RANK": "x", "LORA": "1"}, "error: LORA_RANK: found 'x'"),
        ({"HARD": "1", "SIZE": "large"}, "error: SIZE: found 'large' with HARD=1"),
        ({"PPO_EPISODES": "63"}, "error: PPO_EPISODES: found '63'; expected a number of at least 64"),
        ({"HARD": "2"}, "error: HARD: found '2'; expected 0 or 1"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "HARD": "1"}, "error: HARD: found 1 with MODEL="),
        ({"SMOKE": "yes"}, "error: SMOKE: found 'yes'; expected 0 or 1"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "MICRO": "7"}, "error: MICRO: found 7 on 1 processes"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "PPO_MICRO": "0"}, "error: PPO_MICRO: found '0'"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "SIZE": "tiny"}, "error: SIZE: found 'tiny' with MODEL="),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "ROWS": "many"}, "error: ROWS: found 'many'"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "POSTS": "x"}, "error: ROWS: found ''"),
        (
            {"MODEL": "EleutherAI/pythia-1b-deduped", "PPO_EPISODES": "64"},
            "error: PPO_EPISODES: found '64' with MODEL=",
        ),
        ({"MODEL": "x", "ROWS": "9", "PPO_EPISODES": "few"}, "error: PPO_EPISODES: found 'few'"),
        ({"ROWS": "100"}, "error: ROWS: found '100' without MODEL"),
        ({"MODEL": "EleutherAI/pythia-1b-deduped", "SMOKE": "1"}, "error: SMOKE: found 1 with MODEL="),
    ],
)
def test_bad_settings_are_refused(copy, variables, message):
    before = sorted(p.name for p in copy.iterdir())
    done = hello(copy, **variables)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(message)
    assert sorted(p.name for p in copy.iterdir()) == before


# ---------------------------------------------------------------------------------------- the script alone, on any GPUs

# stands for python: says how many GPUs of 80 GB there are, writes down what it is asked, and makes what was asked for
PYTHON = (
    rf"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$STUB_GPUS 80"; exit; fi
if [ "$1" = benchmark/memory.py ]; then exec {sys.executable} "$@"; fi
"""
    + r"""
printf '%s\t' "$@" >>calls
echo >>calls
number=$(wc -l <calls) all=" $* "
while [ $# -gt 1 ]; do
    case $1 in
        --output_dir | --value_output_dir | --data_dir | --models_dir) made=$2 ;;
        --run_name) made=runs/$2 ;;
        *) made= ;;
    esac
    [ -z "$made" ] || { mkdir -p "$made" && echo "$number" >>"$made/calls"; }
    shift
done
if [ -n "$STUB_FAILS" ] && [[ $all == *"/$STUB_FAILS.py "* ]]; then exit 1; fi
"""
)
STAGES = ("world", "dataset", "sft", "reward", "ppo")  # of the toy world
SCRIPTS = {"toy_tldr": "world", "tldr_dataset": "dataset", "ppo_left_padding": "ppo"}  # others are named as their stage
PAPER = {"sft": 128, "reward": 64, "ppo": 512}  # batch sizes


class Project:
    """A folder with `hello_world.sh`, the memory check, and a python that only writes down what it is asked."""

    def __init__(self, folder):
        self.folder, self.asked = folder, 0
        for name in ("benchmark", "sbatches"):
            (folder / name).mkdir()
        for name in ("hello_world.sh", "benchmark/memory.py", "deepspeed.yaml", "sbatches/rows_of.sh"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def hello(self, gpus: int = 1, fails: str = "", **variables):
        """What `hello_world.sh` said, and what it asked of python in this run: lists of words."""
        stub = {"PYTHON": str(self.folder / "python"), "STUB_GPUS": str(gpus), "STUB_FAILS": fails}
        done = hello(self.folder, **stub, **variables)
        lines = self.lines("calls")
        calls, self.asked = [line.split("\t")[:-1] for line in lines[self.asked :]], len(lines)
        return done, calls

    def lines(self, path: str) -> list[str]:
        """Lines of a file; none where there is no file."""
        return (self.folder / path).read_text().splitlines() if (self.folder / path).exists() else []

    def edit(self, old: str, new: str) -> None:
        script = self.folder / "hello_world.sh"
        assert script.read_text().count(old) == 1
        script.write_text(script.read_text().replace(old, new))

    def tree(self) -> dict[str, list[str]]:
        """Everything that was made: folder -> numbers of the calls that wrote there."""
        paths = [p for top in ("runs", "models", "data") for p in (self.folder / top).rglob("calls")]
        return {str(p.parent.relative_to(self.folder)): p.read_text().split() for p in paths}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def script_of(call: list[str]) -> str:
    return next(word for word in call if word.endswith(".py"))


def stages_of(calls: list[list[str]]) -> list[str]:
    """Which stages were run."""
    names = [script_of(call).split("/")[-1].removesuffix(".py") for call in calls]
    return [stage for name in names if (stage := SCRIPTS.get(name, name)) in STAGES]


class Parsed(Exception):
    """The arguments that a script would run with."""


def parse(call: list[str], monkeypatch):
    """The `Args` that a script makes of its command line: its `__main__`, until `main` would begin."""
    script = script_of(call)
    cli = tyro.cli

    def stop(*given, **settings):
        raise Parsed(cli(*given, **settings))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as found:
        patch.setattr(sys, "argv", [script, *call[call.index(script) + 1 :]])
        patch.setattr(tyro, "cli", stop)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return found.value.args[0]


def check_launch(call: list[str], gpus: int) -> None:
    """The words before the stage's own: for several processes, what accelerate is asked for, in words that it knows."""
    before = call[: call.index(script_of(call))]
    if gpus < 2:
        assert not before
        return
    assert before == [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "deepspeed.yaml",
        "--num_processes",
        f"{gpus}",
    ]
    known = launch_command_parser().parse_args(call[2:])
    assert known.training_script == script_of(call) and known.num_processes == gpus and not known.cpu
    assert known.config_file == "deepspeed.yaml" and (ROOT / "deepspeed.yaml").exists()


def check_sizes(stage: str, args, gpus: int, steps: int) -> None:
    """The stage itself, on so many processes, cuts its batch into so many forward passes; else it refuses."""
    assert args.deepspeed == (gpus > 1)
    assert args.batch_size == max(1, gpus) * steps * args.local_micro_batch_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(max(1, gpus)))
        derive_sizes(args, default_batch_size=1)
    assert args.gradient_accumulation_steps == steps


def read_arithmetic(text: str) -> dict[str, tuple[int, ...]]:
    """The printed lines: stage -> (batch, processes, accumulation, rows)."""
    row = r"^   (SFT|reward|PPO): batch (\d+) = (\d+) processes x (\d+) accumulation x (\d+) rows$"
    return {name.lower(): tuple(map(int, numbers)) for name, *numbers in re.findall(row, text, re.M)}


@pytest.mark.parametrize("gpus", [8, 1, 0])
@pytest.mark.parametrize("size, micro", [("1b", (1, 16, 64)), ("2.8b", (1, 4, 32)), ("6.9b", (1, 1, 4))])
def test_the_real_thing(project, monkeypatch, size, micro, gpus):
    """Three stages with the paper's batches, chained by their folders, in words that all scripts accept."""
    model = f"EleutherAI/pythia-{size}-deduped"
    done, calls = project.hello(gpus, MODEL=model, REPORT="0", GPU_GB="999")
    assert done.returncode == 0, done.stderr
    assert ("there is no GPU here" in done.stdout) == (gpus == 0)
    printed = read_arithmetic(done.stdout)
    assert {stage: batch for stage, (batch, *_) in printed.items()} == PAPER
    assert stages_of(calls) == list(PAPER) and len(calls) == 3
    args = {}
    for stage, call in zip(PAPER, calls):
        batch, processes, steps, rows = printed[stage]
        assert batch == processes * steps * rows and processes == max(1, gpus)
        check_launch(call, gpus)
        args[stage] = found = parse(call, monkeypatch)
        assert (found.batch_size, found.local_micro_batch_size) == (batch, rows)
        check_sizes(stage, found, gpus, steps)
        assert (found.base_model, found.seed, found.precision) == (model, 44413, "auto")
        assert project.lines(f"runs/{found.run_name}/calls") and project.lines(f"{found.output_dir}/calls")
    sft, reward, ppo = args.values()
    assert reward.sft_model_path == ppo.sft_model_path == sft.output_dir
    assert ppo.reward_model_path == reward.output_dir
    assert len({sft.output_dir, reward.output_dir, ppo.output_dir}) == len({a.run_name for a in args.values()}) == 3
    # the paper's rows of a forward pass, and those of the job scripts
    assert (sft.local_micro_batch_size, ppo.local_micro_batch_size, ppo.local_rollout_forward_batch_size) == micro
    assert sft.local_eval_batch_size == micro[2]
    rows_of = ["bash", "-c", 'source sbatches/common.sh; rows_of "$0"', model]
    job = subprocess.run(rows_of, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert tuple(map(int, job.stdout.split())) == micro


def test_the_real_thing_reports_and_is_reused(project, monkeypatch):
    model = {"MODEL": "EleutherAI/pythia-1b-deduped", "SEED": "7"}
    done, calls = project.hello(8, **model)
    assert done.returncode == 0, done.stderr
    sft, reward, ppo, rouge, win_rates, page, report = (parse(call, monkeypatch) for call in calls)
    assert sft.seed == reward.seed == ppo.seed == 7
    assert win_rates.runs == (sft.run_name, ppo.run_name) and rouge.paper and win_rates.paper
    assert all(re.fullmatch(rouge.runs[0].replace("*", ".*"), stage.run_name) for stage in (sft, reward, ppo))
    assert page.models == (f"sft={sft.output_dir}", f"ppo={ppo.output_dir}") and page.reward_model == reward.output_dir
    assert page.ref_model == sft.output_dir and page.html.startswith(f"{rouge.output_dir}/")
    assert [f"{report.chains[0]}_{stage}" for stage in PAPER] == [a.run_name for a in (sft, reward, ppo)]
    # the command that it tells at the end
    said = done.stdout[done.stdout.index("eval/judge.py") :].replace("\\\n", " ").split("(or ")[0]
    judged = parse(shlex.split(said), monkeypatch)
    assert judged.judge == "openai" and judged.run == (sft.run_name, ppo.run_name)

    before = project.tree()
    again, more = project.hello(8, **model, REPORT="0")
    assert again.returncode == 0 and again.stdout.count("reused") == 3 and more == []
    assert project.tree() == before


def test_rows_of_a_forward_pass_can_be_chosen(project, monkeypatch):
    chosen = {"MICRO": "4", "PPO_MICRO": "8", "ROLLOUT": "32"}
    done, calls = project.hello(8, MODEL="EleutherAI/pythia-1b-deduped", REPORT="0", **chosen)
    assert done.returncode == 0, done.stderr
    expected = {"sft": (128, 8, 4, 4), "reward": (64, 8, 2, 4), "ppo": (512, 8, 8, 8)}
    assert read_arithmetic(done.stdout) == expected
    for (stage, (_, _, steps, rows)), call in zip(expected.items(), calls):
        args = parse(call, monkeypatch)
        assert args.local_micro_batch_size == rows
        check_sizes(stage, args, 8, steps)
    assert args.local_rollout_forward_batch_size == 32


@pytest.mark.parametrize(
    "gpus, variables, message",
    [
        (8, {"MICRO": "3"}, "error: MICRO: found 3 on 8 processes; expected rows of a forward pass that divide the "
                            "batch of 128: 3 x 8 does not"),
        (8, {"MICRO": "16"}, "error: MICRO: found 16 on 8 processes; expected rows of a forward pass that divide the "
                             "batch of 64: 16 x 8 does not"),
        (8, {"PPO_MICRO": "3"}, "error: PPO_MICRO: found 3 on 8 processes; expected rows of a forward pass that divide "
                                "the batch of 512: 3 x 8 does not"),
        (6, {}, "error: MICRO: found 1 on 6 processes;"),
        (6, {"MODEL": "toy"}, "error: number of GPUs: found 6; expected a divisor of the batch size 32"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused(project, gpus, variables, message):
    done, calls = project.hello(gpus, **{"MODEL": "EleutherAI/pythia-1b-deduped"} | variables)
    assert done.returncode == 2 and calls == [] and project.tree() == {}
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "gpus, size, gpu_gb, added",
    [
        (8, "6.9b", "80", {"ppo": "--offload"}),
        (8, "6.9b", "800", {}),
        (1, "1b", "80", {"ppo": "--offload"}),
        (0, "6.9b", "80", {}),  # host memory is not looked at
        (8, "12b", "80", None),
    ],
)
def test_what_the_gpus_hold(project, gpus, size, gpu_gb, added):
    """PPO gets --offload where it does not fit without, in a line; what does not fit at all is refused before SFT."""
    done, calls = project.hello(gpus, MODEL=f"EleutherAI/pythia-{size}", REPORT="0", GPU_GB=gpu_gb)
    if added is None:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and calls == [] and project.tree() == {}
        assert done.stderr.startswith(f"error: GPU_GB: found {gpu_gb}, and ppo with pythia-{size} takes 149 GB")
        return
    assert done.returncode == 0 and stages_of(calls) == list(PAPER), done.stderr
    found = {stage: call[-1] for stage, call in zip(PAPER, calls) if not call[-1].isdigit()}
    assert found == added
    assert ("so it is added" in done.stdout) == bool(added)


def test_adapters(project, monkeypatch):
    """LORA=1: the real thing trains adapters in all stages, at ten times the learning rate, on cards that are small."""
    lora = {"LORA": "1", "REPORT": "0"}
    done, calls = project.hello(1, MODEL="EleutherAI/pythia-6.9b-deduped", GPU_GB="24", **lora)
    assert done.returncode == 0, done.stderr
    for call in calls:
        args = parse(call, monkeypatch)
        assert (args.lora, args.lr, args.gradient_checkpointing) == (True, 3e-5, False)
        assert args.output_dir.startswith("models/pythia-6.9b-deduped_seed44413_lora/")
    # the toy world's base model is random: its SFT trains all weights
    done, calls = project.hello(0, **lora)
    assert done.returncode == 0, done.stderr
    sft, reward, ppo = (parse(call, monkeypatch) for call in calls[3:])
    assert (sft.lora, reward.lora, ppo.lora) == (False, True, True) and ppo.lr == 1e-3
    assert sft.output_dir == reward.sft_model_path == ppo.sft_model_path == "models/toy_small_seed1_lora/sft"
    done, calls = project.hello(0, LORA_RANK="8", **lora)
    assert done.returncode == 0, done.stderr
    sft, reward, ppo = (parse(call, monkeypatch) for call in calls[3:])
    assert reward.lora_params.rank == ppo.lora_params.rank == 8
    assert sft.output_dir == "models/toy_small_seed1_lora_rank8/sft"


@pytest.mark.parametrize("bytes_of", [[], [85_017_755_648], [80e9, 40e9, 60e9]])
@pytest.mark.parametrize("use_cpu", [None, "true", "1", "false"])
def test_gpus_are_counted(monkeypatch, capsys, bytes_of, use_cpu):
    """How many there are and the memory of the smallest, GB; none where ACCELERATE_USE_CPU says so."""
    import torch

    counts = re.search(r"""FOUND=\$\("\$PYTHON" -c '([^']+)'\)""", (ROOT / "hello_world.sh").read_text())[1]
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    if use_cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(bytes_of))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(bytes_of))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=bytes_of[i]))
    exec(counts, {})
    used = [] if use_cpu in ("true", "1") else bytes_of
    assert capsys.readouterr().out == f"{len(used)} {int(min(used, default=80e9) / 1e9)}\n"


@pytest.mark.parametrize("gpus", [8, 2])
def test_the_toy_world_on_several_gpus(project, monkeypatch, gpus):
    done, calls = project.hello(gpus, REPORT="0")
    assert done.returncode == 0, done.stderr
    assert stages_of(calls[1:]) == list(STAGES)  # after the speed probe
    args = {stage: parse(call, monkeypatch) for stage, call in zip(STAGES, calls[1:])}
    for stage, batch in (("sft", 32), ("reward", 32), ("ppo", 64)):
        check_launch(calls[1 + STAGES.index(stage)], gpus)
        assert args[stage].batch_size == batch
        check_sizes(stage, args[stage], gpus, steps=1)
    assert str(args["world"].data_dir / "sft") == args["dataset"].sft_dataset
    assert f"{args['dataset'].output_dir}/sft" == args["sft"].query_dataset == args["ppo"].query_dataset


@pytest.mark.parametrize("gpus, size, micro", [(0, "135m", 16), (8, "135m", 8), (8, "2.8b", 4)])
def test_the_real_thing_on_few_rows(project, monkeypatch, gpus, size, micro):
    """Real rows cut to so many and tokenised for the model; the stages read them, in batches for so few."""
    more = {"POSTS": "my/posts", "COMPARISONS": "my/pairs"} if gpus else {"PPO_EPISODES": "320"}
    lora = {"LORA": "1"} if size == "2.8b" else {}
    model = f"EleutherAI/pythia-{size}" if gpus else "HuggingFaceTB/SmolLM2-135M"
    done, calls = project.hello(gpus, MODEL=model, ROWS="2000", REPORT="0", GPU_GB="999", **more, **lora)
    assert done.returncode == 0, done.stderr
    data, sft, rm, ppo = (parse(call, monkeypatch) for call in calls)
    assert (data.max_rows, data.base_model, data.check_length_correctness) == (2000, sft.base_model, False)
    assert not gpus or (data.sft_dataset, data.preference_dataset) == tuple(more.values())
    assert sft.query_dataset == rm.query_dataset == ppo.query_dataset == f"{data.output_dir}/sft"
    assert rm.label_dataset == f"{data.output_dir}/comparisons"
    assert (sft.batch_size, rm.batch_size, ppo.batch_size) == (16, 32, 64) and ppo.local_micro_batch_size == micro
    assert [args.lr for args in (sft, rm, ppo)] == ([3e-4, 1e-4, 3e-5] if lora else [3e-5, 1e-5, 3e-6])
    if gpus:
        assert 8.5 * 2000 < ppo.total_episodes < 8.6 * 2000 and ppo.total_episodes % 64 == 0
    else:
        assert ppo.total_episodes == 320
    for stage, args in zip(("sft", "reward", "ppo"), (sft, rm, ppo)):
        batch, processes, steps, rows = read_arithmetic(done.stdout)[stage]
        assert (batch, rows) == (args.batch_size, args.local_micro_batch_size) and batch == processes * steps * rows
        check_sizes(stage, args, gpus, steps)


# ------------------------------------------------------------------------------------------------- what is run again


def outputs_of(stage: str, ppo: str = "ppo") -> set[str]:
    """Folders that a stage of the toy world makes."""
    chain = "toy_small_seed1"
    ready = {"world": {f"data/{chain}_raw", f"models/{chain}/base"}, "dataset": {f"data/{chain}"}}
    trained = {"ppo": {f"runs/{chain}_{ppo}", f"models/{chain}/{ppo}", f"models/{chain}/{ppo}_value"}}
    return (ready | trained).get(stage, {f"runs/{chain}_{stage}", f"models/{chain}/{stage}"})


def test_fresh_runs_everything_again_and_deletes_nothing(project):
    done, calls = project.hello(REPORT="0")
    assert done.returncode == 0 and stages_of(calls) == list(STAGES)
    first = project.tree()
    assert set(first) == set.union(*map(outputs_of, STAGES))
    reused, calls = project.hello(REPORT="0")
    assert reused.stdout.count("reused") == 5 and stages_of(calls) == [] and project.tree() == first

    fresh, calls = project.hello(REPORT="0", FRESH="1")
    assert fresh.returncode == 0 and stages_of(calls) == list(STAGES) and "reused" not in fresh.stdout
    second = project.tree()
    assert {path: made for path, made in second.items() if path.endswith(".old-1")} == {
        f"{path}.old-1": made for path, made in first.items()
    }
    assert fresh.stdout.count("again, since FRESH=1") == len(STAGES)
    assert set(second) == set(first) | {f"{path}.old-1" for path in first}
    assert all(second[path] != first[path] and len(second[path]) == 1 for path in first)  # new ones, made once
    for path in first:
        assert f"   {path} was there: now {path}.old-1\n" in fresh.stdout

    # what is fresh is reused by the next one, and set aside by the next fresh one, beside the first
    reused, calls = project.hello(REPORT="0")
    assert reused.stdout.count("reused") == 5 and stages_of(calls) == [] and project.tree() == second
    project.hello(REPORT="0", FRESH="1")
    third = project.tree()
    for path in first:
        assert third[f"{path}.old-1"] == first[path] and third[f"{path}.old-2"] == second[path]


def test_fresh_of_the_real_thing(project):
    model = {"MODEL": "EleutherAI/pythia-1b-deduped", "REPORT": "0"}
    project.hello(8, **model)
    first = project.tree()
    fresh, calls = project.hello(8, **model, FRESH="1")
    assert fresh.returncode == 0 and stages_of(calls) == list(PAPER) and len(first) == 6
    assert all(project.tree()[f"{path}.old-1"] == made for path, made in first.items())


@pytest.mark.parametrize(
    "old, new, again",
    [
        ("EPISODES=(19200 16000 3200)", "EPISODES=(19200 16000 6400)", ["ppo"]),
        ("--num_normalization_rows 2048", "--num_normalization_rows 100", ["reward", "ppo"]),
        ("--num_train_epochs 2", "--num_train_epochs 1", ["sft", "reward", "ppo"]),
        ("LENGTHS=(56 ", "LENGTHS=(50 ", ["dataset", "sft", "reward", "ppo"]),
        ("--n_sft 16000", "--n_sft 15000", list(STAGES)),
    ],
    ids=["ppo", "reward", "sft", "dataset", "world"],
)
def test_a_changed_argument_runs_that_stage_and_those_after_it(project, old, new, again):
    """And no other one; what they had made is set aside."""
    project.hello(REPORT="0")
    first = project.tree()
    project.edit(old, new)
    done, calls = project.hello(REPORT="0")
    assert done.returncode == 0, done.stderr
    assert stages_of(calls) == again
    assert done.stdout.count("again, since its arguments or inputs changed") == len(again)
    assert done.stdout.count(": reused") == len(STAGES) - len(again)
    aside, second = set.union(*map(outputs_of, again)), project.tree()
    assert set(second) == set(first) | {f"{path}.old-1" for path in aside}
    for path, made in first.items():
        assert second[f"{path}.old-1" if path in aside else path] == made


@pytest.mark.parametrize(
    "change, run", [({"PPO_EPISODES": "6400"}, ["ppo"]), ({"KL_COEF": "0.2"}, ["ppo"]), ({"SEED": "2"}, list(STAGES))]
)
def test_a_setting_runs_what_depends_on_it(project, change, run):
    """Another KL coefficient and another seed have folders of their own, beside those that are there."""
    project.hello(REPORT="0")
    first = project.tree()
    done, calls = project.hello(REPORT="0", **change)
    assert done.returncode == 0 and stages_of(calls) == run
    aside, second = outputs_of("ppo") if "PPO_EPISODES" in change else set(), project.tree()
    assert {path for path in second if ".old-" in path} == {f"{path}.old-1" for path in aside}
    assert all(second[path] == made for path, made in first.items() if path not in aside)
    if "KL_COEF" in change:
        assert set(second) == set(first) | outputs_of("ppo", "kl0.2_ppo")
    if "SEED" in change:
        assert set(second) == set(first) | {path.replace("seed1", "seed2") for path in first}


def test_another_kl_coefficient_has_a_report_of_its_own(project):
    done, calls = project.hello(KL_COEF="0.2")
    assert done.returncode == 0, done.stderr
    run = name = "toy_small_seed1_kl0.2_ppo"
    reports = {script_of(call): call for call in calls if script_of(call) not in map("{}.py".format, STAGES)}
    judged, report = reports["eval/judge.py"], reports["eval/hello_report.py"]
    assert run in judged and report[report.index("--ppo") + 1] == "kl0.2_ppo"
    assert report[report.index("--name") + 1] == name
    assert f"eval/reports/{name}/tokens.html" in reports["visualize_tokens.py"]


def test_the_hard_world_has_chains_of_its_own(project, monkeypatch):
    """Its rows, its lengths, a learning rate for each size and stage; the easy one's are as they were."""
    found = {}
    for hard in "01":
        done, calls = project.hello(REPORT="0", HARD=hard, SIZE="nano")
        assert done.returncode == 0, done.stderr
        found[hard] = {stage: parse(call, monkeypatch) for stage, call in zip(STAGES, calls)}
    easy, harder = found["0"], found["1"]
    assert (easy["world"].world, harder["world"].world) == ("easy", "hard")
    assert str(harder["world"].data_dir) == "data/hard_nano_seed1_raw"
    for stage in ("sft", "reward", "ppo"):
        assert harder[stage].run_name == f"hard_nano_seed1_{stage}"
    trained = ("sft", "reward", "ppo")
    assert [easy[stage].lr for stage in trained] == [3e-3, 3e-3, 3e-4]
    rates = [[harder[stage].lr for stage in trained]]
    for size in ("tiny", "small", "medium"):
        done, calls = project.hello(REPORT="0", HARD="1", SIZE=size)
        assert done.returncode == 0, done.stderr
        rates.append([parse(call, monkeypatch).lr for call in calls[2:]])
    assert all(wide < narrow for both in zip(rates, rates[1:]) for narrow, wide in zip(*both))  # they fall with width
    for world, args in ((toy_tldr.EASY, easy["dataset"]), (toy_tldr.HARD, harder["dataset"])):
        given = {
            "query": args.tldr_params.length,
            "sft_response": args.tldr_params.max_sft_response_length,
            "sft_query_response": args.tldr_params.max_sft_query_response_length,
            "rm_response": args.tldr_params.max_rm_response_length,
            "rm_query_response": args.tldr_params.max_rm_query_response_length,
            "cnndm_query": args.cnndm_params.length,
            "cnndm_rm_response": args.cnndm_params.max_rm_response_length,
            "cnndm_rm_query_response": args.cnndm_params.max_rm_query_response_length,
        }
        assert given == world.lengths


def test_an_interrupted_stage_goes_on_unless_its_arguments_changed(project):
    failed, calls = project.hello(REPORT="0", fails="reward")
    assert failed.returncode == 1 and stages_of(calls) == ["world", "dataset", "sft", "reward"]
    done, calls = project.hello(REPORT="0", fails="reward")
    assert done.returncode == 1 and "== reward: was interrupted, goes on" in done.stdout
    assert stages_of(calls) == ["reward"] and not [path for path in project.tree() if ".old-" in path]
    project.edit("--num_normalization_rows 2048", "--num_normalization_rows 100")
    changed, calls = project.hello(REPORT="0")
    assert changed.returncode == 0 and "goes on" not in changed.stdout and stages_of(calls) == ["reward", "ppo"]
    assert {path for path in project.tree() if ".old-" in path} == {f"{path}.old-1" for path in outputs_of("reward")}


def test_a_fresh_run_that_failed_goes_on_without_fresh(project):
    project.hello(REPORT="0")
    failed, _ = project.hello(REPORT="0", FRESH="1", fails="reward")
    assert failed.returncode == 1
    done, calls = project.hello(REPORT="0")
    assert done.returncode == 0 and "== reward: was interrupted, goes on" in done.stdout
    assert done.stdout.count("reused") == 3 and stages_of(calls) == ["reward", "ppo"]
    assert all(path.endswith(".old-1") for path in project.tree() if ".old-" in path)  # none was set aside twice
