"""The judge and servers as people have them: what each of them says is understood, and no fault becomes a verdict."""

import asyncio
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import ask_server
import judge
import pandas
import pytest


def answer(text="One is truer.\nPreferred: {better}", finish_reason="stop", **message):
    """A completion; `{better}` is the summary that starts with `good`."""
    message = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return 200, {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def error(status, message, /, **more):
    return status, {"error": {"message": message, **more}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body.get("messages", [{"content": ""}])[0]["content"]
        post = int((re.findall(r"number (\d+)", prompt) or [-1])[0])
        asked = SimpleNamespace(path=self.path, headers=self.headers, body=body, prompt=prompt, post=post)
        with self.server.lock:
            self.server.seen.append(asked)
        reply = self.server.reply(asked)
        if reply is None:  # the line is cut
            self.close_connection = True
            return
        status, content, *headers = reply
        if not isinstance(content, bytes):
            better = "A" if "Summary A:\ngood" in prompt else "B"
            content = json.dumps(content).replace("{better}", better).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **(headers[0] if headers else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):  # a client that waited too long is gone
        pass


@pytest.fixture
def make_server():
    servers = []

    def make(reply=lambda asked: answer()):
        """A server on loopback; `reply(asked)` gives status, body and headers."""
        found = Quiet(("127.0.0.1", 0), Handler)
        found.lock, found.seen, found.reply = threading.Lock(), [], reply
        found.url = f"http://127.0.0.1:{found.server_address[1]}/v1"
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(found)
        return found

    yield make
    for found in servers:
        found.shutdown()
        found.server_close()


@pytest.fixture
def server(make_server):
    return make_server()


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Judge posts whose response is always the better one; returns exit code, output, and the report."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", *ask_server.ROUTES):
        monkeypatch.delenv(name, raising=False)

    def judge_posts(url, posts=3, **settings):
        rows = [{"query": f"POST: number {i}\n\nTL;DR:", "response": f"good {i}", "reference": f"bad {i}"}
                for i in range(posts)]  # fmt: skip
        pandas.DataFrame(rows).to_parquet(tmp_path / "policy.parquet")
        args = {"judge": "openai", "base_url": url, "model": "test/judge", "first_wait": 0.01, "max_attempts": 3}
        args |= {"cache": str(tmp_path / "cache.sqlite"), "output_dir": str(tmp_path / "out"), "bootstrap": 50}
        code, report = 0, None
        try:
            (report,) = judge.main(judge.Args(run=(str(tmp_path / "policy.parquet"),), **(args | settings))).values()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and (code == 0 or err.count("\n") == 1), err
        return SimpleNamespace(code=code, report=report, out=out, err=err)

    return judge_posts


def cached(tmp_path) -> int:
    with sqlite3.connect(tmp_path / "cache.sqlite") as db:
        return db.execute("SELECT count(*) FROM answers").fetchone()[0]


# ----------------------------------------------------------------------------------------------------------------------
# whose fault it is


SET_UP = {
    "tokens": (error(400, "max_tokens is too large: 200. This model supports at most 100 completion tokens, whereas "
                     "you provided 200.", param="max_tokens", code="invalid_value"), "--model"),
    "tokens of vLLM": ((400, {"object": "error", "type": "BadRequestError", "code": 400, "message": "'max_tokens' or "
                       "'max_completion_tokens' is too large: 200. This model's maximum context length is 128 tokens"}),
                       "--model"),
    "policy": (error(400, "unknown model policy", type="invalid_request_error"), "--model"),
    "argument": (error(400, "Unrecognized request argument supplied: max_length", code=None), "--model"),
    "fields": ((422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "length"], "msg": "not permitted"}]}),
               "extra_forbidden"),
    "context": (error(400, "This model's maximum context length is 16 tokens.", code="context_length_exceeded"),
                "context_length_exceeded"),
    "filter": (error(400, "The response was filtered", code="content_filter", type=None), "content_filter"),
    "moderation": (error(403, "Your input was flagged", code=403), "a refused key (403: Your input was flagged)"),
    "moderation with reasons": (error(403, "Your input was flagged", code=403, metadata={"reasons": ["violence"]}),
                                "(403: Your input was flagged)"),
    "errors": ((400, {"errors": [{"code": 5006, "message": "required properties are missing"}]}), "are missing"),
    "unknown model": (error(403, "Project `p` does not have access to model `m`", code="model_not_found"), "--model"),
    "page": ((403, b"<html><head></head>\n<body>\n<h1>403</h1>\nForbidden</body></html>"), "403 Forbidden"),
}  # fmt: skip


