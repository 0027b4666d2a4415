"""What the README and docs/ name exists: files, links, commands, arguments, functions, tests, metrics. Their numbers
are those of the committed reports."""

import ast
import importlib
import itertools
import math
import re
import statistics
import subprocess
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from types import SimpleNamespace

import hello_report
import judge
import numpy as np
import pandas
import pytest
import rlhf_scaling_plot
import scaling_table
import sft_rm_scale
import torch
import yaml
from conftest import ROOT, STAGES
from packaging.requirements import Requirement

import visualize_tokens
from summarize_from_feedback_details import ppo_left_padding, reward, sft, tldr_dataset, toy_tldr
from summarize_from_feedback_details.common import evaluation
from summarize_from_feedback_details.common.check_inputs import TokenIds

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = DOCUMENTS["README.md"]
SCRIPTS = sorted(path.stem for path in STAGES.glob("*.py") if path.stem != "__init__")
MODULES = {name: importlib.import_module(f"summarize_from_feedback_details.{name}") for name in SCRIPTS}
TOOLS = {m.__name__: m for m in (judge, sft_rm_scale, rlhf_scaling_plot, visualize_tokens)}
TRAINERS = [name for name, module in MODULES.items() if hasattr(module.Args(), "save_freq")]
PIPELINE = {"toy_tldr", "tldr_dataset", "sft", "reward", "ppo_left_padding"}  # of hello_world.sh
FOLDERS = (ROOT, STAGES, ROOT / "eval", ROOT / "sbatches")  # where a file may be that is named without its folder
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


def section(document: str, title: str) -> str:
    """Text of a section, up to the next heading of the same level or a higher one."""
    level = title.split()[0]
    parts = re.split(rf"^(#{{1,{len(level)}}} .*)$", DOCUMENTS[document], flags=re.M)
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


