"""Whether a run took what was planned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from arg_dist.config import parse_config
from arg_dist.planning.figures import Figures, make_plan
from arg_dist.planning.meshes import parse_mesh
from arg_dist.planning.model import Model, load_model
from tests.launch.planned_cases import BUCKET, Case
from tests.tolerances import PLANNED_PEAK, PLANNED_TEMPORARIES

EXACT = (
    "weights",
    "master_weights",
    "gradients",
    "optimizer_state",
    "sent_per_step",
    "sent_in_first_step",
)


@lru_cache
def model_of(name: str, vocabulary: int, settings: str) -> Model:
    """The model of a plan; settings as JSON."""
    return load_model(name, parse_config(json.loads(settings)), vocab_size=vocabulary)


def planned(case: Case, processes: int) -> Figures:
    """What is planned for a case on so many processes."""
    plan = make_plan(
        model_of(case.model, case.vocabulary, json.dumps(case.settings)),
        parse_config(case.settings),
        engine=case.engine,
        processes=1 if case.engine == "none" else processes,
        copies=case.copies,
        mesh=None if case.mesh is None else parse_mesh(case.mesh),
        dtype=case.dtype,
        reduce_bucket=BUCKET,
    )
    return plan.figures["AdaRankGrad"]


def check_exact(case: Case, figures: Figures, run: Sequence[dict[str, Any]]) -> None:
    """Asserts that each process held, and sent, what was planned."""
    arrays = figures.arrays()
    for process, found in enumerate(run):
        mine = 0 if case.engine == "none" else process
        for key in EXACT:
            assert found[key] == arrays[key][mine], f"{key} of process {process}"
        assert found["collectives_per_step"] == figures.step_collectives
        assert found["collectives_in_first_step"] == figures.refresh_collectives


def check_temporaries(case: Case, planned: Figures, run: Sequence[dict[str, Any]]) -> None:
    """Asserts that what passed in the steps is near to what was planned."""
    figures = planned.arrays()
    steps = ("step_temporaries", "refresh_temporaries")
    kept = figures["peak"] - np.maximum(*(figures[key] for key in steps))
    for process, found in enumerate(run):
        mine = 0 if case.engine == "none" else process
        least = {key: min(found[key]) for key in steps}
        compared = [(PLANNED_TEMPORARIES, figures[key][mine], least[key]) for key in steps]
        peak = kept[mine] + max(least.values())
        compared.append((PLANNED_PEAK, figures["peak"][mine], peak))
        for tolerance, plan, size in compared:
            # a thread that sends frees a message when it comes to it, so that more may lie there
            more = case.engine != "none" and size > plan
            tolerance.check(float(size if more else plan), float(size))