@pytest.mark.parametrize("case", SET_UP)
def test_a_fault_of_all_questions_is_the_set_ups(case, server, run, tmp_path):
    """Words such as `length` and `policy` make no refusal of a question: nothing is kept, a cured server is asked."""
    reply, words = SET_UP[case]
    server.reply = lambda asked: reply
    found = run(server.url, posts=9)
    assert found.code == 2 and words in found.err and cached(tmp_path) == 0 and not (tmp_path / "out").exists(), found
    assert len(server.seen) <= 3
    server.reply = lambda asked: answer()
    assert run(server.url, posts=9).report["wins"] == 9


def slow(asked):
    time.sleep(0.5)
    return answer()


BLOCKED = {
    "message null": (200, {"choices": [{"index": 0, "finish_reason": None, "message": None}]}),
    "filtered answer": answer(None, "content_filter"),
    "Azure's filter": error(400, "The response was filtered", code="content_filter", param="prompt", status=400,
                            innererror={"code": "ResponsibleAIPolicyViolation"}),
    "too long": error(400, "This model's maximum context length is 16 tokens.", code="context_length_exceeded"),
    "too long for vLLM": (400, {"object": "error", "type": "BadRequestError", "code": 400,
                                "message": "max_tokens is too large: 200. (200 > 2048 - 1900)"}),
    "too long for llama.cpp": error(500, "the request exceeds the available context size", code=500,
                                    type="exceed_context_size_error", n_ctx=256),
    "a setting's words": error(400, "Unsupported value in the text"),
    "a setting's name": error(400, "Unknown parameter", code="unknown_parameter"),
    "flagged": error(403, "Your input was flagged", code=403, metadata={"raw": "violence"}),
    "error 500": error(500, "Context size has been exceeded.", code=500, type="server_error"),
    "error in the answer": (200, {"choices": None, "error": {"message": "Provider returned error", "code": 400}}),
    "thinks for ever": answer(None, "length", reasoning_content="Let me see"),
    "too slow": None,
}  # fmt: skip


WHERE = [(case, int(case == "a setting's name")) for case in BLOCKED] + [("message null", 1), ("message null", 2)]


@pytest.mark.parametrize("case, post", WHERE)
def test_one_blocked_post_is_counted_apart(case, post, server, run, tmp_path):
    """Wherever it stands, and again at the next start; only it is asked again then."""
    blocked = lambda asked: slow(asked) if case == "too slow" else BLOCKED[case]
    server.reply = lambda asked: blocked(asked) if asked.post == post else answer()
    for start in range(2):
        server.seen.clear()
        found = run(server.url, timeout=0.2)
        report = found.report
        assert found.code == 0 and (report["wins"], report["failed"], report["unreadable"]) == (2, 1, 1), found
        assert list(report["failures"].values()) == [1] and "2 questions failed and are counted apart" in found.out
        if start == 1:  # once more at an answered one: is it the question, or the server?
            assert sum(asked.post != post for asked in server.seen) <= 1
    assert cached(tmp_path) == 4
    verdicts = pandas.read_parquet(next((tmp_path / "out").rglob("verdicts.parquet")))
    assert verdicts["failure"].notna().tolist() == [i == post for i in range(3)]
    assert "failed at the server" in next((tmp_path / "out").rglob("report.md")).read_text()


@pytest.mark.parametrize("reply", [None, error(503, "no"), error(429, "Request too large (TPM)", type="tokens")])
@pytest.mark.parametrize("post", [0, 1, 2])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_one_post_that_looks_like_a_servers_fault(reply, post, concurrency, server, run):
    """A proxy cuts the line, a question is over the limit: others are answered, so it is this one's, at each start."""
    server.reply = lambda asked: reply if asked.post == post else answer()
    for _ in range(2):
        found = run(server.url, concurrency=concurrency)
        assert found.code == 0 and (found.report["wins"], found.report["failed"]) == (2, 1), found


def test_too_many_failures_stop(server, run, tmp_path):
    server.reply = lambda asked: error(400, "no", code="content_filter") if asked.post % 3 == 1 else answer()
    found = run(server.url, posts=30, max_failures=0.1)
    assert found.code == 2 and "--max_failures: found 7 of 60 questions that failed" in found.err, found
    assert not (tmp_path / "out").exists()
    assert run(server.url, posts=30, max_failures=0.4).report["failed"] == 10
    assert run(server.url, max_failures=1.5).err.startswith("error: --max_failures: found 1.5")


