"""The same spec measured by a fresh process and as the last of a used one, on the first GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

from probes import cli
from probes.records import Meters
from probes.store import read

_CAMPAIGN = """
campaign = "t"
order = "file"
model = "Qwen/Qwen2.5-0.5B"
bisect = true
[[grids]]
points = [{ repeat = 1, micro_batch_size = 4 }]
[[grids]]
repeat = 2
points = [
  { gradient_checkpointing = true, sequence_length = 2048, micro_batch_size = 4 },
  { "lora.rank" = 128, optimizer = "adamw_torch" },
  { micro_batch_size = 4 },
]
"""


def fresh_and_used() -> tuple[Meters, Meters]:
    """(meters of the fresh process, of the used one)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.toml"
        path.write_text(_CAMPAIGN, encoding="utf-8")
        assert cli.run([str(path), "--store", folder, "--gpus", "0"]) == 0
        records, faults = read(Path(folder))
    assert not faults
    shape = [r for r in records if r.spec.micro_batch_size == 4 and r.spec.sequence_length == 512]
    found = {r.options.repeat: r.meters for r in shape if r.meters is not None}
    return found[1], found[2]
