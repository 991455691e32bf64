"""Speeds side by side: `python -m planner.benchmark`.

The cold answer against a bare import of pydantic, in processor seconds of fresh interpreters (the
least of several rounds), and rows a second of a large sweep. Prints ratios; judges nothing.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 9
BARE = ("-c", "import pydantic; pydantic.BaseModel")
FIT = ("-m", "planner", "fit", "facebook/chameleon-7b", "--gpu", "rtx-3090", "--json")
TEXT = FIT[:-1]
GRID = """model = "facebook/chameleon-7b"
[grid]
model = ["facebook/chameleon-7b", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B"]
lora.rank = [8, 16, 32, 64]
gradient_checkpointing = [true, false]
quantization = ["nf4", "none"]
micro_batch_size = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32]
sequence_length = [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
device = ["rtx-3090", "rtx-4090", "a100-80gb", "h100-80gb-sxm", "h200", "t4", "l4", "l40s",
          "a6000", "rtx-3060-12gb", "rtx-4060-ti-16gb", "v100-32gb-sxm", "a10g", "rtx-5090",
          "b200", "a100-40gb"]
"""


def processor_seconds(arguments: tuple[str, ...]) -> float:
    """User and system time of a fresh interpreter: what other work disturbs least. Byte code is
    read, as after an installation, also where the environment has none written."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], check=False, stdout=subprocess.DEVNULL, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    processor_seconds(TEXT)  # byte code is compiled at installation, not at every answer
    rounds = [[processor_seconds(arguments) for arguments in (BARE, FIT, TEXT)]
              for _ in range(ROUNDS)]  # fmt: skip
    bare, fit, text = (min(column) for column in zip(*rounds, strict=True))
    print(f"bare `import pydantic; pydantic.BaseModel`  {bare:.3f} s")
    print(f"cold `vramwise fit --json`                  {fit:.3f} s  {fit / bare:.2f} x")
    print(f"cold `vramwise fit`, levers included        {text:.3f} s  {text / bare:.2f} x")
    with tempfile.TemporaryDirectory() as folder:
        grid, out = Path(folder) / "grid.toml", Path(folder) / "rows.csv"
        grid.write_text(GRID, encoding="utf-8")
        started = time.monotonic()
        arguments = ("-m", "planner", "sweep", str(grid), "--out", str(out), "--quiet")
        used = processor_seconds(arguments)
        elapsed = time.monotonic() - started
        rows = sum(1 for _ in out.open(encoding="utf-8")) - 1
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"sweep of {rows:,} combinations               {used:.1f} s of processor "
        f"({rows / used:,.0f} rows/s), {elapsed:.1f} s elapsed, at most {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