def shell_blocks(document: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", DOCUMENTS[document], re.M | re.S)


def prose(document: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```", "", DOCUMENTS[document], flags=re.M | re.S)


def links(document: str) -> list[str]:
    """Targets of the links and figures, but for those in the web."""
    return re.findall(r"\]\((?!http)([^)\s]+)\)", prose(document))


def anchor(heading: str) -> str:
    """As GitHub names a heading.

    >>> anchor("## The N+ details, and `hello_world.sh`")
    'the-n-details-and-hello_worldsh'
    """
    return re.sub(r"[^\w -]", "", heading.lstrip("# ").lower()).replace(" ", "-")


@cache
def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\n") if name and (ROOT / name).exists()]


# ------------------------------------------------------------------------------------------------ files and commands


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    file = r"(?:[\w.-]+/)*[\w.-]+\.(?:py|sh|yaml|toml|md|png|csv)"
    named = re.findall(rf"(?<![\w$./{{}}-]){file}(?![\w.])", "\n".join(shell_blocks(document)))
    for word in (w for text in ticked(prose(document)) for w in expand(text)):
        named += re.findall(rf"(?<![\w./<>-]){file}(?![\w.])", word.removeprefix("./"))
        named += re.findall(r"^(?:[\w.-]+/)+$", word)
    # of tldr_dataset.py in its --output_dir, and of the judge; a file that a cluster has
    named = [n for n in named if n not in {"sft/", "comparisons/", "report.md", "site.sh"}]
    named = [n for n in named if not n.startswith(GENERATED)]
    assert len(named) > 15 or document not in ("README.md", "docs/testing.md", "docs/details.md")
    assert not [n for n in named if not any((folder / n).exists() for folder in FOLDERS)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_exist(document):
    """Files, and headings in them."""
    for link in links(document):
        file, _, heading = link.partition("#")
        path = ((ROOT / document).parent / file).resolve() if file else ROOT / document
        assert path.exists() and path.is_relative_to(ROOT), link
        headings = re.findall(r"^#+ .*$", path.read_text(encoding="utf-8"), re.M) if heading else []
        assert not heading or heading in map(anchor, headings), link


def test_the_readme_is_short_and_links_every_document():
    assert len(README.splitlines()) <= 260
    assert len(DOCUMENTS) > 8 and set(DOCUMENTS) - {"README.md"} <= set(links("README.md"))


def test_the_map_shows_what_is_there():
    lines = re.search(r"^```text\n(.*?)^```", section("README.md", "## The repository"), re.M | re.S)[1].splitlines()
    cells = [(len(line) - len(line.lstrip()), cell) for line in lines for cell in re.split(r"\s{2,}", line.strip())]
    named = {
        indent: {cell for i, cell in cells if i == indent and re.fullmatch(r"[\w./]+", cell)} for indent in (0, 4, 8)
    }
    assert named[8] == {path.stem for path in STAGES.glob("common/*.py")} - {"__init__"}
    assert named[4] == {f"{name}.py" for name in SCRIPTS} | {f"{p.parent.name}/" for p in STAGES.glob("*/__init__.py")}
    assert len(named[0]) > 6 and all((ROOT / name).exists() for name in named[0])


def flags_of(cls, derived: bool = False) -> set[str]:
    """Command line names of a dataclass, nested ones as `ppo.kl_coef`; with `derived` also what is filled in."""
    found, default = set(), cls()
    for field in (f for f in fields(cls) if f.init or derived):
        value = getattr(default, field.name)
        nested = flags_of(type(value)) if is_dataclass(value) else ()
        prefix = field.name.replace("lora_params", "lora")
        found |= {f"{prefix}.{name}" for name in nested} if nested else {field.name}
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
    texts = {f"{document} {i}": block for document in DOCUMENTS for i, block in enumerate(shell_blocks(document))}
    texts |= {f"{document} text": "\n".join(ticked(prose(document))) for document in DOCUMENTS}
    texts["hello_world.sh"] = re.sub(r"(TOY|ROWS|REAL)=\(([^)]*)\)", _one_line, (ROOT / "hello_world.sh").read_text())
    return texts | {name: module.__doc__ for name, module in MODULES.items()}


def _one_line(match: re.Match) -> str:
    return f"{match[1]}=({' '.join(match[2].split())})"


def flags_in_source(path) -> set[str]:
    """Arguments of a script that is not imported here: fields of its `Args`, or what a shell script knows."""
    if path.suffix == ".py":
        classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
        return {field.target.id for c in classes for field in c.body if isinstance(field, ast.AnnAssign)}
    return {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", path.read_text())}


def test_flags_of_the_commands_exist():
    checked = {}
    for where, text in sources_of_commands().items():
        for stage, flags in commands(text):
            for name in TRAINERS if stage == "$STAGE" else [stage]:
                known = flags_of((MODULES | TOOLS)[name].Args)
                for flag in flags:
                    flag = flag.replace("-", "_")
                    assert flag in known or flag.removeprefix("no_") in known, f"{where}: {name}.py --{flag}"
                source = where if where == "hello_world.sh" or where in MODULES else "documents"
                checked.setdefault(source, set()).add(name)
    assert checked["documents"] == set(MODULES) | set(TOOLS)
    assert checked["hello_world.sh"] == PIPELINE | set(TOOLS)


def test_flags_of_other_commands_exist():
    """`sbatches/launch.sh` up to `--`, what follows is sbatch's; the scripts of `benchmark/`."""
    found = []
    for where, text in sources_of_commands().items():
        pattern = r"(sbatches/launch\.sh|benchmark/\w+\.py)([^|;#\n]*)"
        for script, rest in re.findall(pattern, re.sub(r"\\\n\s*", " ", text)) if " " in where else ():
            flags = re.findall(r"\s--([\w.-]+)", rest.split(" -- ")[0])
            assert {flag.replace("-", "_") for flag in flags} <= flags_in_source(ROOT / script), f"{where}: {script}"
            found += [script] * len(flags)
    assert len(found) > 5 and len(set(found)) >= 3


def test_flags_in_the_text_exist():
    known = set().union(*(flags_of(m.Args) for m in (MODULES | TOOLS).values()))
    for path in [*ROOT.glob("sbatches/*.sh"), *ROOT.glob("sbatches/*.sbatch"), *ROOT.glob("benchmark/*.py")]:
        known |= flags_in_source(path)
    for document in DOCUMENTS:
        named = re.findall(r"^--(?:no[_-])?([\w.-]+)", "\n".join(ticked(prose(document))), re.M)
        named = {flag.replace("-", "_") for flag in named} - {"help"}
        assert named <= known, (document, named - known)
        assert len(named) > 7 or document not in ("docs/running.md", "docs/cluster.md", "docs/judge.md")
    rows = table(section("docs/running.md", "## Batch words"))
    sizes = {w for row in rows for c in row for w in ticked(c) if re.search("size|mini", w)}
    sizes = {size.removeprefix("--") for size in sizes}
    known |= set().union(*(flags_of(MODULES[name].Args, derived=True) for name in TRAINERS))
    assert len(sizes) >= 4 and sizes <= known, sizes - known


def test_defaults_named_in_the_text_are_those_of_the_code():
    text = section("docs/running.md", "## Datasets and checkpoints")
    args = (tldr_dataset.Args(), sft.Args(), reward.Args(), ppo_left_padding.Args())
    names = ("sft_dataset", "preference_dataset", "preference_revision", "query_dataset", "label_dataset", "base_model")
    names += ("sft_model_path", "sft_model_revision", "reward_model_path", "reward_model_revision")
    for name in names:
        values = {getattr(a, name) for a in args if hasattr(a, name)}
        assert values and all(f"`{value}`" in text for value in values), name
    rows = {ticked(row[0])[0]: row for row in table(section("docs/running.md", "## Stop and go on"))}
    for flag in ("save_freq", "save_minutes", "keep"):
        number = next(float(name.split()[1]) for name in rows if name.startswith(f"--{flag} "))
        assert all(getattr(a, flag) == number for a in args[1:]), flag


def test_sizes_of_the_paper_are_those_of_the_job_scripts():
    script = "source sbatches/common.sh; for s in sft reward ppo_left_padding; do echo ${BATCH_OF[$s]}; done; "
    script += "for size in 1b 2.8b 6.9b; do rows_of pythia-$size; done"
    settings = {"PATH": "/usr/bin:/bin", "PYTHON": "python"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
    sft_batch, reward_batch, ppo_batch, *rows = done.stdout.splitlines()
    micro, ppo, rollout = zip(*(row.split() for row in rows))
    shown = {row[0].strip("`"): row[1:] for row in table(section("docs/running.md", "## Batch words")) if len(row) == 6}
    assert shown["--batch_size"] == [sft_batch, reward_batch, *[ppo_batch] * 3]
    assert shown["--local_micro_batch_size"] == [micro[0], micro[0], *ppo] and len(set(micro)) == 1
    assert shown["--local_rollout_forward_batch_size"] == ["-", "-", *rollout]
    sizes = zip(*(shown[n] for n in ("--batch_size", "--local_micro_batch_size", "accumulation on 8 GPUs")))
    assert all(int(batch) == 8 * int(micro_batch) * int(steps) for batch, micro_batch, steps in sizes)


def test_memory_is_said_alike():
    """The table of docs/running.md is a part of that of docs/cluster.md, which `benchmark/memory.py` prints."""
    plain = lambda row: [row[0].replace("`", "").replace("reward model", "reward"), *(c.split(":")[0] for c in row[1:])]
    there = [plain(row) for row in table(section("docs/cluster.md", "## Memory"))]
    here = [plain(row) for row in table(section("docs/running.md", "## Hardware"))]
    assert len(here) == 5 and all(row in there for row in here)


def test_shell_and_yaml_parse(tmp_path):
    scripts = [ROOT / n for n in tracked() if n.endswith((".sh", ".sbatch"))] + [ROOT / ".ci/run"]
    for i, block in enumerate(block for document in DOCUMENTS for block in shell_blocks(document)):
        scripts.append(tmp_path / f"block_{i}.sh")
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
    find = lambda words: set(re.findall(r"^(?:[A-Z_]+=\S+ )*make ([\w-]+)", "\n".join(words), re.M))
    named = {document: find([*shell_blocks(document), *ticked(prose(document))]) for document in DOCUMENTS}
    assert {"hello", "test", "toy-seeds"} <= named["README.md"]
    assert set().union(*named.values()) == targets - {"lint", "format"}


def test_settings_of_hello_world_exist():
    script = (ROOT / "hello_world.sh").read_text() + (ROOT / "sbatches/rows_of.sh").read_text()
    find = lambda text: set(re.findall(r"\b([A-Z_]+)=", text))
    named = find("\n".join(row[0] for row in table(section("docs/running.md", "## Settings of hello_world.sh"))))
    toy, real = (
        {"SIZE", "HARD", "KL_COEF", "PPO_EPISODES"},
        {"LORA", "LORA_RANK", "MODEL", "MICRO", "PPO_MICRO", "ROLLOUT", "GPU_GB"},
    )
    rows = {"ROWS", "POSTS", "COMPARISONS"}
    assert {"SEED", "SMOKE", "FRESH", "REPORT", "PRECISION"} | toy | real | rows == named
    assert all(f"${{{name}:-" in script for name in named)
    for text in DOCUMENTS.values():
        assert find("\n".join(word for word in ticked(text) if "hello_world.sh" in word)) <= named


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
    for path in sorted(STAGES.rglob("*.py")):
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


@cache
def names_of_tests() -> set[str]:
    """Names of the functions in the test files."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").glob("test_*.py")]
    return {n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}


DETAILS = {row[0]: row[1:] for row in table(section("docs/details.md", "## Details"))}
DEPARTURES = table(section("docs/details.md", "## Departures from the original code"))


@pytest.mark.parametrize("row", [[n, *r] for n, r in DETAILS.items()] + DEPARTURES, ids=lambda row: row[0])
def test_places_and_tests_of_a_row_exist(row):
    where, tests = places(row[-2]), ticked(row[-1])
    assert where and tests
    for place in where:
        file, function = place.split(":")
        assert function in top_level(file), place
    assert set(tests) <= names_of_tests(), set(tests) - names_of_tests()


def test_every_detail_of_the_code_has_a_row():
    found = [(re.split(r" - |$", text)[0].strip(), place) for text, place in marks("Detail")]
    assert len(found) > 25
    plain = lambda name: re.sub(r" \[\d+\]", "", name)
    rows = {plain(name): places(row[-2]) for name, row in DETAILS.items()}
    assert all(len(row) == 3 and row[0] for row in DETAILS.values())
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_named_in_the_text_exist(document):
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").glob("*.py")), re.M))
    text = DOCUMENTS[document]
    named = {word for word in ticked(text) if re.fullmatch(r"test_\w+", word)}
    assert named <= defined, named - defined
    assert len(named) > 30 or document not in ("docs/details.md", "docs/testing.md")
    assert all((ROOT / word).exists() for word in ticked(text) if re.fullmatch(r"tests/[\w.]+", word))


def test_every_mutation_names_its_file_and_the_tests_that_notice_it():
    """The table of docs/testing.md, whose length the text says."""
    text = section("docs/testing.md", "## Mutations")
    rows = table(text)
    assert f"{len(rows)} mutations" in text and len(rows) > 50
    for file, what, tests in rows:
        assert all((STAGES / name).exists() or (ROOT / name).exists() for name in ticked(file)) and ticked(file), file
        assert what and ticked(tests), what


# ----------------------------------------------------------------------------------------------------------- metrics


@cache
def glossary() -> dict[str, list[str]]:
    """Names as written in the glossary -> the metrics they stand for."""
    return {ticked(row[0])[0]: expand(ticked(row[0])[0]) for row in table(DOCUMENTS["docs/metrics.md"])}


GROUPS = r"(?:train|time|memory|objective|policy|loss|value|eval|validation|test|\*)"


def templates() -> set[str]:
    """Metric names in the sources of the training scripts and of what they share; `*` where a part is filled in."""
    found = set()
    for path in [*(STAGES / f"{name}.py" for name in TRAINERS), *STAGES.glob("common/*.py")]:
        tree = ast.parse(path.read_text())
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
    found = templates() - {"*/*/*", "*/*/rouge/*", "*/name"}  # look-ups by key, not names; an id of the hub
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
    found += evaluation.report_scores("ppo", rows | {"score": [1.0], "reference_score": [0.0]})
    args = SimpleNamespace(
        ppo=ppo_left_padding.PpoHParams(), rollout_engine="hf", non_eos_penalty=True, penalty_reward_value=-1.0
    )
    columns = (torch.zeros(2, 3), torch.zeros(2, 3), torch.randn(2, 3), torch.ones(2))
    rollout = ppo_left_padding.Rollout(torch.arange(2), torch.tensor([[5, 0, 9], [5, 6, 0]]), *columns, columns[0])
    experience = ppo_left_padding.compute_experience(rollout, TokenIds(9, 0, 9), args)
    found += ppo_left_padding.rollout_metrics(experience)
    found += ppo_left_padding.training_metrics(torch.zeros(2, len(ppo_left_padding.STATISTICS)), 0.0)
    assert len(found) > 45 and set(found) <= names, set(found) - names


def test_headline_metrics_are_in_the_glossary():
    names = {name for expanded in glossary().values() for name in expanded}
    rows = table(section("README.md", "## The repository"))
    headlines = {word for row in rows for word in ticked(row[-1]) if "/" in word}
    assert len(headlines) == 5 and headlines <= names


# ---------------------------------------------------------------------------------------------------------- numbers


def read_report(name: str) -> pandas.DataFrame:
    return pandas.read_csv(ROOT / f"docs/images/{name}.csv", index_col="metric")


def shown_numbers(document: str, name: str) -> list[tuple[str, list[str]]]:
    """(metric, numbers of its seeds) of each row between a report's markers; of a printed table one number."""
    marker = f"docs/images/{name}.md"
    blocks = re.findall(rf"^<!-- {marker} -->\n(.*?)^<!-- /{marker} -->$", DOCUMENTS[document], re.S | re.M)
    assert len(blocks) == DOCUMENTS[document].count(f"<!-- {marker} -->")
    found = [(row[0], row[1:]) for row in re.findall(r"^│ (\S+) +│ (\S+) +│$", "\n".join(blocks), re.M)]
    return found + [(ticked(row[0])[-1], row[-3:]) for block in blocks for row in table(block)]


def test_numbers_of_the_toy_world_are_those_of_the_committed_report():
    """Each number of the tables, and of the printed one, which is seed 1."""
    report = (ROOT / "docs/images/toy_seeds.md").read_text().splitlines()
    rows = {row[0]: row[1:] for row in table("\n".join(report))}
    for document, least in (("README.md", 13), ("docs/results.md", 30)):
        shown = shown_numbers(document, "toy_seeds")
        assert len(shown) >= least
        for metric, numbers in shown:
            assert list(numbers) == rows[metric][: len(numbers)] and len(numbers) in (1, 3), (document, metric)
    paper = table(section("docs/results.md", "## The paper's numbers beside ours"))
    names = ("sft/rougeL", "rm/accuracy", "rm/accuracy_cnndm", "sft/win_rate", "ppo/win_rate")
    assert [(ticked(row[0])[0], row[-3:]) for row in paper] == [(name, rows[name]) for name in names]
    args = toy_tldr.Args()
    held_out = f"{args.n_sft_validation} held-out posts, {args.n_comparisons_validation:,} held-out comparisons"
    assert held_out in " ".join(README.split())


def test_numbers_of_the_paper_are_the_published_ones():
    """Those that the figures draw with --paper."""
    published = pandas.read_csv(ROOT / "eval/published_results.csv", dtype=str)
    published = published[published["source"].str.startswith("Huang et al. 2024")]
    series = ("SFT ROUGE-L", "TL;DR", "CNN/DM", "SFT", "PPO")
    for name, row in zip(series, table(section("docs/results.md", "## The paper's numbers beside ours")), strict=True):
        for size, cell in zip(("1b", "2.8b", "6.9b"), row[1:4]):
            found = published[(published["series"] == name) & (published["size"] == size)]
            values = [f"{v} +- {e}" if isinstance(e, str) else v for v, e in zip(found["value"], found["plus_minus"])]
            assert cell == " ".join(values), (name, size)


def test_numbers_of_the_scaling_study_are_those_of_its_figures():
    """The committed table is what `make scaling` writes from them, and each of its numbers is worked out again here."""
    images = ROOT / "eval/images"
    written = scaling_table.scaling_table(
        *map(pandas.read_csv, (images / "sft_rm_scale.csv", images / "rlhf_scaling_plot.csv"))
    )
    assert (images / "scaling_table.md").read_text() == written
    marker = "eval/images/scaling_table.md"
    assert f"<!-- {marker} -->\n{written}<!-- /{marker} -->" in DOCUMENTS["docs/results.md"]
    assert '"$PYTHON" eval/scaling_table.py' in (ROOT / "eval/scaling.sh").read_text()
    rows = {row[0]: row[1:] for row in table(section("docs/results.md", "## The scaling study on the toy world"))}
    finals = pandas.read_csv(images / "sft_rm_scale.csv").query("kind == 'final'")
    judged = pandas.read_csv(images / "rlhf_scaling_plot.csv").query("kind == 'judge' and judge == 'gold'")
    numbers = pandas.concat([finals, judged[judged["update"].isna()]])
    for name, (stage, metric) in scaling_table.SHOWN.items():
        each = {size: {} for size in ("nano", "tiny", "small", "medium")}
        for row in numbers[(numbers["stage"] == stage) & (numbers["metric"] == metric)].itertuples():
            each[row.size][row.seed] = row.value
        values = [[of[seed] for seed in (1, 2, 3)] for of in each.values()]  # three seeds of each size
        values.append([last - first for first, last in zip(values[0], values[-1])])
        for cell, three in zip(rows[name], values, strict=True):
            half = 4.302653 * statistics.stdev(three) / math.sqrt(3)  # Student's t, 2 degrees of freedom, 95 %
            mean = statistics.fmean(three)
            assert cell == f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})", (name, three)