def test_a_server_that_dies_on_the_way_stops_all(server, run):
    """Many failures one after the other are not the questions', though others were answered before."""
    server.reply = lambda asked: answer() if len(server.seen) <= 50 else error(500, "the engine is dead")
    found = run(server.url, posts=60, concurrency=2, max_attempts=2, first_wait=0.001)
    assert found.code == 1 and "questions in a row failed" in found.err and "the engine is dead" in found.err, found
    assert "50 of 120 questions" in found.err and len(server.seen) < 120
    server.reply = lambda asked: answer()
    assert run(server.url, posts=60).report["wins"] == 60


def test_the_set_up_is_at_fault_though_others_were_answered_before(server, run):
    """A second start: what is left is refused, and so is what was answered at the first."""
    server.reply = lambda asked: answer() if asked.post < 4 else error(401, "no")
    assert run(server.url, posts=5).code == 2
    server.reply = lambda asked: error(400, "max_tokens is too large")
    found = run(server.url, posts=5)
    assert found.code == 2 and "max_tokens is too large" in found.err


def test_refusals_in_an_old_cache_are_not_believed(server, run, tmp_path):
    args = judge.Args(base_url=server.url, model="test/judge")
    run(server.url, posts=2)
    cache = ask_server.Cache(str(tmp_path / "cache.sqlite"), 1)
    cache.db.execute("UPDATE answers SET answer = ?", (ask_server.OLD_REFUSAL,))
    server.seen.clear()
    assert run(server.url, posts=2).report["wins"] == 2 and len(server.seen) == 4
    old = (ask_server.OLD_REFUSAL,)
    assert cache.db.execute("SELECT count(*) FROM answers WHERE answer = ?", old).fetchone() == (0,)
    # other answers of an earlier version are found again, where the address was typed
    old = json.dumps([server.url, "test/judge", 0.0, 200, "p", 0])
    assert ask_server.cache_key(args, "p", 0) == hashlib.sha256(old.encode()).hexdigest()


