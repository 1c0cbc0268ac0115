"""What the tests on hosts share: the small job, and its run on one host."""

from typing import Any

import pytest

from tests.hosts.jobs import SmallJob


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return SmallJob.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def one_host(job: SmallJob, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of the job's steps with four processes on one host, without any network."""
    return job.on_one_host(tmp_path_factory.mktemp("one-host") / "run", processes=4)
