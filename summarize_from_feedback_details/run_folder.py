"""A run is a folder: what a stage was asked, what it measured, how it ended.

    runs/<run_name>/
        args.json          the arguments, derived sizes included
        typed.json         the arguments as they were typed, and fingerprints of the models that they name
        metrics.jsonl      one object per update: {"update": 1, "train/sft/loss": 3.2, ...}
        tensorboard/       the same numbers as TensorBoard events
        tables/*.parquet   sampled responses and evaluation results
        checkpoints/       where the run goes on after a stop (`checkpoints.py`)
        written.json       folders outside this one that the run has written
        summary.json       state (running | interrupted | finished | failed), final metrics, wall clock, size, commit,
                           versions; a run that was killed stays `running`, and nobody holds its lock

Nothing here knows about RLHF: this is the plumbing that the stage scripts would otherwise repeat at length.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy")
SECONDS_BETWEEN_LINES = 10.0  # progress in a log file: at most one line in this time
REQUEUE_ME = 75  # exit code of a run that a signal interrupted and that the same command continues (EX_TEMPFAIL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a disk says that takes no more
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a launcher sets all of them
# arguments that may change when a run goes on, since its results do not depend on them
FREE = {
    *("exp_name", "run_name", "output_dir", "value_output_dir", "track", "wandb_project_name", "wandb_entity"),
    *("push_to_hub", "hf_entity", "hf_repo_id", "hf_repo_revision"),
    *("print_sample_output_freq", "eval_freq", "save_freq", "save_minutes", "keep"),
    *("world_size", "deepspeed", "gradient_accumulation_steps", "gradient_checkpointing", "offload", "shared_prefix"),
    *("local_micro_batch_size", "micro_batch_size", "local_mini_batch_size", "local_batch_size"),
    *("local_rollout_forward_batch_size", "local_eval_batch_size"),
}
BEGUN = {
    "lock",
    "tables",
    "args.json",
    "typed.json",
    *(f".{n}.json.partial" for n in ("args", "typed", "summary")),
}  # of a run killed at its start
_stop = {"wanted": False}  # set by a signal


def stop_wanted() -> bool:
    """Whether a signal asked this process to stop (SIGTERM or SIGUSR1, while a `RunFolder` is entered)."""
    return _stop["wanted"]


def stop_if_wanted() -> None:
    """End the processes where a signal asked any of them to: for long work that starts again from the last checkpoint.

    Called by all ranks together, since one that leaves alone lets the others wait for it.
    """
    from accelerate.utils import gather_object

    if any(gather_object([stop_wanted()])):
        raise SystemExit(REQUEUE_ME)


def leave_group() -> None:
    """Leave torch's process group at the end of a stage, on all ranks.

    Left to the end of the interpreter, gloo's threads sometimes abort a rank, and the launcher then fails a run that
    has finished (https://github.com/pytorch/pytorch/pull/179291).
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def refuse_unwritable(argument: str, path: str, run_name: str | None = None, root: str = "runs") -> None:
    """Refuse a folder to be written that already holds something, or that cannot be created here.

    What the run `run_name` itself has written there may be written again.
    """
    folder = Path(path)
    if run_name:
        run, here = (Path(os.path.realpath(p)) for p in (Path(root) / run_name, folder))
        if here in (run, *run.parents) or run / "checkpoints" in (here, *here.parents):
            refuse(argument, f"'{path}', where the run itself is kept ({Path(root) / run_name})", "another folder")
    if os.path.isdir(folder) and any(folder.iterdir()) and not (run_name and _wrote(Path(root) / run_name, folder)):
        refuse(argument, f"'{path}', which holds another run's results", "a new or empty folder")
    if os.path.exists(folder) and not folder.is_dir():
        refuse(argument, f"'{path}', which is a file", "a folder that can be created")
    if os.path.ismount(folder):
        refuse(argument, f"'{path}', where a file system is mounted", "a folder below it: it is written as a whole")
    refuse_uncreatable(argument, path)


def refuse_uncreatable(argument: str, path: str | Path, file: str = "") -> None:
    """Refuse a file or folder that cannot be made, or a `file` in that folder: it is tried, and nothing is left."""
    if os.environ.get("RANK", "0") != "0":
        return  # rank 0 writes
    expected = "a place where it can be created"
    if str(path).startswith("~"):  # `command_line` has written out those that it knows
        refuse(argument, f"'{path}', and no such home directory", expected)
    typed = Path(path, file).absolute()
    for part in (typed, *typed.parents):
        if os.path.islink(part) and not os.path.exists(part):
            refuse(argument, f"'{path}', and '{part}' is a link to nowhere ('{os.readlink(part)}')", expected)
    real = Path(os.path.realpath(typed))
    parent = next(p for p in real.parents if os.path.exists(p))
    try:  # rights alone do not tell: root may write anywhere, but not in /proc
        with tempfile.TemporaryDirectory(dir=parent, prefix=".try-") as trial:
            # the longest names that will be written there
            partial = Path(trial, real.relative_to(parent)).with_name(f".{real.name}.partial-1234567")
            partial.mkdir(parents=True)
            (partial / "model-00001-of-00001.safetensors").write_bytes(b"x")
    except OSError as error:
        refuse(argument, f"'{path}', and '{_shown(parent)}' cannot be written ({error.strerror})", expected)


def _shown(path: Path) -> Path:
    """Relative to the present folder where it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _wrote(run: Path, folder: Path) -> bool:
    """Whether this run has written this folder: it was noted, and still holds the files that were put there."""
    try:
        files = json.loads((run / "written.json").read_text())[os.path.normpath(folder)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return files == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def sync_folder(path: Path) -> None:
    """Put the names of a folder's files on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str, run: "RunFolder | None" = None) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, which takes the name `path` when the block ends without an error.

    Where `path` is a link, its target is written. With `run`, the folder is first noted as this run's: when the run is
    killed after that and goes on, it may write the folder again; what another run has put there in the meantime stays.

    Raises:
        SystemExit: that other run's results are there.
    """
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (final.with_name(f".{final.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        follow_umask(partial)
        for file in partial.rglob("*"):
            with open(file, "rb") if file.is_file() else contextlib.nullcontext() as handle:
                if handle is not None:
                    os.fsync(handle.fileno())
        if run is not None:
            if final.is_dir() and any(final.iterdir()) and not _wrote(run.path, Path(path)):
                raise SystemExit(
                    f"error: '{path}' now holds another run's results, and they stay; "
                    "start the same command with a new output folder: it goes on from the last checkpoint"
                )
            run.note_written(Path(path), _sizes(partial))
        shutil.rmtree(old, ignore_errors=True)
        if final.is_dir():  # empty, or its writer's own
            final.rename(old)
        partial.rename(final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give everything in a new folder the folder's own rights: safetensors and tempfile let the owner alone read."""
    rights = folder.stat().st_mode
    for path in folder.rglob("*"):
        path.chmod(rights & (0o7777 if path.is_dir() else 0o666))


def _without_nan(content: Any) -> Any:
    """JSON has no NaN and no infinity: null takes their place."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_metrics(saved: dict[str, float | None]) -> dict[str, float]:
    """Metrics of a JSON file; null there is NaN."""
    return {name: math.nan if value is None else value for name, value in saved.items()}


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_whole(path, json.dumps(_without_nan(content), indent=2, default=str, allow_nan=False) + "\n")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of one; a link stays a link."""
    real = Path(os.path.realpath(path))
    partial = real.with_name(f".{real.name}.partial")
    real.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(real)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a full disk does not name the file
        raise


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _flat(args: dict, prefix: str = "") -> dict[str, Any]:
    """Nested arguments as they are typed: {"ppo": {"lam": 1}} -> {"ppo.lam": 1}."""
    flat = {}
    for name, value in args.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _read_run(path: Path) -> tuple[dict, dict] | None:
    """Summary and arguments of a run, or None where they are not there, unreadable or of another form."""
    try:
        summary, args = (json.loads((path / f"{name}.json").read_text()) for name in ("summary", "args"))
    except (OSError, ValueError):
        return None
    return (summary, args) if isinstance(args, dict) and isinstance(summary, dict) and "state" in summary else None


def differences(saved: dict, now: dict) -> dict[str, tuple]:
    """Arguments that change the result and are not those of a saved run: name -> (there, now)."""
    saved, now = _flat(saved), _flat(json.loads(json.dumps(now, default=str)))
    return {k: (saved.get(k), v) for k, v in now.items() if k not in FREE and saved.get(k) != v}


def as_typed(args: Any) -> dict[str, Any]:
    """The arguments before sizes are derived from them, and fingerprints of the models that they name: `typed.json`."""
    models = {k: v for k, v in asdict(args).items() if k in ("base_model", "sft_model_path", "reward_model_path")}
    return asdict(args) | {"models": {k: weights_fingerprint(v) for k, v in models.items()}}


def weights_fingerprint(path: str) -> str:
    """A short text that changes with the weights of a local checkpoint (both ends of each file); a hub id as it is."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).glob("*") if p.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as content:
            digest.update(content.read(1_000_000))
            content.seek(max(0, size - 1_000_000))
            digest.update(content.read())
    return f"weights {digest.hexdigest()[:12]}" if os.path.isdir(path) else path


def choose_run_name(args: Any, stage: str, root: str = "runs") -> str:
    """The run name that was given; else that of an unfinished run with the same arguments, or a new one.

    Call before sizes are derived.
    """
    if args.run_name:
        return args.run_name
    typed = as_typed(args)
    there = [path for path in Path(root).glob("*/summary.json") if path.exists()]  # not links to nowhere
    for path in sorted(there, key=lambda p: p.stat().st_mtime, reverse=True):
        found = _read_run(path.parent)
        unfinished = found is not None and found[0].get("state") != "finished" and found[0].get("stage") == stage
        if unfinished and not differences(_read_typed(path.parent), typed) and not _held(path.parent):
            return path.parent.name
    return f"{args.exp_name}__{args.seed}__{int(time.time())}"


def finished_before(args: Any, stage: str, stamp: int, root: str = "runs") -> dict[str, float] | None:
    """The final metrics where this very run is finished already: there is nothing to do; otherwise None.

    With --push_to_hub its model is pushed, where that has not happened yet. Call before sizes are derived.
    """
    path = Path(root) / args.run_name
    found = _read_run(path)
    if found is None or found[0]["state"] != "finished" or differences(_read_typed(path), as_typed(args)):
        return None
    outputs = [args.output_dir, getattr(args, "value_output_dir", None)]
    if not all(_wrote(path, Path(folder)) for folder in outputs if folder):
        return None
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(path / "checkpoints", ignore_errors=True)  # of a run that was killed at its very end
        print(f"{path} is finished already, with these arguments: nothing to do\nmodel: {args.output_dir}", flush=True)
        pushed = path / "pushed.json"
        if args.push_to_hub and pushed.exists():
            print(f"hub:    pushed before: {' @ '.join(json.loads(pushed.read_text()).values())}", flush=True)
        elif args.push_to_hub:
            push(args, stage, stamp)
    return read_metrics(found[0].get("metrics", {}))


def _read_typed(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((path / "typed.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _held(path: Path) -> bool:
    """Whether a process works in this run's folder."""
    try:
        with open(path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: ranks that look at the same time do not collide
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class RunFolder:
    """The folder of one run; a context manager, so that `summary.json` says how the run ended.

    On ranks other than 0 every method does nothing. While it is entered, SIGTERM and SIGUSR1 no longer end the process:
    `stop_wanted` tells of them.

    Args:
        args: the stage's arguments, a dataclass instance with `run_name` and, where there is tracking, `track`,
            `wandb_project_name`, `wandb_entity`.
        stage: name of the stage, e.g. `sft`.
        is_main: whether this process is rank 0.
        typed: the arguments before sizes were derived, see `as_typed`.
        root: folder of the runs.

    Raises:
        SystemExit: code 2, where another process still works in this folder (see also `refuse_taken`).
    """

    def __init__(self, args: Any, stage: str, is_main: bool = True, typed: dict | None = None, root: str = "runs"):
        self.path, self.typed = Path(root) / args.run_name, typed or asdict(args)
        self.args, self.stage, self.is_main = args, stage, is_main
        self.start, self.seconds_before, self.metrics = time.monotonic(), 0.0, {}
        self.wandb, self.held = None, 0
        self.parameters: int | None = None  # of the trained model, once it is there

    @staticmethod
    def refuse_taken(args: Any, root: str = "runs") -> None:
        """Refuse a run name whose folder must not be written again; call before any model is loaded."""
        path = Path(root) / args.run_name
        if not args.run_name or "/" in args.run_name or args.run_name.startswith("."):
            refuse("run_name", repr(args.run_name), "a plain folder name")
        found = _read_run(path)
        if found is None:
            if os.path.exists(path / "summary.json"):
                refuse("run_name", f"'{path}', whose summary.json or args.json is unreadable", "a new run name")
            if os.path.exists(path) and (not path.is_dir() or {p.name for p in path.iterdir()} - BEGUN):
                refuse("run_name", f"'{path}', which is not the folder of a run", "a new run name")
            return refuse_unwritable("run_name", str(path)) if not os.path.exists(path) else None
        summary, saved = found
        if summary["state"] == "finished":
            refuse("run_name", f"'{path}', which holds a finished run", "a new run name")
        if differ := differences(saved, asdict(args)):
            names = ", ".join(f"--{k} ({there} there, {now} now)" for k, (there, now) in differ.items())
            refuse("run_name", f"'{path}', a run with other arguments: {names}", "a new run name or the same arguments")
        if _held(path):
            refuse("run_name", f"'{path}', a run that still goes on", "a new run name, or to wait")
        if not os.access(path, os.W_OK):
            refuse("run_name", f"'{path}', which cannot be written", "a folder that can be written")

    def __enter__(self) -> "RunFolder":
        _stop["wanted"] = False
        self.old_handlers, self.lock = {}, None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self.old_handlers[number] = signal.signal(number, lambda *_: _stop.update(wanted=True))
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> None:
        if not self.is_main:
            return
        with self.one_line_for_a_full_disk():
            (self.path / "tables").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "a")  # noqa: SIM115 - held until the process ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse("run_name", f"'{self.path}', a run that still goes on", "a new run name, or to wait")
            write_json(self.path / "args.json", asdict(self.args))
            write_json(self.path / "typed.json", self.typed)
            self._write_summary("running")
        if getattr(self.args, "track", False):
            import wandb

            id_file = self.path / "wandb.json"  # the run goes on under the same id
            if not id_file.exists():
                write_json(id_file, {"id": uuid.uuid4().hex[:8]})
            try:
                self.wandb = wandb.init(
                    project=self.args.wandb_project_name,
                    entity=self.args.wandb_entity,
                    name=self.args.run_name,
                    id=json.loads(id_file.read_text())["id"],
                    resume="allow",
                    config=asdict(self.args),
                    dir=str(self.path.resolve()),
                )
            except wandb.errors.Error as error:
                self._write_summary("interrupted")
                why = str(error).strip().splitlines()[0]
                refuse("track", f"no Weights & Biases: {why}", "`wandb login`, WANDB_MODE=offline, or --no_track")

    def _close(self) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.lock is not None:
            self.lock.close()

    def seconds(self) -> float:
        """Wall clock so far, of all processes that worked on this run (what a killed one lost does not count)."""
        return self.seconds_before + time.monotonic() - self.start

    @contextlib.contextmanager
    def one_line_for_a_full_disk(self) -> Iterator[None]:
        from safetensors import SafetensorError  # which stands for an OSError while weights are written

        try:
            yield
        except (OSError, SafetensorError) as error:
            what, why = getattr(error, "filename", None) or self.path, getattr(error, "strerror", None) or error
            raise SystemExit(
                f"error: {what} cannot be written: {why}; cure that and "
                "start the same command again: it goes on from the last checkpoint"
            ) from None

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`, and the same numbers to TensorBoard and W&B."""
        self.metrics.update(metrics)
        self.held = give_back_fragments(self.held)
        if not self.is_main:
            return
        line = {"update": update, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        with self.one_line_for_a_full_disk():
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self._log_to_tensorboard(update, metrics)
        if self.wandb is not None:
            self.wandb.log(metrics, step=update)

    def _log_to_tensorboard(self, update: int, metrics: dict[str, float]) -> None:
        """Append to one file, at once: SummaryWriter's thread and names by the clock would not survive a stop."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        path = self.path / "tensorboard" / "events.out.tfevents.0"
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as file:
            writer = RecordWriter(file)
            if file.tell() == 0:
                writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            for name, value in metrics.items():
                event = Event(wall_time=time.time(), step=update, summary=scalar(name, value))
                writer.write(event.SerializeToString())

    def _log_files(self) -> list[Path]:
        return [p for p in [self.path / "metrics.jsonl", *(self.path / "tensorboard").glob("events.*")] if p.exists()]

    def sync_logs(self) -> dict[str, int]:
        """Put the logs on the disk; returns their lengths in bytes, by name."""
        for path in self._log_files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return {str(path.relative_to(self.path)): path.stat().st_size for path in self._log_files()}

    def reset_logs(self, state: dict | None) -> None:
        """Cut the logs back to a checkpoint's `logs`, `metrics` and `seconds`, or empty them: no line will come twice.

        Call before the first `log`.
        """
        self.metrics = read_metrics(state["metrics"]) if state else {}
        self.seconds_before = state["seconds"] if state else 0.0
        if not self.is_main:
            return
        lengths = state["logs"] if state else {}
        for path in self._log_files():
            length = lengths.get(str(path.relative_to(self.path)))
            if length is None:
                path.unlink()
            else:
                os.truncate(path, length)

    def table(self, name: str, columns: dict[str, list]) -> Path:
        """Write `tables/<name>.parquet` from equally long columns; returns its path."""
        path = self.path / "tables" / f"{name}.parquet"
        if self.is_main:
            import pandas

            frame = pandas.DataFrame(columns)
            with self.one_line_for_a_full_disk():
                partial = path.with_name(f".{path.name}.partial")
                frame.to_parquet(partial)
                partial.replace(path)
            if self.wandb is not None:
                import wandb

                # part of the present step: without `commit=False` the step would run ahead of `log`
                self.wandb.log({f"tables/{name}": wandb.Table(dataframe=frame)}, commit=False)
        return path

    def note_written(self, folder: Path, files: dict[str, int]) -> None:
        """Note in `written.json` that this run is about to write a folder, and the sizes of its files."""
        path = self.path / "written.json"
        noted = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, noted | {os.path.normpath(folder): files})

    def stop_on_bad_numbers(self, update: int, what: str, batch: dict[str, Any]) -> NoReturn:
        """Save the offending batch and stop the run: one line, exit code 1 (every rank saves its own)."""
        import torch

        rank = os.environ.get("RANK", "0")
        path = self.path / f"bad_batch_update_{update}_rank_{rank}.pt"
        self.path.mkdir(parents=True, exist_ok=True)
        torch.save(batch, path)
        raise SystemExit(f"error: {what} at update {update} is not finite; the batch is saved as {path}")

    def interrupted(self) -> None:
        """Write that the run was stopped by a signal and wants to be started again; call when its state is saved."""
        if self.is_main and not self._has_failed():
            self._write_summary("interrupted", requeue=True)

    def _has_failed(self) -> bool:
        """Whether a rank has written why it failed: that stays, since the others then fail in their own ways."""
        return (_read_run(self.path) or ({},))[0].get("state") == "failed"

    def _write_summary(self, state: str, reason: str | None = None, requeue: bool = False) -> None:
        content = {
            "stage": self.stage,
            "run_name": self.args.run_name,
            "state": state,
            "wall_clock_seconds": round(self.seconds(), 1),
            "parameters": self.parameters,
            "commit": _commit(),
            "versions": _versions(),
            "metrics": self.metrics,
        }
        more = ({"reason": reason} if reason else {}) | ({"requeue": True} if requeue else {})
        write_json(self.path / "summary.json", content | more)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._end(kind, error)
        finally:
            self._close()

    def _end(self, kind, error) -> None:
        code = error.code if kind is SystemExit else None
        # a rank that waits for one that has stopped fails in its own way
        stopped = code == REQUEUE_ME or (kind is not None and stop_wanted())
        if not self.is_main:
            # the launcher will end rank 0, which then writes nothing
            if kind is not None and not stopped and self.path.is_dir() and not self._has_failed():
                self._write_summary("failed", f"rank {os.environ.get('RANK')}: {kind.__name__}: {error}")
            return
        reason = str(error) if kind is SystemExit else f"{kind.__name__}: {error}" if kind else None
        try:
            if stopped:
                self.interrupted()
                print(f"interrupted; start the same command again and {self.path} goes on", flush=True)
            elif kind is KeyboardInterrupt or code == 2:  # 2: refused, so nothing happened to the run
                self._write_summary("interrupted")
            elif not kind or not self._has_failed():
                self._write_summary("failed" if kind else "finished", reason)
        except OSError as full:
            print(f"warning: {self.path}/summary.json cannot be written: {full.strerror}", file=sys.stderr, flush=True)
        if self.wandb is not None:
            self.wandb.finish(exit_code=1 if kind else 0)


class Progress:
    """Progress of long work on rank 0: a bar on a terminal, a plain line every ten seconds in a file.

    Args:
        what: what is counted, e.g. `sft updates`.
        total: how many there will be.
        is_main: whether this process is rank 0.
        done: how many were done before.
    """

    def __init__(self, what: str, total: int, is_main: bool = True, done: int = 0):
        self.what, self.total, self.is_main, self.done, self.done_before = what, total, is_main, done, done
        self.start, self.last, self.bar = time.monotonic(), -SECONDS_BETWEEN_LINES, None
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, initial=done)

    def step(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done; `note` (e.g. the loss) stands at the end of the line."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(note)
            self.bar.update(n)
            if self.done >= self.total:
                self.bar.close()
        elif self.is_main and (time.monotonic() - self.last > SECONDS_BETWEEN_LINES or self.done >= self.total):
            spent, self.last = time.monotonic() - self.start, time.monotonic()
            left = spent / (self.done - self.done_before) * (self.total - self.done)
            print(f"{self.what}: {self.done}/{self.total}  {spent:.0f} s, {left:.0f} s left  {note}", flush=True)


def memory_gb(device) -> float:
    """Peak memory of this process in GB: of the GPU, or resident on CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save_model(accelerator, run: RunFolder, wrapped, model, tokenizer, path: str) -> None:
    """Write a standard checkpoint: safetensors, config, tokenizer; loads with the plain Auto classes.

    Args:
        run: the run that writes it.
        wrapped: what `accelerator.prepare` returned; `model`, or a module that holds it as an attribute.
    """
    import torch
    from transformers import GenerationConfig

    state = accelerator.get_state_dict(wrapped) or {}  # ZeRO-3 puts it together on rank 0 only
    prefix = next(
        (f"{name}." for name, child in accelerator.unwrap_model(wrapped).named_children() if child is model), ""
    )
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if state:  # DeepSpeed lists tied weights twice, and rounds the heads that compute in float32
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        state = {name: weight for name, weight in state.items() if name in names}
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "master") and parameter.dtype != torch.float32:
                state[name] = parameter.master
    # the plain class reads a row's reward at its last token that is not this one, so the end-of-text token cannot be it
    inside = tokenizer.pad_token_id < model.config.vocab_size
    model.config.pad_token_id = tokenizer.pad_token_id if inside else None
    if model.can_generate():  # with the ids of the config, and without the base model's habits of sampling
        model.generation_config = GenerationConfig.from_model_config(model.config)
    if accelerator.is_main_process:
        with run.one_line_for_a_full_disk(), atomic_folder(path, run) as folder:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def push(args, stage: str, stamp: int) -> None:
    """Upload the checkpoint to a branch of its own on the hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        revision, repo = _push_to(api, args, stage, stamp)
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__  # what the hub says is not in the first line
        raise SystemExit(
            f"error: the model is in {args.output_dir}, but was not pushed to the hub: {why}; cure that and "
            "start the same command again: it pushes, and does not train again"
        ) from None
    print(f"hub:    {repo} @ {revision}", flush=True)
    write_json(Path("runs") / args.run_name / "pushed.json", {"repo": repo, "revision": revision})


def _push_to(api, args, stage: str, stamp: int) -> tuple[str, str]:
    # the last two parts of a path, since a hub id has no more; the hub allows 96 letters, no `..`, and no `--`
    name = "_".join([part for part in Path(args.base_model).parts if part.strip("./")][-2:])
    name = re.sub(r"([.-])\1+", r"\1", re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII))
    end = f"__{stage}__tldr"
    repo = args.hf_repo_id or name[-(96 - len(end)) :].lstrip(".-") + end
    if "/" not in repo:
        repo = f"{args.hf_entity or api.whoami()['name']}/{repo}"
    revision = args.hf_repo_revision or f"{stage}__{args.seed}__{stamp}"
    api.create_repo(repo, exist_ok=True)
    api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=args.output_dir, revision=revision)
    return revision, repo


@contextlib.contextmanager
def drawing(**settings: Any) -> Iterator[None]:
    """matplotlib with its own defaults and these settings, whatever MPLBACKEND and a matplotlibrc say."""
    os.environ["MPLBACKEND"] = "agg"  # one that is not installed (a notebook's) would refuse the import
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def new_figure(width: float, height: float):
    """A figure of so many inches with a canvas of its own; inside `drawing`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def save_figure(figure, path: str | Path, dpi: int) -> None:
    """Write a PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    write_whole(path, image.getvalue())


def print_table(table) -> None:
    """Print a `rich.table.Table`; in a log file as wide as its words need, so that none is cut."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    for column in table.columns:
        words = " ".join(map(str, [column.header, *column.cells])).split()
        column.min_width = max(map(len, words), default=0)
    Console(width=120).print(table, crop=False)


def on_gpu() -> bool:
    """Whether the scripts compute on a GPU: there is one, and ACCELERATE_USE_CPU does not say otherwise."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def warn_of_busy_cores() -> None:
    """Say that other processes need the cores on which this one has threads: threads that wait for a core spin."""
    import psutil
    import torch

    threads, mine = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if threads == 1 or on_gpu():
        return
    busy = [share / 100 for i, share in enumerate(psutil.cpu_percent(0.2, percpu=True)) if mine is None or i in mine]
    idle = len(busy) - sum(busy)
    if idle < threads - 0.5:
        print(
            f"warning: other processes leave {idle:.1f} of {len(busy)} cores to {threads} threads, which slows all of "
            f"them down many times: start with OMP_NUM_THREADS={max(1, int(idle))}",
            flush=True,
        )


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: else each large tensor is mapped, zeroed and faulted in again.

    glibc's M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = 2 GiB (mallopt(3)), unless the environment sets one of them, or a GPU
    computes. `RunFolder.log` gives back what fragments.

    Also limits what oneDNN, and torch's layer above it, keep of every shape that a product in bf16 ever had: rows of
    other lengths make new ones all the time, some MB each.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")  # read at the first product; with 64, bf16 pairs take half as long again
    own = os.environ.keys() & {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if own or on_gpu():  # beside GPUs, the memory in which models are loaded is wanted back
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where Linux's /proc is not there."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def give_back_fragments(held: int) -> int:
    """Give free memory back once it has grown by a twentieth, since rows of ever new lengths fragment it.

    Args:
        held: what the last call returned; 0 at first.

    Returns:
        Resident bytes to grow from; 0 where memory was given back.
    """
    resident = resident_bytes()
    if not held or resident <= 1.05 * held:
        return held or resident
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return 0


def quiet_libraries() -> None:
    """Keep the libraries' own notices, and their progress bars where there is no terminal, out of the output."""
    import logging

    import datasets
    import transformers

    # DeepSpeed sets its own level when it is imported: a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
