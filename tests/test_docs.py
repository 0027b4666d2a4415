"""What the documents name exists: files, commands, arguments, functions, tests, metrics; what must not be, is not."""

import ast
import itertools
import re
import subprocess
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from types import SimpleNamespace

import judge
import numpy as np
import pandas
import pytest
import rlhf_scaling_plot
import sft_rm_scale
import torch
import yaml
from conftest import ROOT, STAGES
from packaging.requirements import Requirement

import visualize_tokens
from summarize_from_feedback_details import ppo_left_padding, reward, sft, tldr_dataset, toy_tldr

README = (ROOT / "README.md").read_text()
MODULES = {m.__name__.split(".")[-1]: m for m in (toy_tldr, tldr_dataset, sft, reward, ppo_left_padding)}
TOOLS = {m.__name__: m for m in (judge, sft_rm_scale, rlhf_scaling_plot, visualize_tokens)}
TRAINERS = ("sft", "reward", "ppo_left_padding")
GENERATED = (
    "models/",
    "checkpoints/",
    "runs/",
    "data/",
    "eval/reports/",
    "eval/images/",
    "dataset_visuals/",
    "tables/",
    "tensorboard/",
)


def section(title: str) -> str:
    """Text of a section of the README, up to the next heading of the same level or a higher one."""
    level = title.split()[0]
    parts = re.split(rf"^(#{{1,{len(level)}}} .*)$", README, flags=re.M)
    assert parts.count(title) == 1, title
    return parts[parts.index(title) + 1]


def table(text: str) -> list[list[str]]:
    """Cells of the rows of the tables in a text, headers left out."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    heads = [i for i, row in enumerate(rows) if set("".join(row)) <= set("-")]
    return [row for i, row in enumerate(rows) if i not in heads and i + 1 not in heads]


def expand(name: str) -> list[str]:
    """a/{b,c} -> a/b, a/c.

    >>> expand("{a,b}/{c,d}")
    ['a/c', 'a/d', 'b/c', 'b/d']
    """
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def shell_blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)


@cache
def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\n") if name and (ROOT / name).exists()]


# ------------------------------------------------------------------------------------------------ files and commands


def test_named_files_exist():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    named = re.findall(r"\]\((?!http)([^)\s]+)\)", prose)
    file = r"(?:[\w.-]+/)*[\w.-]+\.(?:py|sh|yaml|toml|md|png|csv)"
    named += re.findall(rf"(?<![\w$./{{}}-]){file}(?![\w.])", "\n".join(shell_blocks()))
    for word in (w for text in ticked(prose) for w in expand(text)):
        named += re.findall(rf"(?<![\w./]){file}(?![\w.])", word.removeprefix("./"))
        named += re.findall(r"^(?:[\w.-]+/)+$", word)
    scripts = {
        p.name for folder in (STAGES, ROOT / "eval", ROOT / "sbatches") for p in folder.glob("*.*")
    }  # named without their folder
    scripts |= {f"common/{p.name}" for p in (STAGES / "common").glob("*.py")}
    outputs = {"sft/", "comparisons/", "report.md"}  # of tldr_dataset.py in its --output_dir, and of the judge
    named = [n for n in named if n not in scripts | outputs and not n.startswith(GENERATED)]
    assert len(named) > 15
    assert not [n for n in named if not (ROOT / n).exists()]


def flags_of(cls) -> set[str]:
    """Command line names of a dataclass, nested ones as `ppo.kl_coef`."""
    found = set()
    for field, value in zip(fields(cls), vars(cls()).values()):
        nested = flags_of(type(value)) if is_dataclass(value) else ()
        found |= {f"{field.name}.{name}" for name in nested} if nested else {field.name}
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(stage, flags) of each call of a stage in shell text; variables set in it are put in where they are used."""
    text = re.sub(r"\\\n\s*", " ", text)
    for name, plain, listed in re.findall(r'^\s*([A-Z]+)=(?:"([^"\n]*)"|\(([^)]*)\))$', text, re.M):
        text = re.sub(rf'"?\$\{{{name}\[@\]\}}"?|\${name}\b', lambda m, v=plain or listed: v, text)
    found = []
    for line in text.splitlines():
        for stage, rest in re.findall(r"([$\w]+)\.py\b\"?([^|;#]*)", line):
            if stage in MODULES or stage in TOOLS or stage == "$STAGE":
                found.append((stage, re.findall(r"(?:^|\s)--([\w.-]+)", rest)))
    return found


