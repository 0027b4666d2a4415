"""common/dataset_files.py: the same rows from every container, and faults that name their file, row and column."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import OFFLINE

from summarize_from_feedback_details.common.check_inputs import check_tokens, find_rows, load_rows

PACK = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def post(i: int, **changes) -> dict:
    # text that a reader of csv or json could take for something else
    texts = ["NA", "null", "007", "2020-01-01", "", 'a "quoted", thing', "two\r\nlines", "naïve 🙂", "1e5", "true"]
    texts += ["long " * 30_000]
    row = {"id": str(i), "subreddit": "NaN", "title": "2020-01-01", "post": texts[i % 11], "summary": f"so, {i}"}
    return row | changes


def pair(i: int, **changes) -> dict:
    summaries = [{"text": f" text {i} {name}", "policy": name, "note": None} for name in "ab"]
    info = {"id": str(i), "post": f"post {i}", "title": "t", "subreddit": "s", "article": None, "site": None}
    row = {"info": info, "summaries": summaries, "choice": i % 2, "worker": "w", "batch": "b", "split": "train"}
    return row | {"extra": {"confidence": None}} | changes


ARTICLE = {"id": "c", "post": None, "title": None, "subreddit": None, "article": "news", "site": "cnn"}
NOTED = [{"text": " x", "policy": "a", "note": "hm"}, {"text": " y", "policy": "b", "note": None}]
KINDS = {  # each column and field of the comparisons is null in one split, and something in the other
    "posts": {"train": [post(i) for i in range(20)], "validation": [post(i) for i in range(5, 8)]},
    "pairs": {
        "train": [pair(i) for i in range(6)],
        "validation": [pair(1, info=ARTICLE, summaries=NOTED, extra={"confidence": 7}), pair(2, extra=None)],
    },
    # tokenised rows, as the stages read them
    "tokens": {
        split: [{"query": f"q{i}", "query_token": [1, 2, i], "n_len": 3, "note": note} for i in range(n)]
        for split, n, note in (("train", 4, None), ("validation", 2, {"deep": [None, "text"]}))
    },
}


def arrow(rows: list[dict]) -> bytes:
    table, file = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return file.getvalue().to_pybytes()


def write(folder: Path, container: str, splits: dict[str, list[dict]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if container == "saved":
        datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s, rows in splits.items()}).save_to_disk(folder)
        return str(folder)
    for split, rows in splits.items():
        kind, _, packing = container.partition(".")
        path = folder / f"{split}.{container}"
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif kind == "pandas":
            pandas.DataFrame(rows).to_parquet(path.with_suffix(".parquet"))
        elif kind == "arrow":
            path.write_bytes(arrow(rows))
        elif kind == "shards":  # one of them without a row
            for i, some in enumerate((rows[:1], [], rows[1:])):
                name = folder / f"data/{split}-0000{i}-of-00003.parquet"
                name.parent.mkdir(exist_ok=True)
                datasets.Dataset.from_list(some).to_parquet(name)
        elif kind == "mixed":
            write(folder, "parquet" if split == "train" else "jsonl.gz", {split: rows})
        else:
            if kind in ("csv", "tsv"):
                plain = folder / "plain"
                with plain.open("w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
                    table.writeheader()
                    table.writerows(rows)
                data = plain.read_bytes()
                plain.unlink()
            else:
                lines = "\n".join(map(json.dumps, rows)) + "\n"
                data = {"jsonl": lines, "json": json.dumps(rows, indent=1), "ndjson": lines}[kind].encode()
            path.write_bytes(PACK[packing](data) if packing else data)
    return str(folder)


CONTAINERS = ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "ndjson", "json", "json.gz", "parquet", "arrow", "pandas"]
CONTAINERS += ["shards", "mixed", "saved"]
CASES = [(kind, container) for kind in KINDS for container in CONTAINERS]
CASES += [("posts", container) for container in ("csv", "csv.gz", "tsv", "tsv.bz2")]


@pytest.mark.parametrize("kind, container", CASES)
def test_each_container_gives_the_same_rows(tmp_path, kind, container):
    """Brackets in the folder's name, what editors leave behind and copies: none of them is in the way."""
    folder = tmp_path / "run[1]"
    write(folder, container, KINDS[kind])
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints/train-checkpoint.jsonl").write_text("{torn")
    (folder / "._train.jsonl").write_bytes(b"\0\5\26\7")
    (folder / ".#train.jsonl").symlink_to("me@host.1")
    (folder / "train.jsonl~").write_text("{torn")
    (folder / "train.jsonl.bak").write_text("{torn")
    (folder / "README.md").write_text("What this is.")
    found = find_rows("query_dataset", str(folder))
    assert {split: rows.to_list() for split, rows in found.items()} == KINDS[kind]
    assert found["train"].features == found["validation"].features
    assert found["train"][0] == found["train"][:1:1] | KINDS[kind]["train"][0]  # one by one, too
    assert found["train"][len(found["train"]) - 1] == KINDS[kind]["train"][-1]


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_stages_read_each_container(tmp_path, container):
    folder = write(tmp_path / "a[b]", container, KINDS["tokens"])
    columns = ["query", "query_token", "n_len"]
    found = load_rows("query_dataset", folder, None, "sft", columns, ["train", "validation"])
    assert check_tokens("query_dataset", found, ["query_token"], 10, 99) == {"query_token": 3}
    assert found["train"].with_format("numpy")["query_token"][:].tolist() == [[1, 2, i] for i in range(4)]


def test_splits_are_those_of_load_dataset(tmp_path):
    """By the README, by shards in `data/`, by folders, by files, or all in one."""
    rows = [post(1)]
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "  - {split: train, path: a*}\n  - {split: x, path: b*}\n---\n"
    for name, files in {
        "readme": ["a.jsonl", "b.jsonl"],
        "shards": ["data/train-00000-of-00001.jsonl", "data/validation_cnndm-00000-of-00001.jsonl", "test.jsonl"],
        "folders": ["train/1.jsonl", "valid/1.jsonl", "valid/2.jsonl"],
        "files": ["my_train_1.jsonl", "dev.jsonl", "test-2.jsonl"],
        "one": ["posts.jsonl", "more/posts.jsonl"],
    }.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(rows[0]))
        if name == "readme":
            (tmp_path / name / "README.md").write_text(card)
        found, expected = find_rows("a", str(tmp_path / name)), datasets.load_dataset(str(tmp_path / name))
        assert {split: len(part) for split, part in found.items()} == {s: len(part) for s, part in expected.items()}
        assert len(found) > 1 or name == "one"
    (tmp_path / "readme").rename(tmp_path / "readme[1]")
    assert {s: len(part) for s, part in find_rows("a", str(tmp_path / "readme[1]")).items()} == {"train": 1, "x": 1}


