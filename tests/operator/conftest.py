"""Makes the helpers beside the tests importable, and the table of specs: tests are no packages here."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("status_cases")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "phoenix_api")]
