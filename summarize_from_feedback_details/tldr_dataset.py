"""Raw rows to tokenised datasets, with OpenAI's preprocessing of the queries.

    SFT rows {id, subreddit, title, post, summary}                                -> <output_dir>/sft/data/
    comparisons {info, summaries[2], choice, worker, batch, split, extra}         -> <output_dir>/comparisons/data/
    arguments, counts, lengths                                                    -> <output_dir>/summary.json
    histograms of the token lengths                                               -> <visuals_dir>/*.png

`datasets.load_dataset("<output_dir>/sft")` reads the result. Rows whose batch is a CNN/DM one become the split
`validation_cnndm`. Other columns of the raw rows are dropped. B rows, Q = `length` tokens, R response tokens.

The paper's (add `--push_to_hub` to share it):
    python summarize_from_feedback_details/tldr_dataset.py --base_model EleutherAI/pythia-1b-deduped
A laptop, from local folders, whose longest rows are not those of the full data:
    python summarize_from_feedback_details/tldr_dataset.py --base_model models/toy/small --sft_dataset data/toy/sft \
        --preference_dataset data/toy/comparisons --no-check-length-correctness --output_dir data/toy_tokenized

Paper: Huang et al. 2024, section on dataset preprocessing; Stiennon et al. 2020, appendix on data.
"""

import copy
import json
import os
import shlex
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    disable_progress_bars,
)
from datasets.utils import logging as datasets_logging
from rich.table import Table

from summarize_from_feedback_details.common.arguments import command_line, reason, refuse
from summarize_from_feedback_details.common.check_inputs import PAD_TOKEN, find_rows, read_tokenizer
from summarize_from_feedback_details.common.console import print_table
from summarize_from_feedback_details.common.figures import drawing, new_figure, save_figure
from summarize_from_feedback_details.common.files import (
    atomic_folder,
    refuse_uncreatable,
    refuse_unwritable,
    write_json,
)
from summarize_from_feedback_details.common.hub import hub_user
from summarize_from_feedback_details.common.raw_rows import parse_columns, rename_columns

CNNDM_BATCHES = ("batch0_cnndm", "cnndm0", "cnndm2")
SFT_COLUMNS = ("id", "subreddit", "title", "post", "summary")
COMPARISON_COLUMNS = ("info", "summaries", "choice", "worker", "batch", "split", "extra")
INFO_FIELDS = ("id", "post", "title", "subreddit", "site", "article")
SLACK = 16  # tokens by which a LONGER cut of a text may be the shorter one in tokens: 4 is the most a fuzz test found
DEBUG_ROWS = 100


@dataclass
class TaskQueryHParams:
    length: int = 512
    """tokens of a query: longer ones are truncated, shorter ones padded"""
    format_str: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    """the query, with fields of the row in braces"""
    truncate_field: str = "post"
    """the field that gives way when a query is too long"""
    truncate_text: str = "\n"
    """where that field is cut, from its end; single characters when it is not (or no longer) in there"""
    padding: Literal["pad_token", "empty_space"] = "pad_token"
    """what fills `query_token`: the pad token, or the token of a space"""
    pad_side: Literal["left", "right"] = "left"
    """the side of the query that is padded"""
    max_rm_response_length: int = 169
    """tokens of a summary in the comparisons, EOS included"""
    max_rm_query_response_length: int = 638
    """tokens of a query joined with such a summary"""


@dataclass
class TldrHParams(TaskQueryHParams):
    max_sft_response_length: int = 53
    """tokens of a reference summary, EOS included"""
    max_sft_query_response_length: int = 562
    """tokens of a query joined with its reference summary"""


def cnndm_defaults() -> TaskQueryHParams:
    # Detail: query length - CNN/DM articles get what a context of 2047 leaves beside a summary of 128
    return TaskQueryHParams(
        length=2047 - 128,
        format_str="Article:\n{article}\n\nTL;DR:\n",
        truncate_field="article",
        max_rm_response_length=155,
        max_rm_query_response_length=2021,
    )


