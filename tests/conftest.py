"""Tiers by directory: their markers, time limits and order; and what every test starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from tests.patience import patient

TIERS = {"unit": 60, "lockstep": 60, "pool": 120, "launch": 600, "hosts": 120}
"""Seconds that one test of a tier may take, in the order in which the tiers run."""

TOGETHER = {
    "tests/pool/": "a pool of processes",
    "tests/launch/test_engines.py": "launches of engines",
    "tests/launch/test_zero.py": "launches of engines",
}
"""What some files, or those of a folder, share: one worker takes all of them."""

LONG = (
    *("engines", "zero", "finetune", "train_lm_resume", "accelerate", "compare", "survival"),
    *("trainer", "train_lm", "killed_saves", "planned_runs", "resume"),
)
"""Launch tests that begin before the others, so that the workers end together."""

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "tiers", derandomize=True, max_examples=20, deadline=None, database=None
)
hypothesis.settings.load_profile("tiers")


class WholeFiles(LoadFileScheduling):
    """Each file is one worker's, and what shares launches with it."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((shared for path, shared in TOGETHER.items() if file.startswith(path)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    return WholeFiles(config, log)


def tier_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(TIERS)
    early = [f"test_{name}" for name in LONG]

    def turn(item: pytest.Item) -> tuple[int, int]:
        name = item.path.stem
        return order.index(tier_of(item)), early.index(name) if name in early else len(early)

    for item in items:
        tier = tier_of(item)
        item.add_marker(tier)
        own = item.get_closest_marker("timeout")
        seconds = TIERS[tier] if own is None else own.args[0]
        item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
    items.sort(key=turn)
