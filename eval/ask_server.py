"""Ask many questions of a server that speaks OpenAI's protocol: each answer is kept, each failure has a reason."""

import asyncio
import collections
import contextlib
import email.utils
import hashlib
import json
import os
import random
import re
import socket
import sqlite3
import sys
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from summarize_from_feedback_details.common.arguments import refuse
from summarize_from_feedback_details.common.console import Progress
from summarize_from_feedback_details.common.files import refuse_uncreatable

CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate of the cost
ANSWER_TOKENS = 60  # of an answer as the prompt asks for, for the estimate of the cost
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more; longer waits are announced
IN_A_ROW = 20  # questions that fail one after the other until one that was answered is asked again
OLD_REFUSAL = "(the server refuses this question)"  # in caches of earlier versions; it may have been about a setting
OPENAI = "https://api.openai.com/v1"
# variables of the environment that the client reads
ROUTES = ("OPENAI_BASE_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
# OpenAI's codes, with Azure's and llama.cpp's
QUESTION_CODES = {"content_filter", "content_policy_violation", "context_length_exceeded", "exceed_context_size_error",
                  "invalid_prompt", "string_above_max_length"}  # fmt: skip
SETTING_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter", "invalid_model", "model_not_found"}
CREDIT_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
THOUGHTS = re.compile(r"(?s)^.*</think>|<think>.*$")  # of a model; the opening tag may have been in the prompt
SETTING_WORDS = re.compile(r"(?i)(unsupported|unrecognized|unknown) (request )?(parameter|argument)")


class Stop(Exception):
    """Nothing more can be asked: (argument, what was found, what was expected); without the last, it may work later."""

    def __init__(self, argument: str, found: str, expected: str | None = None):
        super().__init__(argument, found, expected)
        self.argument, self.found, self.expected = argument, found, expected


class Failure(Exception):
    """Why a request has no answer.

    Args:
        status: of HTTP, or the one that stands in an answer; None: nothing came back, or nothing that can be read.
        code: the server's code, its type of error, or the client's name for what happened.
        words: the server's words.
        wait: seconds that it asks for.
        set_up: no other attempt would help; this is what is wrong if no other question is answered either.
    """

    def __init__(self, status: int | None, code: str, words: str, wait: float = 0.0, set_up: Stop | None = None):
        known = " ".join(str(part) for part in (status, code) if part)
        super().__init__(one_line(f"{known}: {words}" if known else words))
        self.status, self.code, self.words, self.wait, self.set_up = status, code, words, wait, set_up
        self.is_busy = status == 429 or (status or 0) >= 502 and status != 504


def one_line(text: Any, most: int = 240) -> str:
    """Words of a server, or of a library, without markup and line breaks."""
    text = " ".join(re.sub(r"<[^>]*>", " ", str(text)).split())
    return text if len(text) <= most else f"{text[:most]}..."


# ----------------------------------------------------------------------------------------------------------------------
# the cache


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
        self.db.execute("DELETE FROM answers WHERE answer = ?", (OLD_REFUSAL,))

    def get(self, key: str) -> str | None:
        """The answer, or None."""
        row = self.db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def claim(self, key: str) -> bool:
        """Whether this process may ask: no answer is there, and no living process is asking."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            here, now = socket.gethostname(), time.time()
            for host, pid, at in self.db.execute("SELECT host, pid, at FROM claims WHERE key = ?", (key,)).fetchall():
                if abs(now - at) < self.lease and (host != here or psutil.pid_exists(pid)):
                    return False
            if self.get(key) is not None:
                return False
            self.db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (key, here, os.getpid(), now))
            return True
        finally:
            self.db.execute("COMMIT")

    def put(self, key: str, question: str, answer: str) -> None:
        """Keep an answer and give the claim back."""
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, question, answer))
        self.release(key)
        self.db.execute("COMMIT")

    def release(self, key: str) -> None:
        """Give a claim back without an answer."""
        self.db.execute("DELETE FROM claims WHERE key = ?", (key,))


def cache_key(args: Any, prompt: str, ask: int) -> str:
    """What an answer depends on: server, model, sampling, the whole question (so: prompt file, texts and order)."""
    parts = [server_address(args), args.model, args.temperature, args.max_tokens, prompt, ask]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# the way to the server, and what it says


def server_address(args: Any) -> str:
    """The server's address, as it stands in the keys of the cache and in the report."""
    address = os.environ.get("OPENAI_BASE_URL") or OPENAI if args.base_url is None else args.base_url
    path, mark, query = address.strip().partition("?")
    return path.rstrip("/").removesuffix("/chat/completions") + mark + query


def routes() -> str:
    """What the environment says about the way to a server, without passwords: ` (HTTP_PROXY=http://host:1)`."""
    found = [(name, os.environ.get(name) or os.environ.get(name.lower())) for name in ROUTES]
    found = [name + "=" + re.sub(r"(^\w+://|^).*@", r"\1", value) for name, value in found if value]
    return f" (in the environment: {', '.join(found)})" if found else ""


def make_client(args: Any):
    """OpenAI's client. Its own attempts are off: they would not count in the budget."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # local servers want none
    path, _, query = server_address(args).partition("?")
    query = dict(urllib.parse.parse_qsl(query))  # such as Azure's ?api-version=; it belongs behind the whole path
    headers = {"api-key": key} if "api-version" in query else None  # Azure's name for it
    return openai.AsyncOpenAI(
        base_url=path, api_key=key, timeout=args.timeout, max_retries=0, default_query=query, default_headers=headers
    )


def check_server(args: Any) -> None:
    """Refuse an address, a key or a cache that cannot work."""
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


def wait_asked_for(error: Any) -> float | None:
    """Seconds in the server's Retry-After (a number or a date), or None."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("retry-after") or ""
    with contextlib.suppress(ValueError, OverflowError):
        is_number = re.fullmatch(r"[\d.]+", value)
        seconds = float(value) if is_number else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return max(0.0, seconds)
    return None


def read_failure(error: Any) -> Failure:
    """What an exception of the client says, or the `error` that some servers put into an answer with status 200.

    Servers write `{"error": {"message", "type", "code"}}` (OpenAI), `{"message", "type", "code"}` (older vLLM),
    `{"error": "..."}`, `{"detail": ...}` (FastAPI), something else, or a page of HTML; `code` may repeat the status.
    """
    if not isinstance(error, dict) and not hasattr(error, "status_code"):
        cause = error.__cause__
        words = f"{error} ({str(cause) or type(cause).__name__})" if cause else str(error)
        return Failure(None, type(error).__name__, words)
    body = error if isinstance(error, dict) else error.body
    fields = body if isinstance(body, dict) else {"message": body}
    codes = [str(fields[name]) for name in ("code", "type") if fields.get(name)]
    numbers = [int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)]
    words = str(fields.get("message") or fields.get("detail") or body or error)
    if isinstance(fields.get("metadata"), dict) and (raw := fields["metadata"].get("raw")):
        words += f": {raw}"  # a relay's: what the server behind it said
    status = getattr(error, "status_code", next(iter(numbers), None))
    known = [code for code in codes if code in QUESTION_CODES | SETTING_CODES | CREDIT_CODES]
    code = next(iter(known + [code for code in codes if not code.isdigit()]), "")
    return Failure(status, code, words, wait_asked_for(error) or 0.0)


