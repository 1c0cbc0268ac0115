"""How long tests wait: time limits tell hangs, so a slow or busy machine is given longer ones."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("ARG_DIST_TEST_PATIENCE", "1"))
"""Factor of all time limits; `launchers/test.sh`, which starts several tests at once, sets it."""


def patient(seconds: float) -> float:
    """A time limit on this machine.

    Args:
        seconds: the limit on a quiet one.
    """
    return PATIENCE * seconds
