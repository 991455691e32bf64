"""The memory over a traced step, stacked by category: an HTML page of its own, or a PNG."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from planner.units import GIB
from probes.dry.events import Event, Trace, live_storages

ORDER = (
    "parameters", "optimizer_states", "gradients", "inputs", "workspace", "saved_activations",
    "logits", "temporaries",
)  # fmt: skip
COLOURS = (
    "#4c72b0", "#55a868", "#c44e52", "#8c8c8c", "#ccb974", "#dd8452", "#8172b3", "#64b5cd",
)  # fmt: skip
MAX_POINTS = 1500


def save_timeline(traced: Trace, path: Path) -> None:
    """Write the picture; the ending decides its kind (.png needs matplotlib)."""
    positions, stacks, phases = series(traced)
    if path.suffix == ".png":
        _png(positions, stacks, traced, path)
    else:
        path.write_text(_html(positions, stacks, phases, traced), encoding="utf-8")


def series(traced: Trace) -> tuple[list[int], dict[str, list[int]], list[str]]:
    """(event index, bytes by category, phase) at up to MAX_POINTS instants: in each stretch of
    events the one with the most live bytes, so that no peak is lost."""
    now = dict.fromkeys(ORDER, 0)
    for event in live_storages(traced.load):
        now[event.category or "temporaries"] += event.size_bytes
    stretch = max(1, -(-len(traced.events) // MAX_POINTS))
    positions: list[int] = []
    phases: list[str] = []
    stacks: dict[str, list[int]] = {name: [] for name in ORDER}
    best = (-1, 0, now, "")
    for index, event in enumerate(traced.events):
        _apply(now, event)
        total = sum(now.values())
        if total > best[0]:
            best = (total, index, dict(now), f"step {event.step} {event.phase} {event.module}")
        if (index + 1) % stretch == 0 or index + 1 == len(traced.events):
            positions.append(best[1])
            phases.append(best[3])
            for name in ORDER:
                stacks[name].append(best[2][name])
            best = (-1, 0, now, "")
    return positions, stacks, phases


def _apply(now: dict[str, int], event: Event) -> None:
    sign = {"alloc": 1, "free": -1}.get(event.kind, 0)
    now[event.category or "temporaries"] += sign * event.size_bytes


def _png(positions: list[int], stacks: dict[str, list[int]], traced: Trace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5))
    layers = [[value / GIB for value in stacks[name]] for name in ORDER]
    axes.stackplot(positions, layers, labels=ORDER, colors=COLOURS)
    axes.axhline(traced.peak_live_bytes / GIB, color="black", linewidth=0.6, linestyle="--")
    axes.set(xlabel="allocations and releases, in order", ylabel="live GiB",
             title=traced.peak_instant)  # fmt: skip
    axes.margins(x=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def _html(
    positions: list[int], stacks: dict[str, list[int]], phases: list[str], traced: Trace
) -> str:
    """One page, no script from elsewhere: an SVG area a category, and a line that follows."""
    width, height = 1200, 480
    top = max(1, traced.peak_live_bytes)
    span = max(1, positions[-1] if positions else 1)
    base = [0] * len(positions)
    areas, legend = [], []
    for name, colour in zip(ORDER, COLOURS, strict=True):
        upper = [b + v for b, v in zip(base, stacks[name], strict=True)]
        points = _points(positions, upper, span, top, width, height)
        points += reversed(_points(positions, base, span, top, width, height))
        areas.append(f'<polygon fill="{colour}" points="{" ".join(points)}"/>')
        legend.append(f'<span style="background:{colour}"></span>{name}')
        base = upper
    data = json.dumps({"x": positions, "stacks": stacks, "phases": phases, "span": span})
    return _PAGE.format(
        width=width, height=height, areas="".join(areas), legend=" ".join(legend),
        data=data.replace("</", "<\\/"), title=escape(traced.peak_instant),
        peak=f"{traced.peak_live_bytes / GIB:.3f}",
    )  # fmt: skip


def _points(
    positions: list[int], values: list[int], span: int, top: int, width: int, height: int
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
<svg id="s" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{areas}
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