def read_completion(completion: Any, args: Any) -> str:
    """The text of an answer, "" where the model says nothing.

    Raises:
        Failure: the answer has another shape than OpenAI's, or the model did not come to an answer.
    """
    if isinstance(getattr(completion, "error", None), dict):
        raise read_failure(completion.error)
    choice = next(iter(getattr(completion, "choices", None) or []), None)
    end, message = getattr(choice, "finish_reason", None), getattr(choice, "message", None)
    text = getattr(message, "content", None)
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
    if end == "content_filter" and not text:
        found = f"'{args.model}', whose server filters every answer"
        set_up = Stop("model", found, "a model that judges such posts")
        raise Failure(None, end, "no answer came", set_up=set_up)
    if message is None or not isinstance(text, str | None):
        is_model = hasattr(completion, "model_dump_json")
        shape = completion.model_dump_json(exclude_unset=True, warnings=False) if is_model else completion
        raise Failure(None, "", f"not the answer of a chat completion: {shape}")
    # OpenAI's models say nothing while they think, others do so in `reasoning_content` or between tags
    if end == "length" and not THOUGHTS.sub("", text or "").strip():
        found = f"{args.max_tokens}, which the model used up before its answer began"
        set_up = Stop("max_tokens", found, "more (a model that thinks needs thousands)")
        raise Failure(None, "", f"--max_tokens {args.max_tokens} are too few: the answer did not begin", set_up=set_up)
    return (text or "").encode("utf-8", "replace").decode()  # half a character cannot be kept


