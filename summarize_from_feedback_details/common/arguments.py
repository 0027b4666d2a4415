"""The command line: what every script does before `main`, and how bad input is refused: in one line, exit code 2."""

import errno
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a disk says that takes no more
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a launcher sets all of them
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")  # those that need no more than a name
SIZES = "--batch_size and --local_micro_batch_size, from which it follows"
# arguments of the original scripts, and of earlier versions, and what to use in their stead
DROPPED = {
    "cuda": "CUDA_VISIBLE_DEVICES, or ACCELERATE_USE_CPU=true for the CPU",
    "load_from_cache_file": "nothing: the tokenised dataset is read as it is",
    "truncate_token_id": "--truncate_token, where responses are sampled",
    "hf_repo_url": "--hf_repo_id and --hf_repo_revision",
    "num_eval_samples": "--num_eval_rows",
    "local_normalize_batch_size": "--local_eval_batch_size",
    "query_dataset_revision": "--dataset_revision; the comparisons have --label_dataset_revision",
    "micro_batch_size": SIZES,
    "local_mini_batch_size": SIZES,
    "mini_batch_size": SIZES,
    "local_batch_size": SIZES,
    "label_dataset": "reward.py, where comparisons are read",
    "sft_model_path": "--base_model, which may be any policy",
    "reward_model_path": "ppo_left_padding.py, where the reward model is read",
    "response_length": "nothing: no response is sampled here",
    "truncate_token": "nothing: no response is sampled here",
    "temperature": "nothing: no response is sampled here",
    "num_train_epochs": "--total_episodes: the queries are reshuffled at each pass",
    "ppo.nminibatches": "--nminibatches",
    "reward.kl_coef": "--ppo.kl_coef",
    "reward.use_adaptive_kl": "--ppo.kl_coef: the coefficient is fixed",
    "reward.adaptive_kl.target": "--ppo.kl_coef: the coefficient is fixed",
    "reward.adaptive_kl.horizon": "--ppo.kl_coef: the coefficient is fixed",
    "reward.dataset_std": "nothing: rewards are normalised by their mean alone",
}


def may_change(default: Any) -> Any:
    """A field that may have another value when a run goes on after a stop, since its results do not depend on it."""
    return field(default=default, metadata={"may_change": True})


def derived() -> Any:
    """A field that is filled in, and not an argument."""
    return field(init=False, default=None, metadata={"may_change": True})


@dataclass
class RunArgs:
    """What every training run is asked that has nothing to do with learning."""

    # run: name, tracking, checkpoints, results
    exp_name: str = may_change("run")
    """name of the experiment, the first part of the run's name"""
    run_name: str | None = may_change(None)
    """folder of the run below `runs/`; default `<exp_name>__<seed>__<time>`"""
    deepspeed: bool = may_change(False)
    """insist on DeepSpeed: refuse to run when not launched with it"""
    track: bool = may_change(False)
    """also log to Weights & Biases"""
    wandb_project_name: str = may_change("tldr_summarize")
    """project on Weights & Biases"""
    wandb_entity: str | None = may_change(None)
    """team or user on Weights & Biases"""
    save_freq: int = may_change(100)
    """write a checkpoint every so many updates (0: see --save_minutes)"""
    save_minutes: float = may_change(20.0)
    """write a checkpoint when the last one is so many minutes old (0: see --save_freq)"""
    keep: int = may_change(2)
    """newest checkpoints to keep; a finished run keeps none"""
    output_dir: str = may_change("models/run")
    """folder of the trained model"""
    push_to_hub: bool = may_change(False)
    """also upload the trained model"""
    hf_entity: str | None = may_change(None)
    """user or organisation on the hub (default: the one logged in)"""
    hf_repo_id: str | None = may_change(None)
    """repository on the hub (default `<base model>__<stage>__tldr`)"""
    hf_repo_revision: str | None = may_change(None)
    """branch on the hub (default `<stage>__<seed>__<time>`)"""
    # what follows from the sizes, for the record
    micro_batch_size: int | None = derived()
    """rows of one forward pass on all processes"""
    local_batch_size: int | None = derived()
    """rows of one update on one process"""


