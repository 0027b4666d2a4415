"""Do two versions of the code compute the same bits? For refactorings, which may change nothing that a run produces.

    python tests/same_results.py HEAD~1               the working tree beside a commit (two minutes on 2 cores)
    python tests/same_results.py v1.0 HEAD

Each version runs the toy world's smoke chain on one process and one thread, in a folder of its own; then weights,
configurations, metrics and tables of every stage are compared. Exit code 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
SMOKE = {"SMOKE": "1", "REPORT": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
CLOCKS = ("time/", "memory/", "rows_per_second")  # what no two runs share


def check_out(revision: str | None, folder: Path) -> None:
    """The files of a commit; of the working tree where there is none."""
    folder.mkdir()
    if revision:
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        return
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def start(folder: Path) -> subprocess.Popen:
    """Begin the smoke chain of the version in this folder; its output goes to `<folder>.log`."""
    environment = os.environ | SMOKE | {"PYTHON": sys.executable, "PYTHONPATH": str(folder)}
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(["./hello_world.sh"], cwd=folder, env=environment, stdout=log, stderr=log)


def without_clocks(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith(CLOCKS)}


def results(folder: Path) -> dict[str, object]:
    """What the runs in a folder have produced: path, or path and update -> something that can be compared."""
    found: dict[str, object] = {}
    for path in sorted(p for part in ("models", "data") for p in (folder / part).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            content = without_clocks(flat(json.loads(path.read_text())))
            found |= {f"{name} {key}": value for key, value in content.items()}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for run in sorted((folder / "runs").iterdir()):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            metrics = without_clocks(json.loads(line))
            found |= {f"runs/{run.name} update {metrics['update']} {name}": value for name, value in metrics.items()}
        final = without_clocks(json.loads((run / "summary.json").read_text())["metrics"])
        found |= {f"runs/{run.name} summary {name}": value for name, value in final.items()}
        for table in sorted((run / "tables").glob("*.parquet")):
            frame = pandas.read_parquet(table)
            found |= {f"runs/{run.name} {table.name} {column}": frame[column].tolist() for column in frame}
    return found


def flat(content: object, prefix: str = "") -> dict[str, object]:
    """Nested JSON -> `a.b.0` -> value."""
    if not isinstance(content, dict | list):
        return {prefix: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return {key: v for k, value in items for key, v in flat(value, f"{prefix}.{k}" if prefix else str(k)).items()}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """What is not the same in two results, a line each."""
    missing = object()
    lines = []
    for name in sorted(one.keys() | other.keys()):
        there, here = one.get(name, missing), other.get(name, missing)
        if there is missing or here is missing:
            lines.append(f"{name}: only in the {'second' if there is missing else 'first'}")
        elif repr(there) != repr(here):  # NaN is the same as NaN
            lines.append(f"{name}: {str(there)[:60]} | {str(here)[:60]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="commit")
    parser.add_argument("second", nargs="?", help="commit (default: the working tree)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, "first"), Path(scratch, "second")]
        for revision, folder in zip((args.first, args.second), folders):
            check_out(revision, folder)
        runs = [start(folder) for folder in folders]
        for run, folder in zip(runs, folders):
            if run.wait() != 0:
                sys.exit(
                    f"error: {folder.name}: exit code {run.returncode}\n{Path(f'{folder}.log').read_text()[-3000:]}"
                )
        one, other = map(results, folders)
    lines = differences(one, other)
    print("\n".join(lines[:100]))
    print(
        f"{len(one)} values of {args.first}, {len(other)} of {args.second or 'the working tree'}: {len(lines)} differ"
    )
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
