"""Run every command of the README and of docs/, as it is written, in a fresh clone. By hand: it takes half an hour.

    python tests/run_documents.py FOLDER                 clone this commit into FOLDER, and run them there
    python tests/run_documents.py FOLDER README.md       those of one document

The blocks of a document share a shell, as they do for a reader. A command that needs what is not here (the hub, a GPU,
a cluster, a server, a run of the reader's own) must be refused in a line that says so. What is not run at all is listed
with its reason.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
NOT_RUN = {  # part of a command -> why
    "make test": "by itself, as the test suite",
    ".venv-bench": "needs `make bench`, which takes over an hour",
    "tensorboard": "a server that stays",
    "tail -f": "waits for ever",
    "squeue": "needs a cluster",
}
OFFLINE = ("offline", "models/sft")  # the hub cannot be reached, or what the command before would have made is missing
REFUSED = {  # part of a command -> what its line says here, one of these
    "accelerate launch --config_file deepspeed.yaml": OFFLINE,
    "$RUN": OFFLINE,
    ".py --lora": OFFLINE,
    ".py --local_micro_batch_size": OFFLINE,
    "MODEL=EleutherAI": OFFLINE,
    "--released": OFFLINE,
    "sbatches/launch.sh": ("sbatch",),
    "sbatch ": ("sbatch",),
    "my_ppo": ("my_ppo",),
    "tail -n 1 runs/pythia": ("No such file",),
}


def commands(document: str) -> list[str]:
    """The commands of a document's blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(document: str, folder: Path) -> list[tuple[str, str, float, str]]:
    """(command, what came of it, seconds, last line) of a document's commands."""
    found, before = [], ["cd " + str(folder), "[ ! -f .venv/bin/activate ] || source .venv/bin/activate"]
    for command in commands(document):
        why = next((reason for part, reason in NOT_RUN.items() if part in command), None)
        if why:
            found.append((command, f"not run: {why}", 0.0, ""))
            continue
        if re.match(r"[A-Z]+=\S*$|[A-Z]+=\"", command):  # a variable for those that follow
            before.append(command)
            found.append((command, "ok", 0.0, ""))
            continue
        start = time.time()
        script = "\n".join([*before, command])
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        said = (done.stdout + done.stderr).strip().splitlines()
        refusal = next((text for part, text in REFUSED.items() if part in command and "--dry-run" not in command), None)
        ok = done.returncode == 0
        if refusal is not None and not ok:
            # whose launcher prints a traceback of its own
            launched = any(part in command for part in ("accelerate launch", "$RUN", "hello_world.sh"))
            ok = any(text in done.stderr + done.stdout for text in refusal)
            ok = ok and (launched or "Traceback" not in done.stderr)
        what = (
            "ok" if done.returncode == 0 else "refused here, as it should be" if ok else f"FAILED ({done.returncode})"
        )
        found.append((command, what, time.time() - start, said[-1] if said else ""))
        print(f"{what}: {command[:90]} ({found[-1][2]:.0f} s) {found[-1][3][:160]}", flush=True)
    return found


def main(folder: Path, documents: list[str]) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    results = [(document, *each) for document in documents for each in run(document, folder)]
    print(f"\n{len(results)} commands")
    for document, command, what, _, last in results:
        if what != "ok":
            print(f"{document}: {what}: {command}\n    {last[:200]}")
    sys.exit(any(what.startswith("FAILED") for _, _, what, _, _ in results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or DOCUMENTS)
