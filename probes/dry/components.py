"""Which part of a model each module is, and how many parameters each part has, in the planner's
words (planner.models.tree.Component), for any class of transformers."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn.modules import Params4bit

_PARTS = (
    ("image_tokenizer", ("vqmodel", "image_tokenizer")),
    ("projector", ("multi_modal_projector", "merger", "projector", "connector", "adapter",
                   "embed_vision", "aligner")),
    ("vision_tower", ("vision_tower", "vision_model", "visual", "vision_encoder", "vision",
                      "image_encoder")),
)  # fmt: skip


def components(model: Any) -> dict[str, str]:
    """Component of every module that has parameters or buffers of its own, by path."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # a class of the user's own that does not say
        embeddings = None
    head = model.get_output_embeddings()
    found = {}
    for path, module in model.named_modules():
        if module is head:
            found[path] = "lm_head"
        elif module is embeddings:
            found[path] = "embeddings"
        else:
            found[path] = _by_name(path)
    return found


def count_parameters(model: Any) -> dict[str, int]:
    """Elements of each component as the checkpoint has them: a packed weight counts its own."""
    parts, counts = components(model), dict[str, int]()
    for path, parameter in model.named_parameters():
        part = parts[path.rpartition(".")[0]]
        counts[part] = counts.get(part, 0) + elements(parameter)
    return counts


def elements(parameter: Any) -> int:
    """Elements before packing."""
    if isinstance(parameter, Params4bit):
        return int(parameter.quant_state.shape.numel())
    return int(parameter.numel())


def _by_name(path: str) -> str:
    words = path.split(".")
    for part, names in _PARTS:
        if any(name in words for name in names):
            return part
    return "language_model"
