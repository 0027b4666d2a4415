"""--push_to_hub, to a hub on this machine: what arrives, what is refused before work, what is said when it breaks."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from conftest import launch_command
from huggingface_hub.utils import validate_repo_id

from summarize_from_feedback_details import ppo_left_padding, reward, sft, tldr_dataset
from summarize_from_feedback_details.common.hub import _push_to

REPO = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/(.+))?)?")
MODULES = {"sft": sft, "reward": reward, "ppo_left_padding": ppo_left_padding, "tldr_dataset": tldr_dataset}
LARGE = (".safetensors", ".parquet")  # kept as large files, as on the hub; the others come inside the commit
MAIN = "0" * 40


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs: one user, repositories with branches, commits, large files.

    repos: (models or datasets, id) -> branch -> path -> bytes. broken: (pattern of a path, status) for it to fail with.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.broken, self.unknown = {}, {}, None, []

    def answer(self, path: str, body: bytes, token: str | None) -> tuple:
        """Status, content, and the code of an error."""
        if self.broken and re.search(self.broken[0], path):
            return self.broken[1], {"error": "a bad day"}
        if path.startswith("/large/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
            self.objects[path.removeprefix("/large/")] = body
            return 200, {}
        if token != "Bearer good":
            return 401, {"error": "Invalid username or password."}
        given = [json.loads(line) for line in body.splitlines()]
        first = given[0] if given else {}
        if path in ("/api/whoami-v2", "/api/validate-yaml"):
            return 200, {"type": "user", "name": "me"}
        if path == "/api/repos/create":
            key = first.get("type", "model") + "s", f"{first['organization']}/{first['name']}"
            known = key in self.repos
            self.repos.setdefault(key, {"main": {}})
            return (409 if known else 200), {"url": f"{self.url}/{'/'.join(key).removeprefix('models/')}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            upload = lambda oid: {"upload": {"href": f"{self.url}/large/{oid}"}}
            return 200, {"objects": [{**large, "actions": upload(large["oid"])} for large in first["objects"]]}
        if found := REPO.fullmatch(path):
            return self.answer_of_repo(found, given)
        self.unknown.append(path)
        return 501, {}

    def answer_of_repo(self, found: re.Match, given: list[dict]) -> tuple:
        kind, repo, action, rest = found.groups()
        branches = self.repos.get((kind, repo))
        if branches is None:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        if action == "branch":
            known = rest in branches
            branches.setdefault(rest, {})
            return (409 if known else 201), {}
        revision = "main" if rest in (None, MAIN) else rest.split("/")[0]
        if action == "tree" or revision not in branches:
            return 404, {"error": "not there"}, "EntryNotFound" if action == "tree" else "RevisionNotFound"
        if action in (None, "revision"):
            return 200, {"id": repo, "sha": MAIN, "private": False, "tags": [], "siblings": []}
        if action == "paths-info":
            return 200, []
        if action == "preupload":
            mode = lambda path: "lfs" if path.endswith(LARGE) else "regular"
            names = [file["path"] for file in given[0]["files"]]
            return 200, {"files": [{"path": n, "uploadMode": mode(n), "shouldIgnore": False} for n in names]}
        assert action == "commit", action
        for line in given[1:]:
            value, large = line["value"], line["key"] == "lfsFile"
            content = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
            branches[revision][value["path"]] = content
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{MAIN}", "commitOid": MAIN}


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        status, content, *code = self.server.answer(path, body, self.headers["Authorization"])
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "X-Error-Code": "".join(code)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
    assert not server.unknown


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """A folder to work in, in a process whose client of the hub is logged in there."""
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def environment(hub: Hub, tmp_path: Path, token: str = "good") -> dict[str, str]:
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return online | quiet | {"HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}


def start(hub: Hub, stage: str, args, cwd: Path, token: str = "good") -> subprocess.CompletedProcess:
    command, env = launch_command(stage, args, cwd)
    env |= environment(hub, cwd.parent, token)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def files(folder) -> dict[str, bytes]:
    paths = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def raw_args(world, **changes) -> tldr_dataset.Args:
    raw = {"sft_dataset": str(world.folder / "raw/sft"), "preference_dataset": str(world.folder / "raw/comparisons")}
    args = tldr_dataset.Args(base_model=world.base, **raw, output_dir="out", debug=True, push_to_hub=True)
    return replace(args, **changes)


# ------------------------------------------------------------------------------------------------------------- stages
def test_a_run_whose_push_breaks_and_is_started_again(world, hub, here):
    args = world.sft_args("model", total_episodes=16, run_eval=False, push_to_hub=True, hf_entity="someone")
    hub.broken = "/commit/", 500
    done = start(hub, "sft", args, here)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the model is in model, but was not pushed to the hub: Server error '500")
    assert "a bad day" in done.stderr
    saved = files("model")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(saved)
    assert json.loads(Path("runs/model/summary.json").read_text())["state"] == "failed"
    key = "models", "someone/models_small__sft__tldr"
    assert list(hub.repos) == [key] and not any(hub.repos.pop(key).values())

    hub.broken, before = None, int(time.time())
    done = start(hub, "sft", args, here)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout and len(Path("runs/model/metrics.jsonl").read_text().splitlines()) == 2
    branch = max(hub.repos[key])
    assert before <= int(re.fullmatch(r"sft__44413__(\d+)", branch)[1]) <= time.time()
    assert hub.repos == {key: {"main": {}, branch: saved}} and files("model") == saved
    assert done.stdout.splitlines()[-1] == f"hub:    {key[1]} @ {branch}"


NAMED = {  # stage: (changed arguments, repository, branch)
    "sft": ({}, "me/models_small__sft__tldr", r"sft__44413__\d+"),
    "reward": ({"hf_repo_id": "mine", "hf_entity": "us", "seed": 2}, "us/mine", r"reward__2__\d+"),
    "ppo_left_padding": ({"hf_repo_id": "we/it", "hf_entity": "us", "hf_repo_revision": "main"}, "we/it", "main"),
}


@pytest.mark.parametrize("stage", NAMED)
def test_names_that_are_asked_for(world, hub, here, capfd, stage):
    changes, repo, branch = NAMED[stage]
    sizes = {"num_updates": 1} if stage == "ppo_left_padding" else {"total_episodes": 8}
    args = getattr(world, f"{stage.split('_')[0]}_args")("model", run_eval=False, push_to_hub=True, **sizes)
    MODULES[stage].main(replace(args, **changes))
    assert list(hub.repos) == [("models", repo)]
    (name,) = (n for n, content in hub.repos["models", repo].items() if content)
    assert re.fullmatch(branch, name) and hub.repos["models", repo][name] == files("model")
    assert f"hub:    {repo} @ {name}\n" in capfd.readouterr().out


def test_a_finished_run_is_pushed_when_asked_and_once(world, hub, here, capfd):
    args = world.sft_args("model", total_episodes=8, run_eval=False)
    sft.main(replace(args))
    for _ in range(2):
        sft.main(replace(args, push_to_hub=True, hf_entity="someone"))
    (branches,) = hub.repos.values()
    assert sorted(map(bool, branches.values())) == [False, True] and files("model") in branches.values()
    out = capfd.readouterr().out
    assert out.count("nothing to do") == 2 and out.count("hub:    someone/") == 1
    assert f"hub:    pushed before: someone/models_small__sft__tldr @ {max(branches)}\n" in out


NAMES = {  # base model: what its repository begins with
    "EleutherAI/pythia-6.9b-deduped": "EleutherAI_pythia-6.9b-deduped",
    "gpt2": "gpt2",
    "./models/toy/small/": "toy_small",
    "/srv/me/models/toy/small": "toy_small",
    "/small": "small",
    "../.hidden/small": "hidden_small",
    "..": "",
    "./a--b/c..d": "a-b_c.d",
    "my models/größe 1": "my_models_gr_e_1",
    "x" * 90 + "/" + "y" * 60: "x" * 90 + "_" + "y" * 60,  # cut at its front
}


@pytest.mark.parametrize("stage", ["sft", "ppo_left_padding"])
@pytest.mark.parametrize("base_model", NAMES)
def test_each_base_model_gives_a_name_that_the_hub_takes(base_model, stage):
    class Api:
        create_repo = create_branch = upload_folder = lambda self, *args, **kwargs: None

    args = {"base_model": base_model, "seed": 1, "output_dir": "model", "hf_entity": "someone"}
    args = SimpleNamespace(**args, hf_repo_id=None, hf_repo_revision=None)
    revision, repo = _push_to(Api(), args, stage, 7)
    validate_repo_id(repo)
    end = f"__{stage}__tldr"
    assert (revision, repo) == (f"{stage}__1__7", f"someone/{NAMES[base_model][-96 + len(end) :]}{end}")


# ------------------------------------------------------------------------------------------------------------ datasets
def test_both_datasets_arrive(world, hub, here):
    done = start(hub, "tldr_dataset", raw_args(world, hf_entity="someone"), here)
    assert done.returncode == 0, done.stderr
    names = {"sft": "summarize_from_feedback_tldr_3_filtered", "comparisons": "summarize_from_feedback"}
    for (folder, name), (kind, repo) in zip(names.items(), hub.repos, strict=True):
        assert kind == "datasets" and re.fullmatch(rf"someone/{name}_oai_preprocessing_\d+", repo)
        assert f"  https://huggingface.co/datasets/{repo}\n" in done.stdout
        received = hub.repos[kind, repo]["main"]
        assert received.pop("README.md") and received == files(f"out/{folder}")


def test_a_push_of_datasets_that_breaks(world, hub, here):
    """The first arrives, the second does not: the line says how to push it without tokenising again."""
    hub.broken = "feedback_oai_preprocessing_[0-9]+/commit/", 403
    done = start(hub, "tldr_dataset", raw_args(world), here)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    (_, pushed), (_, repo) = hub.repos
    assert done.stderr.startswith(f"error: both datasets are in out, but {repo} was not pushed to the hub: 403 Forb")
    assert pushed not in done.stderr and hub.repos["datasets", pushed]["main"] and Path("out/summary.json").exists()

    hub.broken = None
    (command,) = re.findall(r"`(hf .*?)`", done.stderr)
    command = [str(Path(sys.executable).with_name("hf")), *shlex.split(command)[1:]]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert hub.repos["datasets", repo]["main"] == files("out/comparisons")


# ------------------------------------------------------------------------------------------------- refused before work
REJECTED = {"token": "bad", "argument": "push_to_hub", "words": "does not confirm"}
ABSENT = {"token": "good", "words": "'nobody/nothing', neither a folder here nor on the hub: 404"}
HIDDEN = {"token": "bad", "argument": "base_model", "words": "which the hub does not show: "}
NAME = {"token": "good", "words": "expected a name that the hub allows"}
AS_A_COMMAND = ("sft, entity", "datasets, entity", "no such model")  # the others in this process, which is faster
REFUSED = {  # name: (stage, changed arguments, what is found)
    "sft": ("sft", {"push_to_hub": True}, REJECTED),
    "sft, entity": ("sft", {"push_to_hub": True, "hf_entity": "someone"}, REJECTED),
    "datasets": ("tldr_dataset", {}, REJECTED),
    "datasets, entity": ("tldr_dataset", {"hf_entity": "someone"}, REJECTED),
    "no such model": ("sft", {"base_model": "nobody/nothing"}, ABSENT | {"argument": "base_model"}),
    "no such rows": ("sft", {"query_dataset": "nobody/nothing"}, ABSENT | {"argument": "query_dataset"}),
    "not for everyone": ("sft", {"base_model": "nobody/nothing"}, HIDDEN),
    "a name with two hyphens": ("sft", {"push_to_hub": True, "hf_repo_id": "a--b"}, NAME | {"argument": "hf_repo_id"}),
    "an entity with a slash": ("sft", {"push_to_hub": True, "hf_entity": "a/b"}, NAME | {"argument": "hf_entity"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_nothing_written(world, hub, here, monkeypatch, capfd, name):
    stage, changes, found = REFUSED[name]
    args = raw_args(world, **changes) if stage == "tldr_dataset" else world.sft_args("out", **changes)
    if name in AS_A_COMMAND:
        done = start(hub, stage, args, here, found["token"])
        code, error = done.returncode, done.stderr
    else:
        monkeypatch.setenv("HF_TOKEN", found["token"])
        with pytest.raises(SystemExit) as stopped:
            MODULES[stage].main(args)
        code, error = stopped.value.code, capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"error: --{found['argument']}: found ") and found["words"] in error, error
    assert not os.listdir(here) and not hub.repos
