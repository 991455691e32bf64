"""LaVIN's forward on transformers' own LlamaForCausalLM and CLIPVisionModel.

Shapes: N samples, S positions of which the first is the modality token, d the language model's
width, P pictures, L the tower's positions, v its width, K visual tokens a picture (6 for ViT-L/14).

    1. embed          ids (N, S-1) -> (N, S-1, d), placeholders as id 0
    2. tower          pixels (P, 3, H, W) -> class token (P, v) after every 4th layer -> (P, K, v)
    3. project        (P, K, v) -> (P, K, d): linear, SiLU, linear
    4. insert         the placeholders' rows are the visual tokens
    5. modality       row 0 (text) or 1 (picture) of a learned (2, d), before everything
    6. language       LlamaForCausalLM on (N, S, d) under a causal mask in which no other position
                      sees the first; its own loss on the labels, -100 ignored
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from recipes.data.encoding import IGNORED
from recipes.lavin.adapters import standard_deviation
from recipes.lavin.config import LavinConfig
from recipes.lavin.placement import CLIP_NORMS, LLAMA_NORMS, insert_adapters

IMAGE_PLACEHOLDER = -1
"""The id that stands in `input_ids` where a visual token comes."""


class Projector(nn.Module):
    """Visual tokens into the language model's width."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.silu(self.first(x)))


class Lavin(nn.Module):
    """The two towers, frozen, with their adapters, the projector and the modality token.

    Adapters are inserted here, into the towers that are given. Only they, the projector and the
    modality token train, in fp32.
    """

    def __init__(
        self, language: LlamaForCausalLM, vision: CLIPVisionModel, config: LavinConfig
    ) -> None:
        super().__init__()
        language.requires_grad_(False)
        vision.requires_grad_(False)
        self.language, self.vision, self.config = language, vision, config
        width, depth = config.text.hidden_size, config.vision.hidden_size
        device: Any = language.get_input_embeddings().weight.device
        insert_adapters(language.model.layers, LLAMA_NORMS, config.text_adapters, width, config)
        insert_adapters(
            vision.encoder.layers, CLIP_NORMS, config.vision_adapters, depth, config,
            across_batch=config.published_batch,
        )  # fmt: skip
        with torch.device(device):
            self.projector = Projector(depth, config.projector_size, width)
            self.modality = nn.Embedding(2, width)
        nn.init.normal_(self.modality.weight, std=standard_deviation(width))

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, labels: Tensor | None = None,
        **language: Any,
    ) -> Any:  # fmt: skip
        """What LlamaForCausalLM returns; with `labels` (N, S-1), its loss too.

        input_ids (N, S-1) hold K placeholders for each picture, at most one picture a sample;
        pixel_values: pictures of the samples that have one, in their order (with published_batch:
        one for every sample, zeros where it has none). language: more for LlamaForCausalLM.
        """
        embedded, mask = self.inputs(input_ids, pixel_values)
        if labels is not None:
            labels = nn.functional.pad(labels, (1, 0), value=IGNORED)
        return self.language(
            inputs_embeds=embedded, attention_mask=mask, labels=labels, use_cache=False, **language
        )

    def inputs(self, input_ids: Tensor, pixel_values: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the language model is handed: embeddings (N, S, d) and the mask (1, 1, S, S)."""
        places = input_ids == IMAGE_PLACEHOLDER
        pictured = places.any(dim=1)
        h = self.language.get_input_embeddings()(input_ids.clamp(min=0))
        if pixel_values is not None:
            visual = self.visual_tokens(pixel_values)
            if self.config.published_batch:
                visual = visual[pictured]
            h = h.masked_scatter(places.unsqueeze(-1), visual.to(h.dtype))
        modality = self.modality(pictured.long()).unsqueeze(1)
        h = torch.cat([modality.to(h.dtype), h], dim=1)
        return h, self.mask(h)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """(P, 3, H, W) -> (P, K, d)."""
        x = self.vision.pre_layrnorm(self.vision.embeddings(pixel_values))
        tokens = []
        for index, layer in enumerate(self.vision.encoder.layers, start=1):
            x = layer(x, None)
            if index % self.config.visual_every == 0:
                tokens.append(x[:, 0])
        return self.projector(torch.stack(tokens, dim=1))

    def mask(self, h: Tensor) -> Tensor:
        """(1, 1, S, S), added to the attention's scores: causal, the first position seen by itself
        alone. In the dtype that attention computes in."""
        size = h.shape[1]
        dtype = torch.get_autocast_dtype(h.device.type) if _autocasts(h) else h.dtype
        mask = h.new_full((size, size), torch.finfo(dtype).min, dtype=dtype).triu(1)
        mask[1:, 0] = torch.finfo(dtype).min
        return mask[None, None]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def checkpoint_layers(self) -> None:
        """Recompute each layer of both towers in backward (non-reentrant)."""
        for tower in (self.language, self.vision):
            tower.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            tower.disable_input_require_grads()  # the modality token's gradient suffices


def _autocasts(h: Tensor) -> bool:
    return torch.is_autocast_enabled(h.device.type)
