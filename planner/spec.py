"""The run spec: everything that decides a fine-tune's memory and speed, in one frozen object.

The same object feeds the planner, the probes and the recipes, so what is planned is what is
measured and what is trained. Read from TOML, JSON or flags; every problem is told at once.
"""

# Annotations stay objects here: pydantic would compile each string at import.
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from planner.errors import InputError, Problem, nearest_name
from planner.spec_plain import Count, Section, plainly_valid
from planner.units import parse_bytes

# What `transformers.TrainingArguments(optim=...)` takes (transformers 5.17, training_args.py).
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad",
    "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw",
    "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
]  # fmt: skip


def _as_bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _as_names(value: object) -> object:
    if isinstance(value, str) and value != "all-linear":
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError("is not a list of module names")
        return tuple(value)
    return value


class Lora(Section):
    """The adapter, in peft's words. `target_modules` match by suffix, as peft does."""

    rank: Annotated[int, Field(ge=1, le=65536)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | Literal["all-linear"],
        BeforeValidator(_as_names),
    ] = "all-linear"


class AdaptionPrompt(Section):
    """LLaMA-Adapter, in peft's words: prompt tokens in so many layers, counted from the top."""

    adapter_len: Annotated[int, Field(ge=1, le=65536)] = 10
    adapter_layers: Count = 30


Release = Annotated[str, Field(pattern=r"^\d+\.\d+")]


class Versions(Section):
    """Library versions whose behaviour moves memory. Defaults: those of the first measured rows.

    Another release line than the modelled ones widens the interval and is told in the notes.
    """

    torch: Release = "2.11.0"
    transformers: Release = "5.17.0"
    peft: Release = "0.21.0"
    accelerate: Release = "1.15.0"
    bitsandbytes: Release = "0.50.2"


class Schedule(Section):
    """How long the run is: what turns seconds a step into hours, cost and checkpoint disk."""

    samples: Count | None = None
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    max_steps: Count | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    evaluate_every_steps: Count | None = None
    evaluation_samples: Count | None = None
    save_every_steps: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 42


def _section(name: str, value: object) -> object:
    """A section that only `vramwise train` reads, validated by its own model when it is given."""
    if value is None:
        return None
    from planner import spec_training

    model: type[BaseModel] = getattr(spec_training, name)
    return value if isinstance(value, model) else model.model_validate(value)


if TYPE_CHECKING:
    from planner.spec_training import Data, Evaluation, Pruning, Vocabulary
else:  # built on use: they would double the time this module takes to load
    Data, Evaluation, Pruning, Vocabulary = (
        Annotated[Any, BeforeValidator(partial(_section, name))]
        for name in ("Data", "Evaluation", "Pruning", "Vocabulary")
    )


class RunSpec(Section):
    """One fine-tune, and the card it should run on.

    Sizes are per device: `micro_batch_size` samples of `sequence_length` tokens, image tokens
    included, in one forward. `method` "lora" trains an adapter and freezes the rest: `adapter` says
    which of peft's, where the model has none of its own (LaVIN). `int8_outliers` "few": as in
    trained models; "many": as in random weights, the safe bound (planner.memory.outliers). A field
    that does not apply (`double_quant` without 4 bits) is ignored. Defaults are a QLoRA fine-tune
    as most people start it.
    """

    model: Annotated[str, Field(min_length=1)]
    device: Annotated[str, Field(min_length=1)] | None = None
    device_memory: Annotated[
        Annotated[int, Field(ge=1 << 24, le=1 << 50)] | None, BeforeValidator(_as_bytes)
    ] = None
    host_memory: Annotated[
        Annotated[int, Field(ge=1 << 24, le=1 << 50)] | None, BeforeValidator(_as_bytes)
    ] = None
    stack: Literal["stock", "lean"] = "stock"
    method: Literal["lora", "full"] = "lora"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True
    int8_outliers: Literal["many", "few"] = "many"
    weights_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    lora: Lora = Lora.model_construct()
    adapter: Literal["lora", "adaption_prompt"] = "lora"
    adaption_prompt: AdaptionPrompt = AdaptionPrompt.model_construct()
    micro_batch_size: Count = 1
    sequence_length: Count = 512
    images_per_sample: Annotated[int, Field(ge=0, le=4096)] = 0
    image_size: Annotated[int, Field(ge=14, le=16_384)] | None = None
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    optimizer: Optimizer = "adamw_torch_fused"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    expandable_segments: bool = False
    evaluation_batch_size: Annotated[int, Field(ge=0, le=2**20)] = 0
    versions: Versions = Versions.model_construct()
    schedule: Schedule = Schedule.model_construct()
    data: Data | None = None
    evaluation: Evaluation | None = None
    vocabulary: Vocabulary | None = None
    pruning: Pruning | None = None
    liger: bool = False


