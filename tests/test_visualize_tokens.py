"""The token viewer: numbers against plain forward passes, outputs, hostile text, a browser, a terminal, refusals."""

import doctest
import importlib
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from conftest import OFFLINE, ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from summarize_from_feedback_details import ppo_left_padding

sys.path.insert(0, str(ROOT))  # the script stands beside the package
vt = importlib.import_module("visualize_tokens")

T, KL_COEF, GAMMA, LAM = 0.7, 0.3, 0.9, 0.8  # not PPO's defaults, so that each must arrive
HOSTILE = {
    "html": '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1"><!-- PAGE_DATA SCRIPT_HASH',
    "unicode": "🤔 naïve 漢字 👩‍👩‍👧 a\x1b[31mb\x07\u202ec\u2028d\te\x00",
    "latex": "\\input{/etc/passwd} $x_1^2$ % & # ~ \\end{document} \\\\[1] [2] * ``q'' --- é ß ﬁ",
    "rich": "[bold red]x[/] [/nothing] :smile: {0} %s \x9b31m",
}


@pytest.fixture(scope="module")
def rows(world, tmp_path_factory):
    """Six rows: two of the toy world, then hostile ones in query and reference; the last reference is empty."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pad, found = tokenizer.pad_token_id, []
    for row in datasets.load_dataset(world.sft_rows)["validation"].select(range(2)):
        found.append((row["query"], row["reference_response"]))
    for name, text in HOSTILE.items():
        query = f"SUBREDDIT: r/{name}\n\nTITLE: {text}\n\nPOST: my vase\n{text}\n\nTL;DR:"
        found.append((query, "" if name == "rich" else f" {text[:40]}\n\nmy vase<|endoftext|>"))
    found = [(q, r, tokenizer.encode(q), tokenizer.encode(r)) for q, r in found]
    left, right = (max(len(row[i]) for row in found) for i in (2, 3))
    columns = [{"query": q, "reference_response": r, "query_token": [pad] * (left - len(a)) + a,
                "reference_response_token": b + [pad] * (right - len(b))} for q, r, a, b in found]  # fmt: skip
    folder = tmp_path_factory.mktemp("rows")
    (folder / "data").mkdir()
    datasets.Dataset.from_list(columns).to_parquet(folder / "data/validation-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def args(world, rows):
    """The SFT policy beside the random base model, which at temperature 1 draws anything, half characters included."""
    return vt.Args(
        models=(f"sft={world.sft}", f"wild={world.base}"), base_model=world.base, reward_model=world.reward,
        query_dataset=rows, response_length=12, temperature=1.0, logprob_temperature=T, seed=3, kl_coef=KL_COEF,
        gamma=GAMMA, lam=LAM,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outputs(args, tmp_path_factory):
    """The page as data, and the three files of one call."""
    folder = tmp_path_factory.mktemp("outputs")
    names = {"html": "a/page.html", "latex": "tokens.tex", "json": "tokens.json"}
    page = vt.main(replace(args, details=True, **{key: str(folder / name) for key, name in names.items()}))
    return page, {key: folder / name for key, name in names.items()}


@pytest.fixture(scope="module")
def ppo_run(world, tmp_path_factory):
    """A folder in which SFT, reward and PPO runs have finished."""
    folder = tmp_path_factory.mktemp("run")
    here = os.getcwd()
    os.chdir(folder)
    try:
        ppo_left_padding.main(world.ppo_args(folder / "toy_ppo", num_updates=1, num_eval_rows=6, seed=7))
    finally:
        os.chdir(here)
    return folder


def test_examples_in_docstrings():
    found = doctest.testmod(vt)
    assert found.attempted >= 4 and not found.failed


# ------------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_plain_forward_passes(world, args, outputs):
    page, _ = outputs
    policies = {"sft": AutoModelForCausalLM.from_pretrained(world.sft).eval()}
    policies["wild"] = AutoModelForCausalLM.from_pretrained(world.base).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    rows = datasets.load_dataset(args.query_dataset)["validation"]
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    pad = len(tokenizer)
    for name in ("reference", "sft", "wild"):
        column, raw_advantages = [], []
        for post, row in zip(page["posts"], rows):
            response = next(r for r in post["responses"] if r["name"] == name)
            query = [i for i in row["query_token"] if i != pad]
            ids = [token["id"] for token in response["tokens"]]
            Q, n, whole = len(query), len(ids), torch.tensor([query + ids])
            with torch.no_grad():
                logits = {key: model(whole).logits[0, Q - 1 : Q + n - 1] for key, model in policies.items()}
                hidden = reward.gpt_neox(whole).last_hidden_state[0]
                head = (reward.score(hidden)[:, 0] + reward.config.reward_bias).tolist()
            assert math.isclose(response["score"], head[-1], abs_tol=1e-3)
            if name == "reference":
                assert ids == [i for i in row["reference_response_token"] if i != pad]
            kls = []
            for t, token in enumerate(response["tokens"]):
                order = logits["wild"][t].argsort(descending=True).tolist()  # the base model's
                assert token["rank"] == order.index(ids[t]) + 1
                assert token["band"] == (0 if token["rank"] == 1 else 1 if token["rank"] < 4 else 2)
                logprob = {key: float((ll[t] / T).log_softmax(0)[ids[t]]) for key, ll in logits.items()}
                assert math.isclose(token["base_logprob"], logprob["wild"], abs_tol=1e-3)
                assert math.isclose(token["ref_logprob"], logprob["sft"], abs_tol=1e-3)  # the policy named sft
                assert math.isclose(token["value"], head[Q + t - 1], abs_tol=1e-3)
                assert math.isclose(token["reward_logit"], head[Q + t], abs_tol=1e-3)
                if name != "reference":
                    kls.append(logprob[name] - logprob["sft"])
                    assert math.isclose(token["logprob"], logprob[name], abs_tol=1e-3)
                    assert math.isclose(token["kl"], kls[-1], abs_tol=2e-3)
            if name == "reference":
                assert not any("kl" in token or "advantage" in token for token in response["tokens"])
                continue
            # PPO's rewards and advantages, by hand: the score lands after the end where there is room
            rewards, values = [-KL_COEF * kl for kl in kls], head[Q - 1 : Q + n - 1]
            assert response["ended"] == (ids[-1] == tokenizer.eos_token_id)
            score = head[-1] if response["ended"] else -1.0
            if n < args.response_length:
                assert math.isclose(response["end"]["reward"], score, abs_tol=1e-3)
                assert math.isclose(response["end"]["value"], head[Q + n - 1], abs_tol=1e-3)
                rewards, values = rewards + [score], values + [head[Q + n - 1]]
            else:
                assert "end" not in response
                rewards[-1] += score
            assert math.isclose(response["reward"], sum(rewards), abs_tol=1e-2)
            after, advantages = 0.0, []
            for t in reversed(range(len(rewards))):
                following = values[t + 1] if t + 1 < len(values) else 0.0
                after = rewards[t] + GAMMA * following - values[t] + GAMMA * LAM * after
                advantages.insert(0, after)
            raw_advantages += advantages[:n]
            column += [token["advantage"] for token in response["tokens"]]
        if name != "reference":
            raw = torch.tensor(raw_advantages)
            torch.testing.assert_close(
                torch.tensor(column), (raw - raw.mean()) / raw.std(correction=0), rtol=0, atol=5e-3
            )
    ranks = [t["band"] for p in page["posts"] for r in p["responses"] for t in r["tokens"]]
    assert {0, 1, 2} == set(ranks)  # all bands were seen


def test_the_latest_run_is_shown_with_its_own_responses(ppo_run, monkeypatch, capsys):
    monkeypatch.chdir(ppo_run)
    page = vt.main(vt.Args(num=6))
    table = pandas.read_parquet("runs/toy_ppo/tables/validation.parquet")
    assert len(page["posts"]) == len(table) == 6
    for post, row in zip(page["posts"], table.itertuples()):
        reference, sft, ppo = post["responses"]
        assert [r["name"] for r in post["responses"]] == ["reference", "sft", "ppo"]
        assert ppo["text"].replace("<|endoftext|>", "").strip() == row.response and post["query"] == row.query
        assert math.isclose(ppo["score"], row.score, abs_tol=1e-3)
        assert math.isclose(reference["score"], row.reference_score, abs_tol=1e-3)
        assert all(token["kl"] == 0 for token in sft["tokens"])
    out = capsys.readouterr().out
    assert "run: runs/toy_ppo" in out and "SFT policy: the toy world's base model is random" in out
    assert "lambda 0.95" in out and "seed 7" in out
    # from elsewhere, a run's relative paths are looked for beside its runs/
    assert vt.latest_run("runs", "sft") is None


@pytest.mark.parametrize("with_reward", [True, False])
def test_an_sft_run_with_and_without_a_reward_model(world, workdir, monkeypatch, with_reward, capsys):
    def run(stage, folder, state="finished", **arguments):
        path = workdir / "there/runs" / folder
        path.mkdir(parents=True)
        (path / "args.json").write_text(json.dumps({"run_name": folder} | arguments))
        (path / "summary.json").write_text(json.dumps({"stage": stage, "state": state}))

    shutil.copytree(world.sft, workdir / "there/models/sft")
    run("sft", "a_sft", output_dir="models/sft", base_model=world.base, query_dataset=world.sft_rows, seed=5,
        response_length=6, temperature=0.5, base_model_revision=None, dataset_revision=None)  # fmt: skip
    run("ppo_left_padding", "broken_ppo", state="failed")
    run("ppo_left_padding", "older_ppo", state="finished")  # without what this version reads
    for name, summary in (("torn", '{"stage": '), ("other", "null"), ("short", "{}")):
        run("ppo_left_padding", name)
        (workdir / f"there/runs/{name}/summary.json").write_text(summary)
    (workdir / "there/runs/gone").mkdir()
    (workdir / "there/runs/gone/summary.json").symlink_to("/not/there")
    (workdir / "there/runs/a_file").write_text("x")
    if with_reward:
        run("reward", "a_reward", output_dir=world.reward, sft_model_path="models/sft")
    page = vt.main(vt.Args(runs_dir="there/runs", num=2, details=True))
    (sft,) = [r for r in page["posts"][0]["responses"] if r["name"] != "reference"]
    assert len(sft["tokens"]) <= 6 and ("score" in sft) == with_reward and sft["kl"] == 0
    assert ("advantage" in sft["tokens"][0]) == ("value" in sft["tokens"][0]) == with_reward
    assert "log-probabilities at temperature 0.7" in page["about"]["arithmetic"]


def test_reward_models_of_the_original_and_a_value_network_of_its_own(world, args, outputs, tmp_path):
    from safetensors.torch import save_file

    model = AutoModelForSequenceClassification.from_pretrained(world.reward)
    bias = model.config.reward_bias
    state = {f"lm_backbone.{k}": v.clone() for k, v in model.gpt_neox.state_dict().items()}
    state |= {"scalar_head.weight": model.score.weight.data, "scalar_head.bias": torch.tensor([bias + 2.0])}
    save_file(state, tmp_path / "model.safetensors")
    config = {"architectures": ["ScalarModel"], "base_config": model.config.to_dict(), "bias": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.config.reward_bias = bias + 5.0  # the value network: the same, five higher
    model.save_pretrained(tmp_path / "value")
    AutoTokenizer.from_pretrained(world.base).save_pretrained(tmp_path / "value")
    page = vt.main(replace(args, reward_model=str(tmp_path), value_model=str(tmp_path / "value")))
    for post, before in zip(page["posts"], outputs[0]["posts"]):
        for response, same in zip(post["responses"], before["responses"]):
            assert math.isclose(response["score"], same["score"], abs_tol=1e-4)
            for token, twin in zip(response["tokens"], same["tokens"]):
                assert math.isclose(token["value"], twin["value"] + 5.0, abs_tol=1e-3)
                assert math.isclose(token["reward_logit"], twin["reward_logit"], abs_tol=1e-4)
    assert "where PPO's value network began" not in page["about"]["value network"]
    assert "where PPO's value network began" in outputs[0]["about"]["value network"]


def test_one_model_in_memory_at_a_time(args, monkeypatch):
    loaded, order = [], []
    for owner, name in ((vt, "load_policy"), (vt, "load_reward_model")):

        def watched(*a, real=getattr(owner, name), **k):  # noqa: B008 - bound now, before it is replaced
            assert all(p.is_meta for model in loaded for p in model.parameters()), f"{order} still in memory"
            found = real(*a, **k)
            loaded.append(found)
            order.append(a[0])
            return found

        monkeypatch.setattr(owner, name, watched)
    vt.main(replace(args, num=1, response_length=2))
    assert len(order) == 5  # two policies, the reference policy, the base model, the reward model


def test_more_posts_than_one_forward_pass_holds(args, outputs, monkeypatch):
    monkeypatch.setattr(vt, "ROWS_AT_A_TIME", 4)
    page = vt.main(args)
    for post, before in zip(page["posts"], outputs[0]["posts"]):
        for response, same in zip(post["responses"], before["responses"]):
            assert response["text"] == same["text"] and math.isclose(response["score"], same["score"], abs_tol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- text


def test_what_a_tokenizer_adds_of_its_own_changes_nothing(args, outputs, tmp_path):
    """BOS and EOS, as Llama's and others add them: the texts are tokenised already."""
    base = shutil.copytree(args.base_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    eos = [("<|endoftext|>", tokenizer.eos_token_id)]
    adds = TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=eos)
    tokenizer.backend_tokenizer.post_processor = adds
    tokenizer.save_pretrained(base)
    assert len(AutoTokenizer.from_pretrained(base)("")["input_ids"]) == 2
    page = vt.main(replace(args, models=(args.models[0],), base_model=str(base), json=str(tmp_path / "x.json"), num=2))
    for found, expected in zip(page["posts"], outputs[0]["posts"]):
        for mine, plain in zip(found["responses"], expected["responses"]):
            assert [token["id"] for token in mine["tokens"]] == [token["id"] for token in plain["tokens"]]
            assert math.isclose(mine["score"], plain["score"], abs_tol=1e-5)


