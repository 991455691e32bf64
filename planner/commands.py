"""The command table: each verb, what it does, and the function that runs it, loaded when called.

`extra` names the optional dependency group a verb needs beyond the base install.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from typing import NamedTuple


class Command(NamedTuple):
    """A verb of `vramwise`. `target` is "module:function", called with the remaining arguments
    (a list of str) and returning the exit code. brief: one answer, over before garbage matters."""

    verb: str
    summary: str
    target: str
    extra: str | None = None
    brief: bool = False


COMMANDS = (
    Command(
        "fit",
        "will this fine-tune fit, how fast, what to change",
        "planner.verbs.fit:run",
        brief=True,
    ),
    Command("gpus", "every card: verdict, speed and cost", "planner.verbs.gpus:run", brief=True),
    Command(
        "explain",
        "a term's formula with its numbers filled in",
        "planner.verbs.explain:run",
        brief=True,
    ),
    Command("sweep", "every combination of a grid, as a table", "planner.verbs.sweep:run"),
    Command("models", "the catalogue of known models", "planner.verbs.models:run", brief=True),
    Command("table", "a requirement table for a write-up", "planner.verbs.table:run"),
    Command(
        "ladder", "one lever a row: what each change saves", "planner.verbs.ladder:run", brief=True
    ),
    Command("seeds", "two write-ups, every claim with its verdict", "planner.verbs.seeds:run"),
    Command("calibrate", "learn this card from your own records", "planner.verbs.calibrate:run"),
    Command("probe", "measure (or --dry: trace) a real step", "probes.cli:run", "train"),
    Command(
        "records", "list, filter and export measured records", "probes.records_cli:run", "train"
    ),
    Command("train", "run the fine-tune that was planned", "recipes.cli:run", "train"),
    Command("lavin", "adapters between LLaMA and CLIP, trained", "recipes.lavin.cli:run", "train"),
    Command("demo", "a tiny Chameleon, trained and judged offline", "recipes.demo:run", "train"),
)