@pytest.mark.parametrize("when", ["before", "on the way"])
def test_a_damaged_cache(when, server, run, tmp_path):
    """Or one that is locked, or on a full disk: one line, not a traceback."""

    def reply(asked):
        if when == "on the way" and len(server.seen) == 3:
            with sqlite3.connect(tmp_path / "cache.sqlite") as db:
                db.execute("DROP TABLE claims")
        return answer()

    server.reply = reply
    if when == "before":
        run(server.url, posts=30)
        content = (tmp_path / "cache.sqlite").read_bytes()
        (tmp_path / "cache.sqlite").write_bytes(content[:8192] + b"no" * ((len(content) - 8192) // 2))
    found = run(server.url, posts=31, concurrency=1)
    assert found.code == (2 if when == "before" else 1) and found.err.startswith("error: --cache: "), found


def test_posts_that_are_left_out_are_not_asked_about(server, run, tmp_path):
    """--num_rows holds for the other policy, too, when both are judged against the references."""
    queries = [f"POST: number {i}\n\nTL;DR:" for i in range(3)]
    pandas.DataFrame({"query": queries, "response": "worse", "reference": "bad"}).to_parquet(tmp_path / "other.parquet")
    found = run(server.url, against=str(tmp_path / "other.parquet"), paired_difference=True, num_rows=1)
    assert {asked.post for asked in server.seen} == {0} and found.report["win_rate_difference"]["mean"] == 1.0 - 0.5


# ----------------------------------------------------------------------------------------------------------------------
# models that think


def o_series(asked):
    if "max_tokens" in asked.body:
        message = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return error(400, message, type="invalid_request_error", param="max_tokens", code="unsupported_parameter")
    if asked.body.get("temperature", 1) != 1:
        message = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."  # noqa: E501  # fmt: skip
        return error(400, message, type="invalid_request_error", param="temperature", code="unsupported_value")
    return answer()


def no_temperature(asked):
    message = "Unsupported parameter: 'temperature' is not supported with this model."
    return error(400, message, code="unsupported_parameter") if "temperature" in asked.body else answer()


@pytest.mark.parametrize("reply, sent, words", [
    (o_series, {"max_completion_tokens": 200}, ["is sent as max_completion_tokens", "no --temperature is sent"]),
    (no_temperature, {"max_tokens": 200}, ["no --temperature is sent"]),
    (lambda asked: error(400, "temperature: only 1 is allowed for this model") if asked.body.get("temperature") == 0
     else answer(), {"max_tokens": 200}, ["no --temperature is sent"]),
])  # fmt: skip
def test_settings_that_a_model_does_not_take(reply, sent, words, server, run):
    """They are left out after the server's own message, once, and that is said."""
    server.reply = reply
    found = run(server.url, posts=20)
    assert found.report["wins"] == 20 and len(server.seen) == 40 + len(words), found
    assert {k: v for k, v in server.seen[-1].body.items() if k not in ("model", "messages")} == sent
    assert all(found.out.count(part) == 1 for part in words)


def test_workers_that_find_out_at_the_same_time(server, tmp_path, capsys):
    together = threading.Barrier(3, timeout=20)

    def reply(asked):
        if "max_tokens" in asked.body:
            together.wait()
        return o_series(asked)

    async def ask():
        args = judge.Args(run=("x",), judge="openai", base_url=server.url, max_attempts=1)
        asker = ask_server.Server(args, ask_server.Cache(str(tmp_path / "cache"), 10), [0], judge.read_answer)
        found = await asyncio.gather(*(asker.answer(f"Summary A:\ngood {i}\nSummary B:\nbad") for i in range(3)))
        await asker.client.close()
        return found

    server.reply = reply
    assert asyncio.run(ask()) == ["A"] * 3 and capsys.readouterr().out.count("is sent as max_completion_tokens") == 1


def test_a_setting_that_cannot_be_left_out_stops_at_once(server, run):
    server.reply = lambda asked: error(400, "Unsupported parameter: 'messages'", code="unsupported_parameter")
    assert run(server.url).code == 2 and len(server.seen) == 1


@pytest.mark.parametrize("reply", [answer(None, "length", reasoning_content="Let me see"), answer("", "length"),
                                   answer("<think>Let me see", "length")])  # fmt: skip
def test_an_answer_that_does_not_begin(reply, server, run, tmp_path):
    server.reply = lambda asked: reply
    found = run(server.url)
    assert found.code == 2 and "--max_tokens: found 200, which the model used up" in found.err
    assert cached(tmp_path) == 0


@pytest.mark.parametrize("reply", [
    answer([{"type": "text", "text": "One is truer.\n"}, {"type": "text", "text": "Preferred: {better}"}]),
    answer([{"type": "thinking", "thinking": [{"type": "text", "text": "Preferred: A"}]},
            {"type": "text", "text": "Preferred: {better}"}]),
    answer(reasoning_content="Preferred: A and B"),
])  # fmt: skip
def test_content_of_parts(reply, server, run):
    server.reply = lambda asked: reply
    assert run(server.url).report["wins"] == 3


@pytest.mark.parametrize("text, verdict", [
    ("Preferred: A</s>", "A"), ("Preferred: B<|im_end|>", "B"), ("B <end_of_turn>\n", "B"), ("A<|eot_id|><|end|>", "A"),
    ("Preferred: A<｜end▁of▁sentence｜>", "A"), ("One line. Preferred: A", "A"), ("Truer; **Preferred: B**", "B"),
    ("Truer.\nPreferred: A\n---", "A"), ("Preferred: B.\n\n***\n```", "B"), ("Perhaps\nPreferred: A\n</think>\nB", "B"),
    ("Preferred: <B>", "B"), ("Truer.  Preferred: summary a.", "A"),
    ("Preferred: A. Preferred: B", None), ("Not preferred: A", None), ("The one that is not *preferred*: A", None),
    ("Preferred: A\n---\nor B", None), ("Less preferred: B</s>", None), ("One line. Preferred: A or B", None),
    ("---", None), ("</s>", None), ("Preferred: A. Both are bad.", None), ("I preferred a", None),
])  # fmt: skip
def test_more_answers_are_read_and_none_is_guessed(text, verdict):
    assert judge.read_answer(text) == verdict


@pytest.mark.parametrize("noise", [". " * 3000, " " * 30000, "\n" * 30000, ".\n---\n" * 3000])
def test_an_answer_that_repeats_itself_is_read_at_once(noise):
    """Models that think may write thousands of tokens, and get stuck."""
    start = time.monotonic()
    assert judge.read_answer(f"x{noise}x\nPreferred: A") == "A" and judge.read_answer(f"x{noise}x") is None
    assert judge.read_answer(f"Preferred: B{noise}") == "B" and time.monotonic() - start < 2


# ----------------------------------------------------------------------------------------------------------------------
# addresses, keys, and the way to a server


def only(path):
    """A server that knows one path."""
    missing = (404, {"detail": "Not Found"})
    return lambda asked: answer() if asked.path == path else missing


@pytest.mark.parametrize("reply", [(404, {"detail": "Not Found"}), (404, b"404 page not found"),
                                   error(404, "Invalid URL (POST /chat/completions)", code=None),
                                   error(404, "Resource not found", code="404"),
                                   (405, b"<h1>Not\nAllowed</h1>")])  # fmt: skip
def test_a_wrong_path_is_not_the_models_fault(reply, server, run):
    server.reply = lambda asked: reply
    found = run(server.url.removesuffix("/v1"))
    assert found.code == 2 and found.err.startswith("error: --base_url: found 'http://127.0.0.1:"), found
    assert "ends in /v1" in found.err and len(server.seen) == 1


@pytest.mark.parametrize("reply", [error(404, "The model `x` does not exist.", type="NotFoundError", code=404),
                                   (404, {"object": "error", "message": "The model `x` does not exist."}),
                                   error(404, "The API deployment does not exist.", code="DeploymentNotFound"),
                                   (404, {"error": "model 'x' not found"})])  # fmt: skip
def test_an_unknown_model(reply, server, run):
    server.reply = lambda asked: reply
    assert run(server.url).err.startswith("error: --model: found 'test/judge' (404")


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_an_address_with_a_query(end, server, run, monkeypatch):
    """Azure's: the query stands behind the whole path, and the key in a header of its own."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    path = "/openai/deployments/gpt"
    server.reply = only(f"{path}/chat/completions?api-version=2024-06-01")
    found = run(server.url.replace("/v1", f"{path}{end}?api-version=2024-06-01"))
    assert found.report["wins"] == 3 and server.seen[0].headers["api-key"] == "secret"
    assert found.report["server"].endswith(f"{path}?api-version=2024-06-01")


def test_servers_do_not_share_answers(make_server, run, monkeypatch):
    """Wherever the address comes from, it belongs to the key of an answer, and into the report."""
    better, worse = make_server(), make_server(lambda asked: answer("Preferred: " + "BA"["A:\nbad" in asked.prompt]))
    for server, wins in ((better, 3), (worse, 0), (better, 3)):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        report = run(None).report
        assert (report["wins"], report["server"]) == (wins, server.url)
    assert run(worse.url).report["wins"] == 0 and len(better.seen) == len(worse.seen) == 6
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert "no OPENAI_API_KEY" in run(None).err
    assert ask_server.server_address(judge.Args()) == ask_server.OPENAI


def test_keys_that_cannot_be_sent(server, run, monkeypatch):
    for key in ("a\nb", "a b", "schlüssel"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        found = run(server.url)
        assert found.code == 2 and "OPENAI_API_KEY" in found.err and key not in found.err and not server.seen
    monkeypatch.setenv("OPENAI_API_KEY", "key\r\n")
    assert run(server.url).report["wins"] == 3 and server.seen[0].headers["authorization"] == "Bearer key"


@pytest.mark.parametrize("name, value, shown", [
    ("SSL_CERT_FILE", "/nowhere.pem", "SSL_CERT_FILE=/nowhere.pem"), ("ALL_PROXY", "socks5://", "ALL_PROXY=socks5://"),
    ("all_proxy", "socks4://x:1", "ALL_PROXY=socks4://x:1"), ("HTTP_PROXY", "http://me:pass@127.0.0.1:9", "HTTP_PROXY=http://127.0.0.1:9"),
    ("HTTP_PROXY", "me:pass@127.0.0.1:9", "HTTP_PROXY=127.0.0.1:9"),
])  # fmt: skip
def test_no_way_to_the_server(name, value, shown, server, run, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    found = run(server.url)
    assert found.code == 2 and found.err.startswith("error: --base_url: ") and shown in found.err, found
    assert "pass" not in found.err and not server.seen


def test_an_address_that_is_none(run):
    for url in ("http://[x", "http://localhost:port/v1", ""):
        assert run(url).err.startswith("error: --base_url: found '")
    found = run("http://127.0.0.1:9/v1")
    assert found.code == 2 and "3 attempts failed" in found.err and "All connection attempts failed" in found.err


# ----------------------------------------------------------------------------------------------------------------------
# a server that has enough


@pytest.mark.parametrize("reply", [
    error(429, "You exceeded your current quota", code="insufficient_quota", type="insufficient_quota"),
    error(402, "Insufficient Balance", code=402),
    (200, {"choices": None, "error": {"message": "Insufficient credits", "code": 402}}),
])  # fmt: skip
def test_an_empty_account_stops_at_once(reply, server, run):
    """With the server's words; later the same command goes on."""
    headers = {"retry-after": "5"}  # which would help nobody
    server.reply = lambda asked: answer() if len(server.seen) <= 5 else (*reply, headers)
    found = run(server.url, concurrency=2)
    words = (reply[1]["error"])["message"]
    assert found.code == 1 and words in found.err and "5 of 6 questions are answered and kept" in found.err, found
    assert len(server.seen) <= 7
    server.seen.clear()
    server.reply = lambda asked: answer()
    assert run(server.url).report["wins"] == 3 and len(server.seen) == 1
    server.reply = lambda asked: reply
    assert run(server.url, posts=4, model="other").code == 2


def test_an_error_inside_an_answer_is_shown_and_may_pass(server, run):
    broken = {"id": None, "choices": None, "error": {"message": "Provider returned error", "code": 429}}
    broken["error"]["metadata"] = {"raw": "Too Many Requests", "provider_name": "x"}
    server.reply = lambda asked: answer() if len(server.seen) > 2 else (200, broken)
    assert run(server.url).report["wins"] == 3
    server.reply = lambda asked: (200, broken)
    found = run(server.url, model="other")
    assert found.code == 2 and "429: Provider returned error: Too Many Requests" in found.err, found
    for other in ({"choices": None}, [], "<html>\n<b>no</b></html>", {"choices": [{"message": {"content": 5}}]}):
        server.reply = lambda asked, other=other: (200, other)
        found = run(server.url, model="third")
        assert found.code == 2 and "not the answer of a chat completion" in found.err, found
    server.reply = lambda asked: (200, b'{"choices": [')
    assert run(server.url, model="fourth").code == 2


def test_a_server_with_a_limit_is_waited_for(server, run):
    """Who is refused again and again goes on, as long as others are answered."""
    free = [0.0]

    def reply(asked):
        with server.lock:
            if time.monotonic() < free[0]:
                return (*error(429, "slow down"), {"retry-after": "0.05"})
            free[0] = time.monotonic() + 0.05
        return answer()

    server.reply = reply
    report = run(server.url, posts=10, concurrency=10, max_attempts=4).report
    assert (report["wins"], report["failed"]) == (10, 0)


@pytest.mark.parametrize("value", ["0", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_retry_after_of_nothing_is_no_reason_to_hurry(value, server, run):
    server.reply = lambda asked: (*error(429, "slow down"), {"retry-after": value})
    start = time.monotonic()
    assert run(server.url, first_wait=0.4).code == 2 and time.monotonic() - start > 0.6


def test_long_waits_are_announced(server, tmp_path, capsys):
    """`Retry-After: 86400` is obeyed, not without a word, and once for all who wait."""
    server.reply = lambda asked: (*error(429, "Daily limit reached"), {"retry-after": "86400"})

    async def ask():
        args = judge.Args(run=("x",), judge="openai", base_url=server.url)
        asker = ask_server.Server(args, ask_server.Cache(str(tmp_path / "cache"), 10), [0], judge.read_answer)
        everyone = asyncio.gather(*(asker.answer(f"number {i}") for i in range(3)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(everyone, 1.0)
        await asker.client.close()

    asyncio.run(ask())
    out = capsys.readouterr().out
    assert out.count("1,440 minutes") == 1 and "Daily limit reached" in out and len(server.seen) == 3


def test_who_waits_stops_when_all_stops(server, run):
    """A worker that waits does not keep the others' stop from the user."""

    def reply(asked):
        if len(server.seen) <= 1:
            return answer()
        if asked.post == 1:
            return (*error(429, "slow down"), {"retry-after": "30"})
        time.sleep(0.3)
        return error(429, "no credit", code="insufficient_quota")

    server.reply, start = reply, time.monotonic()
    found = run(server.url, concurrency=2)
    assert found.code == 1 and "no credit" in found.err and time.monotonic() - start < 10, found
    assert os.environ.get("OPENAI_API_KEY") is None
