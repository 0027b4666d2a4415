"""Rows of a dataset from a folder, as people have it: the same rows give the same dataset from every container.

    *.jsonl *.ndjson *.json *.csv *.tsv, also .gz .xz .bz2    read row by row, so that a fault names its row and column
    *.parquet *.arrow                                         memory-mapped, by way of the cache of `datasets`
    a folder of `save_to_disk`                                memory-mapped

Which file belongs to which split is the rule of `datasets.load_dataset`: the README's configuration, else names of
folders and files. Hidden files and folders are left out. Columns get one type in all splits, whatever is null in one.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from summarize_from_feedback_details.common.arguments import reason, refuse

EXPECTED = "a folder of parquet, jsonl or csv files or of `save_to_disk`, or a hub id"
DATA_FILE = re.compile(r"\.(?:(jsonl|ndjson|json|csv|tsv)(\.gz|\.xz|\.bz2)?|parquet|arrow)$")
OPEN = {None: open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
FAULTS = (ValueError, TypeError, OverflowError)  # of pyarrow, too
CHUNK = 1000  # rows that are Python objects at a time


def refuse_unwritable_cache() -> None:
    """Refuse a cache of `datasets` that cannot be written: the library's own error blames the dataset."""
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(cache, os.W_OK) else "not writable"
    except OSError as error:
        why = str(error)
    if why:
        found = f"'{cache}' for the cache of the library datasets, which cannot be written ({why})"
        refuse("HF_HOME", found, "a folder that can be written in HF_HOME or HF_DATASETS_CACHE")


def assign_splits(names: list[str]) -> dict[str, list[str]]:
    """Files of each split by the rules of `datasets.load_dataset`, which does not follow links to folders itself.

    Args:
        names: paths below the dataset's folder.
    """
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    found = {str(split): [] for split in SPLIT_KEYWORDS}
    for name in names:
        if shard := re.fullmatch(r"data/([^/]+)-\d{5}-of-\d{5}.*", name):
            found.setdefault(shard[1], []).append(name)
    for parts in (slice(None, -1), slice(-1, None)):  # names of folders, then those of files
        for split, words in SPLIT_KEYWORDS.items() if not any(found.values()) else ():
            word = re.compile(rf"(.*[{NON_WORDS_CHARS}])?({'|'.join(words)})([{NON_WORDS_CHARS}].*)?")
            found[str(split)] += [name for name in names if any(map(word.fullmatch, name.split("/")[parts]))]
    return {split: names for split, names in found.items() if names} or {"train": names}


def find_files(argument: str, folder: str) -> dict[str, list[str]]:
    """The data files of each split.

    Returns:
        split -> paths
    """
    from datasets.data_files import DataFilesDict, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    def refuse_folder(error: OSError) -> None:  # which `os.walk` would leave out
        refuse(argument, f"'{error.filename}', which cannot be read: {error.strerror}", EXPECTED)

    names = []
    for root, folders, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for path in (os.path.join(root, name) for name in files if not name.startswith(".")):
            if not os.path.exists(path):
                refuse(argument, f"'{path}', a link to '{os.readlink(path)}'", "a link to what exists")
            names += [os.path.relpath(path, folder)] if DATA_FILE.search(path) else []
    if not names:
        found = "which holds no data files" if os.listdir(folder) else "an empty folder"
        refuse(argument, f"'{folder}', {found}", EXPECTED)
    card = Path(folder, "README.md")
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data) if card.is_file() else {}
        if len(configs) > 1:
            refuse(argument, f"'{folder}', whose README names the configurations {', '.join(configs)}", "one of them")
        if given := next(iter(configs.values()), {}).get("data_files"):
            splits = DataFilesDict.from_patterns(sanitize_patterns(given), glob.escape(os.path.abspath(folder)))
        else:
            splits = assign_splits(sorted(names))
    except Exception as error:
        refuse(argument, f"'{folder}', which cannot be read: {reason(error)}", EXPECTED)
    is_data = lambda name: DATA_FILE.search(name) is not None
    splits = {str(split): [os.path.join(folder, n) for n in filter(is_data, some)] for split, some in splits.items()}
    whole = {}
    for path in (path for files in splits.values() for path in files):
        other = whole.setdefault(DATA_FILE.sub("", path), path)
        if other != path:  # the same rows twice, most likely: packed and unpacked
            refuse(argument, f"'{path}' beside '{os.path.basename(other)}'", "one of them")
    return splits


def read_csv(argument: str, path: str, file: Any) -> Iterator[dict]:
    """Rows of a csv file; each value is text."""
    csv.field_size_limit(sys.maxsize)
    separator = "\t" if DATA_FILE.search(path)[1] == "tsv" else ","
    lines = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=separator, strict=True)
    for row in lines:
        if None in row or None in row.values():
            found = f"{path} line {lines.line_num}: more or fewer values than columns"
            refuse(argument, found, f"one value for each of {', '.join(lines.fieldnames)}")
        yield row