# ----------------------------------------------------------------------------------------------------------------------
# asking


class Server:
    """Asks questions: bounded budget, attempts with growing waits, answers kept in the cache.

    Args:
        args: the judge's arguments (`Args` of judge.py).
        sent: one number, of the requests that this command has sent so far; raised here.
        read: what an answer says, None where it cannot be read.
    """

    def __init__(self, args: Any, cache: Cache, sent: list[int], read: Callable[[str], str | None]):
        self.args, self.cache, self.sent, self.read = args, cache, sent, read
        self.client = make_client(args)
        # what is sent beside the question, as far as the model takes it
        self.settings = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        self.answers, self.failed_in_a_row = 0, 0
        self.example = None  # a question that was answered, now or at an earlier start
        self.resume_at, self.stop = 0.0, None  # what ends everything

    async def answer(self, prompt: str, *attempts: int) -> str | None:
        """What `read` makes of the answer; None where it could not read any of `max_asks`.

        Args:
            attempts: numbers of the attempts at each request (default: all): the higher, the longer the wait behind it.

        Raises:
            Failure: no answer came.
            Stop: nothing more can be asked.
        """
        for ask in range(self.args.max_asks):
            key = cache_key(self.args, prompt, ask)
            while (text := self.cache.get(key)) is None:
                if self.cache.claim(key):
                    try:
                        text = await self.request(prompt, ask, *attempts)
                        self.cache.put(key, prompt, text)
                    except BaseException:
                        self.cache.release(key)
                        raise
                elif self.stop:
                    raise self.stop
                else:  # another process, or another worker with the same question, is asking
                    await asyncio.sleep(0.1)
            if found := self.read(text):
                return found
        return None

    async def request(self, prompt: str, ask: int, *attempts: int) -> str:
        """The text of one answer. Raises: see `answer`."""
        while True:
            answers = self.answers
            for attempt in attempts or range(self.args.max_attempts):
                try:
                    text = await self.send(prompt, ask)
                    self.answers, self.failed_in_a_row, self.example = self.answers + 1, 0, prompt
                    return text
                except Failure as found:
                    failure = found
                if failure.set_up:
                    raise failure
                await self.wait(failure, attempt)
            if not failure.is_busy or self.answers == answers:  # where others are answered, only too many ask at once
                raise failure

    async def wait(self, failure: Failure, attempt: int) -> None:
        """Wait behind an attempt: as long as the server asks for, then everybody does, or twice as long as before."""
        if failure.wait:
            until = time.monotonic() + failure.wait
            if failure.wait > LONGEST_WAIT and until > self.resume_at + LONGEST_WAIT:
                print(f"the server asks to wait for {failure.wait / 60:,.0f} minutes ({failure}); "
                      "Ctrl-C stops, and the same command goes on later", flush=True)  # fmt: skip
            self.resume_at = max(self.resume_at, until)
        elif attempt + 1 < self.args.max_attempts:
            await self.pause(min(LONGEST_WAIT, self.args.first_wait * 2**attempt) * random.uniform(0.5, 1.0))

    async def pause(self, seconds: float = 0.0) -> None:
        """Sleep, at least until the server may be asked again; wake up when everything stops."""
        until = time.monotonic() + seconds
        while (wait := max(until, self.resume_at) - time.monotonic()) > 0 and not self.stop:
            await asyncio.sleep(min(wait, 1.0))

    async def send(self, prompt: str, ask: int) -> str:
        """The text of one request's answer; the request is sent again where the model does not take a setting."""
        while True:
            await self.pause()
            if self.stop:
                raise self.stop
            if self.args.max_requests is not None and self.sent[0] >= self.args.max_requests:
                raise Stop("max_requests", f"the {self.args.max_requests} requests are spent")
            self.sent[0] += 1
            settings, messages = dict(self.settings), [{"role": "user", "content": prompt}]
            if ask and "temperature" in settings:  # an answer that could not be read is asked for again at 1
                settings["temperature"] = 1.0
            try:
                found = await self.client.chat.completions.create(model=self.args.model, messages=messages, **settings)
                return read_completion(found, self.args)
            except Exception as error:  # whatever the client makes of what a server answers
                failure = error if isinstance(error, Failure) else read_failure(error)
            if not self.falls_back(failure, settings):
                raise self.meaning(failure)

    def falls_back(self, failure: Failure, sent: dict[str, float]) -> bool:
        """Whether the server refuses a setting that the request can do without; from now on it is not sent.

        OpenAI's models that think take `max_completion_tokens`, and no temperature but 1.
        """
        words = failure.words
        said = re.search(r"(?i)unsupported|not support|instead|only|deprecated", words)
        if failure.status not in (400, 422) or not said or "too large" in words:
            return False
        if sent.keys() != self.settings.keys():  # another worker has found out
            return True
        if "max_tokens" in sent and "max_completion_tokens" in words:
            self.settings["max_completion_tokens"] = self.settings.pop("max_tokens")
            change = "--max_tokens is sent as max_completion_tokens"
        elif "temperature" in sent and "temperature" in words:
            del self.settings["temperature"]
            change = "no --temperature is sent, the model's own holds"
        else:
            return False
        print(f"{self.args.model}: {change} ({failure})", flush=True)
        return True

    def meaning(self, failure: Failure) -> Exception:
        """What a failure ends: everything, one question (with `set_up`), or one attempt."""
        model, status, told = self.args.model, failure.status, f"{failure.code} {failure.words}"
        key = Stop("base_url", f"a refused key ({failure}){routes()}", "the right OPENAI_API_KEY")
        if status == 401:
            return key
        if status in (402, 407) or failure.code in CREDIT_CODES:
            return self.gives_up(failure)
        if status in (404, 405):
            if re.search(r"(?i)model|deployment", told):
                return Stop("model", f"'{model}' ({failure})", "a model that the server has")
            found = f"'{server_address(self.args)}', where no questions are taken ({failure}){routes()}"
            return Stop("base_url", found, "an address that ends in /v1, as most do")
        is_refused = 400 <= (status or 0) < 500 and status not in (408, 409, 425, 429)
        if not failure.set_up and (is_refused or failure.code in QUESTION_CODES):
            found = f"'{model}', whose server refuses the request ({failure})"
            request = Stop("model", found, "a model that takes such questions, temperature and max_tokens")
            failure.set_up = key if status == 403 and "model" not in told else request
            if not self.example and (failure.code in SETTING_CODES or SETTING_WORDS.search(failure.words)):
                return failure.set_up
        return failure

    def gives_up(self, words: Any) -> Stop:
        """The server answers nobody, for now."""
        return Stop("base_url", f"{server_address(self.args)}{routes()}: {words}")

    async def still_answers(self) -> bool:
        """Whether it answers what it answered before: this tells a server's fault from a question's."""
        with contextlib.suppress(Failure):
            return bool(self.example) and await self.request(self.example, 0) is not None
        return False