def refuse(argument: str, found: str, expected: str) -> NoReturn:
    """Stop because of a user's mistake: one line on standard error (rank 0 only) and exit code 2.

    Args:
        argument: the argument as it is typed, without dashes, e.g. `sft_model_path`; or a variable, e.g. `HF_HOME`.
        found: what was found there, e.g. `'models/sft' does not exist`.
        expected: what would have been right, e.g. `a folder or hub id of a policy`.
    """
    if os.environ.get("RANK", "0") == "0":
        name = argument if argument.isupper() else f"--{argument}"
        print(f"error: {name}: found {found}; expected {expected}", file=sys.stderr, flush=True)
    sys.exit(2)


def reason(error: BaseException) -> str:
    """The first line of a library's error, and whether the hub could not be reached at all."""
    while type(error).__name__.startswith("DatasetGeneration") and error.__cause__:
        error = error.__cause__  # "An error occurred while generating the dataset" says nothing
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    chain, names = error, ""
    while chain is not None:
        names, chain = names + type(chain).__name__ + str(chain), chain.__cause__ or chain.__context__
    offline = any(w in names for w in ("Connect", "Offline", "Max retries", "couldn't connect", "name resolution"))
    return f"the hub cannot be reached (offline): {text}" if offline else text


def command_line(main: Callable, arguments: type) -> None:
    """Start a script from its command line: what all of them do before `main`.

    What the terminal or the log file cannot show is replaced (a curly quote in Latin-1), `~` is written out in every
    path, variables that another launch left in the environment are refused, and a full disk is said in one line.

    Args:
        main: takes the arguments.
        arguments: their dataclass; one of a training stage (`RunArgs`) can be started as several processes.
    """
    import tyro

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    trains = issubclass(arguments, RunArgs)
    refuse_left_over(several=trains)
    if trains:
        refuse_dropped(sys.argv[1:], arguments)
        if {"-h", "--help"} & set(sys.argv[1:]):
            tyro.cli(_by_headings(arguments), use_underscores=True)  # prints and ends
    args = tyro.cli(arguments, use_underscores=True)
    _write_out_home(args)
    try:
        main(args)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise SystemExit(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}") from None
    if trains:
        _leave_group()


def _leave_group() -> None:
    """Leave torch's process group at the end of a stage, on all ranks.

    Left to the end of the interpreter, gloo's threads sometimes abort a rank, and the launcher then fails a run that
    has finished (https://github.com/pytorch/pytorch/pull/179291).
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _by_headings(arguments: type) -> type:
    """The same arguments under the headings that stand as comments in their dataclasses' sources; for --help alone."""
    import tyro

    headings, sentences = {}, {}
    for cls in reversed([c for c in arguments.__mro__ if is_dataclass(c)]):
        heading, name = "", ""
        for line in inspect.getsource(cls).splitlines():
            if found := re.match(r"    # ([a-z]+)", line):
                heading = found[1]
            elif found := re.match(r"    (\w+): ", line):
                name = found[1]
                headings.setdefault(name, heading)
            elif found := re.match(r'    """(.*)"""', line):
                sentences[name] = found[1]
    grouped: dict[str, list] = {}
    for f in fields(arguments):
        if f.init and not is_dataclass(f.default_factory):
            flag = tyro.conf.arg(help=sentences.get(f.name, ""), prefix_name=False)
            grouped.setdefault(headings[f.name], []).append((f.name, Annotated[f.type, flag], field(default=f.default)))
    nested = [f for f in fields(arguments) if is_dataclass(f.default_factory)]
    nested = [(f.name, f.type, field(default_factory=f.default_factory)) for f in nested]
    groups = {name: make_dataclass(name, members) for name, members in grouped.items()}
    members = [(name, group, field(default_factory=group)) for name, group in groups.items()]
    return make_dataclass("Args", [*members, *nested])


def _write_out_home(args: Any) -> None:
    """Put the home directory in the place of `~`, which shells leave alone in `--output_dir=~/x` and in quotes."""

    def written_out(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(written_out, value))
        if isinstance(value, Path):
            return Path(os.path.expanduser(value))
        # also `name=~/x`, as visualize_tokens.py has it
        return re.sub(r"(?<![^=])~.*", lambda m: os.path.expanduser(m[0]), value) if isinstance(value, str) else value

    for f in fields(args):
        value = getattr(args, f.name)
        if is_dataclass(value):
            _write_out_home(value)
        elif f.name != "truncate_token":
            setattr(args, f.name, written_out(value))


