"""A run is a folder: what a stage was asked, what it measured, how it ended.

    runs/<run_name>/
        args.json          the arguments, derived sizes included
        metrics.jsonl      one object per update: {"update": 1, "train/sft/loss": 3.2, ...}
        tensorboard/       the same numbers as TensorBoard events
        tables/*.parquet   sampled responses and evaluation results
        summary.json       state (running | finished | failed), final metrics, wall clock, size, commit, versions

Nothing here knows about RLHF: this is the plumbing that the stage scripts would otherwise repeat at length.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy")
SECONDS_BETWEEN_LINES = 10.0  # progress in a log file: at most one line in this time


def refuse(argument: str, found: str, expected: str) -> NoReturn:
    """Stop because of a user's mistake: one line on standard error (rank 0 only) and exit code 2.

    Args:
        argument: the argument as it is typed, without dashes, e.g. `sft_model_path`.
        found: what was found there, e.g. `'models/sft' does not exist`.
        expected: what would have been right, e.g. `a folder or hub id of a policy`.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"error: --{argument}: found {found}; expected {expected}", file=sys.stderr, flush=True)
    sys.exit(2)


def refuse_dropped(argv: list[str], dropped: dict[str, str]) -> None:
    """Refuse arguments of the original scripts that are gone, saying what to use in their stead.

    Args:
        argv: the command line without the program, e.g. `sys.argv[1:]`.
        dropped: argument name -> what to use instead.
    """
    for word in argv:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        name = name.removeprefix("no_")
        if word.startswith("--") and name in dropped:
            refuse(name, "an argument that this version does not have", dropped[name])


def refuse_unwritable(argument: str, path: str) -> None:
    """Refuse a folder to be written that already holds something, or that cannot be created here."""
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        refuse(argument, f"'{path}', which holds another run's results", "a new or empty folder")
    if folder.exists() and not folder.is_dir():
        refuse(argument, f"'{path}', which is a file", "a folder that can be created")
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        refuse(argument, f"'{path}', and '{parent}' cannot be written", "a folder that can be created")


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, which takes the name `path` when the block ends without an error."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            with open(file, "rb") if file.is_file() else contextlib.nullcontext() as handle:
                if handle is not None:
                    os.fsync(handle.fileno())
        if final.is_dir():
            final.rmdir()  # only an empty folder can be here: refuse_unwritable saw to it
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)


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


