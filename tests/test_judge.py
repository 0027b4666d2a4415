"""The judge: statistics that hold what they promise, answers that are never guessed, nothing asked twice."""

import asyncio
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import OFFLINE, ROOT
from scipy.special import expit
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT / "eval"))
import ask_server
import judge
from intervals import length_controlled_win_rate, mean_interval
from judge import outcome_of_answers, read_answer

JUDGE = str(ROOT / "eval/judge.py")

# ----------------------------------------------------------------------------------------------------------------------
# statistics


def judged(chance: np.ndarray, rng) -> np.ndarray:
    """Outcomes of pairs asked in both orders, where each answer prefers the response with this chance."""
    return 0.5 * (rng.random(len(chance)) < chance) + 0.5 * (rng.random(len(chance)) < chance)


@pytest.mark.parametrize("posts, low, high", [(100, 0.0, 1.0), (300, 0.5, 0.9)])
def test_interval_of_the_win_rate_holds_the_truth(posts, low, high):
    """A 95 % interval holds the truth in 93 to 97 % of 1,000 simulated judges."""
    rng, truth = np.random.default_rng(0), (low + high) / 2
    held = 0
    for i in range(1000):
        found = mean_interval(judged(rng.uniform(low, high, posts), rng), np.arange(posts), 1000, i)
        held += found["low"] <= truth <= found["high"]
    assert 930 <= held <= 970


