"""A step of many layers from a run of four: decoder layers are alike, and so are their events.

Layers 1 and 2 of the run are templates. A layer's event refers to its own blocks, to those of the
layer before or after, or to others; the same relation holds at every depth, so the events of layer
m are the template's with the layers shifted. Outside the layers, a release of layer 2's block is
repeated for every layer that layer 2 stands for. The result is, event for event, what running all
the layers gives (tests/planner/memory/test_stretch.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from planner.memory.storage import Block, Instant, Recorder

RUN_LAYERS = 4


Snapshot = tuple[float, ...]  # of the work's counters


class _Cut(NamedTuple):
    """Where a segment starts: of a layer ("forward", 2), of an instant, or neither."""

    label: str
    layer: int
    event: int
    block: int
    instant: str
    work: Snapshot


class MarkedRecorder(Recorder):
    """A recorder that keeps where each decoder layer's forward and backward starts, and the work
    done until there."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts: list[_Cut] = []
        self.work: Callable[[], Snapshot] = tuple
        self._cut("", -1, "")

    def mark(self, label: tuple[str, int]) -> None:
        self._cut(*label, "")

    def enter(self, instant: str) -> None:
        super().enter(instant)
        self._cut(instant, -1, instant)

    def _cut(self, label: str, layer: int, instant: str) -> None:
        work = self.work()
        self.cuts.append(
            _Cut(label, layer, len(self.events), len(self.blocks), instant, work)
        )

    def layer_work(self) -> Snapshot:
        """Work of one layer, forward and backward, in the last micro batch."""
        at = {(cut.label, cut.layer): cut.work for cut in self.cuts}
        forward = _difference(at["forward", 3], at["forward", 2])
        if ("backward", 2) not in at:
            return forward
        backward = _difference(at["backward", 1], at["backward", 2])
        return tuple(a + b for a, b in zip(forward, backward, strict=True))


def _difference(after: Snapshot, before: Snapshot) -> Snapshot:
    return tuple(a - b for a, b in zip(after, before, strict=True))


@dataclass(slots=True)
class _Segment:
    """A stretch of the run. kind: "forward" or "backward" of `layer`, else "" (layer -1)."""

    kind: str
    layer: int
    events: list[int]
    first_block: int
    blocks: list[Block]
    instant: str


class NotAlikeError(Exception):
    """The layers' events differ: run them all."""


def stretch(run: MarkedRecorder, layers: int) -> tuple[Recorder, list[int]]:
    """The recorder of `layers` decoder layers up to the instant "end", ready to go on, and the
    events after it. Raises NotAlikeError."""
    segments = _segments(run)
    _check(segments)
    return _Stretch(segments, layers).result()


def _segments(run: MarkedRecorder) -> list[_Segment]:
    segments = []
    for position, cut in enumerate(run.cuts):
        following = run.cuts[position + 1] if position + 1 < len(run.cuts) else None
        event_end = following.event if following else len(run.events)
        block_end = following.block if following else len(run.blocks)
        in_layer = 0 <= cut.layer < RUN_LAYERS
        segments.append(
            _Segment(
                cut.label if in_layer else "", cut.layer if in_layer else -1,
                run.events[cut.event : event_end], cut.block, run.blocks[cut.block : block_end],
                cut.instant,
            )
        )  # fmt: skip
    return segments


def _check(segments: list[_Segment]) -> None:
    """Layers 1 and 2 must have the same blocks in the same order, forward and backward."""
    by_place: dict[tuple[str, int], list[list[int]]] = {}
    for segment in segments:
        if segment.kind:
            sizes = [block.nbytes for block in segment.blocks]
            by_place.setdefault((segment.kind, segment.layer), []).append(sizes)
    for kind in ("forward", "backward"):
        if by_place.get((kind, 1), []) != by_place.get((kind, 2), []):
            raise NotAlikeError