async def ask_all(questions: dict[Any, str], server: Server, progress: Progress) -> tuple[dict, dict]:
    """Ask all questions, `concurrency` at a time. When one cannot go on, what is under way still ends.

    Returns:
        (name -> answer, name -> reason why there is none).
    """
    args, answers, failures = server.args, {}, {}
    known = {q for q in questions.values() if server.cache.get(cache_key(args, q, 0)) is not None}
    server.example = next(iter(known), None)
    # first those without an answer: they show what the server can do
    waiting = collections.deque(sorted(questions.items(), key=lambda question: question[1] in known))

    async def start() -> None:
        """Ask one at a time, each attempt at another question: where none is answered, the set-up is at fault."""
        attempt = 0
        while waiting and not server.answers:
            name, prompt = waiting.popleft()
            try:
                answers[name] = await server.answer(prompt, attempt)
                progress.step(note=f"{server.sent[0]} requests")
            except Failure as last:
                waiting.append((name, prompt))
                attempt += 1
                is_enough = attempt >= max(3, args.max_attempts) or server.example
                if is_enough and not await server.still_answers():
                    said = f"{attempt} attempts failed, the last one with {last}"
                    raise last.set_up or server.gives_up(said) from None

    async def work() -> None:
        try:
            while waiting and not server.stop:
                name, prompt = waiting.popleft()
                try:
                    answers[name] = await server.answer(prompt)
                    progress.step(note=f"{server.sent[0]} requests")
                except Failure as last:
                    failures[name] = str(last)
                    server.failed_in_a_row += 1
                    await check(last)
        except Stop as stop:
            server.stop = server.stop or stop

    async def check(last: Failure) -> None:
        """Stop where most questions fail, or none is answered any more."""
        number = len(failures)
        if number > args.max_failures * len(questions):
            found = f"{number} of {len(questions)} questions that failed, the last one with {last}"
            raise Stop("max_failures", found, f"at most {args.max_failures:g} of all questions")
        is_doubtful = last.is_busy or last.code == "APIConnectionError" or server.failed_in_a_row % IN_A_ROW == 0
        if is_doubtful and not await server.still_answers():
            raise server.gives_up(f"{server.failed_in_a_row + 1} questions in a row failed, the last one with {last}")

    try:
        await start()
        await asyncio.gather(*(work() for _ in range(args.concurrency)))
    finally:
        await server.client.close()
    if server.stop:
        raise server.stop
    return answers, failures