def test_interval_resamples_posts_not_rows():
    """Three answers on each post that are the same say no more than one."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for i in range(300):
        values = np.repeat(rng.random(80) < 0.6, 3)
        found = mean_interval(values, np.repeat(np.arange(80), 3), 500, i)
        held += found["low"] <= 0.6 <= found["high"]
        found = mean_interval(values, np.arange(240), 500, i)
        naive += found["low"] <= 0.6 <= found["high"]
    assert held >= 270 > naive


def test_interval_of_equal_values_is_not_a_point():
    """Twenty wins of twenty: the exact binomial interval, 0.025 ** (1 / 20) to 1."""
    found = mean_interval(np.ones(20), np.arange(20), 100, 1, shares=True)
    assert found["mean"] == found["high"] == 1.0 and math.isclose(found["low"], 0.025 ** (1 / 20), rel_tol=1e-9)
    assert mean_interval([0.5] * 4, range(4), 100, 1) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert mean_interval([math.nan], [0], 100, 1) == {"mean": None, "low": None, "high": None}
    one_post = mean_interval([1.0, 0.0], ["q", "q"], 100, 1)
    assert one_post == {"mean": 0.5, "low": None, "high": None} and judge.show(one_post) == "0.500 [-]"
    assert mean_interval([1.0, math.nan, 0.0], [0, 1, 2], 100, 1)["mean"] == 0.5


LENGTH_JUDGES = {
    "more words, more wins": lambda d: expit(0.25 * d),
    "always the longer one": lambda d: (d > 0) + 0.5 * (d == 0),
    "levels off": lambda d: expit(2 * np.tanh(d / 5)),
}


@pytest.mark.parametrize("taste", LENGTH_JUDGES)
@pytest.mark.parametrize("posts, longer", [(200, 0), (300, 5)])
def test_a_judge_that_only_likes_length_gives_one_half(taste, posts, longer):
    """However the judge likes length, and however much longer the policy writes; the interval holds 0.5 as promised."""
    rng, held, means, raw = np.random.default_rng(0), 0, [], []
    for _ in range(1000):
        difference = np.round(rng.normal(longer, 6, posts))
        outcomes = judged(LENGTH_JUDGES[taste](difference), rng)
        found = length_controlled_win_rate(outcomes, difference, np.arange(posts))
        held += found["low"] <= 0.5 <= found["high"]
        means.append(found["mean"])
        raw.append(outcomes.mean())
    assert abs(np.mean(means) - 0.5) < 0.01 and 930 <= held <= 970
    if longer:
        assert np.mean(raw) > 0.65  # what the plain win rate would say


def test_length_control_keeps_a_win_rate_that_is_not_by_length():
    rng = np.random.default_rng(0)
    difference = rng.normal(4, 6, 3000)
    outcomes = judged(expit(1.0 + 0.1 * difference), rng)
    found = length_controlled_win_rate(outcomes, difference, np.arange(3000))
    assert found["low"] < expit(1.0) < found["high"] and found["high"] - found["low"] < 0.08
    always_longer = length_controlled_win_rate(rng.integers(0, 2, 50), rng.integers(1, 9, 50), range(50))
    assert always_longer["mean"] is None
    assert length_controlled_win_rate([0.0] * 50, rng.normal(0, 5, 50), range(50))["mean"] is None
    for lengths in ([-3, 4], [-1, 0, 1]):  # so few lengths that the two covariates are one
        difference = rng.choice(lengths, 200)
        found = length_controlled_win_rate(judged(expit(0.3 * difference), rng), difference, np.arange(200))
        assert found["low"] < 0.5 < found["high"]
    nothing = length_controlled_win_rate([1.0] * 20, [0.0] * 20, range(20))
    assert nothing["mean"] is None and nothing["standard_deviation"] == 0


def test_length_control_agrees_with_a_general_optimiser():
    from scipy.optimize import minimize

    rng = np.random.default_rng(3)
    difference = rng.normal(2, 5, 60)
    outcomes = judged(expit(0.4 * difference), rng)
    z = difference / difference.std()
    X = np.stack([np.ones_like(z), z, np.tanh(2 * z)], 1)

    def penalised(beta):
        p = expit(X @ beta)
        information = X.T @ ((p * (1 - p))[:, None] * X)
        likelihood = (outcomes * np.log(p) + (1 - outcomes) * np.log1p(-p)).sum()
        return -likelihood - 0.5 * np.linalg.slogdet(information)[1]

    best = minimize(penalised, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    found = length_controlled_win_rate(outcomes, difference, np.arange(60))
    assert math.isclose(found["mean"], expit(best[0]), abs_tol=1e-5)


def frame(outcomes, **columns):
    n = len(outcomes)
    texts = {"query": [f"q{i}" for i in range(n)], "response": "a", "reference": "b", "same": False}
    words = {"response_words": [2] * n, "reference_words": [2] * n}
    copying = {f"{side}_{name}": 0.0 for side in ("response", "reference") for name in judge.COPYING}
    return pandas.DataFrame({**texts, **words, **copying, "outcome": outcomes, **columns})


def test_report_by_hand():
    verdicts = frame(
        [1.0, 1.0, 0.5, 0.0, math.nan],
        response_words=[2, 4, 10, 30, 7], reference_words=[10, 10, 10, 10, 10],
        first_answer=["A", "A", "A", "B", None], second_answer=["B", "B", "A", "A", "A"],
        rm_score=[3.0, 1.0, 0.0, 2.0, 0.0], rm_reference_score=[1.0, 2.0, 0.0, 0.0, 1.0],
    )  # fmt: skip
    found = judge.summarise(verdicts, judge.Args(run=("x",), bootstrap=200))
    assert (found["wins"], found["ties"], found["losses"], found["unreadable"]) == (2, 1, 1, 1)
    assert found["win_rate"]["mean"] == 2.5 / 4
    assert found["unreadable_answers"] == 1
    assert (found["near_equal_length"]["posts"], found["near_equal_length"]["mean"]) == (1, 0.5)
    assert math.isclose(found["first_position_preferred"]["mean"], 6 / 9)  # A stands first
    assert found["agreement"]["posts"] == 3 and math.isclose(found["agreement"]["share"]["mean"], 1 / 3)
    claimed = sorted(expit(np.array([2.0, -1.0, 2.0])))
    assert np.allclose([b["claimed"] for b in found["agreement"]["calibration"]], claimed)
    bins = {(b["from"], b["to"]): (b["posts"], b["win_rate"]["mean"]) for b in found["by_length_ratio"]}
    assert bins == {(0.0, 0.5): (2, 1.0), (0.9, 1.1): (1, 0.5), (2.0, None): (1, 0.0)}


def test_calibration_of_a_reward_model_that_knows():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, 4000)
    won = (rng.random(4000) < expit(scores)).astype(float)
    honest = judge.summarise(frame(won, rm_score=scores, rm_reference_score=0.0), judge.Args(run=("x",), bootstrap=200))
    loud = judge.summarise(
        frame(won, rm_score=5 * scores, rm_reference_score=0.0), judge.Args(run=("x",), bootstrap=99)
    )
    assert honest["agreement"]["expected_calibration_error"] < 0.03
    assert loud["agreement"]["expected_calibration_error"] > 0.1
    assert honest["agreement"]["share"] == pytest.approx(loud["agreement"]["share"], abs=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# answers


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("The first one invents a boss.\nPreferred: B", "B"),
        ("A is better than B.\n**Preferred:** A", "A"),
        ("preferred: summary b.", "B"),
        ('Comparison: both fine\nPreferred: "A"', "A"),
        ("B", "B"),
        (" (A) ", "A"),
        ("Preferred: both", None),
        ("Preferred: A or B", None),
        ("Preferred: A\nPreferred: B", None),
        ("Preferred: A\nOn second thought, both are bad.", None),
        ("<think>Perhaps\nPreferred: A\nbut wait</think>\nBoth are bad.", None),
        ("<think>Perhaps\nPreferred: A\nbut wait</think>\n\nPreferred: B", "B"),
        ("<think>Preferred: A", None),
        ("I cannot help with that.", None),
        ("A summary should be short.", None),
        ("", None),
        (None, None),
    ],
)
def test_answers_are_read_or_not_never_guessed(text, verdict):
    assert read_answer(text) == verdict


def test_two_orders_make_an_outcome():
    assert [outcome_of_answers(*pair) for pair in ("AB", "BA", "AA", "BB")] == [1.0, 0.0, 0.5, 0.5]
    assert math.isnan(outcome_of_answers(None, "B")) and math.isnan(outcome_of_answers("A", None))


def test_the_prompt_takes_texts_as_they_are():
    text = judge.fill_prompt("{post}|{summary_a}|{summary_b}", "x {summary_b} \\1\n\nTL;DR:", " {post} ", "{0}")
    assert text == "x {summary_b} \\1|{post}|{0}"


# ----------------------------------------------------------------------------------------------------------------------
# a server that misbehaves on purpose

TRUE_WIN_RATE = 0.62
FAULTS = ("429", "500", "hang", "cut", "not json", "no choices", "refusal", "both", "too long")


def draw(*parts) -> float:
    """A number in [0, 1) that is a function of its arguments."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 256**6


