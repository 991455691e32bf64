"""Rows of text as Markdown, LaTeX (booktabs; compiles as it is), CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from planner.units import GIB

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "×": r"$\times$", "–": "--", "±": r"$\pm$",
    "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$", "…": r"\ldots{}",
}  # fmt: skip


def plain_cell(name: str, value: Any) -> str:
    """A figure as a person reads it: bytes in GiB, rates rounded, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(escaped) + " |\n"


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_TEX.get(char, char) for char in text.replace("\n", " "))


def latex_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None
) -> Iterator[str]:
    """A document of one table. It compiles with pdflatex; \\input the tabular alone if need be."""
    yield "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage{booktabs}\n"
    yield "\\usepackage{longtable}\n\\usepackage[margin=1cm,landscape]{geometry}\n"
    yield "\\begin{document}\n\\footnotesize\n"
    yield f"\\begin{{longtable}}{{{'l' * len(header)}}}\n"
    if caption:
        yield f"\\caption{{{tex(caption)}}}\\\\\n"
    yield "\\toprule\n" + _tex_row(header) + "\\midrule\n\\endhead\n"
    for row in rows:
        yield _tex_row(row)
    yield "\\bottomrule\n\\end{longtable}\n\\end{document}\n"


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None
) -> Iterator[str]:
    """A Markdown table, its caption above."""
    if caption:
        yield f"{caption}\n\n"
    yield markdown_row(header)
    yield markdown_row(["---"] * len(header))
    for row in rows:
        yield markdown_row(row)


def csv_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None
) -> Iterator[str]:
    """CSV; the caption as a comment line on top."""
    if caption:
        yield f"# {caption}\n"
    for row in (header, *rows):
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow(row)
        yield out.getvalue()


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None
) -> Iterator[str]:
    """An HTML table."""
    yield "<table>\n"
    if caption:
        yield f"<caption>{html.escape(caption)}</caption>\n"
    yield "<thead>\n" + _html_row(header, "th") + "</thead>\n<tbody>\n"
    for row in rows:
        yield _html_row(row, "td")
    yield "</tbody>\n</table>\n"


RENDERERS = {"md": markdown_table, "tex": latex_table, "csv": csv_table, "html": html_table}


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(tex(cell) for cell in cells) + " \\\\\n"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"
