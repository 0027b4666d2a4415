"""Win rate of policies against the reference summaries, or of one policy against another.

Reads   the table of responses of a run (`runs/<run>/tables/validation.parquet`), or any parquet, csv or jsonl file with
        the columns `query, response, reference`; for two policies, two of them joined on the query
Writes  report.json, report.md and verdicts.parquet (one row a post) in runs/<run>/judge/<judge>

Gold    python eval/judge.py --run toy_small_seed1_sft toy_small_seed1_ppo
Server  OPENAI_API_KEY=... python eval/judge.py --judge openai --model gpt-4o-mini --max_requests 2000 --run my_ppo
Local   python eval/judge.py --judge openai --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B --run my_ppo
Reward  python eval/judge.py --judge reward --reward_model models/reward --run my_ppo
Two     python eval/judge.py --run my_ppo --against my_sft --paired_difference

The server is asked about every pair in both orders. A pair is won, or lost, when both answers say so, and a tie when
they disagree. An answer that cannot be read is asked for again, then counted apart, never guessed. A question that the
server refuses, or fails at, is counted apart as well, if it answers others; where it answers none, the set-up is at
fault, and everything stops. Every answer is in the cache on disk before the next one is asked for: start a stopped
command again and it goes on. Failures are not kept.

Deviates: the original asked each pair once, in a random order, and turned an unreadable answer into a coin flip.
"""

import asyncio
import collections
import contextlib
import email.utils
import hashlib
import json
import math
import os
import random
import re
import socket
import sqlite3
import sys
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas
from rich.table import Table
from scipy import stats
from scipy.special import expit

from summarize_from_feedback_details.run_folder import (
    Progress,
    atomic_folder,
    command_line,
    on_gpu,
    print_table,
    quiet_libraries,
    refuse,
    refuse_uncreatable,
    write_json,
)

