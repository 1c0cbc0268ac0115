"""How much of the package one step goes through."""

import pytest

from tests.steady_step import calls_of_a_steady_step

pytestmark = pytest.mark.unit

AT_MOST_FILES = 14


def test_a_steady_step_in_one_process_is_in_few_files() -> None:
    assert 0 < len(calls_of_a_steady_step()) <= AT_MOST_FILES


def test_of_what_serves_several_processes_a_single_one_runs_the_driver_alone() -> None:
    of_several = {file for file in calls_of_a_steady_step() if file.startswith("sharding/")}
    assert of_several == {"sharding/drivers.py", "sharding/entry.py", "sharding/shard.py"}


def test_as_many_files_for_more_matrices() -> None:
    assert calls_of_a_steady_step(12).keys() == calls_of_a_steady_step(1).keys()
