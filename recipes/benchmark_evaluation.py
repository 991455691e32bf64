"""The benchmark's evaluation: option scoring beside the seed's way; what a call's kernels cost."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from planner.spec import spec_from_mapping
from recipes.build import build
from recipes.console import note
from recipes.evaluation.scoring import Prompt, generate_answers, score_options


def evaluation_row(values: dict[str, Any], questions: int = 100) -> dict[str, Any]:
    """Seconds for `questions` four-choice questions by option scoring, and by the seed's way: on
    the model as the seed prepares it (stack "stock"), and on the very model that was scored. Each
    is warm: scoring has seen every shape, generation its first questions. Random token ids; lengths
    drawn evenly from `values["tokens"]`, after a prefix of 40.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator().manual_seed(0)
    least, most = values["tokens"] if device.type == "cuda" else (6, 30)
    lengths = torch.randint(least, most, (questions,), generator=draw).tolist()
    seconds: dict[str, list[float]] = {}
    for stack_name in ("lean", "stock"):
        spec = spec_from_mapping({**values["spec"], "stack": stack_name})
        built = build(spec, config=values.get("config"), device=device)
        base, top = built.base.eval(), built.config.get_text_config().vocab_size
        rows = [
            tuple(torch.randint(min(8_712, top - 64), top, (count,), generator=draw).tolist())
            for count in (40, 4, *lengths)
        ]
        prefix, letters, prompts = rows[0], list(rows[1]), [Prompt(row) for row in rows[2:]]
        score = partial(score_options, base, prefix, prompts, letters)
        ways = {"generate": partial(generate_answers, base, None, prefix, prompts)}
        if stack_name == "lean":
            ways["options"] = score
        for warm in (way for name, way in ways.items() if name != "generate"):
            warm()
        generate_answers(base, None, prefix, prompts[:10])
        for name, way in ways.items():
            seconds[f"{stack_name} {name}"] = _timed(way, 2 if name == "generate" else 5)
        if values.get("profile"):
            note(profiled(ways.get("options", lambda: None)))
        del built, base, ways, score
    took = {name: statistics.median(times) for name, times in seconds.items()}
    generate = {stack: took[f"{stack} generate"] for stack in ("lean", "stock")}
    return {
        "name": values["name"], "questions": questions, "tokens": sum(lengths),
        "options_s": took["lean options"],
        "generate_s": generate["stock"],
        "times_faster": generate["stock"] / took["lean options"],
        "generate_lean_s": generate["lean"],
        "times_faster_same_model": generate["lean"] / took["lean options"],
        "seconds": seconds,
    }  # fmt: skip


def _timed(function: Callable[[], Any], repeats: int = 3) -> list[float]:
    """Seconds of each repeat; answers are on the host when it returns."""
    ends = [time.perf_counter()]
    for _ in range(repeats):
        function()
        ends.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(ends)]


def profiled(function: Callable[[], Any], rows: int = 40) -> str:
    """One call's kernels by time, as torch's profiler tables them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profile.key_averages().table(
        sort_by=key, row_limit=rows, max_name_column_width=110, header="profile"
    )
