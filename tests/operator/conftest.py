"""Makes the helpers beside the tests importable, and the table of specs: tests are no packages here."""

import logging
import sys
from pathlib import Path

import pytest
from quick_schemas import schemas_are_read_once as schemas_are_read_once

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "phoenix_api")]


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, at its finest."""
    caplog.set_level(logging.DEBUG)
    return caplog