def read_json(argument: str, path: str, file: Any) -> Iterator[dict]:
    """Rows of a file with a JSON object on each line; of `*.json` also where it is one list of them."""
    text = file.read() if DATA_FILE.search(path)[1] == "json" else b""
    if text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = ((f"row {number}", row) for number, row in enumerate(json.loads(text)))
    else:
        lines = enumerate(io.BytesIO(text) if text else file, start=1)
        rows = ((f"line {number}", line) for number, line in lines if line.strip())
    for where, row in rows:
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
        except ValueError as error:
            refuse(argument, f"{path} {where}: {reason(error)}", "one JSON object on each line")
        if not isinstance(row, dict):
            refuse(argument, f"{path} {where}: a {type(row).__name__}", "one JSON object on each line")
        yield row


def merge(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds values of both, nulls at any depth among them; raises a TypeError where there is none."""
    try:
        schemas = (pa.schema({"": kind}) for kind in (one, other))
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        raise TypeError(f"{other} after {one}") from None


def to_column(argument: str, where: str, values: list, start: int, before: pa.DataType) -> tuple[pa.Array, pa.DataType]:
    """A column of some rows, and its type with those before; refuses a value that is of no type, or of another."""
    try:
        column = pa.array(values)
        return column, merge(before, column.type)
    except FAULTS:
        for row, value in enumerate(values, start=start):
            try:
                before = merge(before, pa.array([value]).type)
            except FAULTS as error:
                expected = "one type of values in each column, and text of whole characters"
                refuse(argument, f"{where} in row {row} (counted from 0): {reason(error)}", expected)
        raise


def read_text(argument: str, path: str) -> pa.Table:
    """A file of text, read row by row."""
    kind, packing = DATA_FILE.search(path).groups()
    tables, types, start = [pa.table({})], {}, 0
    try:
        with OPEN[packing](path, "rb") as file:
            rows = (read_csv if kind in ("csv", "tsv") else read_json)(argument, path, file)
            while chunk := list(islice(rows, CHUNK)):
                columns = {}
                for name in dict.fromkeys(name for row in chunk for name in row):
                    values, before = [row.get(name) for row in chunk], types.get(name, pa.null())
                    columns[name], types[name] = to_column(argument, f"`{name}` of {path}", values, start, before)
                tables.append(pa.table(columns))
                start += len(chunk)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, ValueError) as error:
        refuse(argument, f"{path}, which cannot be read: {reason(error)}", "a whole file")
    return pa.concat_tables(tables, promote_options="permissive")


def read_columns(argument: str, path: str) -> pa.Table:
    """A parquet or arrow file, memory-mapped."""
    from datasets import load_dataset

    kind = Path(path).suffix[1:]
    refuse_unwritable_cache()
    try:
        if kind == "parquet" and pq.read_metadata(path).num_rows == 0:  # which the library cannot read
            return pq.read_table(path)
        # file by file: each keeps its types
        return load_dataset(kind, data_files=glob.escape(path), split="train").data.table
    except Exception as error:
        refuse(argument, f"{path}, which cannot be read: {reason(error)}", f"a whole {kind} file")


def read_saved(argument: str, folder: str) -> dict[str, dict[str, pa.Table]]:
    """A folder of `save_to_disk`: split -> name -> table."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(folder)
    except Exception as error:
        refuse(argument, f"'{folder}', which cannot be read: {reason(error)}", "a whole folder of `save_to_disk`")
    if not isinstance(saved, DatasetDict):
        saved = {re.match(r"\w*", str(saved.split or ""))[0] or "train": saved}
    return {split: {f"split '{split}' of {folder}": rows.data.table} for split, rows in saved.items()}


def read_folder(argument: str, folder: str):
    """Read all splits of a dataset.

    Args:
        argument: the argument's name, for messages.
        folder: a local folder.

    Returns:
        datasets.DatasetDict
    """
    from datasets import Dataset, DatasetDict

    if any(Path(folder, name).is_file() for name in ("dataset_dict.json", "state.json")):
        tables = read_saved(argument, folder)
    else:
        read = lambda path: (read_text if DATA_FILE.search(path)[1] else read_columns)(argument, path)
        files = find_files(argument, folder)
        tables = {split: {path: read(path) for path in paths} for split, paths in files.items()}
    types = {}
    for name, table in (pair for found in tables.values() for pair in found.items()):
        for field in table.schema:
            try:
                types[field.name] = merge(types.get(field.name, pa.null()), field.type)
            except FAULTS as error:
                refuse(argument, f"`{field.name}` of {name}: {reason(error)}", "one type of values in each column")
    splits = DatasetDict()
    for split, found in tables.items():
        schema = pa.schema({name: types[name] for table in found.values() for name in table.column_names})
        table = pa.concat_tables([schema.empty_table(), *found.values()], promote_options="permissive")
        splits[split] = Dataset(table, fingerprint=split)
    return splits