def ask_server(
    questions: dict[Any, str], args: Any, sent: list[int], read: Callable[[str], str | None]
) -> tuple[dict[Any, str | None], dict[Any, str]]:
    """What `read` makes of the answers to all questions but those that failed, and why these did.

    Leaves with a message and exit code 1 or 2 where it cannot go on.

    Args:
        questions: any name -> the whole question.
        args, sent, read: see `Server`.
    """
    progress = Progress("answers", len(questions))
    try:
        cache = Cache(args.cache, lease=(args.timeout + LONGEST_WAIT) * args.max_attempts)
        unknown = [q for q in questions.values() if cache.get(cache_key(args, q, 0)) is None]
        tokens = sum(map(len, unknown)) / CHARACTERS_PER_TOKEN
        cost = ""
        if args.price_in is not None and args.price_out is not None:
            dollars = (tokens * args.price_in + len(unknown) * ANSWER_TOKENS * args.price_out) / 1e6
            cost = f", about {dollars:.2f} US dollars"
        print(f"{len(questions)} questions, {len(questions) - len(unknown)} of them answered before: at least "
              f"{len(unknown)} requests, about {tokens:,.0f} tokens read{cost}; "
              f"answers of {server_address(args)} are kept in {args.cache}", flush=True)  # fmt: skip
        answers, failures = asyncio.run(ask_all(questions, Server(args, cache, sent, read), progress))
    except (Stop, sqlite3.Error, KeyboardInterrupt) as error:
        if isinstance(error, sqlite3.Error):  # locked, full, damaged
            error = Stop("cache", f"{args.cache}: {error}")
        if isinstance(error, Stop) and error.expected:
            refuse(*error.args)
        reason = f"error: --{error.argument}: {error.found}" if isinstance(error, Stop) else "stopped"
        print(f"{reason}; {progress.done} of {len(questions)} questions are answered and kept; "
              "the same command goes on", file=sys.stderr)  # fmt: skip
        sys.exit(2 if reason.startswith("error: --base_url") and not progress.done else 1)
    print(f"{sent[0]} requests sent", flush=True)
    if failures:
        reason, _ = collections.Counter(failures.values()).most_common(1)[0]
        print(f"{len(failures)} questions failed and are counted apart, e.g. with {reason}", flush=True)
    return answers, failures