def sources_of_commands() -> dict[str, str]:
    texts = {f"README {i}": block for i, block in enumerate(shell_blocks())}
    texts["hello_world.sh"] = re.sub(r"(TOY|ROWS|REAL)=\(([^)]*)\)", _one_line, (ROOT / "hello_world.sh").read_text())
    return texts | {name: module.__doc__ for name, module in MODULES.items()}


def _one_line(match: re.Match) -> str:
    return f"{match[1]}=({' '.join(match[2].split())})"


def test_flags_of_the_commands_exist():
    checked = {}
    for where, text in sources_of_commands().items():
        for stage, flags in commands(text):
            for name in TRAINERS if stage == "$STAGE" else [stage]:
                known = flags_of((MODULES | TOOLS)[name].Args)
                for flag in flags:
                    flag = flag.replace("-", "_")
                    assert flag in known or flag.removeprefix("no_") in known, f"{where}: {name}.py --{flag}"
                checked.setdefault(where.split()[0], set()).add(name)
    assert checked["README"] == checked["hello_world.sh"] == set(MODULES) | set(TOOLS)


def test_flags_in_the_text_exist():
    known = set().union(*(flags_of(m.Args) for m in (MODULES | TOOLS).values()))
    known |= set(re.findall(r"--(\w+)", (ROOT / "sbatches/launch.sh").read_text()))
    prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    named = {flag for word in ticked(prose) for flag in re.findall(r"^--(?:no_)?([\w.]+)", word)} - {"help"}
    assert len(named) > 7 and named <= known, named - known
    sizes = {
        w for row in table(section("### Batch words")) for c in row for w in ticked(c) if re.search("size|mini", w)
    }
    assert len(sizes) >= 4 and sizes <= known, sizes - known


def test_defaults_named_in_the_readme_are_those_of_the_code():
    text = section("## Datasets and checkpoints")
    args = (tldr_dataset.Args(), sft.Args(), reward.Args(), ppo_left_padding.Args())
    names = ("sft_dataset", "preference_dataset", "preference_revision", "query_dataset", "label_dataset", "base_model")
    names += ("sft_model_path", "sft_model_revision", "reward_model_path", "reward_model_revision")
    for name in names:
        values = {getattr(a, name) for a in args if hasattr(a, name)}
        assert values and all(f"`{value}`" in text for value in values), name


def test_shell_and_yaml_parse(tmp_path):
    scripts = [ROOT / n for n in tracked() if n.endswith((".sh", ".sbatch"))] + [ROOT / ".ci/run"]
    for i, block in enumerate(shell_blocks()):
        scripts.append(tmp_path / f"readme_{i}.sh")
        scripts[-1].write_text(block)
    assert len(scripts) > 6
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in (n for n in tracked() if n.endswith((".yaml", ".yml"))):
        yaml.safe_load((ROOT / name).read_text())
    config = yaml.safe_load((ROOT / "deepspeed.yaml").read_text())
    assert config["deepspeed_config"]["zero_stage"] == 2
    assert (config["num_processes"], config["mixed_precision"]) == (8, "bf16")


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.M))
    assert {"hello", "test", "toy-seeds"} <= named <= targets


