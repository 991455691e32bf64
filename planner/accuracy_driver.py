"""The report's part beyond torch's allocator: the whole card, evaluation, loading, host memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from planner.learn import spread_of
from planner.meters import Meters, device_range, range_error
from planner.residuals import Residual
from planner.units import MIB


def outside_errors(rows: Iterable[Residual], meters: Mapping[str, Meters]) -> list[float]:
    """Bytes outside the allocator: predicted over measured, less one."""
    found = ((row, meters.get(row.measured.key)) for row in rows)
    return [
        row.predicted.non_torch_bytes / known.outside_bytes - 1
        for row, known in found
        if known is not None and known.outside_bytes
    ]


def device_errors(rows: Iterable[Residual], meters: Mapping[str, Meters]) -> list[float]:
    """What the card must have free: distance to the measured range. Records that evaluated are
    left out: their caps were bisected over training steps alone."""
    errors = []
    for row in rows:
        known = meters.get(row.measured.key)
        found = None if known is None else device_range(row.measured, known)
        if found is not None and not row.measured.spec.evaluation_batch_size:
            errors.append(range_error(row.predicted.device_required_bytes, *found))
    return errors


def driver_cells(rows: Sequence[Residual], meters: Mapping[str, Meters]) -> tuple[str, str]:
    """Two cells of a table: outside torch (median, worst) and the card (median, worst, bias)."""
    outside, card = outside_errors(rows, meters), device_errors(rows, meters)
    return (
        "{:.1%}, {:.1%}".format(*spread_of(outside)[:2]) if outside else "-",
        "{:.2%}, {:.2%}, {:+.2%}".format(*spread_of(card)) if card else "-",
    )


def driver_section(rows: Sequence[Residual], meters: Mapping[str, Meters]) -> str:
    """Tables of the meters that the training step's do not cover."""
    lines = [
        "| quantity | records | median | worst | bias |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    quantities = {
        "outside torch's allocator, by the driver": outside_errors(rows, meters),
        "the whole card: required and outside (distance to the measured range)":
            device_errors(rows, meters),
        "peak of evaluation": _ratios(rows, meters, "evaluation_peak_bytes", "eval_peak_bytes"),
        "peak of loading": _ratios(rows, meters, "load_peak_bytes", "load_peak_bytes"),
        "host memory, what to plan with": _ratios(rows, meters, "host_peak_bytes", "host_bytes"),
    }  # fmt: skip
    for name, errors in quantities.items():
        cells = "- | - | -"
        if errors:
            cells = "{:.2%} | {:.2%} | {:+.2%}".format(*spread_of(errors))
        lines.append(f"| {name} | {len(errors)} | {cells} |")
    return "\n\n".join(["\n".join(lines), *_remarks(rows, meters)])


def _ratios(
    rows: Sequence[Residual], meters: Mapping[str, Meters], measured: str, predicted: str
) -> list[float]:
    errors = []
    for row in rows:
        known = meters.get(row.measured.key)
        truth = None if known is None else getattr(known, measured)
        answer = getattr(row.predicted, predicted)
        if truth and answer:
            errors.append(answer / truth - 1)
    return errors


def _remarks(rows: Sequence[Residual], meters: Mapping[str, Meters]) -> list[str]:
    known = [(row, meters[row.measured.key]) for row in rows if row.measured.key in meters]
    remarks = []
    idle = [found.idle_bytes for _, found in known if found.idle_bytes is not None]
    if idle:
        remarks.append(
            "Outside the allocator is the card's use by NVML less what torch reserves, after the "
            f"steps; {max(idle) / MIB:.1f} MiB at most of it were there before the process, which "
            "the total that the CUDA runtime reports leaves out already."
        )
    hosts = [(row, found.host_peak_bytes) for row, found in known if found.host_peak_bytes]
    if hosts:
        low = sum(peak < row.predicted.host_low_bytes for row, peak in hosts)
        high = sum(peak > row.predicted.host_bytes for row, peak in hosts)
        remarks.append(
            f"Host memory is answered as a bound: of {len(hosts)} measured peaks (largest resident "
            f"set since the process began) {high} lie above it and {low} below its lower end."
        )
    if known and not any(found.load_peak_bytes for _, found in known):
        remarks.append(
            "Loading was not measured in these records: their weights were drawn on the card."
        )
    return remarks