def spec_from_mapping(values: Mapping[str, Any]) -> RunSpec:
    """Validate a mapping into a RunSpec; raises InputError naming every bad field at once.

    A full fine-tune that says nothing of quantization has none: packed weights cannot be trained.
    """
    if values.get("method") == "full" and "quantization" not in values:
        values = {**values, "quantization": "none"}
    spec = plainly_valid(RunSpec, values)
    if spec is not None:
        return spec
    try:
        return RunSpec.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(_problems(error)) from None


def plain_values(section: BaseModel) -> dict[str, Any]:
    """`section.model_dump(mode="json")`, without building pydantic's serializer."""
    return {name: _plain_value(value) for name, value in section.__dict__.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return plain_values(value)
    return list(value) if isinstance(value, tuple) else value


def read_mapping(source: str) -> dict[str, Any]:
    """Read TOML or JSON from a path, or from standard input for "-"."""
    if source == "-":
        return parse_mapping(sys.stdin.read(), "standard input")
    path = Path(source)
    if not path.is_file():
        raise InputError(Problem("spec", "no such file", source, "a .toml or .json file, or -"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem("spec", f"cannot be read: {error}", source)) from None
    return parse_mapping(text, source)


def parse_mapping(text: str, name: str) -> dict[str, Any]:
    """Text of a TOML or JSON object -> mapping; `name` is used in the error."""
    if not text.strip():
        raise InputError(Problem("spec", "is empty", name, "a TOML table or a JSON object"))
    import tomllib  # slow to load, and not needed for flags

    try:
        values = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except RecursionError:
        raise InputError(Problem("spec", "is nested too deeply", name)) from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(Problem("spec", f"is neither TOML nor JSON: {error}", name)) from None
    return dict(values)


def _problems(error: ValidationError) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for entry in error.errors(include_url=False):
        path = [str(part) for part in entry["loc"]]
        field = ".".join(part for part in path if _is_field(part))
        if entry["type"] == "extra_forbidden":
            known = _fields_at(path[:-1])
            field = ".".join(path)
            problem = Problem(
                field, "is not a field", None, ", ".join(known), nearest_name(path[-1], known)
            )
        elif entry["type"] == "literal_error":
            expected = str(entry.get("ctx", {}).get("expected", ""))
            names = [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]
            value = entry["input"]
            near = nearest_name(value, names) if isinstance(value, str) else None
            problem = Problem(field, "is not known", value, expected, near)
        elif entry["type"] == "missing":
            problem = Problem(field or ".".join(path), "is required")
        else:
            message = entry["msg"].removeprefix("Value error, ")
            problem = Problem(field or ".".join(path), message[:1].lower() + message[1:],
                              entry["input"])  # fmt: skip
        problems.setdefault(problem.field, problem)
    return list(problems.values())


def _fields_at(path: list[str]) -> list[str]:
    name = path[0] if path else ""
    if name in _TRAINING_SECTIONS:
        from planner import spec_training

        return list(getattr(spec_training, name.capitalize()).model_fields)
    nested: dict[str, type[BaseModel]] = {
        "lora": Lora, "adaption_prompt": AdaptionPrompt, "versions": Versions,
        "schedule": Schedule,
    }  # fmt: skip
    return list(nested.get(name, RunSpec).model_fields)


_TRAINING_SECTIONS = ("data", "evaluation", "vocabulary", "pruning")


def _is_field(part: str) -> bool:
    """Not pydantic's own words for the branch of a union ("function-before[...]")."""
    return part.isidentifier() or part.isdigit()
