"""`vramwise models`: what it prints."""

from __future__ import annotations

import json

import pytest

from planner.cli import main


def test_models_lists_every_entry_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["facebook/chameleon-7b"]["parameters"]["total"] == 7_043_090_432
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in rows)
    assert "7,043,090,432" in text


def test_models_of_one_name_says_where_it_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "chameleon-30b"]) == 0
    text = capsys.readouterr().out
    assert "NOT verified" in text
    assert "https://" in text


def test_models_of_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "chamelon-7b"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'chameleon-7b'" in error