def test_settings_of_hello_world_exist():
    script = (ROOT / "hello_world.sh").read_text()
    named = {name for line in README.splitlines() if "hello_world.sh" in line or "MICRO=" in line
             for name in re.findall(r"\b([A-Z_]+)=", line)}  # fmt: skip
    toy, real = {"SIZE", "KL_COEF", "PPO_EPISODES"}, {"MODEL", "MICRO", "PPO_MICRO", "ROLLOUT"}
    assert {"SEED", "SMOKE", "FRESH", "REPORT", "PRECISION"} | toy | real == named
    assert all(f"${{{name}:-" in script for name in named)


# ---------------------------------------------------------------------------------------------- details and departures


@cache
def top_level(name: str) -> dict[str, tuple[int, int]]:
    """Functions and classes of a file -> their lines."""
    path = next(p for p in (STAGES / name, ROOT / "eval" / name) if p.exists())
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {n.name: (n.lineno, n.end_lineno) for n in nodes}


def marks(word: str) -> list[tuple[str, str]]:
    """(text after `Detail:` or `Deviates:`, file.py:function) of each such comment."""
    found = []
    for path in sorted([*STAGES.glob("*.py"), *STAGES.glob("common/*.py")]):
        name = str(path.relative_to(STAGES))
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            mark = re.search(rf"(?:^\s*|# ){word}: (.+)", line)
            if mark:
                inside = [n for n, (first, last) in top_level(name).items() if first <= number <= last]
                assert inside, f"{name}:{number} is in no function"
                found.append((mark[1], f"{name}:{inside[0]}"))
    return found


def places(cell: str) -> list[str]:
    return [place for word in ticked(cell) for place in expand(word)]


DETAILS = {row[0]: row[1:] for row in table(section("## The N+ details").split("### Departures")[0])}
DEPARTURES = table(section("### Departures from the original code"))