HERE = Path(__file__).resolve().parent
LENGTH_RATIOS = (0.0, 0.5, 0.75, 0.9, 1.1, 1.33, 2.0, math.inf)  # words of the response over words of the reference
CALIBRATION_BINS = 10
NEAR_EQUAL = 0.1  # lengths that differ by this share of the reference, or less, are nearly equal
NEAR_EQUAL_LENGTH = 5  # posts needed where the response is not longer, and where it is not shorter
CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate of the cost
ANSWER_TOKENS = 60  # of an answer as the prompt asks for, for the estimate of the cost
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more; longer waits are announced
IN_A_ROW = 20  # questions that fail one after the other, besides those asked at the same time, until everything stops
TEXTS = ("query", "response", "reference")  # columns of a table of responses
OLD_REFUSAL = "(the server refuses this question)"  # in caches of earlier versions; it may have been about a setting
OPENAI = "https://api.openai.com/v1"
# variables of the environment that the client reads
ROUTES = ("OPENAI_BASE_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
# OpenAI's codes, with Azure's and llama.cpp's
QUESTION_CODES = {"content_filter", "content_policy_violation", "context_length_exceeded", "exceed_context_size_error",
                  "invalid_prompt", "string_above_max_length"}  # fmt: skip
SETTING_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter", "invalid_model", "model_not_found"}
CREDIT_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
SETTING_WORDS = re.compile(r"(?i)(unsupported|unrecognized|unknown) (request )?(parameter|argument)")


@dataclass
class Args:
    run: tuple[str, ...] = ()
    """policies to judge: names of runs, or files (parquet, csv, jsonl) with query, response, reference"""
    against: str | None = None
    """judge against this policy (a run or a file), instead of against the reference summaries"""
    paired_difference: bool = False
    """with --against: also judge both against the references; the difference of their win rates is paired by post"""
    split: str = "validation"
    """which table of a run: validation or test"""
    updates: bool = False
    """also judge the tables that a PPO run with --eval_freq wrote on its way"""
    num_rows: int | None = None
    """first rows of each table only (default: all)"""
    judge: Literal["gold", "reward", "openai"] = "gold"
    """gold: the toy world's annotator; reward: a reward model; openai: a server that speaks OpenAI's protocol"""
    name: str | None = None
    """name of the report (default: gold, or the last part of the model's name)"""
    runs_dir: str = str(HERE.parent / "runs")
    """folder of the runs"""
    output_dir: str | None = None
    """folder of the reports (default: `judge` in the run's folder, or beside the file)"""

    # statistics
    bootstrap: int = 2000
    """resamples of the posts, for the intervals"""
    seed: int = 1
    """seed of the resampling"""

    # a reward model as judge
    reward_model: str | None = None
    """reward model or any sequence-classification model with one label: folder or hub id"""
    reward_model_revision: str | None = None
    """its hub revision"""
    reward_tokenizer: str | None = None
    """its tokenizer, where the checkpoint has none: folder or hub id"""
    batch_size: int = 32
    """rows of one forward pass of the reward model"""

    # a server as judge; the key is read from OPENAI_API_KEY
    base_url: str | None = None
    """address of the server, e.g. http://localhost:8000/v1 (default: that in OPENAI_BASE_URL, else OpenAI's)"""
    model: str = "gpt-3.5-turbo-0125"
    """model to ask (default: the paper's judge)"""
    prompt: str = str(HERE / "judge_prompt.txt")
    """file of the question, with {post}, {summary_a} and {summary_b}"""
    temperature: float = 0.0
    """sampling temperature of the first answer; one that cannot be read is asked for again at 1.0"""
    max_tokens: int = 200
    """tokens of an answer at most"""
    concurrency: int = 16
    """questions asked at the same time"""
    timeout: float = 60.0
    """seconds until an answer is given up"""
    max_attempts: int = 8
    """attempts at one question; at the start each is at another question, and where all fail, everything stops"""
    first_wait: float = 1.0
    """seconds before the second attempt; doubled each time, unless the server says how long to wait"""
    max_asks: int = 3
    """how often to ask until an answer can be read"""
    max_failures: float = 0.5
    """share of the questions that the server may refuse, or fail at, before everything stops"""
    max_requests: int | None = None
    """budget: requests sent at most by this command, those that fail included"""
    price_in: float | None = None
    """US dollars per million tokens read, for the estimate"""
    price_out: float | None = None
    """US dollars per million tokens written, for the estimate"""
    cache: str = str(HERE / "judge_cache.sqlite")
    """file of all answers; several processes may share it"""


# ----------------------------------------------------------------------------------------------------------------------
# tables of responses


def find_table(argument: str, policy: str, args: Args, split: str) -> Path:
    """File of a policy's responses: that of a run, or the file itself."""
    if Path(policy).suffix in (".parquet", ".csv", ".jsonl"):
        if not Path(policy).is_file():
            refuse(argument, f"'{policy}', which is not there", "a run, or a parquet, csv or jsonl file")
        return Path(policy)
    folder = Path(args.runs_dir) / policy
    if "/" in policy or not folder.is_dir():
        refuse(argument, f"'{policy}', and no such run in {args.runs_dir}", "a run, or a parquet, csv or jsonl file")
    table = folder / "tables" / f"{split}.parquet"
    if not table.is_file():
        there = ", ".join(sorted(p.stem for p in (folder / "tables").glob("*.parquet"))) or "none"
        refuse(argument, f"run '{policy}' without a table '{split}' (its tables: {there})", "a run that was evaluated")
    return table


def read_jsonl(path: Path) -> pandas.DataFrame:
    """Rows as they are: pandas' own reader makes numbers of texts, and nothing of half a character.

    Raises:
        ValueError: a line that cannot be read; its number is named.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
                json.dumps(rows[-1], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"line {number} holds half a character") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number}: {error}") from None
    return pandas.DataFrame(rows)


def read_table(argument: str, path: Path) -> pandas.DataFrame:
    """Rows with `query, response, reference`, and a column `copy` that counts rows of the same query."""
    read = {
        ".parquet": pandas.read_parquet,
        ".csv": lambda p: pandas.read_csv(
            p, keep_default_na=False, dtype=dict.fromkeys(TEXTS, str), encoding="utf-8-sig"
        ),
        ".jsonl": read_jsonl,
    }[path.suffix]
    try:
        table = read(path)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        refuse(argument, f"'{path}', which cannot be read: {reason}", "a table of responses")
    missing = [c for c in TEXTS if c not in table]
    if missing:
        found = f"'{path}' without a column {', '.join(missing)}"
        refuse(argument, found, "a table of responses: query, response, reference")
    if len(table) == 0:
        refuse(argument, f"'{path}' without rows", "a table of responses")
    for column in TEXTS:
        bad = table.index[~table[column].map(lambda v: isinstance(v, str))]
        if len(bad):
            refuse(argument, f"'{path}' whose row {bad[0]} has no text in '{column}'", "a text in each row")
    for column in {"score", "reference_score"} & set(table):
        table[column] = pandas.to_numeric(table[column], errors="coerce")
    return table.assign(copy=table.groupby("query").cumcount())


def join_policies(table: pandas.DataFrame, other: pandas.DataFrame, argument: str, other_name: str, cut: bool):
    """Pairs of two policies on the same posts: the other's response takes the reference's place.

    Args:
        cut: whether the first table is only the beginning of its file: what else the other one has is then not missing.

    Returns:
        (pairs with `query, response, reference` and the scores of both, number of posts that only one of them has).
    """
    known = [c for c in ("score", "has_eos") if c in table and c in other]
    left = table[["query", "copy", "response", *known]]
    right = other[["query", "copy", "response", *known]].rename(
        columns={"response": "reference", "score": "reference_score", "has_eos": "reference_has_eos"}
    )
    both = left.merge(right, on=["query", "copy"])
    if len(both) == 0:
        refuse(argument, f"'{other_name}', which has no query in common", "responses to the same posts")
    return both, len(left) + (0 if cut else len(right)) - (1 if cut else 2) * len(both)


# ----------------------------------------------------------------------------------------------------------------------
# judges: pairs -> outcome (1 the response wins, 0.5 tie, 0 it loses, NaN unreadable), and scores where a judge has them


def outcome_of_scores(scores: np.ndarray, reference_scores: np.ndarray) -> np.ndarray:
    """1, 0.5 (equal up to 1e-9) or 0 for each pair: [N], [N] -> [N]."""
    return 0.5 + 0.5 * np.sign(np.where(np.abs(scores - reference_scores) <= 1e-9, 0.0, scores - reference_scores))


def judge_by_gold(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """The toy world's annotator, without its noise. The post is read from the query."""
    from summarize_from_feedback_details.toy_tldr import gold_score, read_facts

    posts = [query.partition("\n\nPOST: ")[2].rpartition("\n\nTL;DR:")[0] for query in pairs["query"]]
    for query, post in zip(pairs["query"], posts):
        if not read_facts(post):
            refuse("judge", f"gold, and a post that is not of the toy world: {query[:40]!r}", "reward or openai")
    columns = {}
    for name, column in (("", "response"), ("reference_", "reference")):
        opinions = [gold_score(post, text) for post, text in zip(posts, pairs[column])]
        columns[f"{name}score"] = np.array([o["score"] for o in opinions])
        columns[f"{name}invented"] = np.array([float(o["wrong"] > 0) for o in opinions])
    return pandas.DataFrame({"outcome": outcome_of_scores(columns["score"], columns["reference_score"]), **columns})


def tokenise(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as `tldr_dataset.py` makes them, and PPO and the viewer read: nothing is added.

    A text that says `[PAD]` says just that, though the tokenizer of a checkpoint knows it as the pad token.
    """
    from summarize_from_feedback_details.check_inputs import PAD_TOKEN
    from summarize_from_feedback_details.tldr_dataset import encode

    split = lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [split(text) if PAD_TOKEN in text else ids for text, ids in zip(texts, encode(tokenizer, texts))]


def judge_by_reward(pairs: pandas.DataFrame, model, bias: float, tokenizer, batch_size: int) -> pandas.DataFrame:
    """A reward model: the reward at the last token of query and response, an end-of-text token behind it."""
    import torch

    from summarize_from_feedback_details.ppo_left_padding import read_rewards

    # a response that was cut off has no end-of-text token, neither here nor when it was sampled
    ended = [str(e) != "False" for side in ("", "reference_") for e in pairs.get(f"{side}has_eos", [True] * len(pairs))]
    queries = tokenise(tokenizer, list(pairs["query"]))
    responses = tokenise(tokenizer, [f" {text.strip()}" for text in [*pairs["response"], *pairs["reference"]]])
    end = [tokenizer.eos_token_id]
    tokens = [query + response + end * has_end for query, response, has_end in zip(2 * queries, responses, ended)]
    scores, progress = np.zeros(len(tokens)), Progress("rewards", len(tokens))
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        with torch.no_grad():
            scores[part] = read_rewards(model, bias, [tokens[i] for i in part]).tolist()
        progress.step(len(part))
    scores, reference_scores = scores[: len(pairs)], scores[len(pairs) :]
    return pandas.DataFrame(
        {
            "outcome": outcome_of_scores(scores, reference_scores),
            "score": scores,
            "reference_score": reference_scores,
        }
    )


def judge_by_server(pairs: pandas.DataFrame, args: Args, sent: list[int]) -> pandas.DataFrame:
    """A language model behind a server, asked about each pair in both orders."""
    template = Path(args.prompt).read_text("utf-8")
    same = [a.strip() == b.strip() for a, b in zip(pairs["response"], pairs["reference"])]
    rows = list(zip(pairs["query"], pairs["response"], pairs["reference"]))
    asked = [i for i in range(len(rows)) if not same[i]]  # equal texts are a tie: nothing to ask
    # one order of all posts, then the other: the first questions are about different posts
    questions = {(i, 0): fill_prompt(template, *rows[i]) for i in asked}
    questions |= {(i, 1): fill_prompt(template, rows[i][0], *rows[i][:0:-1]) for i in asked}
    answers, failures = ask_server(questions, args, sent)
    first = [answers.get((i, 0)) for i in range(len(pairs))]
    second = [answers.get((i, 1)) for i in range(len(pairs))]
    outcome = [0.5 if s else outcome_of_answers(a, b) for s, a, b in zip(same, first, second)]
    failed = [failures.get((i, 0), failures.get((i, 1))) for i in range(len(pairs))]
    return pandas.DataFrame({"outcome": outcome, "first_answer": first, "second_answer": second, "failure": failed})


def fill_prompt(template: str, query: str, summary_a: str, summary_b: str) -> str:
    """The question; texts are put in as they are, braces included."""
    texts = {"post": query.removesuffix("TL;DR:").strip(), "summary_a": summary_a.strip(), "summary_b": summary_b.strip()}  # noqa: E501  # fmt: skip
    return re.sub(r"{(post|summary_a|summary_b)}", lambda field: texts[field[1]], template)


def read_answer(text: str | None) -> str | None:
    """`A` or `B`, or None where the answer names neither, or both, in its closing sentence.

    >>> read_answer("The first invents a boss.\\nPreferred: B"), read_answer("Preferred: both")
    ('B', None)
    """
    text = without_thoughts(text or "")
    text = re.sub(r"(\s*<([/|｜]\S{1,30}|\w\w{1,30})>)+\s*$", "", text)  # a token such as </s>, written out
    text = re.sub(r"\W+$", "", text)  # also a rule below the answer
    if re.fullmatch(r"\W*[AB]", text):
        return text[-1]
    # at the beginning of a line or behind a sentence; the last one at the very end
    pattern = r"(?im)(?:^|[.!?;:]\W*\s)\W*preferred\W+(?:summary\W+)?([ab])\b(?=\W*$|\W+preferred)"
    found = list(re.finditer(pattern, text))
    named = {match[1].upper() for match in found}
    return named.pop() if len(named) == 1 and found[-1].end() == len(text) else None


def without_thoughts(text: str) -> str:
    """Text without what a model says to itself; the opening tag may have been in the prompt.

    >>> without_thoughts("Perhaps A.</think> B"), without_thoughts("<think>Perhaps")
    (' B', '')
    """
    return re.sub(r"(?s)^.*</think>|<think>.*$", "", text)


def outcome_of_answers(first: str | None, second: str | None) -> float:
    """Both orders together; in the first one the response is A, in the second one it is B."""
    if first is None or second is None:
        return math.nan
    return 0.5 * (first == "A") + 0.5 * (second == "B")


# ----------------------------------------------------------------------------------------------------------------------
# asking a server


class Cache:
    """All answers on disk, and who is asking for what, in one SQLite file that several processes may use.

    An answer is committed before `put` returns, so that a process killed at any moment has lost nothing it received.
    SQLite's own journal, not its WAL: that one does not work on network file systems, nor wait when a file is made.
    """

    def __init__(self, path: str, lease: float):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.lease = lease  # seconds after which a question of a process that cannot be looked up is free again
        self.db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, question TEXT, answer TEXT)")
        self.db.execute("CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, host TEXT, pid INTEGER, at REAL)")

    def get(self, key: str) -> str | None:
        """The answer, or None."""
        row = self.db.execute("SELECT answer FROM answers WHERE key = ? AND answer != ?", (key, OLD_REFUSAL)).fetchone()
        return row[0] if row else None

    def claim(self, key: str) -> bool:
        """Whether this process may ask: no answer is there, and no living process is asking."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            if self.get(key) is not None:
                return False
            row = self.db.execute("SELECT host, pid, at FROM claims WHERE key = ?", (key,)).fetchone()
            if row and self._alive(*row):
                return False
            mine = (key, socket.gethostname(), os.getpid(), time.time())
            self.db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", mine)
            return True
        finally:
            self.db.execute("COMMIT")

    def _alive(self, host: str, pid: int, at: float) -> bool:
        if host == socket.gethostname():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass
        return abs(time.time() - at) < self.lease

    def put(self, key: str, question: str, answer: str) -> None:
        """Keep an answer and give the claim back."""
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("DELETE FROM answers WHERE key = ? AND answer = ?", (key, OLD_REFUSAL))
        self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, question, answer))
        self.db.execute("DELETE FROM claims WHERE key = ?", (key,))
        self.db.execute("COMMIT")

    def release(self, key: str) -> None:
        """Give a claim back without an answer."""
        self.db.execute("DELETE FROM claims WHERE key = ?", (key,))


