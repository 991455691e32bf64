"""A step of many layers from a run of four: decoder layers are alike, and so are their events.

Layers 1 and 2 of the run are templates. A layer's event refers to its own blocks, to those of the
layer before or after, or to others; the same relation holds at every depth, so the events of layer
m are the template's with the layers shifted. Outside the layers, a release of layer 2's block is
repeated for every layer that layer 2 stands for. The result is, event for event, what running all
the layers gives (tests/planner/memory/test_stretch.py).
"""

# Annotations stay objects here: named tuples would compile each string at import.
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import NamedTuple

from planner.memory.pools import shifted
from planner.memory.storage import Instant, Recorder

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
        self._cut(instant, -1, instant)  # `stretch` finds the peaks

    def _cut(self, label: str, layer: int, instant: str) -> None:
        work = self.work()
        self.cuts.append(_Cut(label, layer, len(self.events), len(self.blocks), instant, work))

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


class _Segment:
    """A stretch of the run. kind: "forward" or "backward" of `layer`, else "" (layer -1).

    foreign: positions of the events that release other segments' blocks; net and top: change of the
    live bytes over the segment, and their most above its start, `top_event` events into it.
    touches: of a layer's segment, one of the released blocks for each segment that has any.
    """

    __slots__ = (
        "blocks", "events", "first_block", "foreign", "instant", "kind", "layer", "net", "sizes",
        "top", "top_event", "touches",
    )  # fmt: skip

    def __init__(self, run: Recorder, cut: _Cut, event_end: int, block_end: int) -> None:
        in_layer = 0 <= cut.layer < RUN_LAYERS
        self.kind, self.layer = (cut.label, cut.layer) if in_layer else ("", -1)
        self.instant = cut.instant
        self.first_block = cut.block
        self.events = array("q", run.events[cut.event : event_end])
        self.blocks = run.blocks[cut.block : block_end]
        self.sizes = array("q", run.sizes[cut.block : block_end])
        self.touches: dict[int, int] = {}
        self.measure(run.sizes)

    def measure(self, sizes: Sequence[int]) -> None:
        """Find foreign, net and top. sizes: of all blocks of the run."""
        self.foreign: list[int] = []
        live = top = top_event = 0
        last, first = ~self.first_block, ~(self.first_block + len(self.blocks))
        for position, index in enumerate(self.events):
            if index >= 0:
                live += sizes[index]
                if live > top:
                    top, top_event = live, position + 1
            else:
                live -= sizes[~index]
                if not first < index <= last:
                    self.foreign.append(position)
        self.net, self.top, self.top_event = live, top, top_event


class NotAlikeError(Exception):
    """The layers' events differ: run them all."""


def stretch(run: MarkedRecorder, layers: int) -> "tuple[Recorder, array[int]]":
    """The recorder of `layers` decoder layers up to the instant "end", and the events after it.
    Raises NotAlikeError."""
    segments = _segments(run)
    _check(segments)
    return _Stretch(segments, run.sizes, layers).result()


def _segments(run: MarkedRecorder) -> list[_Segment]:
    ends = [(cut.event, cut.block) for cut in run.cuts[1:]]
    ends.append((len(run.events), len(run.blocks)))
    return [_Segment(run, cut, *end) for cut, end in zip(run.cuts, ends, strict=True)]


def _check(segments: list[_Segment]) -> None:
    """Layers 1 and 2 must have the same blocks in the same order, forward and backward."""
    by_place: dict[tuple[str, int], list[array[int]]] = {}
    for segment in segments:
        if segment.kind:
            by_place.setdefault((segment.kind, segment.layer), []).append(segment.sizes)
    for kind in ("forward", "backward"):
        if by_place.get((kind, 1), []) != by_place.get((kind, 2), []):
            raise NotAlikeError