@dataclass
class Args:
    # what to read
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """model whose tokenizer is used: hub id or local folder"""
    sft_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
    """posts with reference summaries: hub id, or folder of parquet, jsonl or csv files or of `save_to_disk`"""
    preference_dataset: str = "openai/summarize_from_feedback"
    """human comparisons: hub id, or folder of parquet or jsonl files or of `save_to_disk`"""
    preference_config: str = "comparisons"
    """folder inside the hub's `preference_dataset` ("" for its root)"""
    preference_revision: str = "refs/convert/parquet"
    """revision of the hub's `preference_dataset`: the hub's parquet conversion, since loading scripts no longer run"""
    columns: tuple[str, ...] = ()
    """names of columns in rows of another schema, OURS=THEIRS: `post=text summary=tldr`; `query=prompt` where the whole
    query is written out, as `format_str` has it; `chosen=NAME rejected=NAME` for comparisons"""
    max_rows: int | None = None
    """take only the first rows of each split, so many at most, without checking the longest lengths"""

    # how to tokenise
    tldr_params: TldrHParams = field(default_factory=TldrHParams)
    """queries and lengths of Reddit TL;DR"""
    cnndm_params: TaskQueryHParams = field(default_factory=cnndm_defaults)
    """queries and lengths of CNN/DM"""
    check_length_correctness: bool = True
    """refuse to save unless the longest rows are exactly as long as declared (true for Pythia on the full data)"""
    allow_empty: bool = False
    """also take posts whose reference summary is empty or blank, which teach a policy to end at once"""
    debug: bool = False
    """take only the first 100 rows of each split, without that check"""

    # where to write
    output_dir: str = "data/tldr"
    """folder for both tokenised datasets"""
    overwrite: bool = False
    """replace the results of an earlier run in `output_dir`"""
    visuals_dir: str = "dataset_visuals"
    """folder for the histograms"""
    push_to_hub: bool = False
    """also push both datasets to the hub"""
    hf_entity: str | None = None
    """hub user or organisation to push to; default: whoever is logged in"""


# ---------------------------------------------------------------------------------------------------------- tokenising
class Query(NamedTuple):
    text: str
    tokens: list[int]  # not padded
    truncated: bool