class OutOfBudget(Exception):
    """--max_requests is spent."""


class ServerFails(Exception):
    """The server answers nobody, for now."""


class WrongRequest(Exception):
    """The server refuses what cannot be cured by asking again: (argument, found, expected)."""


class Failed(Exception):
    """One question has no answer, for this reason.

    Args:
        set_up: what is wrong if no other question is answered either; None where that is the server itself.
        own: whether it may be this question's own fault; otherwise the server would fail at any.
    """

    def __init__(self, reason: str, set_up: WrongRequest | None = None, own: bool = True):
        super().__init__(reason)
        self.set_up, self.own = set_up, own


class Fault(Exception):
    """What went wrong with one request; another attempt may do better.

    Args:
        status: of HTTP, or the one that stands in an answer; None: nothing came back, or nothing that can be read.
        code: the server's code, its type of error, or the client's name for what happened.
        words: the server's words.
        wait: seconds that it asks for.
    """

    def __init__(self, status: int | None, code: str, words: str, wait: float | None = None):
        known = " ".join(str(part) for part in (status, code) if part)
        super().__init__(one_line(f"{known}: {words}"))
        self.status, self.code, self.words, self.wait = status, code, words, wait


def one_line(text: Any, most: int = 240) -> str:
    """Words of a server, or of a library, without markup and line breaks."""
    text = " ".join(re.sub(r"<[^>]*>", " ", str(text)).split())
    return text if len(text) <= most else f"{text[:most]}..."


def server_address(args: Args) -> str:
    """The server's address, as it stands in the keys of the cache and in the report."""
    address = os.environ.get("OPENAI_BASE_URL") or OPENAI if args.base_url is None else args.base_url
    path, mark, query = address.strip().partition("?")
    return path.rstrip("/").removesuffix("/chat/completions") + mark + query


def make_client(args: Args):
    """OpenAI's client. Its own attempts are off: they would not count in the budget."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # local servers want none
    path, _, query = server_address(args).partition("?")
    query = dict(urllib.parse.parse_qsl(query))  # such as Azure's ?api-version=; it belongs behind the whole path
    headers = {"api-key": key} if "api-version" in query else None  # Azure's name for it
    return openai.AsyncOpenAI(
        base_url=path, api_key=key, timeout=args.timeout, max_retries=0, default_query=query, default_headers=headers
    )


def routes() -> str:
    """What the environment says about the way to a server, without passwords: ` (HTTP_PROXY=http://host:1)`."""
    found = [(name, os.environ.get(name) or os.environ.get(name.lower())) for name in ROUTES]
    found = [f"{name}={re.sub('//[^/@]*@', '//', value)}" for name, value in found if value]
    return f" (in the environment: {', '.join(found)})" if found else ""


def cache_key(args: Args, prompt: str, ask: int) -> str:
    """What an answer depends on: server, model, sampling, the whole question (so: prompt file, texts and order)."""
    parts = [server_address(args), args.model, args.temperature, args.max_tokens, prompt, ask]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def wait_asked_for(error: Any) -> float | None:
    """Seconds in the server's Retry-After (a number or a date), or None."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(value)) if math.isfinite(float(value)) else None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = email.utils.parsedate_tz(value) if value else None
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
    return None


