"""The schemas of Kubernetes' objects, read once for all tests that check against them."""

from typing import Any

import kubernetes_validate
import pytest


@pytest.fixture(autouse=True, scope="session")
def schemas_are_read_once() -> Any:
    """The validator reads 2 MB of JSON for each object otherwise."""
    read, known = kubernetes_validate.utils.schema_contents, {}

    def read_once(filename: str, version: str) -> Any:
        if filename not in known:
            known[filename] = read(filename, version)
        return known[filename]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", read_once)
        yield