class Handler(BaseHTTPRequestHandler):
    """Speaks enough of OpenAI's protocol. A summary that starts with `good` is the better one."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        log, liar = self.server.log, self.server.liar
        with self.server.lock:
            log["asked"][prompt] += 1
            count = log["asked"][prompt]
        # a third of the questions meet a fault at the first attempts
        fault = FAULTS[int(draw("which", prompt, count) * len(FAULTS))] if draw("fault", prompt) < 0.33 and count <= 2 else ""  # noqa: E501  # fmt: skip
        fault = self.server.always or ("" if fault in self.server.never else fault)
        if fault == "429":
            return self.reply(429, b'{"error": {"message": "slow down"}}', {"retry-after": "0.05"})
        if fault == "500":
            return self.reply(500, b"oh no")
        if fault == "401":
            return self.reply(401, b'{"error": {"message": "bad key"}}')
        if fault == "404":
            return self.reply(404, b'{"error": {"message": "no such model"}}')
        if fault == "too long":
            return self.reply(400, b'{"error": {"message": "context too long"}}')
        if fault == "400":
            return self.reply(400, b'{"error": {"message": "Unsupported parameter: max_tokens"}}')
        if fault == "hang":
            time.sleep(1.0)  # longer than the client's time-out
            self.close_connection = True
            return None
        if fault == "cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return None
        if fault == "not json":
            return self.reply(200, b"<html>an error page</html>")
        if fault == "no choices":
            return self.reply(200, b'{"choices": []}')
        time.sleep(self.server.delay)
        a, b = (prompt.split(f"Summary {x}:\n")[1].split("\n")[0] for x in "AB")
        better = "A" if a.startswith("good") and not b.startswith("good") else "B"
        if draw("lie", prompt.split("Summary A")[0]) < liar:
            better = "A"  # whatever stands first
        text = {
            "refusal": "I cannot judge people.",
            "half": "Preferred: A\ud800",
            "list": ["A"],
            "both": "Both are fine.\nPreferred: A or B",
        }.get(fault, f"One is truer.\nPreferred: {better}")
        content = {
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
        }
        content |= {"id": "x", "object": "chat.completion", "created": 1}
        if self.reply(200, json.dumps(content).encode()):
            with self.server.lock:
                log["delivered"][prompt] += 1
                log["good" if fault == "" else "unreadable"][prompt] += 1
        return None

    def reply(self, status: int, body: bytes, headers=None) -> bool:
        try:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            return True
        except OSError:  # the client was killed
            return False


@pytest.fixture
def server():
    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, address):
            pass

    found = Quiet(("127.0.0.1", 0), Handler)
    found.log = {name: Counter() for name in ("asked", "delivered", "good", "unreadable")}
    found.lock, found.liar, found.always, found.never, found.delay = threading.Lock(), 0.0, "", (), 0.0
    threading.Thread(target=found.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{found.server_address[1]}/v1"
    yield found
    found.shutdown()
    found.server_close()


def make_table(path: Path, posts: int, seed: int = 0) -> Path:
    """Posts whose responses are the better summary with the true win rate."""
    rng = random.Random(seed)
    rows = []
    for i in range(posts):
        wins = rng.random() < TRUE_WIN_RATE
        response, reference = (f"good summary {i}", f"bad summary {i}")[:: 1 if wins else -1]
        rows.append({"query": f"POST: number {i}\n\nTL;DR:", "response": response, "reference": reference})
    pandas.DataFrame(rows).to_parquet(path)
    return path


def command(table, server, folder, **more) -> list[str]:
    settings = {"run": table, "judge": "openai", "base_url": server.url, "model": "test/judge", "timeout": 0.5,
                "first_wait": 0.02, "bootstrap": 500, "cache": folder / "cache.sqlite"} | more  # fmt: skip
    return [sys.executable, JUDGE, *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def run_judge(*args, **more):
    return subprocess.run(command(*args, **more), env=os.environ | OFFLINE, capture_output=True, text=True, timeout=300)


def answers_in(cache: Path) -> int:
    if not cache.exists():
        return 0
    with sqlite3.connect(cache, timeout=30) as db:
        try:
            return db.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:  # not made yet
            return 0


@pytest.mark.slow
def test_a_thousand_questions_killed_twice(server, tmp_path):
    """Each question is answered once in the end, nothing that arrived is asked again, the truth is in the interval."""
    table, cache, concurrency = make_table(tmp_path / "policy.parquet", 500), tmp_path / "cache.sqlite", 16
    server.never, server.delay, server.liar = ("too long",), 0.02, 0.1
    for stop_at in (250, 600):
        process = subprocess.Popen(command(table, server, tmp_path, concurrency=concurrency), env=os.environ | OFFLINE)
        while answers_in(cache) < stop_at:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_judge(table, server, tmp_path, concurrency=concurrency)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answered before" in done.stdout and "1000 questions" in done.stdout
    report = json.loads((tmp_path / "policy/judge/judge/report.json").read_text())
    verdicts = pandas.read_parquet(tmp_path / "policy/judge/judge/verdicts.parquet")
    assert len(server.log["asked"]) == 1000 and set(server.log["good"]) == set(server.log["asked"])
    # what had been sent, and not been received, when it was killed may have been answered twice
    assert sum(count - 1 for count in server.log["good"].values()) <= 2 * concurrency
    assert report["posts"] == 500 and report["unreadable"] == 0 and verdicts["outcome"].notna().all()
    # a tenth of the posts is judged by position: they become ties
    assert 20 < report["ties"] < 90 and report["first_position_preferred"]["mean"] > 0.52
    truth = 0.9 * TRUE_WIN_RATE + 0.1 * 0.5
    assert report["win_rate"]["low"] < truth < report["win_rate"]["high"]
    assert sum(server.log["asked"].values()) > 1000  # the faults did happen
    # once more: everything is known
    before = sum(server.log["asked"].values())
    again = run_judge(table, server, tmp_path)
    assert again.returncode == 0 and "\n0 requests sent" in again.stdout
    assert sum(server.log["asked"].values()) == before


def test_unreadable_answers_are_counted_apart(server, tmp_path):
    table = make_table(tmp_path / "policy.jsonl.parquet", 12)
    server.always = "both"
    done = run_judge(table, server, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next(tmp_path.glob("*/judge/judge/report.json")).read_text())
    assert report["unreadable"] == 12 and report["failed"] == 0 and report["win_rate"]["mean"] is None
    assert set(server.log["asked"].values()) == {3}


def test_two_processes_share_a_cache(server, tmp_path):
    table = make_table(tmp_path / "policy.parquet", 60)
    server.never, server.delay = FAULTS, 0.02
    settings = {"concurrency": 4, "timeout": 60}
    start = [command(table, server, tmp_path, output_dir=tmp_path / f"out{i}", **settings) for i in range(2)]
    processes = [subprocess.Popen(c, env=os.environ | OFFLINE, stdout=subprocess.PIPE, text=True) for c in start]
    sent = [int(p.communicate(timeout=120)[0].split(" requests sent")[0].split("\n")[-1]) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert sum(sent) == 120 and set(server.log["asked"].values()) == {1}
    reports = [json.loads((tmp_path / f"out{i}/policy/judge/report.json").read_text()) for i in range(2)]
    assert reports[0]["win_rate"] == reports[1]["win_rate"]


def open_at_once(path, barrier, failures):
    barrier.wait()
    try:
        cache = ask_server.Cache(path, lease=10)
        for key in "abcdefgh":
            cache.claim(key)
            cache.put(key, "question", "answer")
    except Exception as error:
        failures.put(repr(error))


def test_a_cache_is_made_by_many_at_once(tmp_path):
    """Switching a new file to SQLite's WAL does not wait for others: "database is locked", 3 times in 120."""
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    for trial in range(20):
        barrier = context.Barrier(6)
        start = (str(tmp_path / f"{trial}.sqlite"), barrier, failures)
        processes = [context.Process(target=open_at_once, args=start) for _ in range(6)]
        [p.start() for p in processes]
        [p.join() for p in processes]
        assert failures.empty(), failures.get()