def read_fault(error: Any) -> Fault:
    """What an exception of the client says, or the `error` that some servers put into an answer with status 200.

    Servers write `{"error": {"message", "type", "code"}}` (OpenAI), `{"message", "type", "code"}` (older vLLM),
    `{"error": "..."}`, `{"detail": ...}` (FastAPI), or a page of HTML; `code` may repeat the status.
    """
    if not isinstance(error, dict) and not hasattr(error, "status_code"):
        cause = error.__cause__
        words = f"{error} ({str(cause) or type(cause).__name__})" if cause else str(error)
        return Fault(None, type(error).__name__, words)
    body = error if isinstance(error, dict) else error.body
    body = body if isinstance(body, dict) else {"message": body}
    codes = [str(body[name]) for name in ("code", "type") if body.get(name)]
    numbers = [int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)]
    words = str(body.get("message") or body.get("detail") or "no words")
    if isinstance(body.get("metadata"), dict):  # a relay's: what the server behind it said
        words += f": {body['metadata'].get('raw')}"
    status = getattr(error, "status_code", next(iter(numbers), None))
    known = [code for code in codes if code in QUESTION_CODES | SETTING_CODES | CREDIT_CODES]
    code = next(iter(known + [code for code in codes if not code.isdigit()]), "")
    return Fault(status, code, words, wait_asked_for(error))


def read_completion(completion: Any, args: Args) -> str:
    """The text of an answer, "" where the model says nothing.

    Raises:
        Fault: the answer has another shape than OpenAI's.
        Failed: the model did not come to an answer, and would not at another attempt.
    """
    if isinstance(getattr(completion, "error", None), dict):
        raise read_fault(completion.error)
    choice = next(iter(getattr(completion, "choices", None) or []), None)
    end, message = getattr(choice, "finish_reason", None), getattr(choice, "message", None)
    text = getattr(message, "content", None)
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
    if end == "content_filter" and not text:
        found = f"'{args.model}', whose server filters every answer"
        raise Failed("content_filter: no answer came", WrongRequest("model", found, "a model that judges such posts"))
    if message is None or not isinstance(text, str | None):
        is_model = hasattr(completion, "model_dump_json")
        shape = completion.model_dump_json(exclude_unset=True, warnings=False) if is_model else completion
        raise Fault(None, "", f"not the answer of a chat completion: {shape}")
    # OpenAI's models say nothing while they think, others do so in `reasoning_content` or between tags
    if end == "length" and not without_thoughts(text or "").strip():
        found = f"{args.max_tokens}, which the model used up before its answer began"
        raise Failed(f"--max_tokens {args.max_tokens} are too few: the answer did not begin",
                     WrongRequest("max_tokens", found, "more (a model that thinks needs thousands)"))  # fmt: skip
    return (text or "").encode("utf-8", "replace").decode()  # half a character cannot be kept


class Server:
    """Asks questions: bounded budget, attempts with growing waits, answers kept in the cache."""

    def __init__(self, args: Args, cache: Cache, sent: list[int]):
        self.args, self.cache, self.sent = args, cache, sent
        self.client = make_client(args)
        self.limit, self.takes_temperature = "max_tokens", True  # what the model takes, as far as it has said
        self.works, self.answered_before, self.failed_in_a_row = False, False, 0
        self.resume_at, self.stop = 0.0, None  # an exception that ends everything

    async def answer(self, prompt: str, attempts: range | None = None) -> str | None:
        """`A`, `B`, or None where `max_asks` answers could not be read.

        Args:
            attempts: numbers of the attempts at each request: the higher, the longer the wait behind it.

        Raises:
            Failed: no answer came, and that may be this question's fault.
            OutOfBudget, ServerFails, WrongRequest: nothing more can be asked.
        """
        for ask in range(self.args.max_asks):
            key = cache_key(self.args, prompt, ask)
            while (text := self.cache.get(key)) is None:
                if self.cache.claim(key):
                    try:
                        text = await self.request(prompt, ask, attempts or range(self.args.max_attempts))
                        self.cache.put(key, prompt, text)
                    except BaseException:
                        self.cache.release(key)
                        raise
                elif self.stop:
                    raise self.stop
                else:  # another process, or another worker with the same question, is asking
                    await asyncio.sleep(0.1)
            if verdict := read_answer(text):
                break
        return verdict

    async def request(self, prompt: str, ask: int, attempts: range) -> str:
        """The text of one answer. Raises: see `answer`."""
        for attempt in attempts:
            try:
                text = await self.send(prompt, ask)
            except Fault as found:
                fault = found
            else:
                self.works, self.failed_in_a_row = True, 0
                return text
            if fault.wait is not None:  # it is the server that has enough: nobody asks until then
                until = time.monotonic() + fault.wait
                if fault.wait > LONGEST_WAIT and until > self.resume_at + LONGEST_WAIT:
                    print(f"the server asks to wait for {fault.wait / 60:,.0f} minutes ({fault}); "
                          "Ctrl-C stops, and the same command goes on later", flush=True)  # fmt: skip
                self.resume_at = max(self.resume_at, until)
            elif attempt + 1 < self.args.max_attempts:
                wait = min(LONGEST_WAIT, self.args.first_wait * 2**attempt)
                await self.pause(time.monotonic() + wait * random.uniform(0.5, 1.0))
        is_down = fault.status == 429 or (fault.status or 0) >= 502 and fault.status != 504
        raise Failed(str(fault), own=not is_down and fault.code != "APIConnectionError")

    async def pause(self, until: float) -> None:
        """Sleep; wake up when everything stops."""
        while (wait := until - time.monotonic()) > 0 and not self.stop:
            await asyncio.sleep(min(wait, 1.0))

    async def send(self, prompt: str, ask: int) -> str:
        """The text of one request's answer; the request is sent again where the model does not take a setting.

        Raises:
            Fault: another attempt may do better.
            Failed, OutOfBudget, ServerFails, WrongRequest: none will.
        """
        while True:
            while self.resume_at > time.monotonic() and not self.stop:
                await self.pause(self.resume_at)
            if self.stop:
                raise self.stop
            if self.args.max_requests is not None and self.sent[0] >= self.args.max_requests:
                raise OutOfBudget
            self.sent[0] += 1
            settings, messages = self.settings(ask), [{"role": "user", "content": prompt}]
            try:
                found = await self.client.chat.completions.create(model=self.args.model, messages=messages, **settings)
                return read_completion(found, self.args)
            except Failed:
                raise
            except Exception as error:  # whatever the client makes of what a server answers
                fault = error if isinstance(error, Fault) else read_fault(error)
            if not self.falls_back(fault, settings, ask):
                raise self.meaning(fault)

    def settings(self, ask: int) -> dict[str, float]:
        """What is sent beside the question: an answer that could not be read is asked for again at temperature 1."""
        temperature = {"temperature": self.args.temperature if ask == 0 else 1.0} if self.takes_temperature else {}
        return {self.limit: self.args.max_tokens} | temperature

    def falls_back(self, fault: Fault, settings: dict[str, float], ask: int) -> bool:
        """Whether the server refuses a setting that the request can do without; from now on it is not sent.

        OpenAI's models that think take `max_completion_tokens`, and no temperature but 1.
        """
        said = re.search(r"(?i)unsupported|not support|instead|only|deprecated", fault.words)
        if fault.status not in (400, 422) or not said or "too large" in fault.words:
            return False
        if settings != self.settings(ask):  # another worker has found out
            return True
        if self.limit == "max_tokens" and "max_completion_tokens" in fault.words:
            self.limit, change = "max_completion_tokens", "--max_tokens is sent as max_completion_tokens"
        elif self.takes_temperature and "temperature" in fault.words:
            self.takes_temperature, change = False, "no --temperature is sent, the model's own holds"
        else:
            return False
        print(f"{self.args.model}: {change} ({fault})", flush=True)
        return True

    def meaning(self, fault: Fault) -> Exception:
        """What a fault ends: everything, one question, or (the fault itself) one attempt."""
        model, status, told = self.args.model, fault.status, f"{fault.code} {fault.words}"
        if status == 401:
            return WrongRequest("base_url", f"a refused key ({fault}){routes()}", "the right OPENAI_API_KEY")
        if status in (402, 407) or fault.code in CREDIT_CODES:
            return ServerFails(str(fault))
        if status in (404, 405) and re.search(r"(?i)model|deployment", told):
            return WrongRequest("model", f"'{model}' ({fault})", "a model that the server has")
        if status in (404, 405):
            found = f"'{server_address(self.args)}', where no questions are taken ({fault}){routes()}"
            return WrongRequest("base_url", found, "an address that ends in /v1, as most do")
        refused = 400 <= (status or 0) < 500 and status not in (408, 409, 425, 429)
        if not refused and fault.code not in QUESTION_CODES:
            return fault
        set_up = WrongRequest("model", f"'{model}', whose server refuses the request ({fault})",
                              "a model that takes such questions, temperature and max_tokens")  # fmt: skip
        if status == 403 and "model" not in told:
            set_up = WrongRequest("base_url", f"a refused key ({fault}){routes()}", "the right OPENAI_API_KEY")
        about_setting = fault.code in SETTING_CODES or SETTING_WORDS.search(fault.words)
        return set_up if about_setting and not (self.works or self.answered_before) else Failed(str(fault), set_up)


