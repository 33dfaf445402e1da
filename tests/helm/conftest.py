"""Makes the helpers beside these tests and those of the operator's importable."""

import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "operator")]


@pytest.fixture(autouse=True, scope="session")
def helm() -> None:
    """Build Helm before the first test, so that its time counts against no test."""
    import charts

    charts.binary()


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
