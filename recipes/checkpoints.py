"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong run.

step-N.pt holds the state; step-N.json, written last and renamed into place, holds its digest and
makes it a checkpoint. A state without its json does not exist for `latest`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.errors import VramwiseError


class CheckpointError(VramwiseError):
    """A checkpoint could not be written or cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """step: optimizer steps done when it was written; size_bytes: of the state file."""

    step: int
    path: Path
    size_bytes: int
    sha256: str


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 3) -> Checkpoint:
    """Write the state of `step`, then drop all but the newest `keep`. Raises CheckpointError where
    the disk is full or refuses; earlier checkpoints are then untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".pt.partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        made = Checkpoint(step, path, partial.stat().st_size, _digest(partial))
        partial.replace(path)
        _write_atomically(
            path.with_suffix(".json"),
            {"step": step, "size_bytes": made.size_bytes, "sha256": made.sha256},
        )
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise _write_error(error, path, folder) from None
    for old in checkpoints(folder)[:-keep]:
        old.path.with_suffix(".json").unlink(missing_ok=True)
        old.path.unlink(missing_ok=True)
    return made


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Committed checkpoints, oldest first, not yet verified."""
    found = []
    for marker in sorted(folder.glob("step-*.json")):
        try:
            values = json.loads(marker.read_text(encoding="utf-8"))
            found.append(Checkpoint(values["step"], marker.with_suffix(".pt"),
                                    values["size_bytes"], values["sha256"]))  # fmt: skip
        except (ValueError, KeyError, OSError):
            raise CheckpointError(f"{marker} is not a checkpoint's record: remove it") from None
    return found


def load_checkpoint(folder: Path) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint and its state, None without one. Raises CheckpointError where its
    bytes are not those that were written, naming the newest one that is whole."""
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    if not _is_whole(newest):
        whole = next((c for c in reversed(found[:-1]) if _is_whole(c)), None)
        rest = (
            f"remove it and its .json to go on from step {whole.step}"
            if whole
            else "no earlier one is whole: start again in another folder"
        )
        raise CheckpointError(f"{newest.path} is corrupt (its digest differs): {rest}")
    return newest, torch.load(newest.path, map_location="cpu", weights_only=True)


def _is_whole(checkpoint: Checkpoint) -> bool:
    path = checkpoint.path
    return (
        path.is_file()
        and path.stat().st_size == checkpoint.size_bytes
        and _digest(path) == checkpoint.sha256
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _write_error(error: Exception, path: Path, folder: Path) -> CheckpointError:
    done = checkpoints(folder)
    rest = f"the one of step {done[-1].step} is whole" if done else "there is none yet"
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    reason = (
        "the disk is full" if full or "enforce fail" in str(error) else str(error).split("\n")[0]
    )
    return CheckpointError(f"{path} was not written: {reason}; {rest}")
