"""What a LaVIN run came to, as text."""

from __future__ import annotations

from typing import Any

from planner.units import format_gib, format_seconds


def report_text(report: dict[str, Any]) -> str:
    """Losses, accuracy by the paper's columns before and after, routing by modality."""
    lines = [
        f"{report['steps']} steps in {format_seconds(report['seconds'])}, "
        f"{report['trainable_parameters']:,} parameters trained; {report['output']}",
        f"loss {report['losses'][0]:.4f} -> {report['losses'][-1]:.4f}",
    ]
    if report["peak_allocated_bytes"]:
        lines.append(f"peak allocated {format_gib(report['peak_allocated_bytes'])}")
    after, before = report["after"], report["before"]
    if after:
        lines += ["", f"{'':<8}" + "".join(f"{name:>8}" for name in after)]
        for label, scores in (("before", before), ("after", after)):
            cells = [f"{scores[n]['accuracy']:8.1%}" if n in scores else f"{'-':>8}" for n in after]
            lines.append(f"{label:<8}" + "".join(cells))
        lines.append(f"{'of':<8}" + "".join(f"{s['total']:>8}" for s in after.values()))
        chance = [f"{s['p_above_chance']:8.1g}" for s in after.values()]
        lines.append(f"{'p':<8}" + "".join(chance) + "  (after, against guessing)")
    lines += ["", f"{'router weight w0 by modality':<52}{'text':>8}{'picture':>9}"]
    for row in report["routing"]:
        cells = [f"{row[m][0]:.3f}" if row[m] else "-" for m in ("text", "picture")]
        lines.append(f"{row['adapter']:<52}{cells[0]:>8}{cells[1]:>9}")
    return "\n".join(lines)