async def ask_all(questions: dict[Any, str], args: Args, cache: Cache, sent: list[int], progress: Progress):
    """Ask all questions, `concurrency` at a time. When one cannot go on, what is under way still ends.

    Returns:
        (name -> answer, name -> reason why there is none).
    """
    server, answers, failures = Server(args, cache, sent), {}, {}
    known = {prompt for prompt in questions.values() if cache.get(cache_key(args, prompt, 0)) is not None}
    server.answered_before = bool(known)
    # first those without an answer: they show what the server can do
    waiting = collections.deque(sorted(questions.items(), key=lambda question: question[1] in known))

    async def start() -> None:
        """Ask one at a time, each attempt at another question: where none is answered, the set-up is at fault."""
        attempt, refused = 0, set()
        while waiting and not server.works:
            name, prompt = waiting.popleft()
            try:
                answers[name] = await server.answer(prompt, range(attempt, attempt + 1))
                progress.step(note=f"{sent[0]} requests")
                continue
            except Failed as failure:
                last = failure
            waiting.append((name, prompt))
            if last.set_up:
                refused.add(name)
            else:
                attempt += 1
            tried = attempt + len(refused)
            if tried < max(3, args.max_attempts) and len(refused) < len(waiting):
                continue
            with contextlib.suppress(Failed):  # what was answered before tells the server's fault from the questions'
                if known:
                    return await server.request(next(iter(known)), 0, range(args.max_attempts - 1, args.max_attempts))
            raise last.set_up or ServerFails(f"{tried} attempts failed, the last one with {last}")

    async def work() -> None:
        while waiting and not server.stop:
            name, prompt = waiting.popleft()
            try:
                answers[name] = await server.answer(prompt)
                progress.step(note=f"{sent[0]} requests")
            except Failed as failure:
                failures[name] = str(failure)
                server.failed_in_a_row += 1
                server.stop = server.stop or too_many(failure)
            except (OutOfBudget, ServerFails, WrongRequest) as stop:
                server.stop = server.stop or stop

    def too_many(last: Failed) -> Exception | None:
        row, number = server.failed_in_a_row, len(failures)
        if not last.own:
            return ServerFails(f"{args.max_attempts} attempts failed, the last one with {last}")
        if row > IN_A_ROW + 2 * args.concurrency:
            return ServerFails(f"{row} questions in a row failed, the last one with {last}")
        if number > args.max_failures * len(questions):
            found = f"{number} of {len(questions)} questions that failed, the last one with {last}"
            return WrongRequest("max_failures", found, f"at most {args.max_failures:g} of all questions")
        return None

    try:
        await start()
        await asyncio.gather(*(work() for _ in range(args.concurrency)))
    finally:
        await server.client.close()
    if server.stop:
        raise server.stop
    return answers, failures


def ask_server(questions: dict[Any, str], args: Args, sent: list[int]) -> tuple[dict[Any, str | None], dict[Any, str]]:
    """Answers (`A`, `B`, None) to all questions but those that failed, and why these did.

    Leaves with a message and exit code 1 or 2 where it cannot go on.

    Args:
        questions: any name -> the whole question.
        sent: one number, of the requests that this command has sent so far; raised here.
    """
    cache = Cache(args.cache, lease=args.timeout * args.max_attempts + LONGEST_WAIT * args.max_attempts)
    open_questions = [q for q in questions.values() if cache.get(cache_key(args, q, 0)) is None]
    tokens = sum(map(len, open_questions)) / CHARACTERS_PER_TOKEN
    print(f"{len(questions)} questions, {len(questions) - len(open_questions)} of them answered before: at least "
          f"{len(open_questions)} requests, about {tokens:,.0f} tokens read", end="")  # fmt: skip
    if args.price_in is not None and args.price_out is not None:
        cost = (tokens * args.price_in + len(open_questions) * ANSWER_TOKENS * args.price_out) / 1e6
        print(f", about {cost:.2f} US dollars", end="")
    print(f"; answers of {server_address(args)} are kept in {args.cache}", flush=True)
    progress = Progress("answers", len(questions))
    try:
        answers, failures = asyncio.run(ask_all(questions, args, cache, sent, progress))
    except (WrongRequest, OutOfBudget, ServerFails, KeyboardInterrupt) as error:
        kept = f"{progress.done} of {len(questions)} questions are answered and kept; the same command goes on"
        if isinstance(error, WrongRequest):
            refuse(*error.args)
        if isinstance(error, OutOfBudget):
            print(f"error: --max_requests: the {args.max_requests} requests are spent; {kept}", file=sys.stderr)
        elif isinstance(error, ServerFails):
            print(f"error: --base_url: {server_address(args)}{routes()}: {error}; {kept}", file=sys.stderr)
        else:
            print(f"stopped: {kept}", file=sys.stderr)
        sys.exit(1 if progress.done or not isinstance(error, ServerFails) else 2)
    print(f"{sent[0]} requests sent", flush=True)
    if failures:
        reason, _ = collections.Counter(failures.values()).most_common(1)[0]
        print(f"{len(failures)} questions failed and are counted apart, e.g. with {reason}", flush=True)
    return answers, failures


