"""Rows of other schemas, such as `prompt`, `completion` or `prompt`, `chosen`, `rejected`, as raw rows of TL;DR."""

import re
import string
from collections.abc import Iterator
from typing import Any

from summarize_from_feedback_details.common.arguments import refuse

FIELDS = ("id", "subreddit", "title", "post")  # of a post; `query` stands for all that the query's format holds
TARGETS = (*FIELDS, "query", "summary", "chosen", "rejected")


def parse_columns(given: tuple[str, ...]) -> dict[str, str]:
    """What --columns says: our column -> theirs.

    >>> parse_columns(("post=text", "summary=tldr"))
    {'post': 'text', 'summary': 'tldr'}

    Raises:
        SystemExit: code 2, for anything but OURS=THEIRS.
    """
    columns: dict[str, str] = {}
    for pair in given:
        ours, _, theirs = pair.partition("=")
        if ours not in TARGETS or not theirs:
            expected = f"OURS=THEIRS, with OURS one of {', '.join(TARGETS)}"
            refuse("columns", f"'{pair}'", expected)
        if ours in columns:
            refuse("columns", f"'{ours}={columns[ours]}' and '{pair}'", "one name for each column")
        columns[ours] = theirs
    if "chosen" in columns and columns["chosen"] == columns.get("rejected"):
        refuse("columns", f"'{columns['chosen']}' for both chosen and rejected", "two columns")
    if "query" in columns and (twice := [name for name in FIELDS[1:] if name in columns]):
        refuse("columns", f"query and {', '.join(twice)}", "query, which holds the others, or these")
    return columns


def read_query(text: str, format_str: str) -> dict[str, str] | None:
    """The fields of a query that is written out; None for a text that is not of this form.

    >>> read_query("TITLE: a\\n\\nPOST: b", "TITLE: {title}\\n\\nPOST: {post}")
    {'title': 'a', 'post': 'b'}
    """
    parts, pattern, seen = string.Formatter().parse(format_str.strip()), "", set()
    for before, name, _, _ in parts:
        pattern += re.escape(before) + (f"(?P={name})" if name in seen else f"(?P<{name}>.*?)" if name else "")
        seen.add(name)
    found = re.fullmatch(pattern, text.strip(), re.DOTALL)
    return found and found.groupdict()


def _posts(argument: str, rows: Any, split: str, columns: dict[str, str], format_str: str) -> Iterator[dict]:
    """Fields of each row's post: from `query`, or from columns of their own."""
    theirs = {name: columns.get(name, name) for name in (*FIELDS, "query")}
    there = {name: column for name, column in theirs.items() if column in rows.column_names}
    for i, row in enumerate(rows.select_columns(sorted({*there.values()})) if there else [{}] * len(rows)):
        post = {"id": f"{split}-{i}"} | {name: row[column] for name, column in there.items() if name != "query"}
        if "query" in columns and "query" in there:
            where = f"row {i} (counted from 0) of the split '{split}'"
            fields = read_query(_text(argument, row, there["query"], where), format_str)
            if fields is None:
                found = f"another form in `{there['query']}` of {where}"
                refuse(argument, found, f"{format_str!r}; or post={there['query']} and --tldr_params.format_str")
            post |= fields
        yield post


def _text(argument: str, row: dict, column: str, where: str) -> str:
    if not isinstance(row[column], str):
        refuse(argument, f"no text in `{column}` of {where}", "a string")
    return row[column].lstrip()


def rename_columns(argument: str, raw: Any, columns: dict[str, str], kind: str, format_str: str):
    """Raw rows in the schema of TL;DR, from rows of another one; as they are where --columns names none of their own.

    Args:
        argument: name of the dataset's argument, for messages.
        raw: datasets.DatasetDict.
        columns: see `parse_columns`.
        kind: sft (posts with `summary`) or rm (comparisons of `chosen` and `rejected`).
        format_str: of the query; fields that it does not hold may be missing, and are empty then.

    Returns:
        datasets.DatasetDict
    """
    from datasets import Dataset, DatasetDict

    texts = ("summary",) if kind == "sft" else ("chosen", "rejected")
    needed = {name for _, name, _, _ in string.Formatter().parse(format_str) if name}
    done = {}
    for split, rows in raw.items():
        theirs = {name: columns.get(name, name) for name in texts}
        if not set(columns.values()) & set(rows.column_names):
            done[split] = rows
            continue
        if missing := [column for column in theirs.values() if column not in rows.column_names]:
            there = ", ".join(rows.column_names)
            refuse(argument, f"no column {', '.join(missing)} in the split '{split}' (it has {there})",
                   f"{' and '.join(texts)}, or their names there: --columns {texts[0]}=NAME")  # fmt: skip
        found = []
        posts = _posts(argument, rows, split, columns, format_str)
        for i, (row, post) in enumerate(zip(rows.select_columns(list(theirs.values())), posts)):
            if missing := sorted(needed - set(post)):
                refuse(argument, f"nothing for {', '.join(missing)} of the query in the split '{split}'",
                       f"--columns {missing[0]}=NAME, or a --tldr_params.format_str without it")  # fmt: skip
            post = dict.fromkeys(FIELDS, "") | post
            where = f"row {i} (counted from 0) of the split '{split}'"
            written = [_text(argument, row, column, where) for column in theirs.values()]
            found.append(post | {"summary": written[0]} if kind == "sft" else _comparison(post, *written, split))
        done[split] = Dataset.from_list(found)
    return DatasetDict(done)


def _comparison(post: dict, chosen: str, rejected: str, split: str) -> dict:
    """A comparison in OpenAI's schema, whose first summary was chosen."""
    # Detail: leading space - the summaries of comparisons have one
    summaries = [{"text": f" {text}", "policy": "unknown", "note": ""} for text in (chosen, rejected)]
    info = post | {"site": None, "article": None}
    return {"info": info, "summaries": summaries, "choice": 0, "worker": "unknown", "batch": "unknown", "split": split,
            "extra": {"confidence": None}}  # fmt: skip
