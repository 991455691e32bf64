"""The sections of a run spec that only `vramwise train` reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from planner.spec_plain import Count, Section


class Data(Section):
    """What `vramwise train` reads. `source`: a local parquet, CSV or JSON file, a folder of them,
    or a dataset of the Hub; `tokenizer`: a folder or Hub name, the model's own by default. The
    planner ignores all of it: it answers for full-length samples."""

    source: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "alpaca", "images"] = "auto"
    tokenizer: str | None = None
    instruction: str = "Instrucción: {instruction}. Entrada: {input}"
    instruction_alone: str = "Instrucción: {instruction}."
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.8
    shuffle: bool = True
    labels: Literal["answer", "all"] = "answer"
    padding: Literal["longest", "max_length"] = "longest"
    group_by_length: bool = True


class Evaluation(Section):
    """Four-choice questions asked before and after. `choose`: by the letters' log-probabilities,
    or the seed's way, one token generated from `beams` beams."""

    source: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "mmmlu", "global_mmlu", "mmlu", "images"] = "auto"
    questions: Count = 100
    sample: Literal["stratified", "first"] = "stratified"
    choose: Literal["options", "generate"] = "options"
    beams: Annotated[int, Field(ge=1, le=64)] = 5
    language: Literal["es", "en"] = "es"


class Vocabulary(Section):
    """New tokens for `vramwise train`, chosen from its data: how many, and whether their rows are
    trained alone or beside the adapters."""

    tokens: Count = 1000
    train: Literal["rows", "with_adapters"] = "with_adapters"


class Pruning(Section):
    """What `vramwise train` removes before it trains. "magnitude" zeroes the smallest weights and
    saves no memory; "mlp_channels" takes whole channels out of every MLP."""

    kind: Literal["magnitude", "mlp_channels"] = "mlp_channels"
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
