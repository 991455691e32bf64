"""The memory over a traced step, stacked by category: an HTML page of its own, or a PNG."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from planner.units import GIB, format_gib
from probes.dry.events import Event, Trace, live_storages

ORDER = (
    "parameters", "optimizer_states", "gradients", "inputs", "workspace", "saved_activations",
    "logits", "temporaries",
)  # fmt: skip
COLOURS = (
    "#4c72b0", "#55a868", "#c44e52", "#8c8c8c", "#ccb974", "#dd8452", "#8172b3", "#64b5cd",
)  # fmt: skip
MAX_POINTS = 1500
_BANDS = {"inputs": "", "recompute": "backward", "zero_grad": "", "load": "", "clip": "clipping"}


def save_timeline(traced: Trace, path: Path) -> None:
    """Write the picture; the ending decides its kind (.png needs matplotlib)."""
    if path.suffix == ".png":
        _png(traced, path)
    else:
        path.write_text(_html(traced), encoding="utf-8")


def series(traced: Trace) -> tuple[list[int], dict[str, list[int]], list[str]]:
    """(event index, bytes by category, phase) of the step that holds the peak, at up to MAX_POINTS
    instants: in each stretch of events the one with the most live bytes, so that no peak is lost.
    """
    first, last = _stretch(traced)
    now = dict.fromkeys(ORDER, 0)
    for event in live_storages([*traced.load, *traced.events[:first]]):
        now[event.category or "temporaries"] += event.size_bytes
    stretch = max(1, -(-(last - first) // MAX_POINTS))
    positions: list[int] = []
    phases: list[str] = []
    stacks: dict[str, list[int]] = {name: [] for name in ORDER}
    best = (-1, 0, now, "")
    for index in range(first, last):
        event = traced.events[index]
        _apply(now, event)
        total = sum(now.values())
        if total > best[0]:
            best = (total, index, dict(now), f"{event.phase} {event.module}: {event.op}")
        if (index - first + 1) % stretch == 0 or index + 1 == last:
            positions.append(best[1] - first)
            phases.append(best[3])
            for name in ORDER:
                stacks[name].append(best[2][name])
            best = (-1, 0, now, "")
    return positions, stacks, phases


def _stretch(traced: Trace) -> tuple[int, int]:
    """First and last event of the peak's step."""
    step = traced.events[traced.peak_index].step
    inside = [index for index, event in enumerate(traced.events) if event.step == step]
    return inside[0], inside[-1] + 1


def bands(traced: Trace) -> list[tuple[str, int, int]]:
    """(name, from, to) of the stretches that a reader wants named, in event indices."""
    first, last = _stretch(traced)
    found: list[tuple[str, int, int]] = []
    for index in range(first, last):
        phase = traced.events[index].phase
        name = _BANDS.get(phase, phase)
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], index + 1 - first)
        elif name:
            found.append((name, index - first, index + 1 - first))
    return found


def legend(traced: Trace) -> dict[str, str]:
    """What the key says of each category live at the peak: its words and its bytes there."""
    sums = dict.fromkeys(ORDER, 0)
    for row in traced.live_at_peak():
        sums[row.category] += row.size_bytes
    return {name: f"{name.replace('_', ' ')}  {format_gib(size, 2)}" for name, size in sums.items()}


def _apply(now: dict[str, int], event: Event) -> None:
    sign = {"alloc": 1, "free": -1}.get(event.kind, 0)
    now[event.category or "temporaries"] += sign * event.size_bytes


