"""Forked processes begin with everything imported, print, fail and end like launched ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.launch.forking import FORKS
from tests.launch.launching import alone, launch

SCRIPT = """
import os, sys, time
LIBRARIES = ("deepspeed", "accelerate", "transformers", "trl", "launchers.train_lm")
words = [*(name in sys.modules for name in LIBRARIES), os.environ.get("RANK"), sys.argv[1]]
os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once: lines of two would mingle
if os.environ.get("RANK") == sys.argv[1]:
    sys.exit("I have enough")
time.sleep(float(sys.argv[2]))
"""

pytestmark = pytest.mark.skipif(not FORKS, reason="forks are for machines without a GPU")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_everything_is_there_at_the_start(script: Path) -> None:
    finished = alone(str(script), "none", 0, seconds=90)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.split() == [*["True"] * 5, "None", "none"]


def test_the_first_error_ends_all(script: Path) -> None:
    began = time.monotonic()
    finished = launch(str(script), 1, 600, processes=3, seconds=90, launcher="forked")
    assert (finished.returncode, finished.stderr) == (1, "I have enough\n")
    assert sorted(line.split()[-2] for line in finished.stdout.splitlines()) == ["0", "1", "2"]
    assert time.monotonic() - began < 90


def test_a_hang_is_ended(script: Path) -> None:
    with pytest.raises(AssertionError, match=r"script\.py was not done after 5 s") as raised:
        launch(str(script), 5, 600, processes=2, seconds=5, launcher="forked")
    assert "True" in str(raised.value)


def test_a_launcher_starts_fresh_processes(script: Path) -> None:
    finished = launch(str(script), "none", 0, processes=2, seconds=90, launcher="torchrun")
    assert finished.returncode == 0, finished.stderr
    for line, index in zip(sorted(finished.stdout.splitlines()), "01", strict=True):
        assert line.split() == [*["False"] * 5, index, "none"]
