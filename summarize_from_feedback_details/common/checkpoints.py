"""Checkpoints: a stage that was stopped at any moment goes on from here, to the same bits.

    runs/<run_name>/checkpoints/
        update_00000120/          after update 120
        update_00000120-003/      three optimiser steps later, inside update 121 (PPO)
            rank_00000.safetensors   its share of the weights and of the optimiser's moments, its random state
            state.json               position, learning rates, lengths of the logs
            manifest.json            size and SHA-256 of every file

Weights and moments are stored whole, by name, in float32, and shared out over the ranks only to be written in parallel:
a checkpoint of 8 ranks under ZeRO-2 is read by one plain process, and the other way round. A checkpoint takes its name
when all of it is on the disk, and is verified when it is read.

Nothing here knows about RLHF: this is the plumbing that the stage scripts would otherwise repeat at length.
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file

from summarize_from_feedback_details.common.arguments import refuse
from summarize_from_feedback_details.common.files import follow_umask, sync_folder
from summarize_from_feedback_details.common.machine import on_gpu
from summarize_from_feedback_details.common.noise import NOISE
from summarize_from_feedback_details.common.run_folder import REQUEUE_ME, RunFolder, stop_wanted
from summarize_from_feedback_details.common.zero import (
    optimizer_steps,
    set_masters,
    set_whole_tensors,
    update_masters,
    whole_tensors,
)


@dataclass
class Resumed:
    """Where a run goes on."""

    found: bool = False  # whether there was a checkpoint
    update: int = 0  # finished ones
    step: int | None = None  # optimiser steps made inside the next one; None between updates
    shared: dict[str, torch.Tensor] = field(default_factory=dict)  # as they were given to `save`, on the CPU
    local: dict[str, torch.Tensor] = field(default_factory=dict)

    def inside(self, update: int) -> "Resumed | None":
        """What was saved inside this update; None where it begins anew."""
        return self if self.step is not None and update == self.update + 1 else None


class Checkpoints:
    """The checkpoints of one run: when to write one, and how to go on from the newest whole one.

    Every method is called by all ranks together.

    Args:
        run: the run's folder, entered.
        accelerator: of accelerate.
        model, optimizer: as `accelerator.prepare` returned them.
        scheduler: of the learning rate, by `transformers.get_scheduler`.
        must_not_change: what must be the same when the run goes on, besides precision and models, e.g. a fingerprint of
            the data: argument -> value.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Any,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        must_not_change: dict[str, str],
    ):
        self.run, self.args, self.accelerator, self.scheduler = run, run.args, accelerator, scheduler
        self.model, self.optimizer = model, optimizer
        precision = {"precision": accelerator.mixed_precision}
        self.must_not_change = must_not_change | precision | run.args_as_given["models"]
        self.folder = run.path / "checkpoints"
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.saved_at, self.look = time.monotonic(), {}
        self.mark(0)

    # ------------------------------------------------------------------------------------------------------------------
    # when

    def mark(self, update: int, step: int | None = None, tensors: Callable[[], tuple] | None = None) -> None:
        """Say where the run goes on if it is stopped from now on: after so many updates.

        `resume` and `after_update` mark the beginning of the next update.

        Args:
            update: updates that are finished.
            step: optimiser steps made inside the next one; None between updates.
            tensors: called at a stop only, by all ranks: what `save` needs as `shared` and `local`.
        """
        self.marked = (update, step, tensors)

    def poll(self) -> None:
        """End the process, with a checkpoint at the mark, where a signal asked any rank to stop."""
        if self.stop_asked():
            update, step, tensors = self.marked
            self.stop(update, step, *(tensors() if tensors else ()))

    def stop_asked(self) -> bool:
        """Whether a signal asked any rank to stop: the same answer on all ranks."""
        return self._agree(stop_wanted())[0]

    def after_update(self, update: int) -> None:
        """Write a checkpoint after this update where one is due; end the process where a signal asked to stop."""
        minutes = (time.monotonic() - self.saved_at) / 60
        due = bool(self.args.save_freq and update % self.args.save_freq == 0)
        due = due or bool(self.args.save_minutes and minutes >= self.args.save_minutes)
        stop, due = self._agree(stop_wanted(), due)
        if stop:
            self.stop(update)
        if due:
            self.save(update)
        self.mark(update)

    def stop(self, *position) -> NoReturn:
        """Write a checkpoint (arguments of `save`), and end the process with the code that asks to be started again."""
        self.save(*position)
        self.run.interrupted()
        self.accelerator.wait_for_everyone()  # the launcher ends all processes when the first one has left
        raise SystemExit(REQUEUE_ME)

    def _agree(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank has it."""
        if self.world == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(found, "sum").tolist()]

    # ------------------------------------------------------------------------------------------------------------------
    # writing

    def save(self, update: int, step: int | None = None, shared: dict | None = None, local: dict | None = None) -> None:
        """Write a checkpoint, then remove those beyond the `keep` newest.

        Args:
            update: updates that are finished.
            step: optimiser steps made inside the next one; None between updates.
            shared: further tensors, the same on all ranks, needed inside an update.
            local: further tensors, one rank's own: on another number of ranks their sum goes on.

        Raises:
            SystemExit: where it cannot be written; the checkpoints that are there stay.
        """
        final = self.folder / (f"update_{update:08d}" + ("" if step is None else f"-{step:03d}"))
        partial = self.folder / ".partial"
        if not self._agree(self.rank == 0 and final.exists())[0]:
            failed = self._try(lambda: self._make_folder(partial), only_main=True)
            failed = failed or self._try(lambda: self._write_share(partial, shared or {}, local or {}))
            looks = gather_object([self.look]) if self.world > 1 else [self.look]
            failed = failed or self._try(lambda: self._finish(partial, final, update, step, looks), only_main=True)
            if failed:
                if self.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                there = self._names()
                kept = f"the last good one is {self.folder / there[-1]}" if there else "there is none yet"
                raise SystemExit(
                    f"error: the checkpoint {final} cannot be written: {failed}; {kept}. "
                    "Cure that and start the same command again: it goes on from there"
                )
            if self.rank == 0:
                for name in self._names()[: -self.args.keep]:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
        self.saved_at = time.monotonic()

    def _try(self, action: Callable[[], None], only_main: bool = False) -> str | None:
        """Do something that may fail on any rank; returns the first reason of all ranks, or None."""
        reason = None
        if not only_main or self.rank == 0:
            try:
                action()
            except Exception as error:  # safetensors has errors of its own for a full disk
                reason = f"{getattr(error, 'strerror', None) or error}"
        if self.world > 1:
            reason = next((r for r in gather_object([reason]) if r), None)
        return reason

    def _make_folder(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _write_share(self, partial: Path, shared: dict, local: dict) -> None:
        """This rank's file. Under DeepSpeed all ranks take part in putting together every tensor."""
        mine = {f"local.{name}": tensor for name, tensor in (local | _random_state()).items()}
        if self.rank == 0:
            mine |= {f"shared.{name}": tensor for name, tensor in shared.items()}
        for i, (name, tensor) in enumerate(whole_tensors(self.model, self.optimizer)):
            if i % self.world == self.rank:  # off the GPU at once: in all it is 12 bytes a parameter
                mine[name] = tensor.detach().to("cpu", copy=True)
        mine = {name: tensor.cpu().contiguous() for name, tensor in mine.items()}
        path = partial / f"rank_{self.rank:05d}.safetensors"
        save_file(mine, path)
        _sync(path)
        self.look = {path.name: _look(path)}

    def _finish(self, partial: Path, final: Path, update: int, step: int | None, looks: list[dict]) -> None:
        state = {
            "update": update,
            "step": step,
            "world_size": self.world,
            "optimizer_steps": optimizer_steps(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "logs": self.run.sync_logs(),
            "seconds": self.run.seconds(),
            "metrics": self.run.metrics,
            "fixed": self.must_not_change,
        }
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        manifest = {name: look for one in looks for name, look in one.items()}
        manifest["state.json"] = _look(partial / "state.json")
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for name in ("state.json", "manifest.json"):
            _sync(partial / name)
        follow_umask(partial)
        sync_folder(partial)
        partial.rename(final)
        sync_folder(self.folder)

    def remove(self) -> None:
        """Remove all checkpoints: the run is finished, what it made is in its output folder."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------------------
    # reading

    def resume(self) -> "Resumed":
        """Go on from the newest whole checkpoint, or begin."""
        while name := self._newest():
            folder = self.folder / name
            damage = self._damage(folder)
            if damage is None:
                break
            if self.rank == 0:
                aside = next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{name}.damaged-{i}")).exists())
                folder.rename(aside)
                print(f"warning: the checkpoint {folder} is damaged ({damage}); it is kept as {aside.name}", flush=True)
            self.accelerator.wait_for_everyone()
        if name is None:
            self.run.reset_logs(None)
            set_masters(self.model, self.optimizer)
            return Resumed()
        state = json.loads((folder / "state.json").read_text())
        for argument, value in self.must_not_change.items():
            then = state["fixed"].get(argument)
            if then != value:
                refuse(argument, f"{value} now, {then} in '{folder}'", "the same, or a new run name")
        self.run.reset_logs(state)
        self.scheduler.load_state_dict(state["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = lr
        files = [safe_open(folder / f"rank_{r:05d}.safetensors", "pt") for r in range(state["world_size"])]
        owner = {key: file for file in files for key in file.keys() if not key.startswith("local.")}  # noqa: SIM118
        set_whole_tensors(self.model, self.optimizer, lambda key: owner[key].get_tensor(key), state["optimizer_steps"])
        update_masters(self.model)
        own = files[self.rank if self.world == state["world_size"] else 0]
        _set_random_state({key: own.get_tensor(f"local.{key}") for key in _random_state() if f"local.{key}" in own.keys()})  # noqa: E501, SIM118  # fmt: skip
        found = Resumed(True, state["update"], state["step"])
        self.mark(found.update)
        for key in files[0].keys():  # noqa: SIM118
            if key.startswith("shared."):
                found.shared[key.removeprefix("shared.")] = files[0].get_tensor(key)
            elif key.startswith("local.") and not key.startswith("local.random."):
                if self.world == state["world_size"]:
                    value = files[self.rank].get_tensor(key)
                else:  # the sum goes on, on rank 0
                    value = sum(file.get_tensor(key) for file in files) * (self.rank == 0)
                found.local[key.removeprefix("local.")] = value
        if self.rank == 0:
            inside = "" if state["step"] is None else f" and {state['step']} optimiser steps of the next one"
            print(f"going on from {folder}: {state['update']} updates{inside} are done", flush=True)
        return found

    def _names(self) -> list[str]:
        """Names of the checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.glob("update_*") if "." not in p.name)

    def _newest(self) -> str | None:
        """Name of the newest checkpoint, or None: rank 0 looks, so that all read the same one."""
        names = self._names()[-1:] if self.rank == 0 else []
        names = gather_object(names) if self.world > 1 else names
        return names[0] if names else None

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, or None; the files are shared out over the ranks to be read."""
        found = None
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for i, (name, wanted) in enumerate(sorted(manifest.items())):
                if i % self.world == self.rank:
                    path = folder / name
                    if not path.exists():
                        found = f"{name} is missing"
                    elif path.stat().st_size != wanted["size"]:
                        found = f"{name} has {path.stat().st_size} bytes instead of {wanted['size']}"
                    elif _look(path) != wanted:
                        found = f"{name} has another checksum than when it was written"
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            found = f"manifest.json cannot be read: {error}"
        return next((d for d in gather_object([found]) if d), None) if self.world > 1 else found


# ----------------------------------------------------------------------------------------------------------------------
# tensors of model and optimiser, whole, whatever holds them


# ----------------------------------------------------------------------------------------------------------------------
# random states


def _random_state() -> dict[str, torch.Tensor]:
    """The states of the global generators, which the stages leave alone but a model's code may use."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    found = {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(keys.astype(np.int64)),
        "random.numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "random.python": torch.tensor(random.getstate()[1]),
    }
    if on_gpu():
        found["random.cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random_state(found: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(found["random.torch"])
    position, has_gauss, gauss = found["random.numpy_rest"].tolist()
    keys = found["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    random.setstate((3, tuple(found["random.python"].tolist()), None))
    if "random.cuda" in found and on_gpu():
        torch.cuda.set_rng_state(found["random.cuda"])


# ----------------------------------------------------------------------------------------------------------------------
# files


def _look(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fingerprint_queries(rows: Any) -> dict[str, str]:
    """What must not change between a checkpoint and the run that goes on from it: its queries, and how it samples.

    Args:
        rows: a dataset with `query_token`.
    """
    probe = rows[np.linspace(0, len(rows) - 1, 1000).astype(int)]["query_token"]
    return {"query_dataset": fingerprint([len(rows), *np.concatenate(probe)]), "seed": f"noise {NOISE}"}


def fingerprint(numbers: Any) -> str:
    """A short text that changes when the numbers (e.g. lengths of all rows of a dataset) do."""
    data = np.ascontiguousarray(np.asarray(numbers, dtype=np.int64))
    return f"{len(data)} rows, {hashlib.sha256(data.tobytes()).hexdigest()[:12]}"