# ----------------------------------------------------------------------------------------------------------------------
# statistics


def mean_interval(values, posts, resamples: int, seed: int, shares: bool = False) -> dict[str, float | None]:
    """Mean and its 95 % bootstrap interval; whole posts are resampled, so that what belongs to a post stays together.

    Where all values are equal, resampling sees no spread: for shares, which may be all 0 or all 1 by chance, the
    interval is then the exact one of the binomial.

    Args:
        values: [N] numbers; NaN are left out.
        posts: [N] which post each belongs to.
        shares: whether the values are wins, or other things that happen or do not.

    Returns:
        `mean`, `low`, `high`; None where there is no value, and for the ends where one post has different ones.
    """
    values, posts = np.asarray(values, float), np.asarray(posts)
    values, posts = values[~np.isnan(values)], posts[~np.isnan(values)]
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None}
    _, codes = np.unique(posts, return_inverse=True)
    sums, counts = np.bincount(codes, values), np.bincount(codes).astype(float)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        if not shares or mean not in (0.0, 1.0):
            return {"mean": mean, "low": mean, "high": mean}
        exact = stats.binomtest(int(mean * len(counts)), len(counts)).proportion_ci()
        return {"mean": mean, "low": float(exact.low), "high": float(exact.high)}
    if len(counts) == 1:
        return {"mean": mean, "low": None, "high": None}
    found = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        n_resamples=resamples, method="percentile", batch=max(1, 10**7 // len(sums)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = found.confidence_interval
    return {"mean": mean, "low": float(low), "high": float(high)}


def length_controlled_win_rate(outcomes, length_differences, posts) -> dict[str, float | None]:
    """Win rate at equal length: logistic regression of the outcome on the difference in length, read at 0.

    Longer summaries win more often, and PPO's are longer. The idea is that of the length-controlled AlpacaEval (Dubois
    et al. 2024, arXiv 2404.04475), here with two covariates, so that a taste for length may grow or level off:
    logit P(win) = a + b z + c tanh(2 z), z = difference / its standard deviation. Firth's (1993) estimate stays finite
    where length alone decides. The 95 % interval of `a` is from the sandwich estimator (HC3), clustered by post.

    The curve is smooth: where many pairs are equal texts, and so ties, it passes above or below what is seen at equal
    length. The report therefore also has what is seen there (`near_equal_length`).

    Args:
        outcomes: [N] 1, 0.5 or 0; NaN are left out.
        length_differences: [N] words of the response minus words of the reference.
        posts: [N] which post each belongs to.

    Returns:
        `mean`, `low`, `high` of sigmoid(a), None where lengths or outcomes do not differ, or one side is nearly always
        the longer one; and `standard_deviation` of the differences in words.
    """
    y, x, posts = np.asarray(outcomes, float), np.asarray(length_differences, float), np.asarray(posts)
    x, posts, y = x[~np.isnan(y)], posts[~np.isnan(y)], y[~np.isnan(y)]
    _, codes = np.unique(posts, return_inverse=True)
    n, deviation = len(np.unique(codes)), float(x.std()) if len(x) else 0.0
    unknown = {"mean": None, "low": None, "high": None, "standard_deviation": deviation}
    # at equal length there must be something to look at, or the curve would say more than the data
    if n < 10 or deviation == 0 or np.ptp(y) == 0 or min((x <= 0).sum(), (x >= 0).sum()) < NEAR_EQUAL_LENGTH:
        return unknown
    z = x / deviation
    X = np.stack([np.ones_like(z), z, np.tanh(2 * z)], 1)  # [N, 3]
    if np.linalg.matrix_rank(X) < 3:  # two lengths only, or three of equal distance: the two covariates are one
        X = X[:, :2]
    information = lambda p: X.T @ (np.maximum(p * (1 - p), 1e-12)[:, None] * X)
    beta, objective = np.zeros(X.shape[1]), -math.inf
    for _ in range(500):  # Newton's method on the penalised likelihood, steps halved until they gain
        p = expit(X @ beta)
        inverse = np.linalg.inv(information(p))
        leverage = np.maximum(p * (1 - p), 1e-12) * np.einsum("ni,ij,nj->n", X, inverse, X)
        step = inverse @ (X.T @ (y - p + leverage * (0.5 - p)))  # Firth's score
        while np.abs(step).max() > 1e-8:
            p = np.clip(expit(X @ (beta + step)), 1e-12, 1 - 1e-12)
            gained = (y * np.log(p) + (1 - y) * np.log1p(-p)).sum() + 0.5 * np.linalg.slogdet(information(p))[1]
            if gained > objective:
                break
            step = step / 2
        else:
            break
        beta, objective = beta + step, gained
    p = expit(X @ beta)
    residuals = ((y - p) / np.maximum(1 - leverage, 0.01))[:, None] * X
    by_post = np.stack([np.bincount(codes, column) for column in residuals.T], 1)  # [posts, 3]
    error = math.sqrt((inverse @ (by_post.T @ by_post) @ inverse)[0, 0])
    margin = stats.t.ppf(0.975, n - X.shape[1]) * error
    low, mean, high = (float(expit(beta[0] + m)) for m in (-margin, 0.0, margin))
    return {"mean": mean, "low": low, "high": high, "standard_deviation": deviation}


def agreement(verdicts: pandas.DataFrame, interval: Callable) -> dict[str, Any]:
    """How far the reward model's scores of the table agree with the judge, and whether their sizes mean what they say.

    A reward model claims P(win) = sigmoid(score - reference score). Ties of the judge are left out.
    """
    decided = verdicts[verdicts["outcome"].isin([0.0, 1.0])].dropna(subset=["rm_score", "rm_reference_score"])
    if len(decided) == 0:
        return {"posts": 0}
    claimed = expit(decided["rm_score"] - decided["rm_reference_score"]).to_numpy()
    won, posts = decided["outcome"].to_numpy(), decided["query"].to_numpy()
    right = np.where(claimed == 0.5, 0.5, (claimed > 0.5) == (won == 1.0))
    bins = []
    for part in np.array_split(np.argsort(claimed, kind="stable"), min(CALIBRATION_BINS, len(decided))):
        observed = interval(won[part], posts[part])
        bins.append({"posts": len(part), "claimed": float(claimed[part].mean()), "win_rate": observed})
    error = sum(b["posts"] * abs(b["claimed"] - b["win_rate"]["mean"]) for b in bins) / len(decided)
    return {
        "posts": len(decided),
        "share": interval(right, posts),
        "expected_calibration_error": error,
        "calibration": bins,
    }


def summarise(verdicts: pandas.DataFrame, args: Args) -> dict[str, Any]:
    """All numbers of a report from one row a post; see the README for what each is."""
    posts, outcomes = verdicts["query"].to_numpy(), verdicts["outcome"].to_numpy(float)
    interval = lambda values, where, shares=True: mean_interval(values, where, args.bootstrap, args.seed, shares)
    read = ~np.isnan(outcomes)
    words, reference_words = verdicts["response_words"].to_numpy(), verdicts["reference_words"].to_numpy()
    near = np.abs(words - reference_words) <= NEAR_EQUAL * np.maximum(1, reference_words)
    report = {
        "posts": len(verdicts),
        "unreadable": int((~read).sum()),
        "wins": int((outcomes == 1).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes == 0).sum()),
        "win_rate": interval(outcomes, posts),
        "length_controlled_win_rate": length_controlled_win_rate(outcomes, words - reference_words, posts),
        "near_equal_length": {**interval(outcomes[near], posts[near]), "posts": int((read & near).sum())},
        "response_words": interval(words, posts, shares=False),
        "reference_words": interval(reference_words, posts, shares=False),
        "by_length_ratio": [],
    }
    ratio = words / np.maximum(1, reference_words)
    for low, high in zip(LENGTH_RATIOS, LENGTH_RATIOS[1:]):
        part = read & (ratio >= low) & (ratio < high)
        if part.any():
            found = interval(outcomes[part], posts[part])
            upper = high if math.isfinite(high) else None
            report["by_length_ratio"].append({"from": low, "to": upper, "posts": int(part.sum()), "win_rate": found})
    if "score" in verdicts:
        report["mean_score"] = interval(verdicts["score"], posts, shares=False)
        report["reference_mean_score"] = interval(verdicts["reference_score"], posts, shares=False)
        report["score_difference"] = interval(verdicts["score"] - verdicts["reference_score"], posts, shares=False)
    if "invented" in verdicts:
        report["invented"] = interval(verdicts["invented"], posts)
        report["reference_invented"] = interval(verdicts["reference_invented"], posts)
    if "first_answer" in verdicts:  # of the answers that can be read, those that prefer what stands first
        answers = np.concatenate([verdicts["first_answer"], verdicts["second_answer"]])
        first = np.array([math.nan if pandas.isna(a) else float(a == "A") for a in answers])
        report["first_position_preferred"] = interval(first, np.concatenate([posts, posts]))
        report["unreadable_answers"] = int(np.isnan(first).sum()) - 2 * int(verdicts["same"].sum())
    if "failure" in verdicts:
        report["failed"] = int(verdicts["failure"].notna().sum())
        report["failures"] = verdicts["failure"].value_counts().head(5).to_dict()  # the most frequent reasons
    if "rm_score" in verdicts:
        report["agreement"] = agreement(verdicts, interval)
    return report


