"""Makes the helpers beside these tests and those of the operator's importable."""

import sys
from pathlib import Path

import pytest
from quick_schemas import schemas_are_read_once as schemas_are_read_once

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "operator")]


@pytest.fixture(autouse=True, scope="session")
def helm() -> None:
    """Build Helm before the first test, so that its time counts against no test."""
    import charts

    charts.binary()
