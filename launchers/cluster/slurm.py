"""What Slurm's variables say of a job's hosts."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

from arg_dist.cli.parsing import InputError

NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
"""The hosts of this job step, else those of the job."""

_FIRST = re.compile(r"(?P<prefix>[^\[\],]+)(?:\[(?P<numbers>[0-9,-]+)\])?(?:,.*)?")


def first_host(environment: Mapping[str, str]) -> str | None:
    """The name of the host that Slurm counts as 0; None outside of Slurm.

    ``scontrol`` tells it, and where that is missing the simple forms of a list are read here:
    ``name``, ``name,...`` and ``prefix[numbers]``.

    Raises:
        InputError: the list can be read in neither way.
    """
    for variable in NODE_LISTS:
        if environment.get(variable):
            return _first(variable, environment[variable])
    return None


def _first(variable: str, hosts: str) -> str:
    if shutil.which("scontrol"):
        try:
            told = subprocess.run(
                ["scontrol", "show", "hostnames", hosts],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            told = []
        if told:
            return told[0]
    found = _FIRST.fullmatch(hosts)
    if found is None:
        raise InputError(
            f"{variable}={hosts}: its first host cannot be read without Slurm's scontrol; give the "
            "address of node 0 in MASTER_ADDR or --master-addr"
        )
    number = re.split("[,-]", found["numbers"])[0] if found["numbers"] else ""
    return found["prefix"] + number