def test_claims_of_the_dead_are_free(tmp_path):
    cache = ask_server.Cache(str(tmp_path / "c.sqlite"), lease=100)
    assert cache.claim("k") and not cache.claim("k")  # we are alive
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cache.db.execute("UPDATE claims SET pid = ?", (gone.pid,))
    assert cache.claim("k")
    cache.db.execute("UPDATE claims SET host = 'elsewhere', at = at - 99")
    assert not cache.claim("k")
    cache.db.execute("UPDATE claims SET at = at - 2")
    assert cache.claim("k")
    cache.put("k", "question", "answer")
    assert not cache.claim("k") and cache.get("k") == "answer"


def test_the_budget_is_kept_and_the_rest_goes_on(server, tmp_path):
    table = make_table(tmp_path / "policy.parquet", 30)
    server.never = FAULTS
    first = run_judge(table, server, tmp_path, max_requests=25, concurrency=8, price_in=0.5, price_out=1.5, timeout=60)
    assert first.returncode == 1 and "US dollars" in first.stdout
    assert first.stderr.startswith("error: --max_requests: the 25 requests are spent; 25 of 60 questions are answered")
    assert sum(server.log["asked"].values()) == 25 and not (tmp_path / "policy").exists()
    second = run_judge(table, server, tmp_path, timeout=60)
    assert second.returncode == 0 and "\n35 requests sent" in second.stdout
    assert set(server.log["asked"].values()) == {1}