class RunFolder:
    """The folder of one run; a context manager, so that `summary.json` says how the run ended.

    On ranks other than 0 every method does nothing.

    Args:
        args: the stage's arguments, a dataclass instance with `run_name` and, where there is tracking, `track`,
            `wandb_project_name`, `wandb_entity`.
        stage: name of the stage, e.g. `sft`.
        is_main: whether this process is rank 0.
        root: folder of the runs.

    Raises:
        SystemExit: code 2, where another process still works in this folder (see also `refuse_taken`).
    """

    def __init__(self, args: Any, stage: str, is_main: bool = True, root: str = "runs"):
        self.path = Path(root) / args.run_name
        self.args, self.stage, self.is_main = args, stage, is_main
        self.start, self.metrics, self.wandb = time.time(), {}, None
        self.parameters: int | None = None  # of the trained model, once it is there

    @staticmethod
    def refuse_taken(args: Any, root: str = "runs") -> None:
        """Refuse a run name whose folder must not be written again; call before any model is loaded."""
        path = Path(root) / args.run_name
        if not args.run_name or "/" in args.run_name or args.run_name.startswith("."):
            refuse("run_name", repr(args.run_name), "a plain folder name")
        try:
            summary = json.loads((path / "summary.json").read_text())
            saved = json.loads((path / "args.json").read_text())
        except FileNotFoundError:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                refuse("run_name", f"'{path}', which is not the folder of a run", "a new run name")
            return refuse_unwritable("run_name", str(path))
        except ValueError:
            refuse("run_name", f"'{path}', whose summary.json or args.json is unreadable", "a new run name")
        if summary["state"] == "finished":
            refuse("run_name", f"'{path}', which holds a finished run", "a new run name")
        now = json.loads(json.dumps(asdict(args), default=str))
        differ = [k for k in now if saved.get(k) != now[k]]
        if differ:
            names = ", ".join(f"{k} ({saved.get(k)} there, {now[k]} now)" for k in differ)
            refuse("run_name", f"'{path}', a run with other arguments: {names}", "a new run name or the same arguments")

    def __enter__(self) -> "RunFolder":
        if not self.is_main:
            return self
        if self.path.exists():  # an interrupted run with the same arguments: keep what it wrote, start afresh
            aside = next(
                p for i in range(1, 10**6) if not (p := self.path.with_name(f"{self.path.name}.stopped-{i}")).exists()
            )
            with open(self.path / "lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    refuse("run_name", f"'{self.path}', a run that still goes on", "a new run name, or to wait")
                self.path.rename(aside)
            print(f"an interrupted run was here: its files are kept in {aside}", flush=True)
        (self.path / "tables").mkdir(parents=True)
        self.lock = open(self.path / "lock", "a")  # noqa: SIM115 - held until the process ends
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        write_json(self.path / "args.json", asdict(self.args))
        self._write_summary("running")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and --help does not need it

        self.tensorboard = SummaryWriter(str(self.path / "tensorboard"))
        if getattr(self.args, "track", False):
            import wandb

            self.wandb = wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                name=self.args.run_name,
                config=asdict(self.args),
                dir=str(self.path),
            )
        return self

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`, and the same numbers to TensorBoard and W&B."""
        self.metrics.update(metrics)
        if not self.is_main:
            return
        line = {"update": update, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, update)
        if self.wandb is not None:
            self.wandb.log(metrics, step=update)

    def table(self, name: str, columns: dict[str, list]) -> Path:
        """Write `tables/<name>.parquet` from equally long columns; returns its path."""
        path = self.path / "tables" / f"{name}.parquet"
        if self.is_main:
            import pandas

            frame = pandas.DataFrame(columns)
            partial = path.with_name(f".{path.name}.partial")
            frame.to_parquet(partial)
            partial.replace(path)
            if self.wandb is not None:
                import wandb

                # part of the present step: without `commit=False` the step would run ahead of `log`
                self.wandb.log({f"tables/{name}": wandb.Table(dataframe=frame)}, commit=False)
        return path

    def stop_on_bad_numbers(self, update: int, what: str, batch: dict[str, Any]) -> NoReturn:
        """Save the offending batch and stop the run: one line, exit code 1 (every rank saves its own)."""
        import torch

        rank = os.environ.get("RANK", "0")
        path = self.path / f"bad_batch_update_{update}_rank_{rank}.pt"
        self.path.mkdir(parents=True, exist_ok=True)
        torch.save(batch, path)
        raise SystemExit(f"error: {what} at update {update} is not finite; the batch is saved as {path}")

    def _write_summary(self, state: str, reason: str | None = None) -> None:
        content = {
            "stage": self.stage,
            "run_name": self.args.run_name,
            "state": state,
            "wall_clock_seconds": round(time.time() - self.start, 1),
            "parameters": self.parameters,
            "commit": _commit(),
            "versions": _versions(),
            "metrics": self.metrics,
        }
        write_json(self.path / "summary.json", content | ({"reason": reason} if reason else {}))

    def __exit__(self, kind, error, traceback) -> None:
        if not self.is_main:
            if kind is not None and self.path.is_dir():  # the launcher will end rank 0, which then writes nothing
                self._write_summary("failed", f"rank {os.environ.get('RANK')}: {kind.__name__}: {error}")
            return
        reason = str(error) if kind is SystemExit else f"{kind.__name__}: {error}" if kind else None
        self._write_summary("failed" if kind else "finished", reason)
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=1 if kind else 0)
        self.lock.close()


class Progress:
    """Progress of long work on rank 0: a bar on a terminal, a plain line every ten seconds in a file.

    Args:
        what: what is counted, e.g. `sft updates`.
        total: how many there will be.
        is_main: whether this process is rank 0.
    """

    def __init__(self, what: str, total: int, is_main: bool = True):
        self.what, self.total, self.is_main, self.done = what, total, is_main, 0
        self.start, self.last, self.bar = time.time(), 0.0, None
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what)

    def step(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done; `note` (e.g. the loss) stands at the end of the line."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(note)
            self.bar.update(n)
            if self.done >= self.total:
                self.bar.close()
        elif self.is_main and (time.time() - self.last > SECONDS_BETWEEN_LINES or self.done >= self.total):
            spent, self.last = time.time() - self.start, time.time()
            left = spent / self.done * (self.total - self.done)
            print(f"{self.what}: {self.done}/{self.total}  {spent:.0f} s, {left:.0f} s left  {note}", flush=True)


def memory_gb(device) -> float:
    """Peak memory of this process in GB: of the GPU, or resident on CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save_model(accelerator, wrapped, model, tokenizer, path: str) -> None:
    """Write a standard checkpoint: safetensors, config, tokenizer; loads with the plain Auto classes.

    Args:
        wrapped: what `accelerator.prepare` returned; `model`, or a module that holds it as an attribute.
    """
    state = accelerator.get_state_dict(wrapped)
    prefix = next(
        (f"{name}." for name, child in accelerator.unwrap_model(wrapped).named_children() if child is model), ""
    )
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if accelerator.is_main_process:
        with atomic_folder(path) as folder:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def push(args, stage: str, stamp: int) -> None:
    """Upload the checkpoint to a branch of its own on the hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo = args.hf_repo_id or f"{args.base_model.strip('/').replace('/', '_')}__{stage}__tldr"
    if "/" not in repo:
        repo = f"{args.hf_entity or api.whoami()['name']}/{repo}"
    revision = args.hf_repo_revision or f"{stage}__{args.seed}__{stamp}"
    api.create_repo(repo, exist_ok=True)
    api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=args.output_dir, revision=revision)
    print(f"hub:    {repo} @ {revision}", flush=True)


def print_table(table) -> None:
    """Print a `rich.table.Table`; in a log file at a width where nothing is cut."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)


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
