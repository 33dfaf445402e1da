"""Makes the helpers beside the tests importable, and the table of specs: tests are no packages here."""

import logging
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "phoenix_api")]


@pytest.fixture(autouse=True, scope="session")
def _schemas_are_read_once() -> Any:
    """The validator reads 2 MB of JSON for each object otherwise."""
    read, known = kubernetes_validate.utils.schema_contents, {}

    def read_once(filename: str, version: str) -> Any:
        if filename not in known:
            known[filename] = read(filename, version)
        return known[filename]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", read_once)
        yield


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, at its finest."""
    caplog.set_level(logging.DEBUG)
    return caplog
