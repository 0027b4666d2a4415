"""The job scripts on a real Slurm of one machine: the chain, failures, requeues, time limits, several nodes.

Brings up a private cluster of four nodes, all of them this machine (munge, slurmctld and slurmd of Debian's packages;
no systemd, no database). Skipped, with the reason, where it cannot be brought up.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import torch
from conftest import OFFLINE, ROOT
from safetensors.torch import load_file
from test_resume import compare_runs, lines

pytestmark = pytest.mark.torture  # all of it: make slurm-test
SLURM_NODES = 4
MODELS, SEEDS = ("small", "medium"), (1, 2)


class Cluster:
    """A private Slurm: `run` calls its commands, `log` is what became of its jobs."""

    def __init__(self, folder: Path):
        self.folder, self.daemons, self.hurried = folder, [], set()
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/usr/bin"}
        for name in ("state", "spool", "log", "munge"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        host, first = socket.gethostname().split(".")[0], free_port()
        (folder / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={first}\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={folder}/munge/socket,cred_expire=3\n"
            f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool/%n\n"
            f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid\n"
            f"SlurmctldLogFile={folder}/log/slurmctld.log\nSlurmdLogFile={folder}/log/slurmd-%n.log\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\n"
            "JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\n"
            f"JobCompType=jobcomp/filetxt\nJobCompLoc={folder}/log/jobs\nSelectType=select/cons_tres\n"
            "SelectTypeParameters=CR_Core\nSchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0\n"
            "GresTypes=gpu\nSlurmdParameters=config_overrides\nReturnToService=2\nMailProg=/bin/true\nJobRequeue=1\n"
            "MinJobAge=3600\nKillWait=20\nInactiveLimit=0\n"
            f"NodeName=node[0-{SLURM_NODES - 1}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first + 1}-{first + SLURM_NODES}] "  # noqa: E501
            "CPUs=16 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN\nPartitionName=gpu Nodes=ALL Default=YES State=UP\n"
        )
        for i in range(8):
            (folder / f"nvidia{i}").symlink_to("/dev/null")  # slurmd counts character devices
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/nvidia[0-7]\n")

    def start(self) -> None:
        munge = ["munged", "--foreground", f"--key-file={self.folder}/munge.key",
                 f"--socket={self.folder}/munge/socket", f"--pid-file={self.folder}/munged.pid",
                 f"--log-file={self.folder}/log/munged.log",
                 f"--seed-file={self.folder}/munge/seed", "--force"]  # fmt: skip
        commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"node{i}"] for i in range(SLURM_NODES))]
        for i, command in enumerate(commands):
            out = open(self.folder / f"log/{i}-{command[0]}.out", "w")  # noqa: SIM115 - the daemon's own
            self.daemons.append(
                subprocess.Popen(command, env=os.environ | self.env, stdout=out, stderr=out, start_new_session=True)
            )
            time.sleep(0.5)
        until = time.monotonic() + 30
        while self.run("sinfo", "-h", "-o", "%T", check=False).split() != ["idle"]:
            if time.monotonic() > until:
                logs = "".join(p.read_text()[-500:] for p in (self.folder / "log").glob("*.out"))
                raise RuntimeError(self.run("sinfo", "-R", check=False) + logs)
            time.sleep(0.2)

    def stop(self) -> None:
        self.run("scancel", "--state=PENDING", "-u", "root", check=False)
        self.run("scancel", "-u", "root", check=False)
        time.sleep(2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = True, **more) -> str:
        done = subprocess.run(
            command, env=os.environ | self.env | more.pop("env", {}), capture_output=True, text=True, **more
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def states(self, *jobs: str) -> dict[str, str]:
        """State and exit code of each element of some jobs: {"12_0": "COMPLETED 0:0"}."""
        found = {}
        for job in jobs:
            for line in self.run("scontrol", "-o", "show", "job", job).splitlines():
                field = lambda name, line=line: m[1] if (m := re.search(rf"\b{name}=(\S+)", line)) else ""
                name = field("ArrayJobId") + "_" + field("ArrayTaskId") if "ArrayTaskId" in line else field("JobId")
                found[name] = f"{field('JobState')} {field('ExitCode')}"
        return found

    def hurry(self, *jobs: str) -> None:
        """Slurm lets a requeued job wait for two minutes; ten seconds are enough for the rest of the old one to end."""
        for job in jobs:
            for line in self.run("scontrol", "-o", "show", "job", job).splitlines():
                restart = re.search(r"Restarts=\d+", line)[0]
                if "JobState=PENDING Reason=BeginTime" in line and (job, line[:40], restart) not in self.hurried:
                    self.hurried.add((job, line[:40], restart))
                    element = f"{job}_{m[1]}" if (m := re.search(r"ArrayTaskId=(\d+) ", line)) else job
                    self.run("scontrol", "update", f"JobId={element}", "StartTime=now+10", check=False)

    def wait(self, *jobs: str, seconds: float = 400) -> dict[str, str]:
        """Wait until all elements of these jobs have ended; returns their states."""
        until, ended = time.monotonic() + seconds, None
        while True:
            self.hurry(*jobs)
            states = self.states(*jobs)
            running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
            if [s for s in states.values() if s.split()[0] in running]:
                ended = None
            else:  # a job that queues itself again looks ended for a moment
                ended = ended or time.monotonic()
                if time.monotonic() - ended > 5:
                    return states
            assert time.monotonic() < until, (states, self.run("squeue"))
            time.sleep(0.3)


def free_port() -> int:
    """The first of a few free ports in a row."""
    while True:
        first = 20000 + int.from_bytes(os.urandom(2), "big") % 20000
        try:
            for port in range(first, first + SLURM_NODES + 1):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("a private Slurm is brought up by root only")
    if not shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin"):
        install = "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client"  # noqa: E501
        done = subprocess.run(["bash", "-c", install], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Slurm's packages cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
    except (RuntimeError, OSError) as error:
        found.stop()
        pytest.skip(f"Slurm does not come up here: {error}")
    yield found
    found.stop()


@pytest.fixture
def project(world, tmp_path):
    """The job scripts and the package in a folder of their own, as a checkout on the cluster."""
    for name in ("sbatches", "summarize_from_feedback_details", "eval", "benchmark", "deepspeed.yaml", "slurm"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shutil.rmtree(tmp_path / "eval/images", ignore_errors=True)
    return tmp_path


def settings(world, **more) -> dict[str, str]:
    """Environment of sbatch: the tiny world on one CPU process an element."""
    data = f"--query_dataset {world.sft_rows} --precision fp32 --print_sample_output_freq 0 --num_eval_rows 20"
    data += " --save_freq 1"
    small = "--lr 1e-3 --weight_decay 0"
    return OFFLINE | {
        "MODELS": " ".join(str(world.folder / "models" / m) for m in MODELS), "SEEDS": " ".join(map(str, SEEDS)),
        "PYTHON": sys.executable, "PROCESSES_PER_NODE": "1", "DEEPSPEED": "", "MICRO": "4", "PPO_MICRO": "4",
        "ROLLOUT": "8", "BATCH": "8", "ACCELERATE_ARGS": "--cpu --mixed_precision no --dynamo_backend no",
        "SFT_ARGS": f"{data} {small} --total_episodes 40 --response_length 24",
        "REWARD_ARGS": f"{data} {small} --label_dataset {world.pairs} --total_episodes 40 --num_normalization_rows 40",
        "PPO_ARGS": f"{data} --lr 1e-4 --weight_decay 0 --num_updates 3 --response_length 24",
        "PYTHONPATH": ".",
    } | more  # fmt: skip


def sbatch(cluster, project, env, *words: str) -> str:
    return cluster.run("sbatch", "--parsable", *words, cwd=project, env=env).strip().split(";")[0]


def logs(project) -> str:
    return "\n".join(p.name + "\n" + p.read_text()[-1500:] for p in sorted((project / "slurm/logs").glob("*.out")))


def test_a_chain_with_a_failure_inside(cluster, project, world):
    """launch.sh: element i starts when element i of the stage before succeeded; the chain of one that fails ends."""
    env = settings(world)
    bad = project / f"models/{MODELS[1]}_{SEEDS[0]}/sft"  # holds what is not this run's: sft.py refuses
    bad.mkdir(parents=True)
    (bad / "config.json").write_text("{}")
    launched = cluster.run(
        "sbatches/launch.sh",
        "--stages",
        "sft reward ppo_left_padding eval",
        cwd=project,
        env=env | {"JUDGE_ARGS": "--judge gold"},
    )  # noqa: E501
    jobs = dict(re.findall(r"^(\w+): job (\d+)", launched, re.M))
    assert list(jobs) == ["sft", "reward", "ppo_left_padding", "eval"]
    states = cluster.wait(*jobs.values())
    for stage in ("sft", "reward", "ppo_left_padding"):
        for element in range(4):
            state = states[f"{jobs[stage]}_{element}"]
            wanted = "COMPLETED 0:0" if element != 2 else "FAILED 1:0" if stage == "sft" else "CANCELLED 0:0"
            assert state.startswith(wanted), (stage, element, states, logs(project))
    assert states[jobs["eval"]].startswith("COMPLETED"), logs(project)
    log = (project / f"slurm/logs/sft_{jobs['sft']}_2.out").read_text()
    assert re.search(
        r"FAILED \(exit code 1\): error: --output_dir: found '.*expected a new", log.strip().splitlines()[-1]
    )
    evaluated = (project / f"slurm/logs/eval_{jobs['eval']}.out").read_text()
    assert f"not finished: {MODELS[1]}_{SEEDS[0]}_ppo" in evaluated and "win rate" in evaluated
    assert (project / "eval/images/rlhf_scale_plot.pdf").exists()

    # cancelled and launched again, after the cure: finished elements end at once, the failed chain is made up for
    shutil.rmtree(bad)
    before = {p: p.stat().st_mtime_ns for p in (project / "models").glob("*/*/model.safetensors")}
    first = dict(re.findall(r"^(\w+): job (\d+)", cluster.run("sbatches/launch.sh", cwd=project, env=env), re.M))
    time.sleep(6)
    cluster.run("scancel", *first.values())
    cluster.wait(*first.values())
    again = dict(re.findall(r"^(\w+): job (\d+)", cluster.run("sbatches/launch.sh", cwd=project, env=env), re.M))
    states = cluster.wait(*again.values())
    assert set(states.values()) == {"COMPLETED 0:0"}, (states, logs(project))
    models = {p: p.stat().st_mtime_ns for p in (project / "models").glob("*/*/model.safetensors")}
    assert len(models) == 12 and before.items() <= models.items()


def test_launched_in_an_allocation_that_was_opened_elsewhere(cluster, project, world, tmp_path_factory):
    """salloc's shell: its variables are another job's, and its folder is another one."""
    elsewhere, env = tmp_path_factory.mktemp("elsewhere"), settings(world, SEEDS="1", MODELS=world.base)
    (project / "sbatches/site.sh").write_bytes(b"if true; then\r\n    export SITE=read\r\nfi\r\n")
    command = ("salloc", "--quiet", "--nodes=1", f"{project}/sbatches/launch.sh", "--stages", "sft")
    job = re.search(r"^sft: job (\d+), 1 elements", cluster.run(*command, cwd=elsewhere, env=env), re.M)[1]
    assert set(cluster.wait(job).values()) == {"COMPLETED 0:0"}, logs(project)
    assert (project / "models/small_1/sft/model.safetensors").exists() and not list(elsewhere.iterdir())


def test_the_three_lines_of_the_paper(cluster, project, world):
    env = settings(world)
    document = (ROOT / "docs/cluster.md").read_text()
    chain = re.search(r"```bash\n(SFT=.*?)```", document, re.S)[1]
    assert chain.count("sbatch --parsable") == 2 and chain.count("--dependency=afterany:") == 2
    cluster.run("bash", "-euc", chain.replace("sbatch ", "sbatch --array=0-4 "), cwd=project, env=env)
    time.sleep(1)
    jobs = sorted(set(cluster.run("squeue", "-h", "-o", "%A").split()))
    ids = sorted({j.split("_")[0] for j in cluster.run("squeue", "-h", "-o", "%F").split()})
    states = cluster.wait(*(ids or jobs))
    assert len(states) == 15 and set(states.values()) == {"COMPLETED 0:0"}, (states, logs(project))
    assert len(list((project / "models").glob("*/ppo/model.safetensors"))) == 4  # the fifth element has nothing to do


def ppo_settings(world, **more) -> dict[str, str]:
    """PPO alone, long enough to be stopped in its middle."""
    env = settings(world, SEEDS="1", MODELS=world.base)
    links = f"--sft_model_path {world.sft} --reward_model_path {world.reward}"
    return env | {"PPO_ARGS": f"{env['PPO_ARGS']} {links} --num_updates 40 --save_freq 2"} | more


def undisturbed_ppo(cluster, project, env) -> tuple[Path, Path]:
    """Run and model of PPO that nothing stopped, moved out of the way."""
    job = sbatch(cluster, project, env, "--array=0", "sbatches/ppo_left_padding.sbatch")
    assert set(cluster.wait(job).values()) == {"COMPLETED 0:0"}, logs(project)
    for name in ("runs", "models"):
        (project / name).rename(project / f"{name}.whole")
    return project / "runs.whole/small_1_ppo", project / "models.whole/small_1/ppo"


def test_requeued_in_the_middle(cluster, project, world):
    env = ppo_settings(world)
    run, model = undisturbed_ppo(cluster, project, env)
    job = sbatch(cluster, project, env, "--array=0", "sbatches/ppo_left_padding.sbatch")
    for times in (1, 2):
        folder, until = project / "runs/small_1_ppo/checkpoints", time.monotonic() + 200
        newest = max((p.name for p in folder.glob("update_*")), default="")
        while max((p.name for p in folder.glob("update_*")), default="") <= newest and time.monotonic() < until:
            time.sleep(0.05)
        cluster.run("scontrol", "requeue", f"{job}_0")
        show = lambda: cluster.run("scontrol", "-o", "show", "job", f"{job}_0")
        while not (f"Restarts={times}" in show() and "JobState=RUNNING" in show()):
            assert time.monotonic() < until, (show(), logs(project))
            cluster.hurry(job)
            time.sleep(0.3)
    assert set(cluster.wait(job).values()) == {"COMPLETED 0:0"}, logs(project)
    log = next((project / "slurm/logs").glob(f"ppo_{job}_0.out")).read_text()
    assert "restart 0 on" in log and "restart 2 on" in log and log.count("going on from") == 2, log
    compare_runs(project / "runs/small_1_ppo", run, project / "models/small_1/ppo", model)


def test_a_time_limit_that_hits_twice(cluster, project, world):
    env = ppo_settings(world)
    env["PPO_ARGS"] += " --num_updates 500 --save_freq 1000"
    run, model = undisturbed_ppo(cluster, project, env)
    limit = ("--time=1", "--signal=B:USR1@15")
    job = sbatch(cluster, project, env, "--array=0", *limit, "sbatches/ppo_left_padding.sbatch")
    assert set(cluster.wait(job, seconds=900).values()) == {"COMPLETED 0:0"}, logs(project)
    log = next((project / "slurm/logs").glob(f"ppo_{job}_0.out")).read_text()
    assert log.count("was interrupted and goes on from its last checkpoint: queued again") >= 2, log
    compare_runs(project / "runs/small_1_ppo", run, project / "models/small_1/ppo", model)


def test_two_nodes_of_one_process(cluster, project, world):
    """DeepSpeed over two nodes, the rendezvous from Slurm's variables: the weights of one process."""
    config = project / "zero2_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nmixed_precision: 'no'\n"
        "deepspeed_config:\n  zero_stage: 2\n  gradient_accumulation_steps: 1\n  zero3_init_flag: false\n"
        "  offload_optimizer_device: none\n  offload_param_device: none\n"
    )
    env = settings(world, SEEDS="1", MODELS=world.base)
    one = sbatch(cluster, project, env, "--array=0", "sbatches/sft.sbatch")
    assert set(cluster.wait(one).values()) == {"COMPLETED 0:0"}, logs(project)
    for name in ("runs", "models"):
        (project / name).rename(project / f"{name}.one")
    env |= {"ACCELERATE_ARGS": f"--config_file {config}", "DEEPSPEED": "--deepspeed", "MICRO": "2"}
    two = sbatch(cluster, project, env, "--array=0", "--nodes=2", "sbatches/sft.sbatch")
    assert set(cluster.wait(two).values()) == {"COMPLETED 0:0"}, logs(project)
    log = (project / f"slurm/logs/sft_{two}_0.out").read_text()
    assert "2 process(es) on cpu" in log and re.search(r"restart 0 on node\[\d-\d\]:", log)
    ours, theirs = (load_file(project / name / "small_1/sft/model.safetensors") for name in ("models", "models.one"))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    runs = [project / name / "small_1_sft" for name in ("runs", "runs.one")]
    tables = [pandas.read_parquet(r / "tables/validation.parquet")["response"].tolist() for r in runs]
    assert tables[0] == tables[1] and len(lines(runs[0])) == len(lines(runs[1]))
