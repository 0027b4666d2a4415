"""What the README names exists: files, tests, functions, arguments, metrics."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT, STAGES

README = (ROOT / "README.md").read_text()


def definitions(pattern: str) -> set[str]:
    trees = (ast.parse(path.read_text()) for path in ROOT.glob(pattern))
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


def test_named_tests_exist():
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 15 and named <= definitions("tests/*.py"), named - definitions("tests/*.py")


def test_named_functions_exist():
    table = README.split("## Details, where they are")[1].split("Departures")[0]
    named = set()
    for row in table.splitlines():
        cells = row.split("|")
        if len(cells) > 3:
            named |= set(re.findall(r"`(?:\w+\.)?([A-Za-z_]+)`", cells[2])) - {"py"}
    assert len(named) > 15 and named <= definitions("summarize_from_feedback_details/*.py")


def test_named_files_exist():
    for path in re.findall(r"`((?:tests|eval|docs|summarize_from_feedback_details)/[\w./]*\.\w+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo_left_padding"])
def test_flags_of_the_commands_exist(stage):
    commands = [
        c
        for c in re.sub(r"\\\n", " ", README + (ROOT / "hello_world.sh").read_text()).splitlines()
        if f"/{stage}.py" in c
    ]
    assert commands
    fields = (STAGES / f"{stage}.py").read_text()
    for command in commands:
        for flag in re.findall(r"--([a-z_]+)", command.split(f"/{stage}.py")[1]):
            assert re.search(rf"^    {flag}: ", fields, re.M), f"{stage}: --{flag}"


def test_glossary_names_every_ppo_metric():
    source = (STAGES / "ppo_left_padding.py").read_text()
    names = set(re.findall(r'"((?:objective|policy|loss|value)/\w+)"', source))
    assert len(names) > 20
    missing = {name for name in names if f"`{name}`" not in README}
    assert not missing


def test_shell_scripts_parse_and_no_machine_paths():
    for script in ("hello_world.sh", ".ci/run"):
        assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for path in (ROOT / name for name in tracked):
        assert path.stat().st_size < 500_000, path
        if path.suffix in (".py", ".md", ".sh", ".toml", ".yaml"):
            assert not re.search(r"/(?:root|home|work)/\w", path.read_text()), path


def test_requirements():
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    assert pins[0] == "torch==2.13.0" and pins[-1] == "-e ."
    assert all("==" in pin for pin in pins[:-1])