BOM = b"\xef\xbb\xbf"
SAME = {  # name: the same two rows
    "plain": ("train.jsonl", b'{"id": "1"}\n{"id": "2"}\n'),
    "no end": ("train.jsonl", b'{"id": "1"}\n{"id": "2"}'),
    "of Windows": ("train.jsonl", BOM + b'{"id": "1"}\r\n{"id": "2"}\r\n'),
    "blank lines": ("train.jsonl", b'\n{"id": "1"}\n \n\n{"id": "2"}\n\n'),
    "lines in json": ("train.json", BOM + b'{"id": "1"}\n\n{"id": "2"}\n'),
    "a list in json": ("train.json", BOM + b'\r\n [{"id": "1"},\r\n{"id": "2"}]\r\n'),
    "csv": ("train.csv", b"id\n1\n2"),
    "csv of Windows": ("train.csv", BOM + b'"id"\r\n"1"\r\n\r\n"2"\r\n'),
}


@pytest.mark.parametrize("name", SAME)
def test_marks_and_ends_of_lines_are_no_text(tmp_path, name):
    (tmp_path / SAME[name][0]).write_bytes(SAME[name][1])
    assert find_rows("a", str(tmp_path))["train"].to_list() == [{"id": "1"}, {"id": "2"}]


def test_one_saved_split_keeps_its_name(tmp_path):
    rows = datasets.Dataset.from_list([post(1)])
    for name, split in (("validation", "validation"), ("train[:10%]", "train"), (None, "train")):
        datasets.Dataset(rows.data, split=name and datasets.NamedSplit(name)).save_to_disk(tmp_path / split)
        assert list(find_rows("a", str(tmp_path / split))) == [split]


def test_links_are_followed(tmp_path):
    write(tmp_path / "there", "jsonl", {"posts": KINDS["posts"]["train"]})
    (tmp_path / "here").mkdir()
    for split in ("train", "test"):
        (tmp_path / "here" / split).symlink_to(tmp_path / "there")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").symlink_to(tmp_path / "there/posts.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "files")
    for name, expected in (("here", {"train": 20, "test": 20}), ("link", {"train": 20})):
        assert {split: len(rows) for split, rows in find_rows("a", str(tmp_path / name)).items()} == expected


