"""The parent's side of a child process: start, feed, listen with a deadline, kill."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

_LOG_TAIL_BYTES = 4000


class Worker:
    """A child that has imported everything and holds no device context until it gets a job."""

    def __init__(self, gpu: int | None, log: Path) -> None:
        self.gpu, self.log = gpu, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file: IO[bytes] = log.open("ab")
        self._log_start = log.stat().st_size
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "probes.child", *([] if gpu is not None else ["--cpu"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)

    def send(self, job: dict[str, Any]) -> None:
        """Hand over the one job of this worker."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it died; the next event says so

    def next_event(self, timeout_s: float) -> dict[str, Any]:
        """The child's next event, or {"event": "timeout"}, or {"event": "died", "evidence"}."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                return {"event": "timeout"}
            chunk = os.read(self.process.stdout.fileno(), 1 << 20)  # type: ignore[union-attr]
            if not chunk:
                return {"event": "died", "evidence": self._death()}
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _death(self) -> str:
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the child ended with {how}; its last words: {self.last_words()}"

    def last_words(self) -> str:
        """The end of what this child wrote to the log, on one line."""
        with self.log.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            lines = handle.read().decode(errors="replace").split("\n")
        return " | ".join(line.strip() for line in lines if line.strip())[-600:]

    def kill(self) -> None:
        """End the child, whatever it does, and everything it started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Kill the child if it lives, and let go of its streams."""
        self.kill()
        self._selector.close()
        for stream in (self.process.stdin, self.process.stdout, self._log_file):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
