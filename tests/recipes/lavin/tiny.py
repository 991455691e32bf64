"""Tiny LaVINs and questions in ScienceQA's layout, for tests on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, LlamaForCausalLM

from recipes.lavin.config import LavinConfig, lavin_config
from recipes.lavin.demo_data import demo_texts, demo_tokenizer, write_scienceqa
from recipes.lavin.model import IMAGE_PLACEHOLDER, Lavin


def tiny_lavin(seed: int = 0, **changes: Any) -> Lavin:
    """In eval mode, fp32, its trained parameters random: adapters that do something."""
    torch.manual_seed(seed)
    config: LavinConfig = lavin_config("tiny", **changes)
    model = Lavin(LlamaForCausalLM(config.text), CLIPVisionModel(config.vision), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def mixed_batch(model: Lavin, rows: int = 4, width: int = 20, seed: int = 1) -> dict[str, Tensor]:
    """Every other sample with a picture, the first one included."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config
    ids = torch.randint(3, config.text.vocab_size, (rows, width), generator=draw)
    ids[::2, 2 : 2 + config.visual_tokens] = IMAGE_PLACEHOLDER
    size: Any = config.vision.image_size
    pictures = torch.randn((rows, 3, size, size), generator=draw)
    labels = ids.masked_fill(torch.arange(width) < width // 2, -100)
    kept = pictures if config.published_batch else pictures[::2]
    return {"input_ids": ids, "labels": labels, "pixel_values": kept}


def tiny_spec(folder: Path, **lavin: Any) -> dict[str, Any]:
    """Data, tokenizer and a spec at random weights, as a mapping."""
    data = write_scienceqa(folder / "data", {"train": 40, "val": 4, "test": 12}, 0)
    demo_tokenizer(demo_texts(data)).save_pretrained(folder / "tokenizer")
    return {
        "model": "lavin-tiny", "quantization": "none", "weights_dtype": "float32",
        "precision": "fp32", "optimizer": "adamw_torch", "micro_batch_size": 2,
        "gradient_accumulation_steps": 2, "sequence_length": 96,
        "schedule": {"max_steps": 6, "save_every_steps": 2, "learning_rate": 1e-3},
        "data": {"source": str(data), "tokenizer": str(folder / "tokenizer")},
        "lavin": {"prompt_format": "QCM-AE", **lavin},
    }  # fmt: skip
