from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import ProcessPool


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Four processes that form groups of one to four."""
    processes = ProcessPool(4)
    yield processes
    processes.close()
