"""Builds the command with which each launcher starts this node's processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launchers.cluster.place import Place

LAUNCHERS = ("torchrun", "deepspeed", "accelerate")
JOB = "arg_dist"
"""Rendezvous id: each job has its own store, so one id serves all jobs."""


@dataclass(frozen=True)
class Job:
    """What this node starts.

    `processes` run on this node and are restarted up to `max_restarts` times; late nodes have
    `start_timeout` seconds; `script` is the job's script and its arguments.
    """

    launcher: str
    processes: int
    max_restarts: int
    start_timeout: float
    accelerate_config: str | None
    script: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command line, and the variables that it needs in addition to this process's."""

    words: tuple[str, ...]
    variables: Mapping[str, str]


def build(job: Job, place: Place, own_address: str, folder: Path) -> Command:
    """The launcher's command.

    Args:
        job: what to start.
        place: which node this is.
        own_address: address at which the other nodes reach this one.
        folder: a temporary directory, for DeepSpeed's hostfile.
    """
    if job.launcher == "deepspeed":
        return _deepspeed(job, place, folder)
    if job.launcher == "accelerate":
        return _accelerate(job, place, own_address)
    return _torchrun(job, place, own_address)


def _torchrun(job: Job, place: Place, own_address: str) -> Command:
    arguments = [sys.executable, "-m", "torch.distributed.run"]
    arguments += ["--nnodes", str(place.nodes), "--nproc-per-node", str(job.processes)]
    arguments += ["--max-restarts", str(job.max_restarts)]
    if place.nodes == 1:
        # without an address, processes resolve their own host name, which may be unknown
        return Command((*arguments, "--standalone", "--local-addr", own_address, *job.script), {})
    arguments += ["--rdzv-id", JOB, "--rdzv-backend", "c10d", "--rdzv-endpoint", place.endpoint]
    arguments += ["--rdzv-conf", rendezvous_settings(job), "--local-addr", own_address]
    return Command((*arguments, *job.script), _own_store())


def rendezvous_settings(job: Job) -> str:
    """Options of torch's rendezvous: the store is already open, and how long to wait."""
    seconds = max(1, round(job.start_timeout))
    return f"is_host=false,join_timeout={seconds},read_timeout=60"


def _own_store() -> dict[str, str]:
    # With one store shared by all attempts, torch 2.13 leaves the surviving nodes with the address
    # of a lost node: if that one was the first by address, they do not find each other again.
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _accelerate(job: Job, place: Place, own_address: str) -> Command:
    arguments = [sys.executable, "-m", "accelerate.commands.launch"]
    arguments += ["--config_file", str(job.accelerate_config)]
    arguments += ["--num_machines", str(place.nodes)]
    arguments += ["--num_processes", str(place.nodes * job.processes)]
    arguments += ["--machine_rank", str(place.node), "--max_restarts", str(job.max_restarts)]
    if place.nodes == 1:
        return Command((*arguments, "--main_process_port", "0", *job.script), {})
    # accelerate requires its port to be free, which the rendezvous port is not; with --same_network
    # it takes the endpoint from torch's own variable, and this port stays unused.
    arguments += ["--main_process_ip", place.address, "--main_process_port", str(place.port + 1)]
    arguments += ["--same_network", "--deepspeed_multinode_launcher", "standard"]
    arguments += ["--rdzv_backend", "c10d", "--rdzv_conf", rendezvous_settings(job)]
    variables = {
        "PET_RDZV_ENDPOINT": place.endpoint,
        "PET_RDZV_ID": JOB,
        "PET_LOCAL_ADDR": own_address,
    }
    return Command((*arguments, *job.script), {**variables, **_own_store()})


def _deepspeed(job: Job, place: Place, folder: Path) -> Command:
    # DeepSpeed only counts nodes and processes in it; the names are not resolved.
    hostfile = folder / "hostfile"
    hosts = [f"node-{node} slots={job.processes}\n" for node in range(place.nodes)]
    hostfile.write_text("".join(hosts))
    arguments = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    arguments += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(place.node)]
    arguments += ["--master_addr", place.address, "--master_port", str(place.port + 1)]
    return Command((*arguments, *job.script), {})
