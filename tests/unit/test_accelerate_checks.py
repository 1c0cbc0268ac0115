"""What is looked at before accelerate trains, and the shipped accelerate files."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from arg_dist import AdaRankGrad, ConfigError
from arg_dist.cli.parsing import InputError
from arg_dist.engines.deepspeed_config import KNOWN_KEYS, refuse_unsupported
from arg_dist.integrations.accelerate import (
    asks_for,
    check_environment,
    check_optimizer,
    prepare,
)
from arg_dist.integrations.beginning import check_own_clipping
from launchers.pretraining import environment
from launchers.pretraining.deepspeed_engine import DeepSpeedSetup

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parents[2] / "launchers" / "accelerate"
YAMLS = ("cpu", "ddp", "fsdp2", "zero2", "zero3")
MULTINODE = "multinode_fsdp2"


class Wrapper:
    """As accelerate and DeepSpeed wrap an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class DeepSpeedCPUAdam(torch.optim.Adam):
    """Has the name that DeepSpeed's has."""


def test_the_inner_optimizer_is_found_below_any_wrappers() -> None:
    optimizer = AdaRankGrad([torch.nn.Parameter(torch.zeros(3, 4))])
    assert check_optimizer(optimizer) is optimizer
    assert check_optimizer(Wrapper(Wrapper(optimizer))) is optimizer


def test_another_optimizer_is_named_with_what_to_do() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3, 4))]
    with pytest.raises(ConfigError, match=r"is AdamW, not AdaRankGrad; .*DummyOptim"):
        check_optimizer(Wrapper(torch.optim.AdamW(parameters)))
    with pytest.raises(ConfigError, match=r"DeepSpeedCPUAdam.*zero_force_ds_cpu_optimizer.: false"):
        check_optimizer(Wrapper(Wrapper(DeepSpeedCPUAdam(parameters))))
    with pytest.raises(ConfigError, match=r"got tuple, .*that\s+accelerator\.prepare"):
        check_optimizer((torch.nn.Linear(2, 2), torch.optim.AdamW(parameters)))


@pytest.mark.parametrize("version", ["1", None])
def test_fsdp1_is_refused_by_name(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_environment()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ConfigError, match=r"fsdp_version: got 1, .*FSDP1; set .fsdp_version: 2"):
        check_environment()
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_environment()
    assert asks_for("FSDP") and not asks_for("DEEPSPEED")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_one_job_has_one_configuration(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    message = rf"--deepspeed_config x\.json: accelerate is configured for {engine} as well"
    with pytest.raises(InputError, match=message):
        DeepSpeedSetup("x.json").connect(None)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that no launcher has started; what it sets is taken back."""
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT".split()
    for name in (*names, "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", *environment.MPI_SIZES):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return monkeypatch


def test_a_process_without_a_launcher_is_a_world_of_one(no_launcher: pytest.MonkeyPatch) -> None:
    environment.prepare_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


def test_a_process_of_mpirun_knows_its_place(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items():
        no_launcher.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    environment.prepare_environment()
    found = [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    assert found == ["3", "4", "1", "2"]


def test_a_lonely_process_of_several_is_told(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("ACCELERATE_USE_CPU", "True")
    no_launcher.setenv("MASTER_ADDR", "127.0.0.1")  # accelerate launch --cpu --num_processes 2
    with pytest.raises(InputError, match=r"MULTI_CPU, .*mpirun.*cpu\.yaml"):
        environment.prepare_environment()


def test_these_files_and_no_others_are_shipped() -> None:
    shipped = sorted(path.name for path in FOLDER.iterdir())
    assert shipped == sorted(
        [*(f"{name}.yaml" for name in (*YAMLS, MULTINODE)), "zero2.json", "zero3.json"]
    )


@pytest.mark.parametrize("name", [*YAMLS, MULTINODE])
def test_accelerate_knows_every_key(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    path = FOLDER / f"{name}.yaml"
    loaded = ClusterConfig.from_yaml_file(str(path))  # raises for an unknown key
    options = vars(launch_command_parser().parse_args(["script.py"]))
    for key in (*loaded.fsdp_config, *loaded.deepspeed_config):
        assert key in options
    assert loaded.num_processes == (16 if name == MULTINODE else 2)
    text = path.read_text()
    assert f"accelerate launch --config_file launchers/accelerate/{name}.yaml" in text
    assert set(yaml.safe_load(text)) >= {"distributed_type", "num_processes", "num_machines"}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_ask_for_what_can_work(stage: int) -> None:
    config = json.loads((FOLDER / f"zero{stage}.json").read_text())
    assert set(config) <= KNOWN_KEYS
    assert config["zero_optimization"]["stage"] == stage
    refuse_unsupported(config, cuda=True)
    assert ("optimizer" in config) == (stage == 2)
    said = yaml.safe_load((FOLDER / f"zero{stage}.yaml").read_text())["deepspeed_config"]
    assert said["deepspeed_config_file"] == f"launchers/accelerate/zero{stage}.json"


def test_a_processs_own_gradient_is_not_clipped(no_launcher: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(6, 4)
    optimizer = AdaRankGrad(model.parameters(), gradient_sync="sketch")
    model, _ = prepare(accelerator, model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ConfigError, match=r"clip_grad_norm_: would clip.*pass max_grad_norm"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ConfigError, match=r"clip_grad_value_: would clip"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    arguments = SimpleNamespace(max_grad_norm=1.0)
    with pytest.raises(ConfigError, match=r"max_grad_norm=1.0 of the Trainer"):
        check_own_clipping(arguments, [optimizer])
    arguments.max_grad_norm = 0.0
    check_own_clipping(arguments, [optimizer])