def encode(encoder: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added."""
    if not texts:
        return []
    backend = getattr(encoder, "backend_tokenizer", None)
    if backend is None:
        return encoder(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]  # without offsets


def candidate_cuts(text: str, truncate_text: str) -> Iterator[int]:
    """Lengths to which OpenAI's rule would cut `text`, one after the other, down to 0.

    >>> list(candidate_cuts("ab\\ncd\\ne", "\\n"))
    [7, 5, 2, 1, 0]
    """
    cut = len(text)
    yield cut
    while truncate_text and (found := text.rfind(truncate_text, 0, cut)) >= 0:
        yield (cut := found)
    yield from range(cut - 1, -1, -1)


def find_cut(text: str, truncate_text: str, length: int, count: Callable[[int], int]) -> int:
    """The first candidate cut at which a query fits, found with few and short tokenisations.

    Detail: query length - too long: cut the post at its last newline, again and again; none left: one character at a
    time. Trying one cut after the other takes time quadratic in the post. Fewer characters make fewer tokens, up to
    SLACK, so: (1) grow a window from the start until it is too long by more than SLACK, hence anything longer is too
    long; (2) bisect for cuts near `length + SLACK`; (3) from there try the cuts in turn, exactly as the rule says.

    Args:
        text: the field that gives way.
        truncate_text: where it is cut.
        length: tokens that the query may have.
        count: tokens of the query when `text` is cut to so many characters.

    Raises:
        ValueError: even the empty text does not fit.
    """
    window = min(8 * length, len(text))
    while window < len(text) and count(window) <= length + SLACK:
        window = min(2 * window, len(text))
    cuts = [cut for cut in candidate_cuts(text, truncate_text) if cut <= window]
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        if count(cuts[middle]) > length + SLACK:
            low = middle + 1
        else:
            high = middle
    for cut in cuts[low:]:
        if count(cut) <= length:
            return cut
    raise ValueError("Could not truncate enough!")


def format_queries(infos: list[dict], encoder: Any, hparams: TaskQueryHParams) -> list[Query]:
    """The text and tokens of each row's query, truncated to `hparams.length` tokens.

    Raises:
        ValueError: a query is too long even without its `truncate_field`; the error's note names the row.
    """
    form, name = hparams.format_str, hparams.truncate_field
    # a post longer than this window is too long in all likelihood: do not tokenise megabytes to find out
    window = 8 * hparams.length
    texts = [form.format(**{**info, name: info[name][:window]}) for info in infos]
    queries = []
    for info, text, tokens in zip(infos, texts, encode(encoder, texts)):
        truncated = len(info[name]) > window or len(tokens) > hparams.length
        if truncated:
            cut_to = lambda cut, info=info: form.format(**{**info, name: info[name][:cut]})
            count = lambda cut, cut_to=cut_to: len(encode(encoder, [cut_to(cut)])[0])
            try:
                cut = find_cut(info[name], hparams.truncate_text, hparams.length, count)
            except ValueError as error:
                error.add_note(f"(id {info.get('id')})")
                raise
            truncated, text = cut < len(info[name]), cut_to(cut)
            tokens = encode(encoder, [text])[0]
        queries.append(Query(text, tokens, truncated))
    return queries


def pad_lists(rows: list[list[int]], length: int, pad_id: int, side: str = "right") -> np.ndarray:
    """Rows of tokens, cut and padded to one length: [B, length]."""
    padded = np.full((len(rows), length), pad_id, dtype=np.int64)
    for target, tokens in zip(padded, rows):
        n = min(len(tokens), length)
        target[slice(0, n) if side == "right" else slice(length - n, length)] = tokens[:n]
    return padded


def pad_queries(queries: list[Query], encoder: Any, hparams: TaskQueryHParams, pad_id: int) -> np.ndarray:
    """`query_token`: [B, Q]."""
    if hparams.padding == "empty_space":
        pad_id = encode(encoder, [" "])[0][0]
    # Detail: query padding - left-padded to exactly `length`
    return pad_lists([q.tokens for q in queries], hparams.length, pad_id, hparams.pad_side)


def process_query(
    query_info: dict, *, encoder: Any, hparams: TaskQueryHParams, pad_token_id: int | None = None
) -> dict:
    """One row's query: its text, its padded tokens [Q], and how many of these are real.

    Raises:
        ValueError: too long even without its `truncate_field`.
    """
    queries = format_queries([query_info], encoder, hparams)
    pad_id = encoder.pad_token_id if pad_token_id is None else pad_token_id
    query_token = pad_queries(queries, encoder, hparams, pad_id)[0].tolist()
    return {"query": queries[0].text, "query_token": query_token, "query_token_len": len(queries[0].tokens)}


def join_tokens(
    queries: list[str], query_tokens: list[list[int]], responses: list[str], encoder: Any
) -> tuple[list, list]:
    """Tokens of each `query + response` as one text, and how many of them are the query's.

    The query is not tokenised again: where its last line joined with the response makes the tokens of both, nothing
    merges across the boundary, and nothing does in the whole text. Otherwise the whole text is tokenised, and the
    query ends where its tokens and those of the whole part ways.
    """
    tails = [query[query.rfind("\n") + 1 :] for query in queries]
    distinct = sorted(set(tails))
    tail_tokens = dict(zip(distinct, encode(encoder, distinct)))
    together = encode(encoder, [tail + response for tail, response in zip(tails, responses)])
    joined, ends = [], []
    for query, tokens, response, tail, short in zip(queries, query_tokens, responses, tails, together):
        n = len(tail_tokens[tail])
        if n and tokens[-n:] == tail_tokens[tail] == short[:n]:
            joined.append(tokens + short[n:])
            ends.append(len(tokens))
        else:
            joined.append(encode(encoder, [query + response])[0])
            ends.append(len(os.path.commonprefix([joined[-1], tokens])))
    return joined, ends


def tokenise_responses(
    name: str, responses: list[str], queries: list[Query], encoder: Any, pad_id: int, lengths: tuple[int, int]
) -> dict[str, Any]:
    """The columns `{name}*` [B, R] and `query_{name}*` [B, T] of a batch; lengths: R, T."""
    length, joined_length = lengths
    tokens = encode(encoder, responses)
    # Detail: joined text - query.strip() + response, tokenised together, right-padded
    stripped = [q.text.strip() for q in queries]
    changed = [i for i, q in enumerate(queries) if q.text != stripped[i]]
    query_tokens = [q.tokens for q in queries]
    for i, again in zip(changed, encode(encoder, [stripped[i] for i in changed])):
        query_tokens[i] = again
    # Deviates: fault 6 - the query ends where ITS STRIPPED tokens end (CNN/DM queries lose a newline to `strip`)
    joined, ends = join_tokens(stripped, query_tokens, responses, encoder)
    joined_token = pad_lists(joined, joined_length, pad_id)
    label = np.where(np.arange(joined_length) < np.array(ends)[:, None], pad_id, joined_token)
    return {
        name: responses,
        f"{name}_token": pad_lists(tokens, length, pad_id),
        f"{name}_token_len": [len(ids) for ids in tokens],  # true lengths: more than `length` if cut there
        f"query_{name}": [query + response for query, response in zip(stripped, responses)],
        f"query_{name}_token": joined_token,
        f"query_{name}_token_response_label": label,
        f"query_{name}_token_len": [len(ids) for ids in joined],
    }


def tokenise_queries(
    infos: list[dict], encoder: Any, pad_id: int, hparams: TaskQueryHParams
) -> tuple[list[Query], dict]:
    queries = format_queries(infos, encoder, hparams)
    columns = {
        "query": [q.text for q in queries],
        "query_token": pad_queries(queries, encoder, hparams, pad_id),
        "query_token_len": [len(q.tokens) for q in queries],
        "truncated": [q.truncated for q in queries],
    }
    return queries, columns


def tokenise_sft(batch: dict[str, list], encoder: Any, pad_id: int, hparams: TldrHParams) -> dict[str, Any]:
    """Columns of a batch of SFT rows."""
    infos = [dict(zip(batch, values)) for values in zip(*batch.values())]
    queries, columns = tokenise_queries(infos, encoder, pad_id, hparams)
    # Detail: leading space - reference summaries have none, and end with the end-of-text token
    responses = [f" {summary}{encoder.eos_token}" for summary in batch["summary"]]
    lengths = hparams.max_sft_response_length, hparams.max_sft_query_response_length
    return columns | tokenise_responses("reference_response", responses, queries, encoder, pad_id, lengths)


def tokenise_comparisons(
    batch: dict[str, list], encoder: Any, pad_id: int, hparams: TaskQueryHParams
) -> dict[str, Any]:
    """Columns of a batch of comparisons."""
    queries, columns = tokenise_queries(batch["info"], encoder, pad_id, hparams)
    columns["info"] = [{name: info.get(name) for name in INFO_FIELDS} for info in batch["info"]]
    columns["extra"] = [{"confidence": (extra or {}).get("confidence")} for extra in batch["extra"]]
    for name, flip in (("chosen", 0), ("rejected", 1)):
        summaries = [pair[choice ^ flip] for pair, choice in zip(batch["summaries"], batch["choice"])]
        columns[f"{name}_policy"] = [summary["policy"] for summary in summaries]
        # Detail: leading space - the summaries of comparisons already have it
        responses = [summary["text"] + encoder.eos_token for summary in summaries]
        lengths = hparams.max_rm_response_length, hparams.max_rm_query_response_length
        columns |= tokenise_responses(name, responses, queries, encoder, pad_id, lengths)
    pairs = zip(columns["chosen_policy"], columns["rejected_policy"])
    columns["policies"] = ["--".join(sorted(pair)) for pair in pairs]
    return columns


def features(responses: tuple[str, ...]) -> Features:
    """Columns and types of a tokenised dataset; declared, since a first batch of nulls says nothing about types."""
    text, number, tokens = Value("string"), Value("int64"), List(Value("int64"))
    if "chosen" in responses:
        columns = dict.fromkeys(COMPARISON_COLUMNS, text) | {"choice": number, "extra": {"confidence": number}}
        columns["info"] = dict.fromkeys(INFO_FIELDS, text)
        columns["summaries"] = List({"text": text, "policy": text, "note": text})
        columns |= dict.fromkeys(("chosen_policy", "rejected_policy", "policies"), text)
    else:
        columns = dict.fromkeys(SFT_COLUMNS, text)
    columns |= {"query": text, "query_token": tokens, "query_token_len": number, "truncated": Value("bool")}
    for name in responses:
        columns |= {name: text, f"{name}_token": tokens, f"{name}_token_len": number}
        columns |= {f"query_{name}": text, f"query_{name}_token": tokens, f"query_{name}_token_len": number}
        columns |= {f"query_{name}_token_response_label": tokens}
    return Features(columns)


# --------------------------------------------------------------------------------------------------------- reading
def load_tokenizer(argument: str, name: str) -> tuple[Any, int]:
    """The tokenizer of a model, and the id of the pad token that the stages give it."""
    encoder = read_tokenizer(argument, name)
    # Detail: pad token - a [PAD] of its own, never the end-of-text token
    # Deviates: texts are tokenised without it, so that a post which says "[PAD]" is not full of holes
    padded = copy.deepcopy(encoder)
    padded.add_special_tokens({"pad_token": PAD_TOKEN})
    return encoder, padded.pad_token_id


def load_raw(argument: str, name: str, data_dir: str = "", revision: str | None = None) -> DatasetDict:
    """Read raw rows from a local folder or the hub."""
    raw = find_rows(argument, name, revision, data_dir)
    for split, rows in raw.items():
        if len(rows) == 0:
            refuse(argument, f"no rows in the split '{split}' of '{name}'", "at least one row in each split")
    return raw


def cut(raw: DatasetDict, most: int) -> DatasetDict:
    """The first rows of each split; of comparisons the first of posts and the first of CNN/DM articles."""
    found = DatasetDict()
    for split, rows in raw.items():
        batches = rows["batch"][:] if "batch" in rows.column_names else [""] * len(rows)
        articles = np.isin(np.array(batches, dtype=object), CNNDM_BATCHES)
        kept = np.sort(np.concatenate([np.flatnonzero(~articles)[:most], np.flatnonzero(articles)[:most]]))
        found[split] = rows.select(kept)
    return found


def rename_both(args: Args, sft: DatasetDict, comparisons: DatasetDict) -> tuple[DatasetDict, DatasetDict]:
    """Both datasets with the columns' names of this script, see --columns."""
    columns, names = parse_columns(args.columns), set()
    for raw in (sft, comparisons):
        names.update(name for rows in raw.values() for name in rows.column_names)
    for ours, theirs in columns.items():
        if theirs not in names:
            refuse("columns", f"'{ours}={theirs}', and no such column in either dataset", f"one of {sorted(names)}")
    form = args.tldr_params.format_str
    return (
        rename_columns("sft_dataset", sft, columns, "sft", form),
        rename_columns("preference_dataset", comparisons, columns, "rm", form),
    )


def check_columns(argument: str, raw: DatasetDict, needed: tuple[str, ...], other: tuple[str, ...], kind: str) -> None:
    """Refuse datasets without the needed columns, and say so when it is the other dataset."""
    for split, rows in raw.items():
        missing = [name for name in needed if name not in rows.column_names]
        if missing:
            swapped = all(name in rows.column_names for name in other)
            hint = " (these look like the rows of the other dataset)" if swapped else ""
            found = f"no column {', '.join(missing)} in the split '{split}'{hint}"
            refuse(argument, found, f"{kind}: {', '.join(needed)}; --columns tells other names")


def check_text(argument: str, where: str, row: dict | None, names: list[str]) -> None:
    for name in names:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            refuse(argument, f"no text in `{name}` of {where}", "a string")


def fields_of(hparams: TaskQueryHParams) -> list[str]:
    """Names of the row's fields that make up a query."""
    return [name for _, name, _, _ in string.Formatter().parse(hparams.format_str) if name is not None]


def each_row(rows: Dataset, columns: tuple[str, ...], split: str) -> Iterator[tuple[str, dict]]:
    start = 0
    for batch in rows.select_columns(list(columns)).iter(1000):
        for i, values in enumerate(zip(*batch.values()), start=start):
            yield f"row {i} (counted from 0) of the split '{split}'", dict(zip(batch, values))
        start += len(batch[columns[0]])


def check_sft_rows(args: Args, raw: DatasetDict) -> None:
    needed = tuple(dict.fromkeys((*SFT_COLUMNS, *fields_of(args.tldr_params))))
    check_columns("sft_dataset", raw, needed, COMPARISON_COLUMNS, "SFT rows")
    for split, rows in raw.items():
        for where, row in each_row(rows, needed, split):
            check_text("sft_dataset", where, row, [*fields_of(args.tldr_params), "summary"])
            # Deviates: an empty reference teaches to end at once; the original trains on it
            if not args.allow_empty and not row["summary"].strip():
                refuse("sft_dataset", f"an empty or blank `summary` in {where}", "a text, or --allow_empty")


def check_comparison(argument: str, where: str, row: dict, hparams: TaskQueryHParams) -> None:
    """Refuse a raw comparison that cannot be used."""
    check_text(argument, f"`info` of {where}", row["info"], fields_of(hparams))
    if not isinstance(row["summaries"], list) or len(row["summaries"]) != 2:
        found = f"{len(row['summaries'])} summaries" if isinstance(row["summaries"], list) else "no list"
        refuse(argument, f"{found} in `summaries` of {where}", "two")
    for summary in row["summaries"]:
        check_text(argument, f"`summaries` of {where}", summary, ["text", "policy"])
    if row["choice"] not in (0, 1):
        refuse(argument, f"choice {row['choice']!r} in {where}", "0 or 1")
    if not isinstance(row["extra"], dict | None):
        refuse(argument, f"{type(row['extra']).__name__} in `extra` of {where}", "an object, or none")
    # Detail: confidence - 1..9 on a line from the first summary to the second; absent in some batches
    confidence = (row["extra"] or {}).get("confidence")
    if confidence is not None and confidence not in range(1, 10):
        refuse(argument, f"confidence {confidence!r} in {where}", "1 to 9, or none")


def check_comparison_rows(args: Args, raw: DatasetDict) -> None:
    name = "preference_dataset"
    check_columns(name, raw, COMPARISON_COLUMNS, SFT_COLUMNS, "comparisons")
    for split, rows in raw.items():
        for where, row in each_row(rows, COMPARISON_COLUMNS, split):
            check_text(name, where, row, ["batch"])
            check_comparison(name, where, row, args.cnndm_params if row["batch"] in CNNDM_BATCHES else args.tldr_params)
        # last: one 0.5 makes fractions of all choices, and is itself what to name
        if not pa.types.is_integer(rows.data.schema.field("choice").type):
            refuse(name, f"choice {rows[0]['choice']!r} in row 0 of the split '{split}'", "0 or 1")


# --------------------------------------------------------------------------------------------------------- reporting
class Lengths(NamedTuple):
    """Token lengths in one split, and what was declared for them."""

    split: str
    kind: str  # sft, rm
    prefix: str  # tldr_params, cnndm_params
    rows: int
    truncated: int
    query: np.ndarray
    response: np.ndarray
    joined: np.ndarray
    declared: tuple[int, int, int]  # query, response, joined
    doubtful: dict[str, int]  # see count_doubtful


def plain(text: str) -> str:
    """A text with runs of white space as one space, and none around it."""
    return " ".join(text.split())


def posts_of(rows: Dataset, kind: str, name: str) -> list[str]:
    """The post of each row; `name` is the field that gives way when it is too long."""
    return [plain(post) for post in (rows[name][:] if kind == "sft" else (info[name] for info in rows["info"][:]))]


def count_doubtful(rows: Dataset, kind: str, posts: list[str], trained_on: set[str] | None) -> dict[str, int]:
    """Rows that are valid but worth a look: texts without a word, pairs without a difference, posts of `train`.

    Args:
        rows: raw rows of one split.
        kind: sft, rm.
        posts: see `posts_of`.
        trained_on: posts of the split `train`; None for that split itself.
    """
    if kind == "sft":
        texts = [[plain(text)] for text in rows["summary"][:]]
    else:
        texts = [[plain(summary["text"]) for summary in pair] for pair in rows["summaries"][:]]
    found = {"empty_posts": posts.count(""), "empty_summaries": sum(row.count("") for row in texts)}
    if kind == "rm":
        found["equal_summaries"] = sum(one == other for one, other in texts)
    if trained_on is not None:
        found["posts_of_train"] = sum(post in trained_on for post in posts)
    return found


def measure_lengths(
    split: str, rows: Dataset, kind: str, prefix: str, hparams: TaskQueryHParams, doubtful: dict[str, int]
) -> Lengths:
    column = lambda name: np.asarray(rows.data.column(name))
    names = ["reference_response"] if kind == "sft" else ["chosen", "rejected"]
    limits = (getattr(hparams, f"max_{kind}_{what}_length") for what in ("response", "query_response"))
    response = np.concatenate([column(f"{name}_token_len") for name in names])
    joined = np.concatenate([column(f"query_{name}_token_len") for name in names])
    query, truncated = column("query_token_len"), int(column("truncated").sum())
    declared = (hparams.length, *limits)
    return Lengths(split, kind, prefix, len(rows), truncated, query, response, joined, declared, doubtful)


def summarise(lengths: Lengths) -> dict[str, Any]:
    # Deviates: fault 8 - rows longer than declared lose their EOS: they are counted and shown
    found = {"rows": lengths.rows, "truncated_queries": lengths.truncated}
    for name, values, declared in zip(("query", "response", "query_response"), lengths[5:8], lengths.declared):
        found |= {f"{name}_mean": float(values.mean()), f"{name}_max": int(values.max())}
        found[f"{name}_overlong"] = int((values > declared).sum())
    return found | lengths.doubtful


def check_lengths(measured: list[Lengths]) -> None:
    """Refuse unless the longest rows over all splits are exactly as long as declared."""
    wrong = []
    for prefix, kind in dict.fromkeys((m.prefix, m.kind) for m in measured):
        group = [m for m in measured if (m.prefix, m.kind) == (prefix, kind)]
        for i, what in ((1, "response"), (2, "query_response")):
            longest = int(max(m[5 + i].max() for m in group))
            if longest != group[0].declared[i]:
                name = f"{prefix}.max_{kind}_{what}_length"
                wrong.append((name, f"{longest} tokens in the longest row, {group[0].declared[i]} declared"))
    if wrong:
        found = "; ".join([wrong[0][1], *(f"--{name}: {what}" for name, what in wrong[1:])])
        refuse(wrong[0][0], found, "the declared lengths to be the longest ones, or --no-check-length-correctness")


def draw_lengths(title: str, measured: list[Lengths], path: Path) -> None:
    """One row of histograms per task, splits on top of each other as densities, the declared maximum as a line."""
    tasks = list(dict.fromkeys(m.prefix for m in measured))
    figure = new_figure(14, 4 * len(tasks))
    grid = figure.subplots(len(tasks), 3, squeeze=False)
    for axes, prefix in zip(grid, tasks):
        group = [m for m in measured if m.prefix == prefix]
        for i, (axis, what) in enumerate(zip(axes, ("query", "response + EOS", "query + response + EOS"))):
            limit = group[0].declared[i]
            bins = np.linspace(0, max(limit, *(m[5 + i].max() for m in group)) * 1.02, 41)
            for m in group:
                label = f"{m.split} ({len(m[5 + i]):,})"
                axis.hist(m[5 + i], bins=bins, density=True, histtype="step", linewidth=1.6, label=label)
            axis.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"declared maximum ({limit})")
            axis.set(xlabel=f"{what} [tokens]", ylabel="density [1/token]")
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9, frameon=False)
        task = {"tldr_params": "Reddit TL;DR", "cnndm_params": "CNN/DM"}[prefix]
        axes[0].set_ylabel(f"{task}\ndensity [1/token]")
    figure.suptitle(title)
    save_figure(figure, path, dpi=100)


