"""Verbs that take few flags tell bad ones in one line."""

from __future__ import annotations

import pytest

from planner.cli import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["calibrate"], "required: records"),
        (["models", "--jsn"], "did you mean '--json'?"),
    ],
)
def test_bad_flag_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