@pytest.mark.parametrize("row", [[n, *r] for n, r in DETAILS.items()] + DEPARTURES, ids=lambda row: row[0])
def test_places_and_tests_of_a_row_exist(row):
    where, tests = places(row[-2]), ticked(row[-1])
    assert where and tests
    for place in where:
        file, function = place.split(":")
        assert function in top_level(file), place
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").glob("test_*.py")]
    defined = {n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert set(tests) <= defined, set(tests) - defined


def test_every_detail_of_the_code_has_a_row():
    found = [(re.split(r" - |$", text)[0].strip(), place) for text, place in marks("Detail")]
    assert len(found) > 25
    plain = lambda name: re.sub(r" \[\d+\]", "", name)
    rows = {plain(name): places(row[0]) for name, row in DETAILS.items()}
    missing = [(name, place) for name, place in found if place not in rows.get(plain(name), [])]
    assert not missing
    numbers = dict(re.findall(r"^(.*) (\[\d+\])$", "\n".join(DETAILS), re.M))
    for name, _ in found:  # the paper's numbers agree, where the code has them
        if "[" in name:
            assert numbers.get(plain(name)) == f"[{name.split('[')[1]}", name


def test_every_departure_of_the_code_has_a_row():
    listed = [place for row in DEPARTURES for place in places(row[-2])]
    commented = [place for _, place in marks("Deviates")]
    assert len(commented) > 10
    missing = {place for place in commented if commented.count(place) > listed.count(place)}
    assert not missing
    assert [row[0] for row in DEPARTURES] == [str(i) for i in range(1, len(DEPARTURES) + 1)] and len(DEPARTURES) >= 14


@pytest.mark.parametrize("document", ["README.md", "docs/testing.md"])
def test_tests_named_in_the_text_exist(document):
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").glob("*.py")), re.M))
    text = (ROOT / document).read_text()
    named = {word for word in ticked(text) if re.fullmatch(r"test_\w+", word)}
    assert len(named) > 30 and named <= defined, named - defined
    assert all((ROOT / word).exists() for word in ticked(text) if re.fullmatch(r"tests/[\w.]+", word))


def test_every_mutation_names_its_file_and_the_tests_that_notice_it():
    """The table of docs/testing.md, whose length the text says."""
    text = (ROOT / "docs/testing.md").read_text()
    rows = table(text.split("## Mutations")[1])
    assert f"{len(rows)} mutations" in text and len(rows) > 50
    for file, what, tests in rows:
        assert all((STAGES / name).exists() for name in ticked(file)) and ticked(file), file
        assert what and ticked(tests), what


# ----------------------------------------------------------------------------------------------------------- metrics


@cache
def glossary() -> dict[str, list[str]]:
    """Names as written in the glossary -> the metrics they stand for."""
    return {ticked(row[0])[0]: expand(ticked(row[0])[0]) for row in table(section("## Metrics"))}


GROUPS = r"(?:train|time|memory|objective|policy|loss|value|eval|validation|test|\*)"


def templates() -> set[str]:
    """Metric names in the sources of the stages; `*` where a part is filled in."""
    found = set()
    for stage in TRAINERS:
        tree = ast.parse((STAGES / f"{stage}.py").read_text())
        inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(v.value if isinstance(v, ast.Constant) else "*" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                text = node.value
            else:
                continue
            if re.fullmatch(rf"{GROUPS}(?:/[\w*]+)+", text):
                found.add(text)
    # the scores of SFT come again under other names, see the `replace` calls of its main
    base = [t.replace("/sft/", "/base/") for t in found if "*/sft/" in t]
    shuffled = [t.replace("/sft/", "/shuffled_references/") for t in found if "*/sft/rouge/" in t]
    return found.union(base, shuffled)


def test_every_metric_in_the_code_is_in_the_glossary_and_the_reverse():
    names = {name for expanded in glossary().values() for name in expanded}
    found = templates() - {"*/*/*", "*/*/rouge/*"}  # look-ups by key, not names
    assert len(names) > 80 and len(found) > 55
    patterns = {t: re.compile(t.replace("*", r"\w+")) for t in found}
    assert not [t for t, pattern in patterns.items() if not any(pattern.fullmatch(name) for name in names)]
    assert not [name for name in names if not any(p.fullmatch(name) for p in patterns.values())]


def test_every_reported_metric_is_in_the_glossary():
    """What the functions that make metrics return, on inputs made up here."""
    names = {name for expanded in glossary().values() for name in expanded}
    rows = {"response": ["a b"], "reference": ["a c"], "loss": [1.0], "has_eos": [True], "response_length": [2]}
    found = [*sft.report("validation", rows), *sft.report("test", rows)]
    pairs = SimpleNamespace(column_names=[])
    for split in ("validation", "validation_cnndm"):
        found += reward.report(split, pairs, np.array([1.0, 0.0]), np.array([0.0, 1.0]))[0]
    found += ppo_left_padding.report(rows | {"score": [1.0], "reference_score": [0.0]})
    args = SimpleNamespace(ppo=ppo_left_padding.PpoHParams(), non_eos_penalty=True, penalty_reward_value=-1.0)
    columns = (torch.zeros(2, 3), torch.zeros(2, 3), torch.randn(2, 3), torch.ones(2))
    adv = ppo_left_padding.compute_advantages(torch.tensor([[5, 0, 9], [5, 6, 0]]), *columns, 9, 0, args)
    found += ppo_left_padding.rollout_metrics(adv)
    found += ppo_left_padding.training_metrics(torch.zeros(2, len(ppo_left_padding.STATISTICS)), 0.0)
    assert len(found) > 45 and set(found) <= names, set(found) - names


def test_headline_metrics_are_in_the_glossary():
    names = {name for expanded in glossary().values() for name in expanded}
    headlines = {word for row in table(section("## The pipeline")) for word in ticked(row[-1]) if "/" in word}
    assert len(headlines) == 4 and headlines <= names


def test_numbers_of_the_toy_world_are_those_of_the_committed_report():
    """The table of the README is a part of docs/images/toy_seeds.md; so is the column beside the paper's numbers."""
    report = (ROOT / "docs/images/toy_seeds.md").read_text().splitlines()
    shown = re.search(r"<!-- toy-seeds -->\n(.*?)<!-- /toy-seeds -->", README, re.S)
    lines = shown[1].strip().splitlines() if shown else []
    assert len(lines) > 10 and set(lines) <= set(report), set(lines) - set(report)
    rows = {row[0]: " ".join(row[1:]) for row in table("\n".join(report))}
    ours = [row[-1] for row in table(section("## The paper's numbers beside ours"))]
    names = ("sft/rougeL", "rm/accuracy", "rm/accuracy_cnndm", "sft/win_rate", "ppo/win_rate")
    assert ours == [rows[name] for name in names]


@pytest.mark.parametrize("name", ["toy_seeds", "toy_seeds_bf16"])
def test_each_seed_of_the_toy_world_reaches_what_it_has_to(name):
    """What the pipeline has to show on each of three seeds, held against the numbers that are committed."""
    report = pandas.read_csv(ROOT / f"docs/images/{name}.csv", index_col="metric")
    assert len(report.columns) == 3
    for seed, row in report.items():
        assert row["sft/rougeL"] >= row["sft/rougeL_shuffled"] + 0.2, seed
        assert abs(row["sft/gold"] - row["sft/reference_gold"]) < 0.2, seed
        assert row["rm/accuracy"] >= (row["rm/blind"] + row["rm/ceiling"]) / 2, seed
        assert row["ppo/gain_in_standard_errors"] > 3 and row["ppo/gold"] > row["sft/gold"], seed
        assert row["ppo/win_rate"] >= row["sft/win_rate"] + 0.15, seed
        assert row["ppo/eos_rate_last"] > 0.95 and row["ppo/first_pass_ratio_error"] < 1e-3, seed
        assert row["ppo/kl_k3_smallest_after_first"] > 0 and 0 < row["ppo/kl_last"] < 100, seed
        assert row.get("ppo/kl_smallest_in_standard_errors", 0.0) > -3, seed


def test_the_bf16_table_is_the_report():
    report = (ROOT / "docs/images/toy_seeds_bf16.md").read_text().splitlines()
    lines = re.search(r"^\| in bf16 \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)[1].strip().splitlines()
    assert len(lines) >= 6 and set(lines) <= set(report), set(lines) - set(report)


def test_the_readme_counts_the_cases_of_bad_input():
    from test_bad_input import CASES

    assert f"{len(CASES)} such cases are one test, `test_refused`" in README


# --------------------------------------------------------------------------------------------- what must not be there


def test_no_machine_paths_no_open_ends_no_large_files():
    open_end = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b.*")
    machine = re.compile(r"(?<![\w.])/(?:root|home|work|Users|scratch|fsx)/\w+")
    faults = []
    for name in tracked():
        path = ROOT / name
        if path.stat().st_size >= 500_000:
            faults.append(f"{name}: {path.stat().st_size} bytes")
        if path.suffix in (".png", ".jpg", ".ico", ".pdf"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            faults += [f"{name}:{number}: {m[0]}" for m in (*open_end.finditer(line), *machine.finditer(line))]
    assert not faults, "\n".join(faults)


def test_only_one_line_names_the_shared_folder():
    assert [line for line in README.splitlines() if "../shared" in line] == [
        line for line in section("## Tests").splitlines() if "../shared" in line
    ]
    assert README.count("../shared") == 1


# ------------------------------------------------------------------------------------------------------ dependencies


def test_pins_are_within_the_declared_ranges():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines[0] == "torch==2.13.0" and lines[-2:] == ["-e", "."]
    pins = dict(line.split("==") for line in lines[:-2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(r) for r in project["dependencies"] + sum(project["optional-dependencies"].values(), [])]
    for requirement in wanted:
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} does not admit its pin"
    assert project["requires-python"] == ">=3.11,<3.12" and "Python 3.11" in README