def _png(traced: Trace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    positions, stacks, _ = series(traced)
    peak, at = traced.peak_live_bytes / GIB, traced.peak_index - _stretch(traced)[0]
    figure, axes = pyplot.subplots(figsize=(11, 5.4))
    layers = [[value / GIB for value in stacks[name]] for name in ORDER]
    key = legend(traced)
    areas = axes.stackplot(
        positions, layers, labels=[key[name] for name in ORDER], colors=COLOURS, step="mid"
    )
    axes.set(
        ylabel="live memory, GiB", ylim=(0, peak * 1.18), xlabel="events of the step, in order"
    )
    axes.margins(x=0)
    _annotate(axes, traced, peak, at)
    axes.legend(areas[::-1], [key[name] for name in ORDER][::-1], title="at the peak",
                loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=130)
    pyplot.close(figure)


def _annotate(axes: Any, traced: Trace, peak: float, at: int) -> None:
    """The peak with its operation, and the phases along the top."""
    width = axes.get_xlim()[1]
    event = traced.events[traced.peak_index]
    where = event.module.removeprefix("base_model.model").strip(".") or "the loss"
    left = at > width / 2
    axes.annotate(
        f"peak {peak:.2f} GiB\n{event.phase}: {event.op}\n{where}", (at, peak),
        xytext=(-14 if left else 14, 0), textcoords="offset points", va="center",
        ha="right" if left else "left", fontsize=9, arrowprops={"arrowstyle": "->"},
    )  # fmt: skip
    for name, start, end in bands(traced):
        axes.axvline(start, color="black", linewidth=0.5, alpha=0.4)
        if (end - start) / width > 0.04:
            axes.text((start + end) / 2, peak * 1.14, name, ha="center", fontsize=10)


def _html(traced: Trace) -> str:
    """One page, no script from elsewhere: an SVG area a category, and a line that follows."""
    positions, stacks, phases = series(traced)
    key = legend(traced)
    width, height = 1200, 480
    top = max(1, traced.peak_live_bytes) * 1.1
    span = max(1, positions[-1] if positions else 1)
    base = [0] * len(positions)
    areas, shown = [], []
    for name, colour in zip(ORDER, COLOURS, strict=True):
        upper = [b + v for b, v in zip(base, stacks[name], strict=True)]
        points = _points(positions, upper, span, top, width, height)
        points += reversed(_points(positions, base, span, top, width, height))
        areas.append(f'<polygon fill="{colour}" points="{" ".join(points)}"/>')
        shown.append(f'<span style="background:{colour}"></span>{key[name]}')
        base = upper
    data = json.dumps({"x": positions, "stacks": stacks, "phases": phases, "span": span})
    return _PAGE.format(
        width=width, height=height, areas="".join(areas), legend=" ".join(shown),
        ticks=_ticks(top, width, height),
        data=data.replace("</", "<\\/"), title=escape(traced.peak_instant),
        peak=f"{traced.peak_live_bytes / GIB:.3f}",
    )  # fmt: skip


def _ticks(top: float, width: int, height: int) -> str:
    """Lines across at round GiB, with their figures."""
    gib = top / GIB
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if gib / s <= 8), 200)
    lines = []
    for count in range(1, int(gib / step) + 1):
        y = height - count * step / gib * height
        lines.append(
            f'<line x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#0003"/>'
            f'<text x="4" y="{y - 3:.1f}" font-size="12">{count * step:g} GiB</text>'
        )
    return "".join(lines)


def _points(
    positions: list[int], values: list[int], span: int, top: float, width: int, height: int
) -> list[str]:
    return [
        f"{x * width / span:.1f},{height - value * height / top:.1f}"
        for x, value in zip(positions, values, strict=True)
    ]


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>memory over the step</title>
<style>body{{font:14px sans-serif;margin:2em}}svg{{border:1px solid #ccc;width:100%}}
span{{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em}}
pre{{min-height:11em}}</style>
<h1>Live memory, {peak} GiB at its peak</h1><p>Peak: {title}</p><p>{legend}</p>
<svg id="s" viewBox="0 0 {width} {height}">{areas}{ticks}
<line id="l" y1="0" y2="{height}" stroke="black"/></svg><pre id="t"></pre>
<script>const d={data};const s=document.getElementById("s");
s.onmousemove=e=>{{const r=s.getBoundingClientRect(),f=(e.clientX-r.left)/r.width;
let i=0;while(i+1<d.x.length&&d.x[i]<f*d.span)i++;
const l=document.getElementById("l");l.setAttribute("x1",f*{width});l.setAttribute("x2",f*{width});
let sum=0,t="";for(const k in d.stacks){{sum+=d.stacks[k][i];
t+=k.padEnd(20)+(d.stacks[k][i]/2**30).toFixed(3)+" GiB\\n";}}
document.getElementById("t").textContent=d.phases[i]+"\\n"+(sum/2**30).toFixed(3)+" GiB\\n"+t;}};
</script>
"""