def test_other_files_name_no_split(tmp_path):
    write(tmp_path, "jsonl", {"posts": [post(1)]})
    for name in ("train.log", "test_notes.txt", "eval/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert {split: rows.to_list() for split, rows in find_rows("a", str(tmp_path)).items()} == {"train": [post(1)]}


# ------------------------------------------------------------------------------------------------------------- faults
def lines(*rows) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


MANY = lines(*(post(i % 10) for i in range(3000)))
ARROW = arrow([post(i % 10) for i in range(3000)])


def garbled_parquet() -> bytes:
    """Its footer is whole, but a page points to a fourth of three words."""
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list("abc") * 100}), file, compression="NONE")
    data = bytearray(file.getvalue())
    column = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0)
    end = column.dictionary_page_offset + column.total_compressed_size
    data[end - 4 : end] = b"\xff" * 4
    return bytes(data)


HEADER = b"id,post,summary\n"
CARD = b"---\nconfigs:\n- {config_name: a, data_files: a*}\n- {config_name: b"
FAULTS = {  # name: (files, what the line must say)
    "torn gz": ({"train.jsonl.gz": gzip.compress(MANY)[:-900]}, ["train.jsonl.gz", "end-of-stream"]),
    "torn xz": ({"train.jsonl.xz": lzma.compress(MANY)[:-90]}, ["train.jsonl.xz", "end-of-stream"]),
    "torn bz2": ({"train.jsonl.bz2": bz2.compress(MANY)[:-90]}, ["train.jsonl.bz2", "end-of-stream"]),
    "garbled gz": ({"train.jsonl.gz": gzip.compress(MANY)[:99] + bytes(999)}, ["train.jsonl.gz"]),
    "no gz": ({"train.jsonl.gz": lines(post(1))}, ["train.jsonl.gz", "gzip"]),
    "no xz": ({"train.jsonl.xz": lines(post(1))}, ["train.jsonl.xz", "format not supported"]),
    "torn json": ({"train.json": b'[{"id": "1"}, {"id'}, ["train.json", "line 1 column 16"]),
    "torn parquet": ({"validation.parquet": b"PAR1" + bytes(99)}, ["validation.parquet", "magic bytes"]),
    "empty parquet": ({"train.parquet": b""}, ["train.parquet", "0 bytes"]),
    "garbled parquet": ({"train.parquet": garbled_parquet()}, ["train.parquet", "not in dictionary bounds"]),
    "torn folder": ({"state.json": b"{}", "dataset_info.json": b"{}"}, ["save_to_disk"]),
    "lone surrogate": (
        {"train.jsonl": MANY + lines(post(1)) + lines('{"post": "\\ud83d"}')},
        ["`post` of", "train.jsonl in row 3001", "surrogates not allowed"],
    ),
    "surrogate in a list": (
        {"train.jsonl": lines(pair(0), pair(1, summaries=[{"text": "\ud83d"}]))},
        ["`summaries` of", "train.jsonl in row 1"],
    ),
    "other type": (
        {"train.jsonl": lines(post(0), post(1), post(2, summary=[1]))},
        ["`summary` of", "train.jsonl in row 2", "list<item: int64> after string"],
    ),
    "other type, much later": (
        {"train.jsonl": MANY + lines(post(0), post(1, title=3.5))},
        ["`title` of", "train.jsonl in row 3001", "double after string"],
    ),
    "other type, in a chunk of its own": (
        {"train.jsonl": MANY + lines(post(1, title=3.5))},
        ["`title`", "in row 3000"],
    ),
    "torn arrow": ({"train.arrow": ARROW[:-300]}, ["train.arrow", "a whole arrow file"]),
    "other type in json": ({"train.json": json.dumps([post(0), post(1, id=1)]).encode()}, ["`id` of", "in row 1"]),
    "other type, deep": ({"train.jsonl": lines(pair(0), pair(1, info={"post": 3}))}, ["`info` of", "row 1"]),
    "other type in another file": (
        {"train.jsonl": lines(post(0)), "validation.jsonl": lines(post(0, post=[1]))},
        ["`post` of", "validation.jsonl", "list<item: int64> after string"],
    ),
    "huge number": ({"train.jsonl": lines({"id": 1}, {"id": 10**30})}, ["`id` of", "train.jsonl in row 1"]),
    "not UTF-8": ({"train.jsonl": lines(post(1)) + '{"id": "é"}'.encode("latin-1")}, ["train.jsonl line 2", "utf-8"]),
    "not an object": ({"train.json": b'[{"id": "1"}, 3]'}, ["train.json row 1", "a int"]),
    "long line of csv": ({"train.csv": HEADER + b"1,a,so, so\n"}, ["train.csv line 2", "more or fewer values"]),
    "short line of csv": ({"train.csv": HEADER + b"1,a,b\n2,a\n"}, ["train.csv line 3", "more or fewer values"]),
    "open quote in csv": ({"train.csv": HEADER + b'1,a,"b\n'}, ["train.csv", "unexpected end of data"]),
    "packed and unpacked": (
        {"train.jsonl": lines(post(1)), "train.jsonl.gz": gzip.compress(lines(post(1)))},
        ["train.jsonl.gz", "beside 'train.jsonl'"],
    ),
    "two configurations": ({"README.md": CARD + b", data_files: b*}\n---\n", "b.jsonl": MANY}, ["configurations a, b"]),
    "no such file in the README": (
        {"README.md": b"---\nconfigs:\n- {config_name: a, data_files: gone.jsonl}\n---\n", "a.jsonl": MANY},
        ["gone.jsonl"],
    ),
    "only hidden files": ({".train.jsonl": MANY}, ["data files"]),
    "no data": ({"notes.txt": b"x", "train.jsonl.bak": MANY}, ["no data files"]),
}


