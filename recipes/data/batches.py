"""Encoded samples -> batches. The batches of step n are a function of the seed and n alone, so a
resumed run needs no state of a data loader to see what it would have seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recipes.data.encoding import IGNORED, Encoded

Batch = dict[str, Tensor]
_GROUP = 32  # micro batches sorted by length together


@dataclass(frozen=True)
class Batches:
    """Micro batches of one optimizer step after another, epoch after epoch.

    samples: encoded; size: samples a micro batch; parts: micro batches a step; pad_to: pad every
    row to this many tokens, None pads to the batch's longest (a multiple of 8).
    """

    samples: Sequence[Encoded]
    size: int
    parts: int
    pad_id: int
    seed: int
    pad_to: int | None = None
    group_by_length: bool = True

    @cached_property
    def _orders(self) -> dict[int, list[list[int]]]:
        """The order of the epoch that steps were last asked of."""
        return {}

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps; a last part of a step is left out, as a full batch is asked."""
        return max(1, len(self.samples) // (self.size * self.parts))

    def step(self, index: int) -> list[Batch]:
        """Micro batches of optimizer step `index` (from 0)."""
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()  # the epoch before is over
            self._orders[epoch] = self._order(epoch)
        order = self._orders[epoch]
        first = place * self.parts
        return [self.batch(places) for places in order[first : first + self.parts]]

    def batch(self, places: Sequence[int]) -> Batch:
        """Padded rows. Padding is on the right with labels -100, and a causal model's real
        positions do not see it: no attention mask is needed."""
        rows = [self.samples[place] for place in places]
        longest = max(len(row.ids) for row in rows)
        width = self.pad_to or -(-longest // 8) * 8
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            labels[index, : len(row.labels)] = torch.tensor(row.labels)
        return {"input_ids": ids, "labels": labels}

    def padded_share(self, epoch: int = 0) -> float:
        """Share of an epoch's positions that are padding."""
        real = total = 0
        for places in self._order(epoch):
            lengths = [len(self.samples[place].ids) for place in places]
            width = self.pad_to or -(-max(lengths) // 8) * 8
            real, total = real + sum(lengths), total + width * len(places)
        return 1 - real / total if total else 0.0

    def _order(self, epoch: int) -> list[list[int]]:
        draw = random.Random(self.seed * 1_000_003 + epoch)
        places = list(range(len(self.samples)))
        draw.shuffle(places)
        if len(places) < self.size * self.parts:  # fewer samples than a step takes: repeat them
            places = (places * (self.size * self.parts // len(places) + 1))[
                : self.size * self.parts
            ]
        if not self.group_by_length:
            return _cut(places, self.size)
        groups = [
            sorted(group, key=lambda place: len(self.samples[place].ids))
            for group in _cut(places, self.size * _GROUP, keep_rest=True)
        ]
        batches = [batch for group in groups for batch in _cut(group, self.size)]
        draw.shuffle(batches)
        return batches


def _cut(items: list[int], size: int, keep_rest: bool = False) -> list[list[int]]:
    stop = len(items) if keep_rest else len(items) - len(items) % size
    return [items[start : start + size] for start in range(0, stop, size)]