def print_lengths(measured: list[Lengths]) -> None:
    table = Table(title="tokens (mean / max); overlong: longer than declared, so that their EOS is cut off")
    names = ("dataset", "split", "rows", "query", "response", "query + response", "truncated", "overlong", "o. joined")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for m in measured:
        s = summarise(m)
        means = [f"{s[f'{name}_mean']:.1f} / {s[f'{name}_max']}" for name in ("query", "response", "query_response")]
        counts = [s["truncated_queries"], s["response_overlong"], s["query_response_overlong"]]
        table.add_row("sft" if m.kind == "sft" else "comparisons", m.split, f"{m.rows:,}", *means, *map(str, counts))
    rule = "empty: nothing but white space; equal, in train: the same text but for white space"
    doubtful = Table(title="rows to look at", caption=rule)
    for i, name in enumerate(("dataset", "split", "rows", "empty posts", "empty summaries", "equal pairs", "in train")):
        doubtful.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for m in measured:
        names = ("empty_posts", "empty_summaries", "equal_summaries", "posts_of_train")
        counts = [f"{m.doubtful[name]:,}" if name in m.doubtful else "-" for name in names]
        doubtful.add_row("sft" if m.kind == "sft" else "comparisons", m.split, f"{m.rows:,}", *counts)
    print_table(table)
    print_table(doubtful)


