"""Answering four-choice questions: by the letters' log-probabilities, and by generating.

Scoring runs the words that all prompts share once, keeps their keys and values, and runs the rest
of many prompts in one forward, end to end where the model's attention allows it
(recipes.evaluation.packed) and padded elsewhere; only the last position of each meets the head.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from planner.errors import UnsupportedError
from recipes.evaluation.packed import can_pack, pack, packed_attention
from recipes.evaluation.questions import LETTERS
from recipes.loss import head_of

_MOST_AT_ONCE = 32_768  # tokens of a forward: a busy card gains nothing from more


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question. text: what was said (a letter, or what was generated instead);
    index: the option it stands for, None where it stands for none; log_probabilities: of the four
    letters, None by generation; seconds: its share of the batch, or its own."""

    text: str
    index: int | None
    log_probabilities: tuple[float, ...] | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of the part after the shared prefix; image tokens are already ids."""

    ids: tuple[int, ...]


def letter_ids(tokenizer: Any, prompt_text: str) -> list[int]:
    """The token each letter is, right after `prompt_text`. Raises UnsupportedError where a letter
    is more than one token there: its log-probability would not be one token's."""
    before = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    found = []
    for letter in LETTERS:
        for text in (prompt_text + " " + letter, prompt_text + letter):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids[: len(before)] == before and len(ids) == len(before) + 1:
                found.append(ids[-1])
                break
    if len(set(found)) != len(LETTERS):
        raise UnsupportedError("the tokenizer does not write each of A, B, C, D as one token")
    return found


@torch.no_grad()
def score_options(
    base: Any,
    prefix: Sequence[int],
    prompts: Sequence[Prompt],
    letters: Sequence[int],
    *,
    tokens_at_once: int | None = None,
) -> list[Answer]:
    """Answers by the largest of the letters' log-probabilities, in the order of `prompts`.

    prefix: ids shared by all, may be empty; letters: one id an option. At most `tokens_at_once`
    tokens run in one forward; None is what half of the free memory holds. The model must be in eval
    mode.
    """
    longest = len(prefix) + max((len(prompt.ids) for prompt in prompts), default=0)
    packs = can_pack(base, longest)
    state = (_packed_states if packs else _padded_states)(base, prefix)
    answers: list[Answer | None] = [None] * len(prompts)
    at_once = _tokens_that_fit(base) if tokens_at_once is None else tokens_at_once
    for places in _groups(prompts, at_once, padded=not packs):
        began = time.perf_counter()
        rows = [prompts[place].ids for place in places]
        scores = _log_probabilities(base, state(rows), letters).cpu()
        seconds = (time.perf_counter() - began) / len(places)
        for place, row in zip(places, scores.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            answers[place] = Answer(LETTERS[best], best, tuple(row), seconds)
    return [answer for answer in answers if answer is not None]


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prefix: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    beams: int = 5,
) -> list[Answer]:
    """The seed's own way: one question at a time, one new token, `beams` beams, early stopping.
    `beams` 1 is greedy. An answer is a letter only if the token's text is one."""
    device = model.get_input_embeddings().weight.device
    answers = []
    for prompt in prompts:
        began = time.perf_counter()
        ids = torch.tensor([[*prefix, *prompt.ids]], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1,
            num_beams=beams, early_stopping=beams > 1, do_sample=False,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )  # fmt: skip
        token = int(out[0, -1])
        text = tokenizer.decode([token]).strip() if tokenizer is not None else str(token)
        index = LETTERS.index(text) if text in LETTERS else None
        answers.append(Answer(text, index, None, time.perf_counter() - began))
    return answers


# Rows of ids -> the hidden state (rows, D) after the last of each.
States = Callable[[Sequence[Sequence[int]]], Tensor]


def _packed_states(base: Any, prefix: Sequence[int]) -> States:
    device = base.get_input_embeddings().weight.device
    past: dict[int, tuple[Tensor, Tensor]] = {}

    def states(rows: Sequence[Sequence[int]]) -> Tensor:
        packed = pack(prefix, rows, past, device)
        with packed_attention(base, packed):
            hidden = base.model(
                input_ids=packed.ids, position_ids=packed.positions, use_cache=False
            ).last_hidden_state
        return hidden[0] if hidden.shape[1] == len(rows) else hidden[0, packed.ends]

    return states


def _padded_states(base: Any, prefix: Sequence[int]) -> States:
    """Rows are padded on the right: a causal model's last real position does not see what follows
    it, so no mask is needed."""
    device = base.get_input_embeddings().weight.device
    cache = _prefix_cache(base, prefix, device)

    def states(rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
        past = None
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(rows))
        hidden = base.model(
            input_ids=ids, past_key_values=past, use_cache=past is not None
        ).last_hidden_state
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        return hidden[torch.arange(len(rows), device=device), ends]

    return states


def _prefix_cache(base: Any, prefix: Sequence[int], device: torch.device) -> DynamicCache | None:
    if not prefix:
        return None
    cache = DynamicCache(config=base.config)
    ids = torch.tensor([list(prefix)], device=device)
    base.model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _tokens_that_fit(base: Any) -> int:
    """Tokens of a forward that half of the card's free memory holds, at most _MOST_AT_ONCE."""
    device = base.get_input_embeddings().weight.device
    if device.type != "cuda":
        return _MOST_AT_ONCE
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    config = base.config.get_text_config()
    # An MLP's three wide tensors, and what stands beside them or in attention at the width of
    # the stream: residual, input, query, key, value, both again with the prefix, what was attended.
    values = 3 * config.intermediate_size + 10 * config.hidden_size
    fit = free // 2 // (values * base.dtype.itemsize)
    return max(1024, min(_MOST_AT_ONCE, fit))


def _groups(prompts: Sequence[Prompt], tokens_at_once: int, *, padded: bool) -> Iterator[list[int]]:
    """Indices, longest prompts first, in groups of at most so many tokens, padding included where
    there is one (and of one prompt at least)."""
    group: list[int] = []
    tokens = 0
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids)):
        length = len(prompts[group[0] if padded and group else place].ids)
        if group and tokens + length > tokens_at_once:
            yield group
            group, tokens, length = [], 0, len(prompts[place].ids)
        group.append(place)
        tokens += length
    if group:
        yield group


def _log_probabilities(base: Any, last: Tensor, letters: Sequence[int]) -> Tensor:
    """Hidden states (rows, D) -> (rows, letters) log-probabilities of the next token."""
    logits = base.get_output_embeddings()(last).float()
    head = head_of(base)
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    if head.excluded is not None:
        logits = logits.masked_fill(head.excluded, torch.finfo(logits.dtype).min)
    return torch.log_softmax(logits, dim=-1)[:, list(letters)]
