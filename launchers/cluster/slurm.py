"""The hosts of a Slurm job, from Slurm's variables."""

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

    ``scontrol`` expands the list; without it, only simple forms can be parsed: ``name``,
    ``name,...`` and ``prefix[numbers]``.

    Raises:
        InputError: neither can read the list.
    """
    for variable in NODE_LISTS:
        if environment.get(variable):
            return _first(variable, environment[variable])
    return None


def _first(variable: str, hosts: str) -> str:
    if shutil.which("scontrol"):
        try:
            names = subprocess.run(
                ["scontrol", "show", "hostnames", hosts],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            names = []
        if names:
            return names[0]
    found = _FIRST.fullmatch(hosts)
    if found is None:
        raise InputError(
            f"{variable}={hosts}: its first host cannot be parsed without Slurm's scontrol; set "
            "MASTER_ADDR or --master-addr to the address of node 0"
        )
    number = re.split("[,-]", found["numbers"])[0] if found["numbers"] else ""
    return found["prefix"] + number
