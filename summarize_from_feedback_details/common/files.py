"""Files and folders that are written whole or not at all; those that cannot be written are refused beforehand."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from summarize_from_feedback_details.common.arguments import refuse


def refuse_unwritable(argument: str, path: str, run_name: str | None = None, root: str = "runs") -> None:
    """Refuse a folder to be written that already holds something, or that cannot be created here.

    What the run `run_name` itself has written there may be written again.
    """
    folder = Path(path)
    if run_name:
        run, here = (Path(os.path.realpath(p)) for p in (Path(root) / run_name, folder))
        if here in (run, *run.parents) or run / "checkpoints" in (here, *here.parents):
            refuse(argument, f"'{path}', where the run itself is kept ({Path(root) / run_name})", "another folder")
    if os.path.isdir(folder) and any(folder.iterdir()) and not (run_name and wrote(Path(root) / run_name, folder)):
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


def wrote(run: Path, folder: Path) -> bool:
    """Whether this run has written this folder: it was noted, and still holds the files that were put there."""
    try:
        files = json.loads((run / "written.json").read_text())[os.path.normpath(folder)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return files == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def atomic_folder(path: str, run: Any = None) -> Iterator[Path]:
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
            if final.is_dir() and any(final.iterdir()) and not wrote(run.path, Path(path)):
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


def sync_folder(path: Path) -> None:
    """Put the names of a folder's files on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_whole(path, json.dumps(_without_nan(content), indent=2, default=str, allow_nan=False) + "\n")


def _without_nan(content: Any) -> Any:
    """JSON has no NaN and no infinity: null takes their place."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
