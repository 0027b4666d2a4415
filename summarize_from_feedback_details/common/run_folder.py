"""A run is a folder: what a stage was asked, what it measured, how it ended.

    runs/<run_name>/
        args.json          the arguments, derived sizes included
        typed.json         the arguments as they were typed, and fingerprints of the models that they name
        metrics.jsonl      one object per update: {"update": 1, "train/sft/loss": 3.2, ...}
        tensorboard/       the same numbers as TensorBoard events
        tables/*.parquet   sampled responses and evaluation results
        checkpoints/       where the run goes on after a stop (`common/checkpoints.py`)
        written.json       folders outside this one that the run has written
        summary.json       state (running | interrupted | finished | failed), final metrics, wall clock, size, commit,
                           versions; a run that was killed stays `running`, and nobody holds its lock

Nothing here knows about RLHF: this is the plumbing that the stage scripts would otherwise repeat at length.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list

from summarize_from_feedback_details.common.arguments import RunArgs, check_sizes, refuse
from summarize_from_feedback_details.common.console import Progress, quiet_libraries
from summarize_from_feedback_details.common.files import refuse_unwritable, write_json, wrote
from summarize_from_feedback_details.common.hub import check_push, push
from summarize_from_feedback_details.common.machine import give_back_fragments
from summarize_from_feedback_details.common.run_files import (
    find_run,
    newest_first,
    read_metrics,
    read_run,
    weights_fingerprint,
)

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy")
REQUEUE_ME = 75  # exit code of a run that a signal interrupted and that the same command continues (EX_TEMPFAIL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# what a run that was killed at its start leaves behind
STARTUP_FILES = {"lock", "tables", "args.json", "typed.json", ".args.json.partial", ".typed.json.partial",
                 ".summary.json.partial"}  # fmt: skip
MODELS = ("base_model", "sft_model_path", "reward_model_path")  # arguments that name a checkpoint
_stop = {"wanted": False}  # set by a signal


def stop_wanted() -> bool:
    """Whether a signal asked this process to stop (SIGTERM or SIGUSR1, while a `RunFolder` is entered)."""
    return _stop["wanted"]


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


def differences(args: Any, saved: dict, now: dict) -> dict[str, tuple]:
    """Arguments that change the result (not `may_change`) and are not those of a saved run: name -> (there, now).

    An argument that the saved run's version did not have yet had its default.
    """
    free = {f.name for f in fields(args) if f.metadata.get("may_change")}
    as_text = lambda given: _flat(json.loads(json.dumps(given, default=str)))
    saved, now = as_text(asdict(type(args)())) | _flat(saved), as_text(now)
    return {k: (saved.get(k), v) for k, v in now.items() if k not in free and saved.get(k) != v}


def args_as_given(args: Any) -> dict[str, Any]:
    """The arguments before sizes are derived from them, and fingerprints of the models that they name: `typed.json`."""
    given, free = asdict(args), {f.name for f in fields(args) if f.metadata.get("may_change")}
    return given | {
        "models": {name: weights_fingerprint(given[name]) for name in MODELS if given.get(name) and name not in free}
    }


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
    """The folder of one run.

        run = RunFolder(args, "sft")
        if run.is_finished():
            return run.final_metrics()
        with run.open(accelerator):
            ...

    While it is open, `summary.json` says how the run ends, and SIGTERM and SIGUSR1 no longer end the process:
    `stop_wanted` tells of them. Only rank 0 writes.

    Args:
        args: the stage's arguments as they were given, a `RunArgs`; gets a `run_name` where it has none: that of an
            unfinished run with the same arguments, or a new one.
        stage: name of the stage, e.g. `sft`.
        root: folder of the runs.
    """

    def __init__(self, args: RunArgs, stage: str, root: str = "runs"):
        quiet_libraries()
        self.args, self.stage, self.root = args, stage, Path(root)
        self.is_main = os.environ.get("RANK", "0") == "0"
        self.started_at, self.start, self.seconds_before = int(time.time()), time.monotonic(), 0.0
        self.args_as_given = args_as_given(args)
        args.run_name = args.run_name or self._unfinished() or f"{args.exp_name}__{args.seed}__{self.started_at}"
        self.metrics, self.wandb, self.held, self.bar = {}, None, 0, None
        self.parameters: int | None = None  # of the trained model, once it is there

    @property
    def path(self) -> Path:
        return self.root / self.args.run_name

    def _unfinished(self) -> str | None:
        """Name of the newest run of this stage that began with these arguments and that nobody works on."""
        for path in newest_first(self.root):
            found = find_run(path)
            unfinished = found and found[0]["state"] != "finished" and found[0].get("stage") == self.stage
            if unfinished and not self._differences(path) and not _held(path):
                return path.name
        return None

    def _differences(self, path: Path) -> dict[str, tuple]:
        return differences(self.args, _read_typed(path), self.args_as_given)

    def is_finished(self) -> bool:
        """Whether this very run is finished already, so that there is nothing to do; says so.

        With --push_to_hub its model is pushed, where that has not happened yet. Call before sizes are derived.
        """
        found, args = find_run(self.path), self.args
        if found is None or found[0]["state"] != "finished" or self._differences(self.path):
            return False
        outputs = [args.output_dir, getattr(args, "value_output_dir", None)]
        if not all(wrote(self.path, Path(folder)) for folder in outputs if folder):
            return False
        if self.is_main:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # of a run that was killed at its very end
            self.say(f"{self.path} is finished already, with these arguments: nothing to do")
            if args.output_dir is not None:
                self.say(f"model: {args.output_dir}")
            pushed = self.path / "pushed.json"
            if args.push_to_hub and pushed.exists():
                print(f"hub:    pushed before: {' @ '.join(json.loads(pushed.read_text()).values())}", flush=True)
            elif args.push_to_hub:
                push(args, self.stage, self.started_at)
        return True

    def final_metrics(self) -> dict[str, float]:
        """The metrics of a finished run."""
        return read_metrics(read_run(self.path)[0].get("metrics", {}))

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def deliver(self, paths: dict[str, Any]) -> None:
        """Say where the results are, and upload the model with --push_to_hub.

        Args:
            paths: what it is -> where it is.
        """
        for what, path in (paths | {"run": self.path}).items():
            self.say(f"{what + ':':7} {path}")
        if self.is_main and self.args.push_to_hub:
            push(self.args, self.stage, self.started_at)

    @staticmethod
    def check(args: RunArgs) -> None:
        """Refuse what cannot work of the arguments that every run has, but for its name."""
        check_sizes(args, positive=("keep",), at_least_zero=("save_freq", "save_minutes"))
        if args.output_dir is not None:
            refuse_unwritable("output_dir", args.output_dir, args.run_name)
        if getattr(args, "value_output_dir", None) is not None:
            refuse_unwritable("value_output_dir", args.value_output_dir, args.run_name)
            value, policy = Path(args.value_output_dir).resolve(), Path(args.output_dir).resolve()
            if value in (policy, *policy.parents) or policy in value.parents:
                found = f"'{args.value_output_dir}', which is, holds or is inside --output_dir"
                refuse("value_output_dir", found, "a folder beside it")
        check_push(args)

    @staticmethod
    def refuse_taken(args: Any, root: str = "runs") -> None:
        """Refuse a run name whose folder must not be written again; call before any model is loaded."""
        path = Path(root) / args.run_name
        if not args.run_name or "/" in args.run_name or args.run_name.startswith("."):
            refuse("run_name", repr(args.run_name), "a plain folder name")
        found = find_run(path)
        if found is None:
            if os.path.exists(path / "summary.json"):
                refuse("run_name", f"'{path}', whose summary.json or args.json is unreadable", "a new run name")
            if os.path.exists(path) and (not path.is_dir() or {p.name for p in path.iterdir()} - STARTUP_FILES):
                refuse("run_name", f"'{path}', which is not the folder of a run", "a new run name")
            return refuse_unwritable("run_name", str(path)) if not os.path.exists(path) else None
        summary, saved = found
        if summary["state"] == "finished":
            refuse("run_name", f"'{path}', which holds a finished run", "a new run name")
        if differ := differences(args, saved, asdict(args)):
            names = ", ".join(f"--{k} ({there} there, {now} now)" for k, (there, now) in differ.items())
            names = names.replace("--lora_params.", "--lora.")
            refuse("run_name", f"'{path}', a run with other arguments: {names}", "a new run name or the same arguments")
        if _held(path):
            refuse("run_name", f"'{path}', a run that still goes on", "a new run name, or to wait")
        if not os.access(path, os.W_OK):
            refuse("run_name", f"'{path}', which cannot be written", "a folder that can be written")

    def open(self, accelerator: Any) -> "RunFolder":
        """Ready for `with`, on all ranks.

        Raises:
            SystemExit: code 2, where another process still works in this folder (see also `refuse_taken`).
        """
        self.is_main = accelerator.is_main_process
        # the time in it may differ between processes
        self.args.run_name = broadcast_object_list([self.args.run_name])[0]
        return self

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
            write_json(self.path / "typed.json", self.args_as_given)
            self._write_summary("running")
        if self.args.track:
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

    def progress(self, what: str, first: int, last: int) -> range:
        """Numbers of the updates to come; each is done with a `log` that has a note."""
        self.bar = Progress(what, last, self.is_main, done=first - 1)
        return range(first, last + 1)

    def log(self, update: int, metrics: dict[str, float], note: str = "") -> None:
        """Append one line to `metrics.jsonl`, and the same numbers to TensorBoard and W&B.

        Args:
            note: what the line of the progress says of this update.
        """
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
        if note:
            self.bar.step(note=note)

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
        return (find_run(self.path) or ({},))[0].get("state") == "failed"

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

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self._end(kind, error)
        finally:
            self._close()

    def _end(self, kind: Any, error: Any) -> None:
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