def test_the_documents_are_as_make_toy_seeds_writes_them():
    """The committed reports change nothing; other numbers are put in, and only there."""
    assert hello_report.Args(chains=()).documents == ("README.md", "docs/results.md")
    recipe = re.search(r"^toy-seeds:.*?\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)[0]
    assert "--name toy_seeds$(SUFFIX) --output_dir docs/images" in recipe
    for name in ("toy_seeds", "toy_seeds_bf16", "toy_seeds_lora"):
        numbers, marker = read_report(name), f"docs/images/{name}.md"
        for document in ("README.md", "docs/results.md"):
            text = DOCUMENTS[document]
            assert hello_report.fill_tables(text, marker, numbers) == text
            other = hello_report.fill_tables(text, marker, numbers + 1000)
            changed = [new for old, new in zip(text.splitlines(), other.splitlines(), strict=True) if old != new]
            assert len(changed) == len(shown_numbers(document, name))
            assert hello_report.fill_tables(other, marker, numbers) == text


def test_tables_are_filled_by_hand():
    numbers = pandas.DataFrame({"a": [0.12345, np.nan], "b": [7.0, 2.0]}, index=["x/y", "x/z"])
    text = "<!-- r.md -->\n| | p | a | b |\n|---|---|---|---|\n| words, `x/y` | 9 | 1 | 2 |\n| `x/z` | 0 | 0 |\n"
    text += "│ x/y     │ 0.000           │\nwords\n<!-- /r.md -->\n| `x/y` | 1 | 2 |\n"
    filled = "<!-- r.md -->\n| | p | a | b |\n|---|---|---|---|\n| words, `x/y` | 9 | 0.123 | 7.000 |\n"
    filled += "| `x/z` | - | 2.000 |\n│ x/y     │ 0.123           │\nwords\n<!-- /r.md -->\n| `x/y` | 1 | 2 |\n"
    assert hello_report.fill_tables(text, "r.md", numbers) == filled
    assert hello_report.fill_tables(text, "q.md", numbers) == text
    with pytest.raises(KeyError):
        hello_report.fill_tables(text, "r.md", numbers.drop(index="x/z"))
    with pytest.raises(ValueError, match="3 chains do not fit"):
        hello_report.fill_tables(text, "r.md", numbers.assign(c=0.0))


def test_a_report_is_written_into_its_documents(tmp_path, monkeypatch, capsys):
    """Into those that are there, whole; a row that the report does not have is refused, and the document stays."""
    from test_plots import ppo_run, sft_final, write_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hello_report, "draw_curves", lambda *_: None)
    write_run(tmp_path / "runs", "a_sft", "sft", final=sft_final(0.25), lines=[{"update": 1, "train/sft/loss": 2.0}])
    write_run(tmp_path / "runs", "a_reward", "reward", lines=[{"update": 1, "train/rm/accuracy": 0.6}])
    ppo_run(tmp_path / "runs", "a_ppo")
    for path in tmp_path.glob("runs/*/summary.json"):
        path.write_text(path.read_text().replace("{", '{"wall_clock_seconds": 60, ', 1))
    text = "<!-- out/r.md -->\n| `sft/rougeL` | 0.000 |\n<!-- /out/r.md -->\n"
    (tmp_path / "README.md").write_text(text)
    args = hello_report.Args(chains=("a",), output_dir="out", name="r")
    hello_report.main(args)
    assert (tmp_path / "README.md").read_text() == text.replace("0.000", "0.250")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "out", "runs"]
    (tmp_path / "README.md").write_text(text.replace("sft/rougeL", "sft/rougeX"))
    with pytest.raises(SystemExit) as stopped:
        hello_report.main(args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: --documents: found 'README.md', whose rows do not fit out/r.md ('sft/rougeX')")
    assert "0.000" in (tmp_path / "README.md").read_text()


def test_speed_in_the_readme_is_that_of_the_benchmark():
    text = section("README.md", "## Speed and memory")
    ratios = {row[0]: row[1].strip("*x") for row in table(section("docs/benchmark.md", "## Time"))}
    names = ("PPO, fp32", "RM, each at its better micro batch", "SFT, each at its better micro batch")
    assert re.findall(r"([\d.]+) times", text)[:3] == [ratios[name] for name in names]
    others = [row[1].strip("*x") for row in table(section("docs/benchmark.md", "## Other algorithms"))]
    shown = re.search(r"of DPO\s+([\d.]+), RLOO ([\d.]+) and GRPO ([\d.]+) times", text).groups()
    assert list(shown) == [f"{float(others[i]):.1f}" for i in (0, 2, 3)]
    measured = table((ROOT / "benchmark/results/2026-11-27-amd-epyc/alternatives.md").read_text())
    assert others == [row[3].strip("*x") for row in measured]
    assert [row[2] for row in table(section("docs/benchmark.md", "## Other algorithms"))] == [r[8] for r in measured]
    memory = re.search(r"PPO takes ([\d.]+) of TRL's memory", text)[1]
    assert f"PPO {memory}." in section("docs/benchmark.md", "## Memory")


@pytest.mark.parametrize("name", ["toy_seeds", "toy_seeds_bf16", "toy_seeds_lora"])
def test_each_seed_of_the_toy_world_reaches_what_it_has_to(name):
    """What the pipeline has to show on each of three seeds, held against the numbers that are committed."""
    report = read_report(name)
    assert len(report.columns) == 3
    for seed, row in report.items():
        assert row["sft/rougeL"] >= row["sft/rougeL_shuffled"] + 0.2, seed
        assert abs(row["sft/gold"] - row["sft/reference_gold"]) < 0.2, seed
        assert row["rm/accuracy"] >= (row["rm/blind"] + row["rm/ceiling"]) / 2, seed
        assert row["ppo/gain_in_standard_errors"] > 3 and row["ppo/gold"] > row["sft/gold"], seed
        assert row["ppo/win_rate"] >= row["sft/win_rate"] + 0.15, seed
        assert row["ppo/eos_rate_last"] > 0.95 and row["ppo/first_pass_ratio_error"] < 1e-3, seed
        assert row["ppo/kl_k3_smallest_after_first"] > 0 and 0 < row["ppo/kl_last"] < 100, seed
        assert row.get("ppo/win_rate_gain_low", 1.0) > 0, seed
        assert row.get("ppo/kl_smallest_in_standard_errors", 0.0) > -3, seed


@pytest.mark.parametrize("name", ["toy_seeds_bf16", "toy_seeds_lora"])
def test_the_other_tables_are_their_reports(name):
    report = (ROOT / f"docs/images/{name}.md").read_text().splitlines()
    rows = {row[0]: row[1:] for row in table("\n".join(report))}
    shown = shown_numbers("docs/results.md", name)
    assert len(shown) >= 6 and all(numbers == rows[metric] for metric, numbers in shown)


def test_the_text_counts_the_cases_of_bad_input():
    from test_bad_input import CASES

    assert f"{len(CASES)} such cases are one test, `test_refused`" in DOCUMENTS["docs/testing.md"]


# --------------------------------------------------------------------------------------------- what must not be there


def test_no_machine_paths_no_open_ends_no_large_files():
    open_end = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b.*")
    machine = re.compile(r"(?<![\w.])/(?:root|home|work|Users|scratch|fsx)/\w+")
    faults = []
    for name in sorted({*tracked(), *DOCUMENTS}):
        path = ROOT / name
        if path.stat().st_size >= 500_000:
            faults.append(f"{name}: {path.stat().st_size} bytes")
        if path.suffix in (".png", ".jpg", ".ico", ".pdf", ".npz"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            faults += [f"{name}:{number}: {m[0]}" for m in (*open_end.finditer(line), *machine.finditer(line))]
    assert not faults, "\n".join(faults)


def test_only_one_line_names_the_shared_folder():
    found = [
        (document, line) for document, text in DOCUMENTS.items() for line in text.splitlines() if "../shared" in line
    ]
    assert [document for document, _ in found] == ["docs/testing.md"] and found[0][1].count("../shared") == 1
    assert found[0][1] in section("docs/testing.md", "## Commands")


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
