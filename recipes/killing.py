"""A training run killed on purpose, to show that it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def kill_once_saved(
    command: Sequence[str], checkpoints: Path, wanted: str = "step-*.json", limit_s: float = 120,
    **environment: str,
) -> int:  # fmt: skip
    """Start `command` and kill it once a checkpoint's record of the name `wanted` lies in
    `checkpoints`, it has ended, or `limit_s` have passed: the newest step it had saved, 0 without
    any. environment: variables set beside this process's own."""
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip
    deadline = time.monotonic() + limit_s
    while child.poll() is None and time.monotonic() < deadline:
        if any(checkpoints.glob(wanted)):
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    saved = sorted(checkpoints.glob("step-*.json"))
    return int(saved[-1].stem.removeprefix("step-")) if saved else 0