def test_a_server_that_stays_broken_stops_everything(server, tmp_path):
    table = make_table(tmp_path / "policy.parquet", 30)
    server.always = "500"
    done = run_judge(table, server, tmp_path, max_attempts=3)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "3 attempts failed" in done.stderr and "0 of 60 questions" in done.stderr
    assert sum(server.log["asked"].values()) == 3  # one attempt at each of three questions


def test_retry_after_is_obeyed_by_all(server):
    from types import SimpleNamespace

    answer = lambda value: SimpleNamespace(response=SimpleNamespace(headers={"retry-after": value}))
    assert ask_server.wait_asked_for(answer("1.5")) == 1.5 and ask_server.wait_asked_for(answer(None)) is None
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < ask_server.wait_asked_for(answer(date)) < 31
    assert ask_server.wait_asked_for(answer("soon")) is None and ask_server.wait_asked_for(ValueError()) is None

    async def ask(folder):
        args = judge.Args(run=("x",), judge="openai", base_url=server.url, first_wait=0.01)
        asker = ask_server.Server(args, ask_server.Cache(str(folder), 10), [0], judge.read_answer)
        asker.resume_at = time.monotonic() + 0.5
        start = time.monotonic()
        await asyncio.gather(*(asker.answer(f"Summary A:\ngood\nSummary B:\nbad {i}\n") for i in range(3)))
        await asker.client.close()
        return time.monotonic() - start

    server.never = FAULTS
    assert asyncio.run(ask(":memory:")) >= 0.5


