"""Table renderers: the same cells in four formats, special characters kept from doing harm."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

import pytest

from planner.report.tables import RENDERERS, plain_cell

HEADER = ["method", "a_b & c"]
ROWS = [["50 % of #1 | x", "{y} ~ z^2 \\"], ["<b>", "$5"]]


def _text(kind: str) -> str:
    return "".join(RENDERERS[kind](HEADER, ROWS, "one_caption"))


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells.append(data)


def test_csv_reads_back() -> None:
    lines = _text("csv").splitlines()
    assert lines[0] == "# one_caption"
    assert list(csv.reader(io.StringIO("\n".join(lines[1:])))) == [HEADER, *ROWS]


def test_html_reads_back() -> None:
    parser = _Cells()
    parser.feed(_text("html"))
    assert parser.cells == [*HEADER, *ROWS[0], *ROWS[1]]


def test_markdown_keeps_its_columns() -> None:
    lines = _text("md").splitlines()
    assert lines[0] == "one_caption"
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines[2:])


def test_latex_is_a_document_with_escaped_cells() -> None:
    text = _text("tex")
    assert text.startswith("\\documentclass")
    assert text.rstrip().endswith("\\end{document}")
    for name in ("document", "longtable"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
    body = text.partition("\\toprule")[2]
    assert r"50 \% of \#1 | x & \{y\} \textasciitilde{} z\textasciicircum{}2 " in body
    assert r"\textless{}b\textgreater{} & \$5 \\" in body
    assert r"a\_b \& c" in body
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(("name", "value", "text"), [
    ("peak_allocated_bytes", 1 << 30, "1.00 GiB"), ("step_seconds", 0.123456, "0.1235"),
    ("pareto", True, "yes"), ("double_quant", False, "no"), ("reason", None, ""), ("n", 7, "7"),
])  # fmt: skip
def test_cells(name: str, value: object, text: str) -> None:
    assert plain_cell(name, value) == text
