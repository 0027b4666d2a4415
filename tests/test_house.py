"""What makes the code readable in one sitting: short scripts, flat functions, few parameters; true examples."""

import ast
import doctest
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import STAGES

LINES = {"sft.py": 420, "reward.py": 500, "ppo_left_padding.py": 700, "rloo.py": 350, "grpo.py": 350,
         "dpo.py": 350, "online_dpo.py": 350, "best_of_n.py": 280}  # fmt: skip
FILES = sorted(str(path.relative_to(STAGES)) for path in [*STAGES.glob("*.py"), *STAGES.glob("common/*.py")])
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def functions(file: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse((STAGES / file).read_text())) if isinstance(node, ast.FunctionDef)]


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [parameter for parameter in every if parameter.arg not in ("self", "cls")]


def depth(node: ast.AST, inside: int = 0) -> int:
    """How many blocks stand inside each other; an `elif` is no deeper than its `if`.

    >>> depth(ast.parse("for i in a:\\n    if i:\\n        b\\n    elif j:\\n        c"))
    2
    """
    deepest = inside
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            deepest = max(deepest, depth(child, inside + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


@pytest.mark.parametrize("script", LINES)
def test_a_script_is_read_in_one_sitting(script):
    assert len(Path(STAGES / script).read_text().splitlines()) <= LINES[script]
    (main,) = (function for function in functions(script) if function.name == "main")
    assert main.end_lineno - main.lineno < 150


@pytest.mark.parametrize("file", FILES)
def test_functions_are_flat_and_take_few_annotated_parameters(file):
    for function in functions(file):
        assert depth(function) <= 4, function.name
        # a loss over named tensors
        assert len(parameters(function)) <= 6 or function.name == "ppo_losses", function.name
        assert all(parameter.annotation for parameter in parameters(function)), function.name


def test_examples_in_docstrings_are_true():
    names = [file.removesuffix(".py").replace("/", ".") for file in FILES if "__init__" not in file]
    modules = [import_module(f"summarize_from_feedback_details.{name}") for name in names] + [sys.modules[__name__]]
    found = [doctest.testmod(module) for module in modules]
    assert sum(result.attempted for result in found) > 4 and not sum(result.failed for result in found)