@pytest.mark.slow
def test_transformers_serve(world, tmp_path):
    """A real server with a real (tiny, ignorant) model: its answers cannot be read, and none is guessed."""
    pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi and uvicorn, which are not installed")
    pytest.importorskip("uvicorn", reason="`transformers serve` needs fastapi and uvicorn, which are not installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = open(tmp_path / "serve.log", "w")  # noqa: SIM115
    chat = shutil.copytree(world.sft, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(chat)
    (tmp_path / "prompt.txt").write_text("{post} {summary_a} {summary_b}")
    process = subprocess.Popen([*serve, str(chat)], env=os.environ | OFFLINE, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        from types import SimpleNamespace

        table = make_table(tmp_path / "policy.parquet", 2)
        done = run_judge(
            table,
            SimpleNamespace(url=f"http://127.0.0.1:{port}/v1"),
            tmp_path,
            model=chat,
            timeout=60,
            max_tokens=4,
            prompt=tmp_path / "prompt.txt",
            max_attempts=2,
        )
        assert done.returncode == 0, done.stderr[-2000:] + (tmp_path / "serve.log").read_text()[-2000:]
        report = json.loads(next(tmp_path.glob("policy/judge/*/report.json")).read_text())
        assert report["unreadable"] == 2 and report["unreadable_answers"] == 4
        assert answers_in(tmp_path / "cache.sqlite") == 4 * 3
    finally:
        process.terminate()
        process.wait(30)
        log.close()


# ----------------------------------------------------------------------------------------------------------------------
# runs, reward models, two policies


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A folder with the run of an SFT and of a PPO policy, with evaluations on the way."""
    from summarize_from_feedback_details import ppo_left_padding, sft

    folder = tmp_path_factory.mktemp("judged")
    here = os.getcwd()
    os.chdir(folder)
    try:
        sft.main(world.sft_args(folder / "chain_sft", lr=3e-3, total_episodes=200, num_eval_rows=40))
        ppo_left_padding.main(world.ppo_args(folder / "chain_ppo", num_eval_rows=40, eval_freq=1))
    finally:
        os.chdir(here)
    return folder / "runs"


def test_gold_judge_of_runs(runs, capsys):
    from summarize_from_feedback_details.toy_tldr import gold_score

    args = judge.Args(run=("chain_sft", "chain_ppo"), runs_dir=str(runs), updates=True, bootstrap=200)
    reports = judge.main(args)
    assert set(reports) == {"chain_sft", "chain_ppo", "chain_ppo, update 1"}
    assert "length-controlled" in capsys.readouterr().out
    table = pandas.read_parquet(runs / "chain_ppo/tables/validation.parquet")
    wins = 0.0
    for query, response, reference in zip(table["query"], table["response"], table["reference"]):
        post = query.split("\n\nPOST: ")[1].removesuffix("\n\nTL;DR:")
        a, b = gold_score(post, response)["score"], gold_score(post, reference)["score"]
        wins += 0.5 if abs(a - b) < 1e-9 else float(a > b)
    assert math.isclose(reports["chain_ppo"]["win_rate"]["mean"], wins / len(table))
    assert reports["chain_ppo"]["agreement"]["posts"] > 0 and "agreement" not in reports["chain_sft"]
    written = json.loads((runs / "chain_ppo/judge/gold/report.json").read_text())
    assert written["win_rate"] == reports["chain_ppo"]["win_rate"]
    assert (runs / "chain_ppo/judge/gold/update_1/report.json").is_file()
    # the same again changes nothing; other rows set the old report aside
    judge.main(args)
    assert not list(runs.glob("*/judge/gold.old-*"))
    judge.main(judge.Args(run=("chain_sft",), runs_dir=str(runs), num_rows=10, bootstrap=200))
    old = json.loads((runs / "chain_sft/judge/gold.old-1/report.json").read_text())
    assert (old["posts"], json.loads((runs / "chain_sft/judge/gold/report.json").read_text())["posts"]) == (40, 10)


def test_two_policies_are_paired(runs, tmp_path):
    args = judge.Args(run=("chain_ppo",), against="chain_sft", paired_difference=True, runs_dir=str(runs),
                      output_dir=str(tmp_path), bootstrap=500)  # fmt: skip
    (report,) = judge.main(args).values()
    verdicts = pandas.read_parquet(tmp_path / "chain_ppo/gold_against_chain_sft/verdicts.parquet")
    sft_table = pandas.read_parquet(runs / "chain_sft/tables/validation.parquet").set_index("query")
    assert (verdicts["reference"] == sft_table.loc[verdicts["query"], "response"].to_numpy()).all()
    alone = judge.main(judge.Args(run=("chain_ppo", "chain_sft"), runs_dir=str(runs), output_dir=str(tmp_path / "x"), bootstrap=200))  # noqa: E501  # fmt: skip
    expected = alone["chain_ppo"]["win_rate"]["mean"] - alone["chain_sft"]["win_rate"]["mean"]
    assert math.isclose(report["win_rate_difference"]["mean"], expected, abs_tol=1e-12)
    # a policy against itself: all ties, and a difference of nothing
    (itself,) = judge.main(judge.Args(run=("chain_ppo",), against="chain_ppo", paired_difference=True,
                                      runs_dir=str(runs), output_dir=str(tmp_path / "y"))).values()  # fmt: skip
    assert itself["ties"] == itself["posts"] and itself["win_rate_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_reward_model_as_judge(world, runs, tmp_path):
    """Its scores are those that PPO's evaluation wrote."""
    args = judge.Args(run=("chain_ppo",), judge="reward", reward_model=world.reward, runs_dir=str(runs),
                      output_dir=str(tmp_path), batch_size=7, bootstrap=200)  # fmt: skip
    (report,) = judge.main(args).values()
    verdicts = pandas.read_parquet(next(tmp_path.rglob("verdicts.parquet")))
    assert np.abs(verdicts["score"] - verdicts["rm_score"]).max() < 1e-4
    assert np.abs(verdicts["reference_score"] - verdicts["rm_reference_score"]).max() < 1e-4
    assert report["agreement"]["share"]["mean"] == 1.0


ADDED = {
    "BOS": "<|endoftext|> $A",
    "EOS": "$A <|endoftext|>",
    "both": "<|endoftext|> $A <|endoftext|>",
    "neither": "$A",
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_judge_adds_no_tokens_of_the_tokenizers_own(added, side, world, runs, tmp_path):
    """Llama's adds BOS, others EOS: the judge reads the tokens that PPO's table, the data and the viewer hold."""
    folder = shutil.copytree(world.reward, tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " it says [PAD] here"  # no hole in a text
    plain = [AutoTokenizer.from_pretrained(world.base)(text)["input_ids"]]
    assert plain != [tokenizer(text)["input_ids"]]
    eos = [("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=ADDED[added], special_tokens=eos)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("")["input_ids"]) == ADDED[added].count("<")
    assert judge.tokenise(tokenizer, [text]) == plain
    args = judge.Args(run=("chain_ppo",), judge="reward", reward_model=str(folder), runs_dir=str(runs),
                      output_dir=str(tmp_path), bootstrap=50, num_rows=20)  # fmt: skip
    judge.main(args)
    verdicts = pandas.read_parquet(next(tmp_path.rglob("verdicts.parquet")))
    assert np.abs(verdicts["score"] - verdicts["rm_score"]).max() < 1e-4
    assert np.abs(verdicts["reference_score"] - verdicts["rm_reference_score"]).max() < 1e-4


def test_a_response_that_was_cut_off_has_no_end_in_any_container(world, tmp_path):
    """`False` in a csv with a hole is text, and still false."""
    from summarize_from_feedback_details.common.reward_models import load_reward_model

    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    pairs = pandas.DataFrame({"query": ["q", "q"], "response": ["my vase"] * 2, "reference": ["a"] * 2})
    model = load_reward_model(world.reward)
    typed = judge.judge_by_reward(pairs.assign(has_eos=[False, True]), model, tokenizer, 4)
    text = judge.judge_by_reward(pairs.assign(has_eos=["False", ""]), model, tokenizer, 4)
    assert typed.equals(text) and typed["score"][0] != typed["score"][1]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_tables_of_any_kind(suffix, tmp_path):
    rows = pandas.read_parquet(make_table(tmp_path / "source.parquet", 4))
    rows.loc[0, "response"] = ""  # a policy may say nothing
    path = tmp_path / f"table{suffix}"
    write = {".parquet": rows.to_parquet, ".csv": lambda p: rows.to_csv(p, index=False),
             ".jsonl": lambda p: rows.to_json(p, lines=True, orient="records")}[suffix]  # fmt: skip
    write(path)
    found = judge.read_table("run", path)
    assert found[["query", "response", "reference"]].equals(rows) and found["copy"].tolist() == [0] * 4


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_texts_stay_texts(bom, tmp_path):
    """What looks like a number, a date or a truth value is none; a BOM is no part of the first name."""
    texts = ["12", "0012", "1e5", "true", "NaN", "", "2020-01-01", "a\u2028b\x85c", "[PAD]", "12345678901234567890123"]
    rows = [{"query": "7", "response": text, "reference": text, "date": "1", "id": 2**80} for text in texts]
    (tmp_path / "t.jsonl").write_bytes(bom + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    (tmp_path / "t.csv").write_bytes(bom + pandas.DataFrame(rows).to_csv(index=False).encode())
    for name in ("t.jsonl", "t.csv"):
        found = judge.read_table("run", tmp_path / name)
        assert found["response"].tolist() == found["reference"].tolist() == texts and set(found["query"]) == {"7"}


@pytest.mark.parametrize("line, words", [
    (b'{"query": "q", "response": "\\ud83d", "reference": "r"}', "line 2 holds half a character"),
    (b'{"query": "q", "response": 12, "reference": "r"}', "row 1 has no text"), (b'{"query": "q", "res', "line 2: "),
    (b'{"query": "q", "response": "\xff", "reference": "r"}', "cannot be read"), (b"12", "line 2: "),
])  # fmt: skip
def test_lines_that_are_no_rows(line, words, tmp_path, capsys):
    """Half a character was an empty text for pandas' reader."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"query": "q", "response": "r", "reference": "r"}\n' + line + b"\n")
    with pytest.raises(SystemExit) as stop:
        judge.read_table("run", path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and str(path) in error and error.count("\n") == 1, error


def test_csv_of_numbers_and_holes(tmp_path):
    """Texts of digits are texts; a score that is missing is none."""
    path = tmp_path / "table.csv"
    path.write_text("query,response,reference,score,reference_score\nq,12,s,0.5,1\np,34,t,,1\n")
    found = judge.read_table("run", path)
    assert found["response"].tolist() == ["12", "34"] and found["score"].isna().tolist() == [False, True]


def test_dots_in_names_and_reports_of_the_same_name(tmp_path, capsys):
    folders = [judge.report_folder(p, "gold", judge.Args(output_dir="out")) for p in ("x_kl0.05_ppo", "x_kl0.2_ppo")]
    assert folders == [Path("out/x_kl0.05_ppo/gold"), Path("out/x_kl0.2_ppo/gold")]
    assert judge.short_name("a/b.v2.parquet") == "b.v2"
    paths = [tmp_path / name / "t.parquet" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        make_table(path, 3)
    with pytest.raises(SystemExit) as stop:
        judge.main(judge.Args(run=tuple(map(str, paths)), output_dir=str(tmp_path / "out")))
    assert stop.value.code == 2 and "would both be" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_only_the_first_rows_against_another_policy(runs, tmp_path):
    args = judge.Args(run=("chain_ppo",), against="chain_sft", num_rows=5, runs_dir=str(runs), output_dir=str(tmp_path))
    (report,) = judge.main(args).values()
    assert (report["posts"], report["posts_of_one_policy_only"]) == (5, 0)


@pytest.mark.parametrize("fault", ["half", "list"])
def test_answers_that_are_no_text(server, tmp_path, fault):
    """Half a character is kept as a question mark; a list is no answer: asked again, then said in one line."""
    server.always = fault
    done = run_judge(make_table(tmp_path / "policy.parquet", 3), server, tmp_path, max_attempts=2)
    if fault == "half":
        report = json.loads(next(tmp_path.rglob("report.json")).read_text())
        assert done.returncode == 0 and report["unreadable"] + report["ties"] == 3, done.stderr
    else:
        assert done.returncode == 2 and done.stderr.count("error: --base_url") == 1 and "Traceback" not in done.stderr


def bad_table(tmp_path, **columns):
    path = tmp_path / "bad.jsonl"
    pandas.DataFrame(columns).to_json(path, lines=True, orient="records")
    return str(path)


BAD = {
    "no run": ({"run": ()}, "--run: found nothing"),
    "unknown run": ({"run": ("nope",)}, "--run: found 'nope', and no such run"),
    "no file": ({"run": ("nope.csv",)}, "--run: found 'nope.csv', which is not there"),
    "no table": ({"run": ("chain_ppo",), "split": "test"}, "without a table 'test' (its tables: validation, "),
    "column": ({"run": {"query": ["q"], "response": ["r"]}}, "without a column reference"),
    "type": ({"run": {"query": ["q", "p"], "response": ["r", None], "reference": ["s", "s"]}}, "row 1 has no text"),
    "empty": ({"run": {"query": [], "response": [], "reference": []}}, "expected a table of responses"),
    "not toy": ({"run": {"query": ["q"], "response": ["r"], "reference": ["s"]}}, "found gold, and a post that"),
    "nothing in common": ({"run": {"query": ["q"], "response": ["r"], "reference": ["s"]}, "against": "chain_sft"},
                          "no query in common"),
    "against": ({"against": "nope"}, "--against: found 'nope'"),
    "difference": ({"paired_difference": True}, "--paired_difference: found no --against"),
    "budget": ({"max_requests": 0}, "--max_requests: found 0"),
    "rows": ({"num_rows": -1}, "--num_rows: found -1"),
    "bootstrap": ({"bootstrap": 0}, "--bootstrap: found 0"),
    "no reward model": ({"judge": "reward"}, "--reward_model: found nothing"),
    "policy as reward model": ({"judge": "reward", "reward_model": "SFT"}, "--reward_model: found"),
    "no key": ({"judge": "openai"}, "no OPENAI_API_KEY"),
    "address": ({"judge": "openai", "base_url": "localhost:1"}, "--base_url: found 'localhost:1'"),
    "seed": ({"seed": -1}, "--seed: found -1"),
    "output below a file": ({"output_dir": __file__ + "/below"}, "--output_dir: found"),
    "not a cache": ({"judge": "openai", "base_url": "http://x", "cache": __file__}, "--cache: found"),
    "cache below a file": ({"judge": "openai", "base_url": "http://x", "cache": __file__ + "/below/x"}, "--cache"),
    "prompt of bytes": ({"judge": "openai", "base_url": "http://x", "prompt": sys.executable}, "cannot be read"),
    "no prompt": ({"judge": "openai", "base_url": "http://x", "prompt": "nope.txt"}, "--prompt: found 'nope.txt'"),
    "prompt": ({"judge": "openai", "base_url": "http://x", "prompt": "PROMPT"}, "without {summary_b}"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    changes, words = BAD[case]
    settings = {"run": ("chain_ppo",), "runs_dir": str(runs), "output_dir": str(tmp_path / "out"), **changes}
    if isinstance(settings["run"], dict):
        settings["run"] = (bad_table(tmp_path, **settings["run"]),)
    if settings.get("reward_model") == "SFT":
        settings["reward_model"] = world.sft
    if settings.get("prompt") == "PROMPT":
        (tmp_path / "prompt.txt").write_text("{post} {summary_a}")
        settings["prompt"] = str(tmp_path / "prompt.txt")
    with pytest.raises(SystemExit) as stop:
        judge.main(judge.Args(**settings))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("401", "--base_url: found a refused key"),
        ("404", "--model: found 'test/judge'"),
        ("400", "--model: found 'test/judge', whose server refuses the request"),
    ],
)
def test_a_wrong_key_or_model_is_refused(server, tmp_path, fault, words):
    server.always = fault
    done = run_judge(make_table(tmp_path / "policy.parquet", 5), server, tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sum(server.log["asked"].values()) == 1 and not (tmp_path / "policy").exists()
