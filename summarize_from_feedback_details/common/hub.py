"""The Hugging Face hub: whether something is there, one file of a model, and a trained model pushed to it."""

import os
import re
from pathlib import Path
from typing import Any

from summarize_from_feedback_details.common.arguments import reason, refuse
from summarize_from_feedback_details.common.files import write_json


def find_on_hub(argument: str, name: str, revision: str | None, kind: str, expected: str) -> None:
    """Refuse what is not on the hub, after ONE request: the libraries' own retries take most of a minute.

    Args:
        kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return  # the libraries then look into their cache only, and say at once what is not there
    try:
        getattr(HfApi(), f"{kind}_info")(name, revision=revision, timeout=5)
    except HFValidationError as error:
        refuse(argument, f"'{name}', neither a folder here nor an id of the hub: {reason(error)}", expected)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            refuse(argument, f"'{name}', neither a folder here nor on the hub: {reason(error)}", expected)
        refuse(argument, f"'{name}', which the hub does not show: {reason(error)}", expected)
    except Exception:
        found = f"'{name}', which is not a folder here, and no network to look for it on the hub (offline)"
        refuse(argument, found, f"{expected} (HF_HUB_OFFLINE=1 takes it from the local cache)")


def find_file(path: str, revision: str | None, names: list[str]) -> str:
    """The first of these files that a checkpoint has, in a folder or on the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        if os.path.isdir(path):
            if os.path.exists(os.path.join(path, name)):
                return os.path.join(path, name)
        else:
            try:
                return hf_hub_download(path, name, revision=revision)
            except EntryNotFoundError:
                continue
    raise FileNotFoundError(f"{path} has none of {', '.join(names)}")


def hub_user() -> str:
    """Name of the user who is logged in; refuses --push_to_hub where there is none."""
    from huggingface_hub import get_token, whoami

    expected = "`hf auth login`, or HF_TOKEN in the environment"
    if get_token() is None:
        refuse("push_to_hub", "no hub login on this machine", expected)
    try:
        return whoami()["name"]
    except Exception as error:
        refuse("push_to_hub", f"a login that the hub does not confirm: {reason(error)}", expected)


def check_push(args: Any) -> None:
    """Refuse --push_to_hub without a login, or to a name that the hub does not allow."""
    if args.push_to_hub:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        hub_user()
        for name, repo in (("hf_entity", f"{args.hf_entity or 'me'}/name"), ("hf_repo_id", args.hf_repo_id or "name")):
            try:
                validate_repo_id(repo)
            except HFValidationError as error:
                refuse(name, f"'{getattr(args, name)}' ({reason(error)})", "a name that the hub allows")


def push(args: Any, stage: str, stamp: int) -> None:
    """Upload the checkpoint to a branch of its own on the hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        revision, repo = _push_to(api, args, stage, stamp)
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__  # what the hub says is not in the first line
        raise SystemExit(
            f"error: the model is in {args.output_dir}, but was not pushed to the hub: {why}; cure that and "
            "start the same command again: it pushes, and does not train again"
        ) from None
    print(f"hub:    {repo} @ {revision}", flush=True)
    write_json(Path("runs") / args.run_name / "pushed.json", {"repo": repo, "revision": revision})


def _push_to(api: Any, args: Any, stage: str, stamp: int) -> tuple[str, str]:
    # the last two parts of a path, since a hub id has no more; the hub allows 96 letters, no `..`, and no `--`
    name = "_".join([part for part in Path(args.base_model).parts if part.strip("./")][-2:])
    name = re.sub(r"([.-])\1+", r"\1", re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII))
    end = f"__{stage}__tldr"
    repo = args.hf_repo_id or name[-(96 - len(end)) :].lstrip(".-") + end
    if "/" not in repo:
        repo = f"{args.hf_entity or api.whoami()['name']}/{repo}"
    revision = args.hf_repo_revision or f"{stage}__{args.seed}__{stamp}"
    api.create_repo(repo, exist_ok=True)
    api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=args.output_dir, revision=revision)
    return revision, repo