def test_every_byte_of_every_token_is_shown(world):
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    read = vt.byte_reader(tokenizer)
    text = "my 🤔 vase, naïve 漢字\n<|endoftext|>"
    ids = tokenizer.encode(text)
    assert b"".join(read(i) for i in ids) == text.encode()
    texts = vt.token_texts([read(i) for i in ids])
    assert len(texts) == len(ids) and "".join(texts) == text
    assert texts.count("") >= 3  # the toy tokenizer has the emoji's bytes as tokens: three go on with the first
    assert vt.token_texts([read(i) for i in ids][::-1])  # bytes in an order that is no text
    alone = [vt.token_texts([read(i)])[0] for i in range(len(tokenizer) + 3)]
    assert all(alone) and len(set(alone)) == len(alone) and alone[-1] == f"<id {len(tokenizer) + 2}>"


def test_the_real_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer")
    read, text = vt.byte_reader(tokenizer), "  two spaces    🤔 ça va\n\n漢字 don't"
    ids = tokenizer.encode(text)
    assert "".join(vt.token_texts([read(i) for i in ids])) == text
    assert all(tokenizer.decode([i]).encode() == read(i) for i in range(0, len(tokenizer), 7)
               if "�" not in tokenizer.decode([i]))  # fmt: skip


def test_nothing_that_a_screen_would_act_on(outputs):
    page, files = outputs
    for path in files.values():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", path.read_text()), path
    titles = [post["title"] for post in page["posts"]]
    assert HOSTILE["html"] in titles and r"a\x1b[31mb\x07\u202ec\u2028d\te\x00" in titles[3]


