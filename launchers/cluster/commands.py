"""The command by which each launcher starts this node's processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launchers.cluster.place import Place

LAUNCHERS = ("torchrun", "deepspeed", "accelerate")
JOB = "arg_dist"
"""Name of the rendezvous: each job has a store of its own, so one name does."""


@dataclass(frozen=True)
class Job:
    """What this node starts.

    `processes` on this node, `max_restarts` of them, and `start_timeout` seconds for nodes that are
    late; `script` is the job's script and its arguments.
    """

    launcher: str
    processes: int
    max_restarts: int
    start_timeout: float
    accelerate_config: str | None
    script: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """Words of a command, and the variables that it needs besides those of this process."""

    words: tuple[str, ...]
    variables: Mapping[str, str]


def build(job: Job, place: Place, own_address: str, folder: Path) -> Command:
    """The launcher's command.

    Args:
        job: what to start.
        place: which node this is.
        own_address: under which the other nodes reach this one.
        folder: a temporary directory, for the hostfile that DeepSpeed reads.
    """
    if job.launcher == "deepspeed":
        return _deepspeed(job, place, folder)
    if job.launcher == "accelerate":
        return _accelerate(job, place, own_address)
    return _torchrun(job, place, own_address)


def _torchrun(job: Job, place: Place, own_address: str) -> Command:
    words = [sys.executable, "-m", "torch.distributed.run"]
    words += ["--nnodes", str(place.nodes), "--nproc-per-node", str(job.processes)]
    words += ["--max-restarts", str(job.max_restarts)]
    if place.nodes == 1:
        # without an address the processes look for their own host name, which nobody may know
        return Command((*words, "--standalone", "--local-addr", own_address, *job.script), {})
    words += ["--rdzv-id", JOB, "--rdzv-backend", "c10d", "--rdzv-endpoint", place.endpoint]
    words += ["--rdzv-conf", rendezvous_settings(job), "--local-addr", own_address]
    return Command((*words, *job.script), _own_store())


def rendezvous_settings(job: Job) -> str:
    """What torch's rendezvous is told: the store is there already, and how long to wait."""
    seconds = max(1, round(job.start_timeout))
    return f"is_host=false,join_timeout={seconds},read_timeout=60"


def _own_store() -> dict[str, str]:
    # With a store that is shared by all attempts, torch 2.13 leaves the nodes that survive the
    # address of a lost node: where that one was the first by address, none finds the others again.
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _accelerate(job: Job, place: Place, own_address: str) -> Command:
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(job.accelerate_config)]
    words += ["--num_machines", str(place.nodes)]
    words += ["--num_processes", str(place.nodes * job.processes)]
    words += ["--machine_rank", str(place.node), "--max_restarts", str(job.max_restarts)]
    if place.nodes == 1:
        return Command((*words, "--main_process_port", "0", *job.script), {})
    # It looks whether its port is free, which that of the meeting is not; and with --same_network
    # it leaves the endpoint to torch's own variable. Nobody uses this port then.
    words += ["--main_process_ip", place.address, "--main_process_port", str(place.port + 1)]
    words += ["--same_network", "--deepspeed_multinode_launcher", "standard"]
    words += ["--rdzv_backend", "c10d", "--rdzv_conf", rendezvous_settings(job)]
    variables = {
        "PET_RDZV_ENDPOINT": place.endpoint,
        "PET_RDZV_ID": JOB,
        "PET_LOCAL_ADDR": own_address,
    }
    return Command((*words, *job.script), {**variables, **_own_store()})


def _deepspeed(job: Job, place: Place, folder: Path) -> Command:
    # No names are looked up: DeepSpeed takes from it how many nodes and processes there are.
    hostfile = folder / "hostfile"
    hosts = [f"node-{node} slots={job.processes}\n" for node in range(place.nodes)]
    hostfile.write_text("".join(hosts))
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    words += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(place.node)]
    words += ["--master_addr", place.address, "--master_port", str(place.port + 1)]
    return Command((*words, *job.script), {})
