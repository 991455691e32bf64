"""The real transformers class on the meta device, quantised and adapted as the reference workload
builds it. Nothing here downloads: a folder, a config.json or the local Hub cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from planner.errors import InputError, Problem, nearest_name
from planner.models.registry import known_names, load_model
from planner.spec import RunSpec
from recipes.build import adapter_config, weights_dtype

DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
}  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def load_config(name: str) -> PretrainedConfig:
    """A folder, a config.json, a name of the catalogue, or a Hub id in the local cache -> config.

    Nothing is downloaded; InputError when nothing of that name is there.
    """
    path = Path(name)
    try:
        if path.is_file():
            return _of_mapping(json.loads(path.read_text(encoding="utf-8")))
        if not path.is_dir() and name.lower() in {known.lower() for known in known_names()}:
            return _of_mapping(load_model(name).config)
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        allowed = "a name of `vramwise models`, a folder, a config.json or a cached Hub id"
        near = nearest_name(name, known_names())
        raise InputError(
            Problem("model", f"cannot be built: {reason}", name, allowed, near)
        ) from None


def _of_mapping(values: Mapping[str, Any]) -> PretrainedConfig:
    rest = {key: value for key, value in values.items() if key != "model_type"}
    return AutoConfig.for_model(values["model_type"], **rest)


def shortened(config: PretrainedConfig, layers: int | None) -> PretrainedConfig:
    """The same config with fewer decoder layers, for a test that looks at one of them."""
    if layers is None:
        return config
    text = config.get_text_config()
    for name in _LAYER_COUNTS:
        if hasattr(text, name):
            setattr(text, name, layers)
            kinds = getattr(text, "layer_types", None)
            if kinds:
                text.layer_types = kinds[:layers]
            return config
    raise InputError(Problem("layers", "this config does not say how many layers it has"))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that trains it: image-text where there is one, then causal, then sequence to
    sequence, then whatever `architectures` names."""
    for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise InputError(
        Problem("model", "transformers has no class that trains it", config.model_type)
    )


def build(
    spec: RunSpec, config: PretrainedConfig, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """The base model on meta, as `from_pretrained` leaves it (quantised, not yet adapted).
    `cls`: not transformers' own choice."""
    _complete_vocabulary(config)
    config._attn_implementation = spec.attention if _offers(cls, spec.attention) else "eager"
    cls = cls or model_class(config)
    with torch.device("meta"), no_init_weights(), refused("model"):
        model = cls._from_config(config, dtype=weights_dtype(spec))
    model.tie_weights()
    model.config.use_cache = False  # TrainingArguments.use_cache
    _keep_in_fp32(model, spec)
    if spec.quantization != "none":
        quantize(model, spec)
    return model


def _offers(cls: type[PreTrainedModel] | None, attention: str) -> bool:
    """A class that does not say that it takes SDPA loads as "eager", whatever its own code does."""
    return cls is None or attention != "sdpa" or bool(getattr(cls, "_supports_sdpa", False))


def quantize(model: PreTrainedModel, spec: RunSpec) -> None:
    """Replace the linears as transformers does, and fill them with packed meta weights."""
    settings = quantization_config(spec)
    kept = get_keys_to_not_convert(model)
    replace_with_bnb_linear(model, kept, settings)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            _pack_4bit(module, spec)
        elif isinstance(module, Linear8bitLt):
            _pack_8bit(module)
        if isinstance(module, (Linear4bit, Linear8bitLt)) and module.bias is not None:
            module.bias.data = module.bias.data.to(weights_dtype(spec))
    marks = {"is_quantized": True, "quantization_method": settings.quant_method}
    name = "is_loaded_in_8bit" if spec.quantization == "int8" else "is_loaded_in_4bit"
    for mark, value in {**marks, name: True}.items():
        setattr(model, mark, value)


def quantization_config(spec: RunSpec) -> BitsAndBytesConfig:
    """What the reference workload passes to `from_pretrained`."""
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=weights_dtype(spec),
    )  # fmt: skip


def adapt(
    model: PreTrainedModel, spec: RunSpec, empty_cache: Callable[[], None]
) -> torch.nn.Module:
    """`prepare_model_for_kbit_training` where quantised, then the adapter; or all trainable."""
    if spec.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        empty_cache()  # its auto_clear_cache
    if spec.method == "full":
        return model
    config = adapter_config(spec)
    if not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = None  # peft's class for causal models also generates
    with torch.device("meta"), refused(spec.adapter):
        return get_peft_model(model, config)


@contextmanager
def refused(field: str) -> Iterator[None]:
    """What transformers or peft refuse to build is the spec's problem."""
    try:
        yield
    except ValueError as error:
        raise InputError(Problem(field, str(error).splitlines()[0])) from None


def _pack_4bit(module: Linear4bit, spec: RunSpec) -> None:
    """uint8 weights, two to a byte; maxima of blocks of 64, themselves in 8 bits when doubled."""
    shape = torch.Size((module.out_features, module.in_features))
    blocks = -(-shape.numel() // 64)
    doubled = spec.double_quant
    state = QuantState(
        absmax=_meta(blocks, torch.uint8 if doubled else torch.float32), shape=shape,
        code=_meta(16, torch.float32), blocksize=64, quant_type=spec.quantization,
        dtype=weights_dtype(spec),
    )  # fmt: skip
    if doubled:  # the 8-bit map is copied to the device for each weight (`quantize_blockwise`)
        state.nested, state.offset = True, torch.empty((), device="meta")
        state.state2 = QuantState(
            absmax=_meta(-(-blocks // 256), torch.float32),
            code=_meta(256, torch.float32), blocksize=256,
            dtype=torch.float32,
        )  # fmt: skip
    packed = torch.empty(((shape.numel() + 1) // 2, 1), dtype=torch.uint8, device="meta")
    module.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=64,
        compress_statistics=doubled, quant_type=spec.quantization, module=module,
        bnb_quantized=True,
    )  # fmt: skip
    module.quant_state = state


def _pack_8bit(module: Linear8bitLt) -> None:
    rows, columns = module.out_features, module.in_features
    codes = torch.empty((rows, columns), dtype=torch.int8, device="meta")
    scales = _meta(rows, torch.float32)
    module.weight = Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )


def _meta(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dtype=dtype, device="meta")


def _keep_in_fp32(model: PreTrainedModel, spec: RunSpec) -> None:
    """Modules that the class keeps in fp32 when loaded in 16 bits (modeling_utils)."""
    plan = model._get_dtype_plan(weights_dtype(spec))
    for path, parameter in model.named_parameters():
        for pattern, dtype in plan.items():
            if re.search(pattern, path):
                parameter.data = parameter.data.to(dtype)


def _complete_vocabulary(config: PretrainedConfig) -> None:
    """A Chameleon config without its vocabulary map gets one of the published shape: 8192 image
    codes after the first four ids, and `<image>` (8711)."""
    if config.model_type != "chameleon" or config.vocabulary_map:
        return
    codes = {f"IMGIMG{_letters(code)}Z": code + 4 for code in range(8192)}
    config.vocabulary_map = {**codes, "<image>": 8711}
    config.image_token_id = 8711


def _letters(code: int) -> str:
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code))
