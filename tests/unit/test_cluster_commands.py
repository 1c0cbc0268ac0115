"""Each launcher understands the command that is built for it, and gets what was meant."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.elastic.rendezvous.api import RendezvousParameters

from launchers.cluster.commands import Command, Job, build
from launchers.cluster.place import Place

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE_CONFIGS = ["multinode_fsdp2", "fsdp2", "ddp", "cpu", "zero2", "zero3"]
SCRIPT = ("train.py", "--steps", "3")
SECOND = Place(1, 3, "10.0.0.1", 29400)
ALONE = Place(0, 1, "127.0.0.1", 29400)


def command(launcher: str, place: Place, folder: Path, config: str | None = None) -> Command:
    restarts = 0 if launcher == "deepspeed" else 2
    job = Job(launcher, 4, restarts, 90.0, config, SCRIPT)
    return build(job, place, "10.0.0.2", folder)


def check_rendezvous(args: argparse.Namespace) -> None:
    """What torch's agent is given, however it came there."""
    config, _, arguments = torchrun.config_from_args(args)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (3, 3, 4)
    assert config.max_restarts == 2
    assert config.local_addr == "10.0.0.2"
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "10.0.0.1:29400")
    assert config.run_id == "arg_dist"
    assert arguments[-3:] == list(SCRIPT)
    told = RendezvousParameters(
        config.rdzv_backend, config.rdzv_endpoint, config.run_id, 3, 3, **config.rdzv_configs
    )
    assert told.get_as_bool("is_host") is False
    assert told.get_as_int("join_timeout") == 90
    assert c10d_rendezvous_backend.DEFAULT_PORT == 29400  # that of the meeting, by default


def test_torchrun_uses_the_store_of_the_meeting(tmp_path: Path) -> None:
    made = command("torchrun", SECOND, tmp_path)
    assert made.words[1:3] == ("-m", "torch.distributed.run")
    check_rendezvous(torchrun.parse_args(made.words[3:]))
    assert made.variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_torchrun_alone_needs_no_address(tmp_path: Path) -> None:
    made = command("torchrun", ALONE, tmp_path)
    args = torchrun.parse_args(made.words[3:])
    assert args.standalone
    assert args.local_addr == "10.0.0.2"  # not the host's name, which need not lead anywhere
    assert (args.nproc_per_node, args.training_script) == ("4", "train.py")
    assert not made.variables


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_passes_the_rendezvous_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate itself has no option for the endpoint and the own address."""
    from accelerate.commands import launch

    monkeypatch.chdir(ROOT)
    config = f"launchers/accelerate/{name}.yaml"
    made = command("accelerate", SECOND, tmp_path, config)
    assert made.words[1:3] == ("-m", "accelerate.commands.launch")
    for variable, value in made.variables.items():
        monkeypatch.setenv(variable, value)
    ran: list[argparse.Namespace] = []
    monkeypatch.setattr(torchrun, "run", ran.append)
    launch.launch_command(launch.launch_command_parser().parse_args(made.words[3:]))
    check_rendezvous(ran[0])


def test_accelerate_alone_finds_a_port_itself(tmp_path: Path) -> None:
    from accelerate.commands import launch

    made = command("accelerate", ALONE, tmp_path, "any.yaml")
    args = launch.launch_command_parser().parse_args(made.words[3:])
    assert (args.num_machines, args.num_processes, args.main_process_port) == (1, 4, 0)
    assert [args.training_script, *args.training_script_args] == list(SCRIPT)


@pytest.mark.parametrize("place", [SECOND, ALONE])
def test_deepspeed_needs_no_ssh(place: Place, tmp_path: Path) -> None:
    from deepspeed.launcher import runner

    made = command("deepspeed", place, tmp_path)
    assert made.words[1:3] == ("-m", "deepspeed.launcher.runner")
    args = runner.parse_args(list(made.words[3:]))
    hosts = runner.fetch_hostfile(args.hostfile)
    assert list(hosts.values()) == [4] * place.nodes
    assert args.no_ssh
    assert (args.node_rank, args.master_addr) == (place.node, place.address)
    assert args.master_port == place.port + 1  # the port itself is that of the meeting
    assert [args.user_script, *args.user_args] == list(SCRIPT)
