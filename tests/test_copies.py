"""Who imports whom, and what is copied; each argument is read and explained; importing does nothing."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields
from graphlib import TopologicalSorter
from importlib import import_module

import pytest
from conftest import OFFLINE, ROOT, STAGES

PACKAGE = "summarize_from_feedback_details"
TRAINING = ["sft.py", "reward.py", "ppo_left_padding.py", "rloo.py", "grpo.py", "dpo.py", "online_dpo.py"]
SCRIPTS = ["tldr_dataset.py", "toy_tldr.py", *TRAINING, "best_of_n.py"]
COMMON = sorted(f"common/{path.name}" for path in (STAGES / "common").glob("*.py"))
OWN = {"main", "check_args", "report", "evaluate_policy", "Args", "read_rows"}  # each stage's own


def top_level(script: str) -> dict[str, str]:
    tree = ast.parse((STAGES / script).read_text())
    return {n.name: ast.unparse(n) for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def imported(file: str, anywhere: bool = True) -> set[str]:
    """Modules of the package that a file of it imports: `sft`, `common/sampling`; with `anywhere` in functions, too."""
    tree, found = ast.parse((STAGES / file).read_text()), set()
    for node in ast.walk(tree) if anywhere else tree.body:
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.split(".")[0] == PACKAGE:
            path = "/".join(module.split(".")[1:])
            found |= {path} if path not in ("", "common") else {f"{path}/{a.name}".strip("/") for a in node.names}
    return found


def test_same_name_same_body():
    """A short helper may be copied: one name, one body."""
    bodies = defaultdict(dict)
    for file in SCRIPTS + COMMON:
        for name, body in top_level(file).items():
            bodies[name][file] = body
    shared = {name: found for name, found in bodies.items() if len(found) > 1 and name not in OWN}
    different = [name for name, found in shared.items() if len(set(found.values())) > 1]
    assert not different
    long = [name for name, found in shared.items() if len(next(iter(found.values())).splitlines()) > 10]
    assert not long


@pytest.mark.parametrize("file", SCRIPTS + COMMON)
def test_nobody_imports_a_script(file):
    """Scripts stand alone on `common`, which knows nothing of a particular stage."""
    assert COMMON and all(name.startswith("common/") for name in imported(file))


def test_no_import_goes_round_in_a_circle():
    """Also none that is put off into a function."""
    graph = {file.removesuffix(".py"): imported(file) for file in SCRIPTS + COMMON}
    assert sum(map(len, graph.values())) > 50
    TopologicalSorter(graph).prepare()  # CycleError


def test_each_module_says_in_a_sentence_what_it_is_for():
    for file in COMMON:
        tree = ast.parse((STAGES / file).read_text())
        assert not tree.body or re.match(r"[A-Z].{20,250}?[.:]", ast.get_docstring(tree), re.S), file


def _is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@pytest.mark.parametrize("script", [*TRAINING, "best_of_n.py"])
def test_every_argument_is_read(script):
    source = (STAGES / script).read_text()
    tree = ast.parse(source)
    readers = source + "".join((STAGES / file).read_text() for file in COMMON)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in ("Args", "PpoHParams")]
    classes += [
        n for n in ast.parse((STAGES / "common/arguments.py").read_text()).body if getattr(n, "name", "") == "RunArgs"
    ]
    names = {n.target.id for cls in classes for n in cls.body if isinstance(n, ast.AnnAssign)}
    module = import_module(f"{PACKAGE}.{script.removesuffix('.py')}")
    assert {f.name for f in fields(module.Args)} <= names  # those that are inherited, too
    for field in names:
        assert re.search(rf"args\.(ppo\.)?{field}\b|args, \"{field}\"", readers), f"{script}: --{field} is read nowhere"


@pytest.mark.parametrize("script", [*TRAINING, "best_of_n.py"])
def test_every_argument_has_a_sentence(script):
    bodies = ast.parse((STAGES / script).read_text()).body, ast.parse((STAGES / "common/arguments.py").read_text()).body
    for node in (n for body in bodies for n in body):
        if isinstance(node, ast.ClassDef) and node.name in ("Args", "PpoHParams", "RunArgs"):
            for field, after in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign):
                    assert _is_docstring(after), f"{script}: {field.target.id}"


def test_importing_does_nothing(tmp_path):
    """No file, no socket, no seed, no command line: only definitions. One process imports all, one after the other."""
    modules = [f"{PACKAGE}.{script.removesuffix('.py')}" for script in SCRIPTS]
    state = "(random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())"
    code = (
        "import importlib, os, random, socket, sys\n"
        "def no(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "sys.argv = ['x', '--no-such-argument']\n"
        f"for module in {modules}: importlib.import_module(module)\n"  # libraries may draw numbers when first imported
        "import numpy, torch\n"
        f"for module in {modules}:\n"
        "    for name in [n for n in sys.modules if n.startswith('summarize_from_feedback')]: del sys.modules[name]\n"
        "    random.seed(1); numpy.random.seed(1); torch.manual_seed(1)\n"
        f"    before = {state}\n"
        "    importlib.import_module(module)\n"
        f"    assert before == {state}, module\n"
        "    assert not os.listdir('.'), module\n"
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
