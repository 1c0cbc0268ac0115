"""Which node this is: options, the environment, Slurm's and Kubernetes' variables."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arg_dist.cli.parsing import InputError
from launchers.cluster import slurm
from launchers.cluster.place import DEFAULT_PORT, Place, find_place, whole_number

pytestmark = pytest.mark.unit

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
SLURM = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[07-09,12]"}
PODS = {"NNODES": "3", "JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "job-0.job"}


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, Place(0, 1, "127.0.0.1", DEFAULT_PORT)),
        ({"NNODES": "", "NODE_RANK": ""}, {}, Place(0, 1, "127.0.0.1", DEFAULT_PORT)),
        (TWO, {}, Place(1, 2, "10.0.0.1", DEFAULT_PORT)),
        (TWO, {"node_rank": "0", "master_port": "1234"}, Place(0, 2, "10.0.0.1", 1234)),
        (TWO | {"MASTER_PORT": "1234"}, {"nodes": "3"}, Place(1, 3, "10.0.0.1", 1234)),
        (TWO | {"MASTER_ADDR": "[fe80::1]"}, {}, Place(1, 2, "fe80::1", DEFAULT_PORT)),
        (SLURM, {}, Place(2, 4, "gpu07", DEFAULT_PORT)),
        (SLURM | {"MASTER_ADDR": "10.0.0.7"}, {}, Place(2, 4, "10.0.0.7", DEFAULT_PORT)),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[08-09,12]"},
            {},
            Place(2, 3, "gpu08", DEFAULT_PORT),
        ),
        (PODS, {}, Place(2, 3, "job-0.job", DEFAULT_PORT)),
    ],
)
def test_a_place(environment: dict[str, str], options: dict[str, str], expected: Place) -> None:
    assert find_place(environment, **options) == expected


@pytest.mark.parametrize(
    ("environment", "options", "named"),
    [
        ({"NNODES": "two"}, {}, "NNODES=two"),
        ({"NNODES": "0"}, {}, "NNODES=0"),
        ({}, {"nodes": "-1"}, "--nodes=-1"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, {}, "NODE_RANK: not set"),
        ({"NNODES": "2", "NODE_RANK": "1"}, {}, "MASTER_ADDR: not set"),
        (TWO | {"NODE_RANK": "2"}, {}, "NODE_RANK=2: .* 0 to 1 with NNODES=2"),
        ({"NODE_RANK": "1"}, {}, "NODE_RANK=1: .* 0 with NNODES .not set"),
        (TWO | {"MASTER_PORT": "65535"}, {}, "MASTER_PORT=65535"),
        (TWO | {"MASTER_ADDR": "10.0.0.1:29400"}, {}, "MASTER_ADDR=10.0.0.1:29400"),
        (SLURM | {"NNODES": "2"}, {}, "NNODES=2 and SLURM_JOB_NUM_NODES=4"),
        (SLURM, {"node_rank": "1"}, "--node-rank=1 and SLURM_NODEID=2"),
        (PODS | {"NODE_RANK": "1"}, {}, "NODE_RANK=1 and JOB_COMPLETION_INDEX=2"),
        (SLURM | {"SLURM_LOCALID": "1"}, {}, "SLURM_LOCALID=1: .*--ntasks-per-node=1"),
        (SLURM | {"SLURM_JOB_NODELIST": "a[1-2]b[3]"}, {}, "SLURM_JOB_NODELIST=.*scontrol"),
    ],
)
def test_what_cannot_be_is_named(
    environment: dict[str, str], options: dict[str, str], named: str
) -> None:
    with pytest.raises(InputError, match=named) as error:
        find_place(environment, **options)
    assert "\n" not in str(error.value)


@given(
    nodes=st.integers(1, 10_000),
    node=st.integers(0, 20_000),
    by=st.sampled_from(["NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX"]),
)
def test_every_number_below_the_number_of_nodes_is_a_place(nodes: int, node: int, by: str) -> None:
    environment = {"NNODES": str(nodes), by: str(node), "MASTER_ADDR": "a"}
    if node < nodes:
        assert find_place(environment) == Place(node, nodes, "a", DEFAULT_PORT)
    else:
        with pytest.raises(InputError, match=f"{by}={node}"):
            find_place(environment)


def test_endpoints_of_ipv6_have_brackets() -> None:
    assert Place(0, 2, "fe80::1", 5).endpoint == "[fe80::1]:5"
    assert Place(0, 2, "10.0.0.1", 5).endpoint == "10.0.0.1:5"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[3,5]", "gpu3"),
        ("gpu[003-128]", "gpu003"),
        ("a-b[1-2],c[3]", "a-b1"),
    ],
)
def test_simple_lists_of_hosts_need_no_scontrol(hosts: str, first: str) -> None:
    assert slurm.first_host({"SLURM_JOB_NODELIST": hosts}) == first


def test_scontrol_reads_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames a[1-2]b[3]" ] && echo a1b3 a2b3\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert slurm.first_host({"SLURM_JOB_NODELIST": "a[1-2]b[3]"}) == "a1b3"
    assert slurm.first_host({}) is None


def test_a_number_comes_from_the_option_or_else_its_variable() -> None:
    def found(option: str | None, **environment: str) -> int:
        return whole_number("--n", option, "N", environment, least=1, default=7)

    assert (found("3", N="4"), found(None, N="4"), found(None, N=""), found(None)) == (3, 4, 7, 7)
    with pytest.raises(InputError, match="N=x: a whole number of at least 1"):
        found(None, N="x")