class _Stretch:
    """Emits the segments of the whole step in order. A layer's blocks are its template's."""

    def __init__(self, segments: list[_Segment], sizes: Sequence[int], layers: int) -> None:
        self.segments = segments
        self.sizes = sizes
        self.layers = layers
        owners = [index for index, segment in enumerate(segments) if segment.blocks]
        self.owners = owners  # segments with blocks
        self.starts = array("q", [segments[index].first_block for index in owners])
        for segment in segments:
            if segment.kind:
                sources = [~segment.events[position] for position in segment.foreign]
                segment.touches = {self._owner(source): source for source in sources}
        self.recorder = Recorder()
        self.recorder.events, self.recorder.sizes = array("q"), array("q")
        self.live = 0
        self.open: Instant | None = None
        # (kind, layer of the whole, turn) -> where its blocks start; others by segment
        self.layer_base: dict[tuple[str, int, int], int] = {}
        self.segment_base: dict[int, int] = {}
        self.turns = self._count_turns()
        # the backward of layer 1 meets layer 0's forward, that of a layer further up another's
        self.middle: dict[int, _Segment] = {}
        self.lower: dict[int, list[tuple[int, str, int, int]]] = {}
        for index, segment in enumerate(segments):
            if (segment.kind, segment.layer) == ("backward", 1):
                self.middle[index] = middle = self._middle(segment, segments[index - 1])
                self.lower[index] = self._lower(middle, segments[index - 1])

    def _count_turns(self) -> list[int]:
        """How often a segment's (kind, layer) came before: micro batches repeat."""
        seen: dict[tuple[str, int], int] = {}
        turns = []
        for segment in self.segments:
            place = (segment.kind, segment.layer)
            turns.append(seen.get(place, 0))
            seen[place] = turns[-1] + 1
        return turns

    def result(self) -> "tuple[Recorder, array[int]]":
        recorder = self.recorder
        instants: list[Instant] = []
        current, top, top_event, start = "loaded", 0, 0, 0
        for index, segment, layers in self._plan():
            if segment.instant:
                instants.append(Instant(current, top, top_event, start))
                if segment.instant == "end":
                    break
                current, top, top_event = segment.instant, self.live, len(recorder.events)
                start = top_event
            for turn in range(len(layers) or 1):
                if self.live + turn * segment.net + segment.top > top:
                    top = self.live + turn * segment.net + segment.top
                    before = len(recorder.events) + turn * len(segment.events)
                    top_event = before + segment.top_event
            if layers:
                self._emit_layers(index, segment, layers)
            else:
                self._emit(index, segment)
        before = len(recorder.events)
        live = self.live
        self._emit(index, segment)
        tail = array("q", recorder.events[before:])
        del recorder.events[before:]
        recorder.resume(instants, live)
        return recorder, tail

    def _plan(self) -> Iterator[tuple[int, _Segment, Sequence[int]]]:
        """(template's index, template, layers of the whole or none) in the order of the step."""
        for index, segment in enumerate(self.segments):
            if segment.kind == "forward" and segment.layer == 2:
                yield index, segment, range(2, self.layers - 1)
            elif segment.kind == "backward" and segment.layer == 2:
                yield index, segment, (self.layers - 2,)
                yield index + 1, self.middle[index + 1], range(self.layers - 3, 1, -1)
            elif segment.kind:
                yield index, segment, (_outer(segment.layer, self.layers),)
            else:
                yield index, segment, ()

    def _emit(self, index: int, segment: _Segment) -> None:
        recorder = self.recorder
        base = self.segment_base[index] = len(recorder.blocks)
        shifts = array("q", [base - segment.first_block]) * len(self.starts)
        events = shifted(segment.events, self.starts, shifts, shifts)
        events = self._with_repeats(segment, events)
        recorder.blocks += segment.blocks
        recorder.sizes.extend(segment.sizes)
        sizes = recorder.sizes
        self.live += sum([sizes[e] if e >= 0 else -sizes[~e] for e in events])
        recorder.events.extend(events)

    def _emit_layers(self, index: int, segment: _Segment, layers: Sequence[int]) -> None:
        """Layers in a row from one template: from each to the next all blocks move alike."""
        recorder, times = self.recorder, len(layers)
        for turn, whole in enumerate(layers):
            base = len(recorder.blocks) + turn * len(segment.blocks)
            self.layer_base[segment.kind, whole, self.turns[index]] = base
        shown = (layers[0], layers[times > 1], layers[-1])
        first, second, last = (self._shifts(index, segment, whole) for whole in shown)
        steps = array("q", [b - a for a, b in zip(first, second, strict=True)])
        if any(a + (times - 1) * step != c for a, step, c in zip(first, steps, last, strict=True)):
            raise NotAlikeError
        events = shifted(segment.events, self.starts, first, steps, times)
        for position, kind, turn, offset in self.lower.get(index, ()):
            for place, whole in enumerate(layers):
                if whole > 1:
                    at = place * len(segment.events) + position
                    events[at] = ~(self.layer_base[kind, whole - 1, turn] + offset)
        recorder.blocks += segment.blocks * times
        recorder.sizes.extend(segment.sizes * times)
        recorder.events.extend(events)
        self.live += segment.net * times

    def _shifts(self, index: int, segment: _Segment, whole: int) -> "array[int]":
        """How far the blocks of each segment are moved in layer `whole`."""
        base = self.layer_base[segment.kind, whole, self.turns[index]]
        shifts = array("q", [base - segment.first_block]) * len(self.starts)
        for owner, source in segment.touches.items():
            found = self._elsewhere(source, whole - segment.layer, segment.layer)
            shifts[owner] = found - source
        return shifts

    def _middle(self, segment: _Segment, above: _Segment) -> _Segment:
        """Layer 1's backward as a layer further up has it. Where nothing in layer 0 keeps what all
        layers share (the angles of the rotation), layer 1 is the last to release it."""
        ours = [p for p in segment.foreign if not self._place(~segment.events[p])[0]]
        if not ours:
            return segment
        if any(not self._place(~above.events[position])[0] for position in above.foreign):
            raise NotAlikeError
        middle = copy(segment)
        left_out = set(ours)
        middle.events = array("q", [e for p, e in enumerate(segment.events) if p not in left_out])
        middle.measure(self.sizes)
        return middle

    def _lower(self, segment: _Segment, above: _Segment) -> list[tuple[int, str, int, int]]:
        """(position, kind, turn, offset): where layer 1 releases a block of layer 0, which has
        other blocks (nothing before it wants a gradient), what layer 2 releases of layer 1."""
        found = []
        for position in segment.foreign:
            kind, layer, turn, offset = self._place(~segment.events[position])
            if not kind or layer:
                continue
            twin = above.events[position] if position < len(above.events) else 0
            if twin >= 0:
                raise NotAlikeError
            place = self._place(~twin)
            if place[:3] != (kind, 1, turn):
                raise NotAlikeError
            if place[3] != offset:
                found.append((position, kind, turn, place[3]))
        return found

    def _owner(self, source: int) -> int:
        """Which of the segments with blocks has this one."""
        return bisect_right(self.starts, source) - 1

    def _elsewhere(self, source: int, shift: int, layer: int) -> int:
        """The block of another segment that stands in the same relation to this layer."""
        place = self.owners[self._owner(source)]
        other = self.segments[place]
        offset = source - other.first_block
        if not other.kind:
            return self.segment_base[place] + offset
        near = abs(other.layer - layer) <= 1
        whole = other.layer + shift if near else _outer(other.layer, self.layers)
        return self.layer_base[other.kind, whole, self.turns[place]] + offset

    def _with_repeats(self, segment: _Segment, events: "array[int]") -> "array[int]":
        """A segment between layers: what it releases of layer 2 it releases of all alike."""
        found = array("q")
        run: list[tuple[str, int, int]] = []  # releases of layer 2 in a row
        done = 0
        for position in segment.foreign:
            kind, layer, turn, offset = self._place(~segment.events[position])
            if run and (position > done or not kind or layer != 2):
                self._repeat(run, found)
            found += events[done:position]
            done = position + 1
            if kind and layer == 2:
                run.append((kind, turn, offset))
            elif kind:
                whole = layer if layer < 2 else self.layers - 1
                found.append(~(self.layer_base[kind, whole, turn] + offset))
            else:
                found.append(~(self.segment_base[turn] + offset))
        self._repeat(run, found)
        found += events[done:]
        return found

    def _repeat(self, run: list[tuple[str, int, int]], found: "array[int]") -> None:
        bases = self.layer_base
        for whole in range(2, self.layers - 1) if run else ():
            found.extend([~(bases[kind, whole, turn] + offset) for kind, turn, offset in run])
        run.clear()

    def _place(self, source: int) -> tuple[str, int, int, int]:
        """(kind, layer, turn, offset) of a block; turn is the segment's index outside layers."""
        place = self.owners[self._owner(source)]
        other = self.segments[place]
        offset = source - other.first_block
        if other.kind:
            return other.kind, other.layer, self.turns[place], offset
        return "", -1, place, offset


def _outer(layer: int, layers: int) -> int:
    return layer if layer < 2 else layers - RUN_LAYERS + layer
