"""The demo's two frozen towers: a language model taught words, a vision tower taught pictures, each
for itself and before the other exists, as LLaMA and CLIP were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from recipes.data.encoding import IGNORED
from recipes.demo_data import COLOURS, PLACES, SHAPES, SIZE, Picture
from recipes.lavin.batches import picture
from recipes.lavin.demo_data import SAY, base_texts

_TRAITS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS), "shape": SHAPES, "place": PLACES,
}  # fmt: skip
_LAYER_OF = {"colour": 2, "place": 4, "shape": 6}


def write_language_base(folder: Path, tokenizer: Any, steps: int, seed: int) -> Path:
    """A LLaMA of two hundred thousand parameters, taught `base_texts`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    say = tokenizer.convert_tokens_to_ids(SAY)
    texts = list(base_texts(64 * steps, seed))
    rows = [[1, *ids, 2] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        ids, letters, said, words = _padded(rows[64 * step : 64 * step + 64], say)
        logits = model(input_ids=ids).logits
        loss = _loss(logits, letters) + _loss(logits, said) + 0.1 * _loss(logits, words)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_vision_base(folder: Path, drawn: Sequence[Picture], steps: int, seed: int) -> Path:
    """A CLIP tower of six layers, taught each picture's colour, place and shape, the simpler from
    the class token of an earlier layer: what CLIP gets from captions."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        image_size=SIZE, patch_size=8, projection_dim=32,
    )  # fmt: skip
    model = CLIPVisionModel(config).train()
    heads = nn.ModuleDict({trait: nn.Linear(64, len(v)) for trait, v in _TRAITS.items()})
    pixels = torch.stack([picture(p.png, SIZE) for p in drawn])
    targets = {t: torch.tensor([v.index(p.answer(t)) for p in drawn]) for t, v in _TRAITS.items()}
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        places = torch.randint(len(drawn), (64,))
        states = model(pixel_values=pixels[places], output_hidden_states=True).hidden_states
        loss = torch.zeros(())
        for trait, layer in _LAYER_OF.items():
            said = heads[trait](states[layer][:, 0])
            loss = loss + nn.functional.cross_entropy(said, targets[trait][places])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
    return folder


def _padded(rows: Sequence[Sequence[int]], say: int) -> tuple[Tensor, ...]:
    """ids (N, S); labels of the letter alone, of all from it on, of every word."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    words = ids.masked_fill(ids == 0, IGNORED)
    places = torch.arange(width)
    letter = torch.tensor([[row.index(say) + 1] for row in rows])
    return (
        ids,
        words.masked_fill(places != letter, IGNORED),
        words.masked_fill(places < letter, IGNORED),
        words,
    )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