def refuse_variable(name: str, expected: str) -> NoReturn:
    """As `refuse`, of an environment variable; on any rank, since nobody may know which one this is."""
    print(f"error: {name}: found {os.environ[name]!r} in the environment; expected {expected}", file=sys.stderr)
    sys.exit(2)


def refuse_settings_of_accelerate(error: Exception) -> None:
    """Refuse the variable whose value accelerate cannot read, if that is what an error says: it has many of them."""
    said = str(error).strip().split("\n")[0]
    value = re.fullmatch(
        "'(.*)' is not a valid .*|invalid literal for .*: '(.*)'|invalid truth value (.*)|.* device string: (.*)", said
    )
    wrong = next((group for group in value.groups() if group), None) if value else None
    for name in sorted(name for name in os.environ if name.startswith("ACCELERATE_")):
        if wrong and os.environ[name].lower() == wrong.lower():
            refuse_variable(name, f"a value that accelerate knows ({said[:200]}), or `unset {name}`")


def refuse_left_over(several: bool) -> None:
    """Refuse a launcher's variables that make no whole: an export, or another launch, has left them in the environment.

    Args:
        several: whether this script can be started as several processes.
    """
    there = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if name in there and not re.fullmatch("[0-9]+", there[name]):
            refuse_variable(name, f"a number, as torchrun and accelerate set it, or `unset {name}`")
    world = int(there.get("WORLD_SIZE", 1))
    if world == 0 or (world > 1 and not several):
        refuse_variable("WORLD_SIZE", ("a number above 0" if several else "one process") + ", or `unset WORLD_SIZE`")
    if int(there.get("RANK", 0)) >= world:
        size = f"WORLD_SIZE={world}" if "WORLD_SIZE" in there else "no WORLD_SIZE"
        refuse_variable("RANK", f"a rank that fits to {size}, or `unset RANK`")
    missing = [name for name in LAUNCHED if not there.get(name)]
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        if missing and name in there and (name == "LOCAL_RANK" or world > 1):
            refuse_variable(name, f"{', '.join(missing)} beside it, as torchrun and accelerate do, or `unset {name}`")
    for name in sorted(name for name in os.environ if name.startswith("ACCELERATE_USE_")):
        if os.environ[name].lower() not in ("true", "t", "yes", "y", "on", "1", "false", "f", "no", "n", "off", "0"):
            refuse_variable(name, f"true or false, or `unset {name}`")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and missing:
        expected = "a start by `accelerate launch`, or `unset ACCELERATE_USE_DEEPSPEED`"
        refuse_variable("ACCELERATE_USE_DEEPSPEED", expected)


def refuse_dropped(argv: list[str], arguments: type) -> None:
    """Refuse arguments of the original scripts that are gone, saying what to use in their stead.

    Args:
        argv: the command line without the program, e.g. `sys.argv[1:]`.
        arguments: the dataclass of this script; what it has is not gone.
    """
    there = {f.name for f in fields(arguments) if f.init}
    for word in argv:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        name = name.removeprefix("no_").replace(".no_", ".")
        if word.startswith("--") and name in DROPPED and name not in there:
            refuse(name, "an argument that this version does not have", DROPPED[name])


