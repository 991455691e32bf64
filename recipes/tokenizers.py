"""Tokenizers as runs use them: read by name, or made of a demo's words."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from planner.errors import InputError, Problem


def read_tokenizer(name: str) -> Any:
    """From a folder or the Hub. Raises InputError."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(Problem("data.tokenizer", f"cannot be read: {reason}", name)) from None


def pad_id(tokenizer: Any) -> int:
    """The padding token, or the end token where there is none."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def word_tokenizer(vocabulary: dict[str, int], splitter: Any) -> PreTrainedTokenizerFast:
    """A word a token, cut by `splitter`; <pad>, <s>, </s> and <unk> are in the vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