# ----------------------------------------------------------------------------------------------------------------------
# reports


def show(value: dict[str, float | None]) -> str:
    """`0.723 [0.690, 0.755]`"""
    if value["mean"] is None or value["low"] is None:
        return "-" if value["mean"] is None else f"{value['mean']:.3f} [-]"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def report_rows(report: dict[str, Any]) -> dict[str, str]:
    """What is shown of a report: label -> text."""
    rows = {"win rate": show(report["win_rate"]), "length-controlled": show(report["length_controlled_win_rate"])}
    near = report["near_equal_length"]
    rows["seen at nearly equal length"] = f"{show(near)} ({near['posts']} posts)"
    rows["wins / ties / losses"] = f"{report['wins']} / {report['ties']} / {report['losses']}"
    rows["unreadable pairs"] = str(report["unreadable"])
    if report.get("failed"):
        reason = next(iter(report["failures"])).replace("|", "/")
        rows["of these, failed at the server"] = f"{report['failed']}, e.g. {reason}"
    rows["words"] = show(report["response_words"])
    rows["words of the other side"] = show(report["reference_words"])
    names = {"mean_score": "score", "reference_mean_score": "score of the other side", "invented": "invents something"}
    names |= {"reference_invented": "other side invents something", "first_position_preferred": "first one preferred"}
    rows |= {label: show(report[key]) for key, label in names.items() if key in report}
    if report.get("agreement", {}).get("posts"):
        rows["reward model agrees"] = show(report["agreement"]["share"])
        rows["its calibration error"] = f"{report['agreement']['expected_calibration_error']:.3f}"
    if "win_rate_difference" in report:
        rows["win rate, difference"] = show(report["win_rate_difference"])
    return rows


