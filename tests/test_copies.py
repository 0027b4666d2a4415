"""One name, one body: stage scripts copy small helpers on purpose, and the copies are the same; each stands alone."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import OFFLINE, ROOT, STAGES

SCRIPTS = ["tldr_dataset.py", "toy_tldr.py", "sft.py", "reward.py", "ppo_left_padding.py"]
PLUMBING = {"run_folder", "checkpoints", "check_inputs", "packed_rows", "dataset_files"}  # nothing of RLHF
OWN = {"main", "check_args", "report", "evaluate_policy", "Args", "read_rows"}  # each stage's own


def top_level(script: str) -> dict[str, str]:
    tree = ast.parse((STAGES / script).read_text())
    return {n.name: ast.unparse(n) for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_same_name_same_body():
    bodies = defaultdict(dict)
    for script in SCRIPTS:
        for name, body in top_level(script).items():
            bodies[name][script] = body
    shared = {name: found for name, found in bodies.items() if len(found) > 1 and name not in OWN}
    assert {"deal", "sample_responses", "train_step", "epoch_order", "model_inputs"} <= set(shared)
    different = [name for name, found in shared.items() if len(set(found.values())) > 1]
    assert not different


def test_long_copies_are_few():
    """A copied helper stays small: what passes 40 lines of code would move to a module."""
    for script in SCRIPTS:
        tree = ast.parse((STAGES / script).read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in (
                "deal",
                "train_step",
                "make_accelerator",
                "sample_responses",
            ):
                code = ast.unparse(ast.Module([n for n in node.body if not _is_docstring(n)], []))
                assert len(code.splitlines()) <= 40, (script, node.name)


def _is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_stages_import_no_other_stage():
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((STAGES / script).read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("summarize_from_feedback_details"):
                assert module.split(".")[1] in PLUMBING, f"{script} imports {module}"


@pytest.mark.parametrize("script", ["sft.py", "reward.py", "ppo_left_padding.py"])
def test_every_argument_is_read(script):
    source = (STAGES / script).read_text()
    tree = ast.parse(source)
    readers = source + "".join((STAGES / f"{name}.py").read_text() for name in PLUMBING)
    # sizes that follow from others are read by name: what contradicts them is refused (test_bad_input.py)
    derived = {"micro_batch_size", "local_mini_batch_size", "mini_batch_size", "local_batch_size", "batch_size"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in ("Args", "PpoHParams"):
            for field in (n.target.id for n in node.body if isinstance(n, ast.AnnAssign)):
                assert field in derived or re.search(rf"args\.(ppo\.)?{field}\b|args, \"{field}\"", readers), (
                    f"{script}: --{field} is read nowhere"
                )


@pytest.mark.parametrize("script", ["sft.py", "reward.py", "ppo_left_padding.py"])
def test_every_argument_has_a_sentence(script):
    for node in ast.parse((STAGES / script).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Args", "PpoHParams"):
            for field, after in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign):
                    assert _is_docstring(after), f"{script}: {field.target.id}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_nothing(script, tmp_path):
    """No file, no socket, no seed, no command line: only definitions."""
    module = f"summarize_from_feedback_details.{script.removesuffix('.py')}"
    state = "(random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())"
    code = (
        "import os, random, socket, sys\n"
        "def no(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "sys.argv = ['x', '--no-such-argument']\n"
        f"import {module}\n"  # libraries may draw random numbers when they are first imported
        "import numpy, torch\n"
        "for name in [n for n in sys.modules if n.startswith('summarize_from_feedback')]: del sys.modules[name]\n"
        "random.seed(1); numpy.random.seed(1); torch.manual_seed(1)\n"
        f"before = {state}\n"
        f"import {module}\n"
        f"assert before == {state}\n"
        "assert not os.listdir('.')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | OFFLINE, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_offline_and_soon(script, tmp_path):
    before = os.times()
    done = subprocess.run([sys.executable, str(STAGES / script), "--help"], cwd=tmp_path, env=os.environ | OFFLINE,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and ("--seed" in done.stdout or "--base" in done.stdout), done.stderr
    # seconds of processor time: what an idle machine takes, also when others work on this one
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10
    assert not list(tmp_path.iterdir())


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
