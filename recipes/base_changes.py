"""New tokens and pruning: changes of the base model, made once before a run and kept in its folder.

They need 16-bit weights whole on the host, before anything is quantised or adapted; the changed
base is then a checkpoint like any other, and a resumed run takes it as it lies there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from planner.spec import RunSpec
from planner.units import format_gib
from recipes.build import weights_dtype
from recipes.models import load_config, model_class
from recipes.pruning import prune_magnitude, prune_mlp_channels
from recipes.vocabulary import extend


@dataclass(frozen=True, slots=True)
class ChangedBase:
    """weights: a checkpoint's folder; config, tokenizer: of the changed model; first_new_id: of
    the first new row, None without new tokens."""

    weights: str | Path
    config: PretrainedConfig
    tokenizer: Any
    first_new_id: int | None


def changed_base(
    spec: RunSpec, config: PretrainedConfig, tokenizer: Any, weights: str | Path, folder: Path,
    texts: Sequence[str], say: Callable[[str], None],
) -> ChangedBase:  # fmt: skip
    """The base as the spec changes it, made in `folder` where it is not there yet; as it was where
    the spec changes nothing. texts: the corpus that new tokens are chosen from."""
    if spec.vocabulary is None and spec.pruning is None:
        return ChangedBase(weights, config, tokenizer, None)
    marker = folder / "changes.json"
    if not marker.is_file():
        _make(spec, config, tokenizer, weights, folder, texts, say)
    first = json.loads(marker.read_text(encoding="utf-8"))["first_new_id"]
    return ChangedBase(
        folder, load_config(str(folder)), AutoTokenizer.from_pretrained(folder), first
    )


def _make(
    spec: RunSpec, config: PretrainedConfig, tokenizer: Any, weights: str | Path, folder: Path,
    texts: Sequence[str], say: Callable[[str], None],
) -> None:  # fmt: skip
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model, first = _loaded(spec, config, weights), None
    told: dict[str, Any] = {}
    if spec.pruning is not None:
        prune = prune_magnitude if spec.pruning.kind == "magnitude" else prune_mlp_channels
        pruned = prune(model, spec.pruning.fraction)
        told["pruned"] = asdict(pruned)
        say(f"pruned ({pruned.kind}): {format_gib(pruned.bytes_before)} -> "
            f"{format_gib(pruned.bytes_after)}, {pruned.zero_share:.0%} zeros")  # fmt: skip
    if spec.vocabulary is not None:
        extension = extend(model, tokenizer, texts, spec.vocabulary.tokens)
        first = extension.first_id
        told["vocabulary"] = asdict(extension)
        say(f"{len(extension.tokens)} new tokens: {extension.fertility_before:.2f} -> "
            f"{extension.fertility_after:.2f} tokens a word")  # fmt: skip
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    told["first_new_id"] = first
    (partial / "changes.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    partial.replace(folder)


def _loaded(spec: RunSpec, config: PretrainedConfig, weights: str | Path) -> PreTrainedModel:
    dtype, kind = weights_dtype(spec), model_class(config)
    if str(weights) == "random":
        torch.manual_seed(0)
        return kind._from_config(config, dtype=dtype)
    return kind.from_pretrained(str(weights), config=config, dtype=dtype)
