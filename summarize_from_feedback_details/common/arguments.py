"""The command line: what every script does before `main`, and how bad input is refused: in one line, exit code 2."""

import errno
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a disk says that takes no more
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a launcher sets all of them


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


def command_line(main: Callable, arguments: type, dropped: dict[str, str] | None = None) -> None:
    """Start a script from its command line: what all of them do before `main`.

    What the terminal or the log file cannot show is replaced (a curly quote in Latin-1), `~` is written out in every
    path, variables that another launch left in the environment are refused, and a full disk is said in one line.

    Args:
        main: takes the arguments.
        arguments: their dataclass; one with a `world_size` can be started as several processes.
        dropped: see `refuse_dropped`.
    """
    import tyro

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    refuse_left_over("world_size" in {field.name for field in fields(arguments)})
    refuse_dropped(sys.argv[1:], dropped or {})
    args = tyro.cli(arguments, use_underscores=True)
    _write_out_home(args)
    try:
        main(args)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise SystemExit(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}") from None


def _write_out_home(args: Any) -> None:
    """Put the home directory in the place of `~`, which shells leave alone in `--output_dir=~/x` and in quotes."""

    def written_out(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(written_out, value))
        if isinstance(value, Path):
            return Path(os.path.expanduser(value))
        # also `name=~/x`, as visualize_tokens.py has it
        return re.sub(r"(?<![^=])~.*", lambda m: os.path.expanduser(m[0]), value) if isinstance(value, str) else value

    for field in fields(args):
        value = getattr(args, field.name)
        if is_dataclass(value):
            _write_out_home(value)
        elif field.name != "truncate_token":
            setattr(args, field.name, written_out(value))


def refuse_left_over(several: bool) -> None:
    """Refuse a launcher's variables that make no whole: an export, or another launch, has left them in the environment.

    Args:
        several: whether this script can be started as several processes.
    """

    def refuse_variable(name: str, expected: str) -> None:  # on any rank: nobody knows which one this is
        print(f"error: {name}: found {os.environ[name]!r} in the environment; expected {expected}", file=sys.stderr)
        sys.exit(2)

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


def refuse_dropped(argv: list[str], dropped: dict[str, str]) -> None:
    """Refuse arguments of the original scripts that are gone, saying what to use in their stead.

    Args:
        argv: the command line without the program, e.g. `sys.argv[1:]`.
        dropped: argument name -> what to use instead.
    """
    for word in argv:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        name = name.removeprefix("no_").replace(".no_", ".")
        if word.startswith("--") and name in dropped:
            refuse(name, "an argument that this version does not have", dropped[name])


def check_sizes(args: Any, positive: tuple[str, ...] = (), at_least_zero: tuple[str, ...] = ()) -> None:
    """Refuse arguments that are not positive (or not at least zero); None passes. `ppo.lam` style names work."""
    for names, ok, expected in (
        (positive, lambda v: math.isfinite(v) and v > 0, "more than 0"),
        (at_least_zero, lambda v: math.isfinite(v) and v >= 0, "at least 0"),
    ):
        for name in names:
            value = args
            for part in name.split("."):
                value = getattr(value, part)
            if value is not None and not ok(value):
                refuse(name, str(value), expected)


def check_batch_sizes(args, world_size: int, default_batch_size: int) -> None:
    """Fill in the batch sizes that were left out; refuse those that contradict each other.

    micro batch (one forward pass) <= batch (one update); `local_` is per process.
    Deviates: the global batch is what stays the same on another number of processes, so it is the default, and
    --gradient_accumulation_steps follows from it (the original kept the accumulation: 1 GPU trained on an eighth).
    """
    if args.world_size not in (None, world_size):
        refuse("world_size", str(args.world_size), f"{world_size}, the number of processes launched")
    args.world_size = world_size
    positive = "local_micro_batch_size gradient_accumulation_steps micro_batch_size local_batch_size batch_size"
    check_sizes(args, positive=tuple(positive.split()))
    micro = args.local_micro_batch_size * world_size
    if args.gradient_accumulation_steps is None:
        batch_size = args.batch_size or (args.local_batch_size or 0) * world_size or default_batch_size
        if batch_size % micro:
            expected = f"a multiple of {micro} (--local_micro_batch_size {args.local_micro_batch_size} x {world_size}"
            refuse("batch_size", str(batch_size), f"{expected} processes)")
        args.gradient_accumulation_steps = batch_size // micro
    local = args.local_micro_batch_size * args.gradient_accumulation_steps
    for name, value in (("micro_batch_size", micro), ("local_batch_size", local), ("batch_size", local * world_size)):
        if getattr(args, name) not in (None, value):
            how = (
                f"micro {args.local_micro_batch_size} x accumulation {args.gradient_accumulation_steps} x {world_size}"
            )
            refuse(name, str(getattr(args, name)), f"{value} ({how} processes)")
        setattr(args, name, value)


def fill_episodes(args, rows: int) -> None:
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


def check_scheduler(args) -> None:
    """Refuse a learning rate schedule that transformers does not know, or that needs more than a name."""
    known = ["linear", "cosine", "constant", "constant_with_warmup"]
    if args.scheduler not in known:
        refuse("scheduler", args.scheduler, f"one of {', '.join(known)}")


def drop_revisions(args: Any, *models: str) -> None:
    """Set `<model>_revision` to None where `<model>_path` is not the default: the default revision is of that one."""
    for model in models:
        path, revision = f"{model}_path", f"{model}_revision"
        default = type(args)
        if getattr(args, path) != getattr(default, path) and getattr(args, revision) == getattr(default, revision):
            setattr(args, revision, None)