def write_report(folder: Path, report: dict[str, Any], verdicts: pandas.DataFrame) -> None:
    """Write a report's folder as a whole; one that is there and says something else is set aside."""
    if (folder / "report.json").is_file():
        if json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report)):
            return
        n = 1
        while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
            n += 1
        folder.rename(aside)
        print(f"another report was there: now {aside}", flush=True)
    with atomic_folder(str(folder)) as partial:
        write_json(partial / "report.json", report)
        verdicts.to_parquet(partial / "verdicts.parquet")
        lines = [f"| {label} | {text} |" for label, text in report_rows(report).items()]
        lines = [f"| {report['policy']} | 95 % interval |", "|---|---|", *lines]
        (partial / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_args(args: Args) -> None:
    """Refuse what cannot work."""
    if not args.run:
        refuse("run", "nothing", "names of runs, or files with query, response, reference")
    for name in ("num_rows", "bootstrap", "batch_size", "max_tokens", "concurrency", "timeout", "max_attempts",
                 "max_asks", "max_requests", "first_wait"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value > 0:
            refuse(name, str(value), "a number above 0")
    if args.paired_difference and not args.against:
        refuse("paired_difference", "no --against", "two policies")
    if args.seed < 0:
        refuse("seed", str(args.seed), "a number of at least 0")
    if not 0 <= args.max_failures <= 1:
        refuse("max_failures", str(args.max_failures), "a share from 0 to 1")
    if args.temperature < 0:
        refuse("temperature", str(args.temperature), "a number of at least 0")
    if args.judge == "reward" and not args.reward_model:
        refuse("reward_model", "nothing", "the reward model that judges: a folder or hub id")
    if args.judge == "openai":
        if not Path(args.prompt).is_file():
            refuse("prompt", f"'{args.prompt}', which is not there", "a file with {post}, {summary_a}, {summary_b}")
        missing = [f for f in ("{post}", "{summary_a}", "{summary_b}") if f not in Path(args.prompt).read_text("utf-8")]
        if missing:
            refuse("prompt", f"'{args.prompt}' without {', '.join(missing)}", "all three of post and summaries")
        address, key = server_address(args), os.environ.get("OPENAI_API_KEY", "").strip()
        if address == OPENAI and not key:
            refuse("base_url", "OpenAI's server, and no OPENAI_API_KEY", "a key in the environment, or an address")
        if not re.fullmatch(r"[!-~]*", key):
            refuse("base_url", "an OPENAI_API_KEY with a line break, a space or a letter beyond ASCII", "the key alone")
        if not re.match(r"https?://[^/]", address):
            refuse("base_url", f"'{address}'{routes()}", "an address such as http://localhost:8000/v1")
        try:
            urllib.parse.urlsplit(address).port  # noqa: B018 (it raises)
            make_client(args)
        except Exception as error:  # the client reads certificates, and whatever proxies the environment names
            found = f"'{address}', to which no way leads{routes()}: {one_line(error)}"
            refuse("base_url", found, "an address, certificates and proxies that exist")
        refuse_uncreatable("cache", args.cache)
        try:
            Cache(args.cache, 0.0).db.close()
        except (sqlite3.Error, OSError) as error:
            refuse("cache", f"'{args.cache}', which cannot be used ({error})", "a file of answers, or a new one")


def make_judge(args: Args) -> tuple[str, Callable[[pandas.DataFrame], pandas.DataFrame]]:
    """The judge's name and its function from pairs to verdicts; refuses a reward model that cannot be loaded."""
    if args.judge == "gold":
        return args.name or "gold", judge_by_gold
    if args.judge == "openai":
        name = args.name or args.model.rstrip("/").split("/")[-1]
        sent = [0]  # requests of all tables together: the budget is the command's
        return name, lambda pairs: judge_by_server(pairs, args, sent)
    from summarize_from_feedback_details.check_inputs import find_model, find_tokenizer
    from summarize_from_feedback_details.ppo_left_padding import load_reward_model

    find_model("reward_model", args.reward_model, args.reward_model_revision, "reward")
    if args.reward_tokenizer:
        tokenizer = find_tokenizer("reward_tokenizer", args.reward_tokenizer)
    else:
        tokenizer = find_tokenizer("reward_model", args.reward_model, args.reward_model_revision)
    loaded = []

    def judge(pairs: pandas.DataFrame) -> pandas.DataFrame:

        if not loaded:
            model, bias = load_reward_model(args.reward_model, args.reward_model_revision, "reward_model")
            loaded.append((model.eval().to("cuda" if on_gpu() else "cpu"), bias))
        return judge_by_reward(pairs, *loaded[0], tokenizer, args.batch_size)

    return args.name or Path(args.reward_model).name, judge


def judge_table(pairs: pandas.DataFrame, judge: Callable) -> pandas.DataFrame:
    """Verdicts on pairs, with what the table knew: lengths in words, scores of the reward model."""
    pairs = pairs.reset_index(drop=True)
    texts = pairs[["query", "response", "reference"]]
    known = {f"{side}_words": texts[side].map(lambda t: len(t.split())) for side in ("response", "reference")}
    if {"score", "reference_score"} <= set(pairs):
        known |= {"rm_score": pairs["score"], "rm_reference_score": pairs["reference_score"]}
    same = [a.strip() == b.strip() for a, b in zip(texts["response"], texts["reference"])]
    return pandas.concat([texts, pandas.DataFrame({**known, "same": same}), judge(pairs)], axis=1)


def short_name(policy: str) -> str:
    """A run's name, or a file's without its suffix; a dot in a run's name (`kl0.05`) is part of it."""
    path = Path(policy)
    return path.stem if path.suffix in (".parquet", ".csv", ".jsonl") else path.name


def report_folder(policy: str, name: str, args: Args) -> Path:
    """Where a policy's report goes."""
    if args.output_dir:
        return Path(args.output_dir) / short_name(policy) / name
    if Path(policy).suffix in (".parquet", ".csv", ".jsonl"):
        return Path(policy).with_suffix("") / "judge" / name
    return Path(args.runs_dir) / policy / "judge" / name


def main(args: Args) -> dict[str, dict[str, Any]]:
    """Judge every policy; returns policy (and update) -> report."""
    quiet_libraries()
    check_args(args)
    tables = {p: read_table("run", find_table("run", p, args, args.split)) for p in args.run}
    other = read_table("against", find_table("against", args.against, args, args.split)) if args.against else None
    name, judge = make_judge(args)
    if args.against:
        name += f"_against_{short_name(args.against)}"
    jobs = []  # (label, folder, table)
    for policy, table in tables.items():
        folder = report_folder(policy, name, args)
        jobs.append((policy, folder, table))
        if args.updates:
            found = (Path(args.runs_dir) / policy / "tables").glob(f"{args.split}_*.parquet")
            for update, path in sorted((int(p.stem.split("_")[-1]), p) for p in found):
                jobs.append((f"{policy}, update {update}", folder / f"update_{update}", read_table("run", path)))  # noqa: E501  # fmt: skip
    # all pairs are made, so that a table that does not fit is refused, before the first one is judged
    left_out = {}
    for i, (label, folder, table) in enumerate(jobs):
        table = table.head(args.num_rows or len(table))
        if other is not None:
            pairs, left_out[label] = join_policies(table, other, "against", args.against, bool(args.num_rows))
            jobs[i] = (label, folder, table, pairs)
        else:
            jobs[i] = (label, folder, table, table)
    for i, (label, folder, *_) in enumerate(jobs):
        same = [other_label for other_label, other_folder, *_ in jobs[:i] if other_folder == folder]
        if same:
            refuse("run", f"'{label}' and '{same[0]}', whose reports would both be {folder}", "one command for each")
        refuse_uncreatable("output_dir", folder)
    reports, shown = {}, Table("", *[job[0] for job in jobs], title=f"judged by {name}")
    for label, folder, table, pairs in jobs:
        verdicts = judge_table(pairs, judge)
        report = {"judge": name, "policy": label, "against": args.against or "references", "made_with": asdict(args)}
        if args.judge == "openai":
            report["server"] = server_address(args)
        report |= summarise(verdicts, args)
        if args.against:
            report["posts_of_one_policy_only"] = left_out[label]
        if args.paired_difference:
            mine = judge_table(table, judge).set_index(["query", table["copy"].to_numpy()])["outcome"]
            others = judge_table(other, judge).set_index(["query", other["copy"].to_numpy()])["outcome"]
            difference = (mine - others).dropna()  # posts that both have
            posts = difference.index.get_level_values(0).to_numpy()
            report["win_rate_difference"] = mean_interval(difference, posts, args.bootstrap, args.seed)
        write_report(folder, report, verdicts)
        reports[label] = report
    labels = list(dict.fromkeys(label for report in reports.values() for label in report_rows(report)))
    for row in labels:
        shown.add_row(row, *(report_rows(report).get(row, "-") for report in reports.values()))
    print_table(shown)
    for label, folder, *_ in jobs:
        print(f"{label}: {folder}/report.json, report.md, verdicts.parquet")
    return reports


if __name__ == "__main__":
    command_line(main, Args)