def check_sizes(
    args: Any, positive: tuple[str, ...] = (), at_least_zero: tuple[str, ...] = (), shares: tuple[str, ...] = ()
) -> None:
    """Refuse arguments that are not positive, at least zero, or from 0 to 1; None passes. Names may be `ppo.lam`."""
    for names, ok, expected in (
        (positive, lambda v: math.isfinite(v) and v > 0, "more than 0"),
        (at_least_zero, lambda v: math.isfinite(v) and v >= 0, "at least 0"),
        (shares, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ):
        for name in names:
            value = args
            for part in name.split("."):
                value = getattr(value, part)
            if value is not None and not ok(value):
                refuse(name, str(value), expected)


def check_optimisation(args: Any) -> None:
    """Refuse settings of optimiser, schedule and evaluation that all stages have, and that cannot work."""
    samples = ("print_sample_output_freq",) if hasattr(args, "print_sample_output_freq") else ()
    check_sizes(
        args,
        positive=("eps", "max_grad_norm", "local_eval_batch_size", "num_eval_rows"),
        at_least_zero=("seed", "lr", "weight_decay", "warm_up_steps", "eval_freq", *samples),
    )
    if args.scheduler not in SCHEDULERS:
        refuse("scheduler", args.scheduler, f"one of {', '.join(SCHEDULERS)}")


def check_world_size(args: Any) -> int:
    """Fill in the number of processes; refuse another one than was launched."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.world_size not in (None, world_size):
        refuse("world_size", str(args.world_size), f"{world_size}, the number of processes launched")
    args.world_size = world_size
    return world_size


def derive_sizes(args: Any, default_batch_size: int) -> None:
    """Fill in the batch sizes that were left out; refuse those that contradict each other.

    micro batch (one forward pass) <= mini-batch (one optimiser step; where there is --nminibatches) <= batch (one
    update); `local_` is per process.
    Deviates: the global batch is what stays the same on another number of processes, so it is the default, and
    --gradient_accumulation_steps follows from it (the original kept the accumulation: 1 GPU trained on an eighth).
    """
    world_size = check_world_size(args)
    cuts = ["nminibatches"] if hasattr(args, "nminibatches") else []
    sizes = "local_micro_batch_size", "gradient_accumulation_steps", "batch_size", "total_episodes", "num_updates"
    check_sizes(args, positive=(*sizes, *cuts))
    minis = args.nminibatches if cuts else 1
    args.micro_batch_size = args.local_micro_batch_size * world_size
    how = f"--local_micro_batch_size {args.local_micro_batch_size} x {world_size} processes"
    how += f" x --nminibatches {minis}" if cuts else ""
    unit = args.micro_batch_size * minis
    given = args.gradient_accumulation_steps
    batch_size = args.batch_size or (unit * given if given else default_batch_size)
    if batch_size % unit:
        refuse("batch_size", str(batch_size), f"a multiple of {unit} ({how})")
    args.gradient_accumulation_steps = batch_size // unit
    if given not in (None, args.gradient_accumulation_steps):
        expected = f"{args.gradient_accumulation_steps} (--batch_size {batch_size} / ({how}))"
        refuse("gradient_accumulation_steps", str(given), expected)
    args.batch_size, args.local_batch_size = batch_size, batch_size // world_size
    if cuts:
        args.mini_batch_size, args.local_mini_batch_size = batch_size // minis, args.local_batch_size // minis


def fill_episodes(args: Any, rows: int) -> None:
    """Fill in how many rows and updates there will be; refuse more than the data can serve."""
    available = rows * args.num_train_epochs
    if args.total_episodes is None:
        args.total_episodes = min(available, (args.num_updates or available) * args.batch_size)
    if args.total_episodes > available:
        found = f"at most {available} ({rows} rows x {args.num_train_epochs} epochs)"
        refuse("total_episodes", str(args.total_episodes), found)
    updates = math.ceil(args.total_episodes / args.batch_size)
    if args.num_updates not in (None, updates):
        refuse("num_updates", str(args.num_updates), f"{updates} ({args.total_episodes} episodes / {args.batch_size})")
    args.num_updates = updates


def derive_updates(args: Any) -> None:
    """Fill in how many episodes and updates there will be, where queries are sampled anew in each pass."""
    if args.total_episodes is None:
        args.total_episodes = args.num_updates * args.batch_size if args.num_updates else 1_000_000
    if args.total_episodes > 10**9:
        refuse("total_episodes", str(args.total_episodes), "at most 1,000,000,000: their order is held in memory")
    updates = args.total_episodes // args.batch_size
    if updates == 0:
        refuse("total_episodes", str(args.total_episodes), f"at least one batch of {args.batch_size}")
    if args.num_updates not in (None, updates):
        refuse("num_updates", str(args.num_updates), f"{updates} ({args.total_episodes} // {args.batch_size})")
    args.num_updates = updates


def drop_revisions(args: Any, *models: str) -> None:
    """Set `<model>_revision` to None where `<model>_path` is not the default: the default revision is of that one."""
    for model in models:
        path, revision = f"{model}_path", f"{model}_revision"
        default = type(args)
        if getattr(args, path) != getattr(default, path) and getattr(args, revision) == getattr(default, revision):
            setattr(args, revision, None)
