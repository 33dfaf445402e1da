"""What must be known before any test module is imported."""

import pytest

pytest_plugins = ["services"]

# imported by tests in more than one folder; its assertions should explain themselves
pytest.register_assert_rewrite("status_cases")
