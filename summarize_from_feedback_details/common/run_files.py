"""The files of a run folder as everybody reads them: stages, figures, report, token viewer and job scripts."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

PIECE = 2**16  # bytes of a file of weights that are read at a time


def read_run(path: Path) -> tuple[dict, dict]:
    """Summary and arguments of a run.

    Raises:
        OSError, ValueError: they are not there, unreadable or of another form.
    """
    summary, args = (json.loads((path / f"{name}.json").read_text()) for name in ("summary", "args"))
    if not isinstance(summary, dict) or "state" not in summary:
        raise ValueError("summary.json holds no state")
    if not isinstance(args, dict):
        raise ValueError("args.json holds no arguments")
    return summary, args


def find_run(path: Path) -> tuple[dict, dict] | None:
    """What `read_run` gives, or None where there is no run that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return read_run(path)
    return None


def newest_first(runs_dir: Path) -> list[Path]:
    """The folders that hold a summary, the one written last first."""
    there = [file for file in runs_dir.glob("*/summary.json") if file.exists()]  # not links to nowhere
    return [file.parent for file in sorted(there, key=lambda file: file.stat().st_mtime, reverse=True)]


def optimises_a_policy(summary: dict, args: dict) -> bool:
    """Whether a run is one of PPO or of another algorithm with its metrics, whatever its script is called."""
    return "objective/scores" in (summary.get("metrics") or {}) or "reward_model_path" in args


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; half a line, which a run that goes on or was killed has written, does not count."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def read_metrics(saved: dict[str, float | None]) -> dict[str, float]:
    """Metrics that JSON has kept as null are not finite."""
    return {name: math.nan if value is None else value for name, value in saved.items()}


def weights_fingerprint(path: str) -> str:
    """A short text that changes with the weights of a local checkpoint; a hub id as it is.

    Of each file 256 pieces are read, evenly spread, so that every large matrix counts; of one below 16 MB all.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).glob("*") if p.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as content:
            for start in (*range(0, size, max(PIECE, size // 256)), max(0, size - PIECE)):
                content.seek(start)
                digest.update(content.read(PIECE))
    return f"weights {digest.hexdigest()[:12]}" if os.path.isdir(path) else path