class _Stretch:
    """Emits the segments of the whole step in order."""

    def __init__(self, segments: list[_Segment], layers: int) -> None:
        self.segments = segments
        self.layers = layers
        self.starts = [segment.first_block for segment in segments]
        self.events: list[int] = []
        self.blocks: list[Block] = []
        self.instants: list[tuple[str, int]] = [("loaded", 0)]
        # (kind, layer of the whole, turn) -> where its blocks start; others by segment
        self.layer_base: dict[tuple[str, int, int], int] = {}
        self.segment_base: dict[int, int] = {}
        self.turns = self._count_turns()

    def _count_turns(self) -> list[int]:
        """How often a segment's (kind, layer) came before: micro batches repeat."""
        seen: dict[tuple[str, int], int] = {}
        turns = []
        for segment in self.segments:
            place = (segment.kind, segment.layer)
            turns.append(seen.get(place, 0))
            seen[place] = turns[-1] + 1
        return turns

    def result(self) -> tuple[Recorder, list[int]]:
        index = 0
        while index < len(self.segments):
            segment = self.segments[index]
            if segment.instant:
                self.instants.append((segment.instant, len(self.events)))
            if segment.kind == "forward" and segment.layer == 2:
                for layer in range(2, self.layers - 1):
                    self._layer(index, layer)
            elif segment.kind == "backward" and segment.layer == 2:
                self._layer(index, self.layers - 2)
                for layer in range(self.layers - 3, 1, -1):
                    self._layer(index + 1, layer)
            elif segment.kind:
                whole = segment.layer if segment.layer < 2 else self.layers - 1
                self._layer(index, whole)
            else:
                self._outside(index)
            index += 1
        return self._recorder()

    def _layer(self, index: int, whole: int) -> None:
        """Emit a template as layer `whole`."""
        template = self.segments[index]
        turn = self.turns[index]
        base = len(self.blocks)
        self.layer_base[template.kind, whole, turn] = base
        self.blocks += self._renamed(template, whole)
        own, shift = template.first_block, whole - template.layer
        end = own + len(template.blocks)
        for event in template.events:
            source = event if event >= 0 else ~event
            if own <= source < end:
                target = base + source - own
            else:
                target = self._elsewhere(source, shift, template.layer)
            self.events.append(target if event >= 0 else ~target)

    def _elsewhere(self, source: int, shift: int, layer: int) -> int:
        """The block of another segment that stands in the same relation to this layer."""
        place = bisect_right(self.starts, source) - 1
        while not self.segments[place].blocks or source >= (
            self.starts[place] + len(self.segments[place].blocks)
        ):
            place -= 1
        other = self.segments[place]
        offset = source - other.first_block
        if not other.kind:
            return self.segment_base[place] + offset
        near = abs(other.layer - layer) <= 1
        whole = other.layer + shift if near else _outer(other.layer, self.layers)
        return self.layer_base[other.kind, whole, self.turns[place]] + offset

    def _outside(self, index: int) -> None:
        """Emit a segment between layers; what it releases of layer 2 it releases of all alike."""
        segment = self.segments[index]
        base = len(self.blocks)
        self.segment_base[index] = base
        self.blocks += segment.blocks
        own, end = segment.first_block, segment.first_block + len(segment.blocks)
        run: list[tuple[str, int, int]] = []  # releases of layer 2 in a row
        for event in segment.events:
            source = event if event >= 0 else ~event
            if own <= source < end:
                self._repeat(run)
                target = base + source - own
                self.events.append(target if event >= 0 else ~target)
                continue
            kind, layer, turn, offset = self._place(source)
            if kind and layer == 2:
                run.append((kind, turn, offset))
                continue
            self._repeat(run)
            if kind:
                whole = layer if layer < 2 else self.layers - 1
                target = self.layer_base[kind, whole, turn] + offset
            else:
                target = self.segment_base[turn] + offset
            self.events.append(~target)
        self._repeat(run)

    def _repeat(self, run: list[tuple[str, int, int]]) -> None:
        for whole in range(2, self.layers - 1) if run else ():
            for kind, turn, offset in run:
                self.events.append(~(self.layer_base[kind, whole, turn] + offset))
        run.clear()

    def _place(self, source: int) -> tuple[str, int, int, int]:
        """(kind, layer, turn, offset) of a block; turn is the segment's index outside layers."""
        place = bisect_right(self.starts, source) - 1
        while not self.segments[place].blocks or source >= (
            self.starts[place] + len(self.segments[place].blocks)
        ):
            place -= 1
        other = self.segments[place]
        offset = source - other.first_block
        if other.kind:
            return other.kind, other.layer, self.turns[place], offset
        return "", -1, place, offset

    def _renamed(self, template: _Segment, whole: int) -> list[Block]:
        if whole == template.layer:
            return template.blocks
        old, new = f"layers.{template.layer}.", f"layers.{whole}."
        return [
            Block(b.nbytes, b.shape, b.dtype, b.module.replace(old, new, 1), b.op, b.category)
            if old in b.module
            else b
            for b in template.blocks
        ]

    def _recorder(self) -> tuple[Recorder, list[int]]:
        *instants, (_, end) = self.instants
        recorder = Recorder()
        events, tail = self.events[:end], self.events[end:]
        recorder.resume(self.blocks, events, _peaks(self.blocks, events, instants))
        return recorder, tail


def _outer(layer: int, layers: int) -> int:
    return layer if layer < 2 else layers - RUN_LAYERS + layer


def _peaks(
    blocks: list[Block], events: list[int], starts: list[tuple[str, int]]
) -> list[Instant]:
    """The peak of each instant, from the events."""
    instants = []
    live = 0
    for place, (name, start) in enumerate(starts):
        end = starts[place + 1][1] if place + 1 < len(starts) else len(events)
        peak, at = live, start
        for position in range(start, end):
            index = events[position]
            if index >= 0:
                live += blocks[index].nbytes
                if live > peak:
                    peak, at = live, position + 1
            else:
                live -= blocks[~index].nbytes
        instants.append(Instant(name, peak, at, start))
    return instants
