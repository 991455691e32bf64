"""The tiny model, written once a session."""

from __future__ import annotations

import pytest

from tests.planner.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a two-layer model."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))