# --------------------------------------------------------------------------------------------------------------- files


def test_json_holds_everything(outputs):
    page, files = outputs
    assert json.loads(files["json"].read_text()) == page
    tokens = [t for p in page["posts"] for r in p["responses"][1:] for t in r["tokens"]]
    wanted = {"id", "text", "rank", "band", *vt.NUMBERS}
    assert all(wanted <= set(token) for token in tokens)
    assert page["posts"][5]["responses"][0]["tokens"] == []  # the empty reference
    for i, total in enumerate(page["totals"]):
        column = [post["responses"][i] for post in page["posts"]]
        assert math.isclose(total["score"], sum(r["score"] for r in column) / len(column), abs_tol=1e-4)
        assert math.isclose(sum(total["shares"]), 1.0, abs_tol=1e-3)
    assert not list(files["json"].parent.glob(".*"))  # no partial file is left


def test_html_is_one_file_without_network_and_scripts_of_others(outputs):
    html = outputs[1]["html"].read_text()
    assert html.count("<script") == 2 and html.count("</script") == 2  # the data, and our own
    assert "PAGE_DATA" not in html.replace("\\u003c!-- PAGE_DATA", "")
    assert not re.search(r"(?:src|href)=[\"']?(?:http|//)|url\(|@import", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and policy.count("sha256-") == 2
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in html


def test_latex_is_ascii_and_compiles(outputs, tmp_path):
    tex = outputs[1]["latex"].read_text()
    assert tex.isascii() and r"\hex{1F914}" in tex and r"na{\"\i}ve" in tex
    for dangerous in ("\\input{", "\\end{document} "):
        assert dangerous not in tex
    assert tex.count(r"\end{document}") == 1
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", str(outputs[1]["latex"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "tokens.pdf").read_bytes().startswith(b"%PDF")
    assert "Missing character" not in (tmp_path / "tokens.log").read_text(errors="replace")


# ------------------------------------------------------------------------------------------------------------ terminal


def test_without_a_terminal_nothing_is_asked_and_marks_stand_for_colours(args, outputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    vt.print_page(outputs[0], ask=False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60 and "\x1b" not in out and "post 6 of 6" in out
    assert "[bold red]x[/] [/nothing] :smile:" in out and "marginal°" in out and "shifted*" in out
    shifted = next(
        t for t in outputs[0]["posts"][0]["responses"][2]["tokens"] if t["band"] == 2 and t["text"].isalnum()
    )
    assert f"{shifted['text']}*" in out
    lines = out.splitlines()
    assert any(line.split()[:2] == ["token", "rank"] for line in lines)
    assert sum("(after the end)" in line for line in lines) >= 2


def test_keys_in_a_terminal_of_60_columns(ppo_run):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ppo_run)
        os.environ.update(OFFLINE | {"COLUMNS": "60", "TERM": "xterm-256color"})
        os.execv(sys.executable, [sys.executable, str(ROOT / "visualize_tokens.py")])
    out, keys, end = b"", [b" ", b"\x1b[B", b"q"], time.time() + 120
    while time.time() < end:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            out += os.read(terminal, 65536)
        except OSError:
            break
        if out.count(b"any key") > 3 - len(keys):
            os.write(terminal, keys.pop(0))
    else:
        os.kill(pid, signal.SIGKILL)  # it waits for a key that never came
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.decode())
    assert code == 0, text[-2000:]
    assert "post 3 of 8" in text and "post 4 of 8" not in text and "mean over posts" in text  # q ends it
    assert b"\x1b[" in out and not keys


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking " \
            "disable-component-update disable-sync disable-dev-shm-usage"  # fmt: skip
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}", "window-size=1280,800"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def screen(browser, path, width=1280, height=800, dark=False):
    """Open the page on a screen of this size; `ask` evaluates JavaScript there."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(Path(path).as_uri())
    return lambda code: browser.execute_script(f"return {code}")


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_page_in_a_browser(browser, outputs):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page, files = outputs
    ask = screen(browser, files["html"])
    find = lambda selector: browser.find_elements(By.CSS_SELECTOR, selector)
    title = lambda: ask("document.querySelector('main h2').textContent")
    panel = lambda: ask("document.getElementById('panel').innerText")
    # side by side, every token there, coloured by rank
    assert [e.text for e in find("article h3")] == ["reference", "sft", "wild"]
    boxes = [e.rect for e in find("article")]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    for article, response in zip(find("article"), page["posts"][0]["responses"]):
        tokens = article.find_elements(By.CSS_SELECTOR, ".tok")
        assert [t.get_attribute("textContent") for t in tokens] == [vt.shown_token(t) for t in response["tokens"]]
        bands = [("band1" in t.get_attribute("class")) + 2 * ("band2" in t.get_attribute("class")) for t in tokens]
        assert bands == [t["band"] for t in response["tokens"]]
    # pointing at a token shows its numbers
    token, element = page["posts"][0]["responses"][2]["tokens"][1], find("article:nth-of-type(3) .tok")[1]
    ActionChains(browser).move_to_element(element).perform()
    assert "wild · token 2" in panel() and f"rank {token['rank']} ({vt.BANDS[token['band']]})" in panel()
    assert f"KL {vt.shown('kl', token['kl'])}".replace("-", "−") in panel()
    # colours by key and by click; each of them differs from the one before
    seen = set()
    for key in "1234":
        press(browser, key)
        seen.add(ask("[...document.querySelectorAll('.tok')].map((e) => e.className).join()"))
        assert ask(f"document.querySelectorAll('#modes button')[{int(key) - 1}].ariaPressed") == "true"
    assert len(seen) == 4
    find("#modes button")[0].click()
    assert "first choice" in find("#legend")[0].text
    # posts by key, by button, by click; search
    press(browser, "j")
    assert title() == page["posts"][1]["title"]
    press(browser, "k", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert title() == page["posts"][2]["title"] == HOSTILE["html"]
    find("main button[aria-label='Previous post']")[0].click()
    assert title() == page["posts"][1]["title"]
    press(browser, "/")
    press(browser, "漢字")
    assert ask("document.getElementById('count').textContent") == "1 of 6 posts"
    assert len([e for e in find("#list li") if e.is_displayed()]) == 1
    press(browser, Keys.ENTER)
    assert title() == page["posts"][3]["title"] and "漢字" in title()
    press(browser, "/", Keys.ESCAPE)
    assert ask("document.getElementById('count').textContent") == "6 posts"
    # keyboard alone: roving tabindex, the panel follows the focus
    assert ask(
        "[...document.querySelectorAll('.tokens')].every((e) => e.querySelectorAll('[tabindex=\"0\"]').length === 1)"
    )
    browser.execute_script("document.querySelectorAll('.tokens')[2].querySelector('[tabindex=\"0\"]').focus()")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "wild · token 2" in panel() and title() == page["posts"][3]["title"]
    assert ask("document.activeElement.getAttribute('aria-label')").endswith(("shifted", "marginal", "unshifted"))
    assert ask("document.activeElement.getAttribute('aria-selected')") == "true"
    press(browser, "?")
    assert ask("document.getElementById('help').open")
    press(browser, Keys.ESCAPE)
    assert not ask("document.getElementById('help').open")
    # every post, in every colour: nothing of a post ever runs
    for _ in page["posts"]:
        press(browser, "k")
    for _ in page["posts"]:
        press(browser, "1", "2", "3", "4", "j")
    assert title() == page["posts"][-1]["title"]
    assert ask("window.pwned === undefined && document.images.length === 0 && document.scripts.length === 2")
    assert [line for line in browser.get_log("browser") if line["level"] != "INFO"] == []


CONTRAST = """(() => {
  const luminance = (rgb) => {
    const c = rgb.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
  const parse = (text) => text.match(/[0-9.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  const words = [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && e.textContent.trim()
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && !e.matches('script, style, noscript'));
  return words.map((e) => { const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(behind(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className + ' ' + e.tagName]; });
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_page_is_readable_in_light_and_dark_and_on_a_phone(browser, outputs, dark):
    ask = screen(browser, outputs[1]["html"], 360, 740, dark)
    button = "document.getElementById('posts-toggle')"
    assert ask("document.documentElement.scrollWidth") <= 360
    assert not ask("document.getElementById('posts').checkVisibility()") and ask(f"{button}.checkVisibility()")
    browser.execute_script(f"{button}.click()")
    assert ask("document.getElementById('posts').checkVisibility()") and ask(f"{button}.ariaExpanded") == "true"
    screen(browser, outputs[1]["html"], 1280, 800, dark)
    assert ask("document.documentElement.classList.contains('dark')") is dark
    for flipped in (False, True):
        kinds = set()
        for mode in "1234":
            press(browser, mode)
            found = ask(CONTRAST)
            assert len(found) > 50 and min(found)[0] >= 4.5, (flipped, mode, min(found))
            kinds |= {name for _, name in found if name.startswith("tok ")}
        assert len(kinds) >= 9  # three bands and six steps of the other colours: the legend shows them all
        browser.execute_script("document.getElementById('theme').click()")
    # colour is never the only carrier: each tinted kind is underlined in a way of its own
    for mode, number in (("1", 2), ("2", 6)):
        press(browser, mode)
        lines = ask(
            "[...document.querySelectorAll('#legend .tok')].map((e) => getComputedStyle(e))"
            ".filter((s) => s.textDecorationLine === 'underline')"
            ".map((s) => s.textDecorationStyle + s.textDecorationThickness)"
        )
        assert len(lines) == len(set(lines)) == number


# ----------------------------------------------------------------------------------------------------------- bad input

CASES = {
    "no run": ({"models": (), "base_model": None}, "models", "no finished run"),
    "no base": ({"base_model": None}, "base_model", "found nothing"),
    "no name": ({"models": ("models/sft",)}, "models", "name="),
    "name twice": ({"models": ("a=x", "a=y")}, "models", "once"),
    "markup as name": ({"models": ("<b>=x",)}, "models", "letters"),
    "the reference's name": ({"models": ("reference=x",)}, "models", "reference"),
    "no such model": ({"models": ("a=no/such/folder",)}, "models", "does not exist"),
    "not on the hub": ({"models": ("a=nobody/nothing@main",)}, "models", "offline"),
    "reward as policy": ({"models": lambda w: (f"a={w.reward}",)}, "models", "ForSequenceClassification"),
    "policy as reward": ({"reward_model": lambda w: w.sft}, "reward_model", "ForCausalLM"),
    "policy as value": ({"value_model": lambda w: w.sft}, "value_model", "ForCausalLM"),
    "no such reference": ({"ref_model": "no/such/folder"}, "ref_model", "does not exist"),
    "other vocabulary": ({"reward_model": "other"}, "reward_model", "vocabulary"),
    "no dataset": ({"query_dataset": "no/such/folder"}, "query_dataset", "does not exist"),
    "comparisons": ({"query_dataset": lambda w: w.pairs}, "query_dataset", "comparisons"),
    "no split": ({"split": "tests"}, "query_dataset", "tests"),
    "beyond the split": ({"first": 6}, "first", "below 6"),
    "negative row": ({"first": -1}, "first", "at least 0"),
    "no posts": ({"num": 0}, "num", "more than 0"),
    "no length": ({"response_length": 0}, "response_length", "more than 0"),
    "too long": ({"response_length": 250}, "response_length", "256 positions"),
    "negative temperature": ({"temperature": -0.1}, "temperature", "at least 0"),
    "lambda": ({"lam": 1.5}, "lam", "from 0 to 1"),
    "both": ({"released": "1b"}, "released", "one of the two"),
    "no such seed": ({"models": (), "base_model": None, "released": "1b", "seed": 1}, "seed", "55513"),
    "offline": ({"models": (), "base_model": None, "released": "1b", "seed": 55513}, "released", "offline"),
    "a folder": ({"html": "."}, "html", "file"),
    "below a file": ({"json": "file/a.json"}, "json", "cannot be written"),
    "the same file": ({"json": "x", "latex": "./x"}, "latex", "another output"),
    "no file name": ({"latex": ""}, "latex", "file"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_any_model_is_loaded(world, args, workdir, monkeypatch, capsys, case):
    changes, argument, words = CASES[case]
    changes = {name: value(world) if callable(value) else value for name, value in changes.items()}
    if changes.get("reward_model") == "other":
        shutil.copytree(world.reward, "other")
        config = json.loads(Path("other/config.json").read_text())
        Path("other/config.json").write_text(json.dumps(config | {"vocab_size": 77}))
    Path("file").write_text("x")
    before = sorted(workdir.rglob("*"))
    for owner, name in ((vt, "load_policy"), (vt, "load_reward_model")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("a model was loaded"))
    changes = {"html": "out/page.html"} | changes
    with pytest.raises(SystemExit) as stopped:
        vt.main(replace(args, **changes))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: --{argument}: found ") and words in error[0], error
    assert "; expected " in error[0] and sorted(workdir.rglob("*")) == before


def test_weights_that_cannot_be_loaded_leave_no_file(world, args, workdir, capsys):
    shutil.copytree(world.sft, "sft")
    config = json.loads(Path("sft/config.json").read_text())
    Path("sft/config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(SystemExit) as stopped:
        vt.main(replace(args, models=("a=sft",), html="page.html"))
    assert stopped.value.code == 2 and not Path("page.html").exists()
    assert "error: --models: found 'sft', which cannot be loaded" in capsys.readouterr().err


def test_the_table_of_released_checkpoints_is_whole():
    for size in ("1b", "2.8b", "6.9b"):
        for seed in (44413, 55513, 66613, 77713):
            policies, run = vt.read_released(size, seed)
            assert set(policies) == {"sft", "ppo"} and run["base_model"] == f"EleutherAI/pythia-{size}-deduped"
            for model in (*policies.values(), vt.Model(run["reward_model_path"], run["reward_model_revision"])):
                assert f"pythia-{size}-" in model.path and f"__{seed}__" in model.revision
    # the defaults of PPO are in it
    _, run = vt.read_released("1b", 44413)
    assert run["reward_model_revision"] == ppo_left_padding.Args.reward_model_revision


def test_help_names_every_argument():
    done = subprocess.run(
        [sys.executable, str(ROOT / "visualize_tokens.py"), "--help"], capture_output=True, text=True,
        env=os.environ | OFFLINE | {"COLUMNS": "100"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and all(f"--{name}" in done.stdout for name in vt.Args.__dataclass_fields__)