# ------------------------------------------------------------------------------------------------------------- main
def is_ours(folder: Path) -> bool:
    """Whether this script has written the folder."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return {"vocab_size", "pad_token_id", "rows_per_second"} <= set(summary)
    except (OSError, ValueError, TypeError):
        return False


def check_args(args: Args) -> None:
    parse_columns(args.columns)
    if args.max_rows is not None and args.max_rows < 1:
        refuse("max_rows", str(args.max_rows), "a number above 0")
    for prefix in ("tldr_params", "cnndm_params"):
        hparams = getattr(args, prefix)
        for name, value in asdict(hparams).items():
            if isinstance(value, int) and not 0 < value <= 10**6:
                refuse(f"{prefix}.{name}", str(value), "a number of tokens above 0, at most a million")
        try:
            names = fields_of(hparams)
            hparams.format_str.format(**dict.fromkeys(names, ""))
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            refuse(f"{prefix}.format_str", f"{hparams.format_str!r} ({reason(error)})", "text with {fields} of the row")
        if hparams.truncate_field not in names:
            refuse(f"{prefix}.truncate_field", f"'{hparams.truncate_field}'", f"a field of the query: {names}")
    ours = is_ours(Path(args.output_dir))
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir) and not (ours and args.overwrite):
        hint = ", or --overwrite" if ours else ""
        refuse("output_dir", f"'{args.output_dir}', which is not empty", f"a new folder{hint}")
    if not ours:
        refuse_unwritable("output_dir", args.output_dir)
    refuse_uncreatable("visuals_dir", args.visuals_dir, "comparisons_token_lengths.png")


def tokenise(args: Args, kind: str, raw: DatasetDict, encoder: Any, pad_id: int) -> tuple[DatasetDict, list[Lengths]]:
    """Tokenise every split of one dataset, and measure it."""
    name, function = {
        "sft": ("sft_dataset", tokenise_sft),
        "rm": ("preference_dataset", tokenise_comparisons),
    }[kind]
    kept = features(("reference_response",) if kind == "sft" else ("chosen", "rejected"))
    done, measured = DatasetDict(), []
    prefixes = {split: "cnndm_params" if split == "validation_cnndm" else "tldr_params" for split in raw}
    posts = {s: posts_of(rows, kind, getattr(args, prefixes[s]).truncate_field) for s, rows in raw.items()}
    trained_on = set(posts.get("train", ())) - {""}
    for split, rows in raw.items():
        prefix = prefixes[split]
        hparams = getattr(args, prefix)
        doubtful = count_doubtful(rows, kind, posts[split], None if split == "train" else trained_on)
        wanted = (*SFT_COLUMNS, *fields_of(hparams)) if kind == "sft" else COMPARISON_COLUMNS
        rows = rows.select_columns(list(dict.fromkeys(wanted)))
        try:
            rows = rows.map(
                function,
                batched=True,
                fn_kwargs={"encoder": encoder, "pad_id": pad_id, "hparams": hparams},
                remove_columns=[column for column in rows.column_names if column not in kept],
                features=kept,
                load_from_cache_file=False,
                desc=f"{name} {split}",
            )
        except (TypeError, pa.ArrowException) as error:
            refuse(name, f"rows of the split '{split}' of other types ({reason(error)})", "the types of OpenAI's rows")
        except ValueError as error:
            where = f"the split '{split}' of --{name} {' '.join(getattr(error, '__notes__', ()))}"
            refuse(f"{prefix}.length", f"{reason(error)} {where}", f"room for more than {hparams.length} tokens")
        measured.append(measure_lengths(split, rows, kind, prefix, hparams, doubtful))
        done[split] = rows.remove_columns(["truncated", "query_token_len"] if kind == "sft" else ["truncated"])
    return done, measured


def split_off_cnndm(raw: DatasetDict) -> DatasetDict:
    """Comparisons of CNN/DM articles, wherever they are, become a split of their own."""
    split = DatasetDict()
    cnndm = []
    for name, rows in raw.items():
        is_cnndm = np.isin(np.array(rows["batch"][:], dtype=object), CNNDM_BATCHES)
        if (~is_cnndm).any():
            split[name] = rows.select(np.flatnonzero(~is_cnndm)) if is_cnndm.any() else rows
        if is_cnndm.any():
            cnndm.append(rows.select(np.flatnonzero(is_cnndm)))
    if cnndm:
        split["validation_cnndm"] = concatenate_datasets(cnndm)
    return split


def save(args: Args, done: dict[str, DatasetDict], summary: dict[str, Any]) -> list[str]:
    """Write both datasets and their summary at once: all of it, or nothing. Returns the files."""
    with atomic_folder(args.output_dir) as folder:
        for name, splits in done.items():
            (folder / name / "data").mkdir(parents=True)
            for split, rows in splits.items():
                # in `data/` and with this name, `load_dataset` takes what stands before the number as the split
                rows.to_parquet(folder / name / "data" / f"{split}-00000-of-00001.parquet")
        write_json(folder / "summary.json", summary)
        if args.overwrite:
            shutil.rmtree(args.output_dir, ignore_errors=True)
    return [os.path.join(args.output_dir, name) for name in (*done, "summary.json")]


def push_datasets(args: Args, done: dict[str, DatasetDict], entity: str) -> list[str]:
    """Upload both datasets; returns their addresses."""
    datasets_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    stamp = int(time.time())
    names = {"sft": "summarize_from_feedback_tldr_3_filtered", "comparisons": "summarize_from_feedback"}
    names = {name: f"{entity}/{repo}_oai_preprocessing_{stamp}" for name, repo in names.items()}
    for i, (name, splits) in enumerate(done.items()):
        try:
            splits.push_to_hub(names[name])
        except Exception as error:
            rest = [
                f"`hf upload {names[n]} {shlex.quote(os.path.join(args.output_dir, n))} --repo-type dataset`"
                for n in list(done)[i:]
            ]
            raise SystemExit(
                f"error: both datasets are in {args.output_dir}, but {names[name]} was not pushed to the hub: "
                f"{reason(error)}; cure that, then {' and '.join(rest)}"
            ) from None
    return [f"https://huggingface.co/datasets/{name}" for name in names.values()]


def main(args: Args) -> dict[str, Any]:
    """Build both datasets; returns counts, lengths and paths."""
    # ------------------------------------------------------------------ what can be refused before any work
    check_args(args)
    if not sys.stderr.isatty():
        disable_progress_bars()
    user = hub_user() if args.push_to_hub else ""
    encoder, pad_id = load_tokenizer("base_model", args.base_model)
    sft = load_raw("sft_dataset", args.sft_dataset)
    comparisons = load_raw(
        "preference_dataset", args.preference_dataset, args.preference_config, args.preference_revision
    )
    if most := DEBUG_ROWS if args.debug else args.max_rows:
        sft, comparisons = cut(sft, most), cut(comparisons, most)
    if args.columns:
        sft, comparisons = rename_both(args, sft, comparisons)
    check_sft_rows(args, sft)
    check_comparison_rows(args, comparisons)

    # ------------------------------------------------------------------ tokenise
    start = time.time()
    done, measured = {}, {}
    done["sft"], measured["sft"] = tokenise(args, "sft", sft, encoder, pad_id)
    done["comparisons"], measured["comparisons"] = tokenise(args, "rm", split_off_cnndm(comparisons), encoder, pad_id)
    everything = [*measured["sft"], *measured["comparisons"]]
    rows = sum(m.rows for m in everything)
    rows_per_second = rows / (time.time() - start)
    print_lengths(everything)
    print(f"{rows:,} rows tokenised, {rows_per_second:,.0f} rows/s")

    # ------------------------------------------------------------------ check, and only then save
    if args.check_length_correctness and not args.debug and args.max_rows is None:
        check_lengths(everything)
    summary = {
        "args": asdict(args),
        "vocab_size": len(encoder),
        "pad_token_id": pad_id,
        "eos_token_id": encoder.eos_token_id,
        "rows_per_second": rows_per_second,
        **{name: {m.split: summarise(m) for m in group} for name, group in measured.items()},
    }
    paths = save(args, done, summary)
    for name, group in measured.items():
        paths.append(os.path.join(args.visuals_dir, f"{name}_token_lengths.png"))
        with drawing():
            draw_lengths(f"{name}: token lengths", group, Path(paths[-1]))
    if args.push_to_hub:
        paths += push_datasets(args, done, args.hf_entity or user)
    print("written:", *paths, sep="\n  ")
    return summary | {"paths": paths}


if __name__ == "__main__":
    command_line(main, Args)
