"""Spanish tokens for a vocabulary made mostly of English ones.

New tokens are the words that cost the corpus most pieces; each new row starts as the mean of the
rows it replaces. Trained rows are those alone: the rest of the two matrices keeps its values,
though gradient and optimizer state are of the whole matrices' size (4 bytes a parameter each).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Extension:
    """tokens: added, most saving first; replaced: the ids each stood for before; first_id: of the
    first new row; fertility_before, fertility_after: tokens a word over the corpus."""

    tokens: tuple[str, ...]
    replaced: tuple[tuple[int, ...], ...]
    first_id: int
    fertility_before: float
    fertility_after: float


def fertility(tokenizer: Any, texts: Iterable[str]) -> float:
    """Tokens a word: how many pieces the tokenizer makes of one, on average."""
    words = pieces = 0
    for text in texts:
        words += len(_WORD.findall(text))
        pieces += len(_ids(tokenizer, text))
    return pieces / words if words else 0.0


def choose_tokens(tokenizer: Any, texts: Iterable[str], count: int) -> list[str]:
    """The `count` words that save most pieces as tokens: occurrences times pieces less one. Words
    that occur once, or are one token already, are never chosen."""
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    savings = {
        word: times * (len(_ids(tokenizer, word)) - 1)
        for word, times in counts.items()
        if times > 1 and len(word) > 1
    }
    worth = [word for word, saved in savings.items() if saved > 0]
    return sorted(worth, key=lambda word: (-savings[word], word))[:count]


@torch.no_grad()
def extend(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], count: int) -> Extension:
    """Add up to `count` tokens to tokenizer and model, before quantised modules or adapters see
    the new size. Both matrices grow; each new row is the mean of its pieces' rows."""
    before = fertility(tokenizer, texts)
    tokens = choose_tokens(tokenizer, texts, count)
    replaced = tuple(tuple(_ids(tokenizer, token)) for token in tokens)
    tokenizer.add_tokens(tokens)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    first = min(ids, default=len(tokenizer))
    rows = max(len(tokenizer), _matrices(model)[0].shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    for matrix in _matrices(model):
        for new, pieces in zip(ids, replaced, strict=True):
            matrix[new] = matrix[list(pieces)].float().mean(0).to(matrix.dtype)
    return Extension(tuple(tokens), replaced, first, before, fertility(tokenizer, texts))


def train_new_rows(model: PreTrainedModel, first_id: int) -> list[nn.Parameter]:
    """Let gradients into the rows from `first_id` on, and no other, of both matrices. An optimizer
    without weight decay then leaves the old rows bit for bit as they are."""

    def only_new(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[:first_id] = 0
        return kept

    matrices = _matrices(model)
    for matrix in matrices:
        matrix.requires_grad_(True)
        matrix.register_hook(only_new)
    return matrices


def row_training_bytes(rows: int, width: int, tied: bool, whole: bool = True) -> int:
    """Bytes that training `rows` rows of `width` adds in fp32: gradient and Adam's two moments, of
    the whole matrices (as `train_new_rows` does) or of the new rows alone."""
    del whole
    return (1 if tied else 2) * rows * width * 4 * 3


def _matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    head = getattr(head, "base_layer", head)
    distinct = {id(m.weight): m.weight for m in (embedding, head) if m is not None}
    return list(distinct.values())


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