def refused(capfd, folder) -> str:
    with pytest.raises(SystemExit) as stop:
        find_rows("query_dataset", str(folder))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "; expected " in error, error
    return error


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_in_one_line(tmp_path, capfd, name):
    files, said = FAULTS[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    error = refused(capfd, tmp_path)
    assert error.startswith("error: --query_dataset: found ")
    for words in said:
        assert words in error, error


@pytest.mark.parametrize("name", ["train.jsonl", "validation.parquet", "test"])
def test_a_link_to_nothing_is_named(tmp_path, capfd, name):
    """Even where other files are there: a split would be missing in silence."""
    (tmp_path / "train-1.jsonl").write_bytes(MANY)
    (tmp_path / name).symlink_to("/no/such/place")
    assert f"{name}', a link to '/no/such/place'" in refused(capfd, tmp_path)


def test_a_circle_of_links_is_named(tmp_path, capfd):
    """Or its rows would come forty times."""
    (tmp_path / "train.jsonl").write_bytes(MANY)
    (tmp_path / "again").symlink_to(tmp_path)
    assert "a link to" in refused(capfd, tmp_path)


@pytest.mark.parametrize("name", ["validation", "validation.jsonl"])
def test_what_may_not_be_read_is_named(capfd, name):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        write(Path(folder), "jsonl", {"train": [post(1)], "validation": [post(2)]})
        if name == "validation":
            Path(folder, name).mkdir()
        os.chmod(Path(folder, name), 0)
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            error = refused(capfd, folder)
        finally:
            os.seteuid(user)
    assert f"/{name}" in error and "ermission denied" in error


@pytest.mark.parametrize("place", ["file", "/proc/none", "/sys/none"])  # where root cannot write, either
def test_an_unwritable_cache_is_named(tmp_path, capfd, monkeypatch, place):
    (tmp_path / "file").write_text("")
    cache = (tmp_path / place) / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    folder = write(tmp_path / "rows", "parquet", KINDS["posts"])
    capfd.readouterr()
    error = refused(capfd, folder)
    assert error.startswith(f"error: HF_HOME: found '{cache}'") and "cannot be written" in error
    assert find_rows("a", write(tmp_path / "lines", "jsonl", KINDS["posts"]))  # which needs no cache


@pytest.mark.parametrize("fault", ["HF_HOME", "--a"])
def test_one_line_is_all_there_is(tmp_path, fault):
    """From a process of its own: of an unwritable HF_HOME, and where the library says the error, too."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.parquet").write_bytes(garbled_parquet())
    (tmp_path / "file").write_text("")
    home = "file/x" if fault == "HF_HOME" else "home"
    module = "summarize_from_feedback_details.common.check_inputs"
    code = f"from {module} import find_rows as f; import sys; f('a', sys.argv[1])"
    env = {k: v for k, v in os.environ.items() if k != "HF_DATASETS_CACHE"} | OFFLINE
    command = [sys.executable, "-c", code, str(tmp_path / "rows")]
    done = subprocess.run(command, env=env | {"HF_HOME": str(tmp_path / home)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {fault}: found "), done.stderr
    assert done.stderr.count("\n") == 1
