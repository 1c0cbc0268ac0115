"""The DeepSpeed config: what is read, what is refused, and in which words."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arg_dist.config import ConfigError
from arg_dist.engines.deepspeed_config import (
    load_deepspeed_config,
    optimizer_settings,
    refuse_unsupported,
    warn_defaults,
)
from arg_dist.engines.deepspeed_rules import RULES
from tests.patience import patient

pytestmark = pytest.mark.unit

NAMED = {"type": "AdaRankGrad", "params": {}}
OFFLOAD = {"device": "cpu"}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


# --- reading ---------------------------------------------------------------------------------


def test_a_path_a_text_and_a_mapping_give_the_same(tmp_path: Path) -> None:
    config = {"train_batch_size": 16, **zero(2)}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert load_deepspeed_config(path) == config
    assert load_deepspeed_config(str(path)) == config
    assert load_deepspeed_config("\n " + json.dumps(config)) == config
    copied = load_deepspeed_config(config)
    assert copied == config and copied is not config


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: .*cannot be read: No such file"):
        load_deepspeed_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', "not valid JSON at line 2, column 7"),
        ('{"z": {"stage": 1, "stage": 2}}', "key 'stage' is given twice"),
    ],
)
def test_a_faulty_text_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_deepspeed_config(text)
    assert "\n" not in str(caught.value)


def test_a_list_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="got a JSON list; an object is needed"):
        load_deepspeed_config(path)


def test_neither_deepspeed_nor_process_groups_are_imported() -> None:
    script = (
        "import sys, arg_dist.engines.deepspeed_config\n"
        "assert 'deepspeed' not in sys.modules, 'deepspeed was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=patient(50))


# --- the optimizer section -------------------------------------------------------------------


def test_the_params_become_settings() -> None:
    params = {"lr": 0.01, "betas": [0.8, 0.9], "max_rank": 0.25, "side": "auto"}
    settings = optimizer_settings({"optimizer": {"type": "AdaRankGrad", "params": params}})
    assert (settings.lr, settings.betas, settings.max_rank) == (0.01, (0.8, 0.9), 0.25)


@pytest.mark.parametrize("section", [{"type": "AdaRankGrad"}, {**NAMED, "params": None}])
def test_params_may_be_left_out(section: dict[str, Any]) -> None:
    assert optimizer_settings({"optimizer": section}) == optimizer_settings({"optimizer": NAMED})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "optimizer: got nothing; "),
        ("AdaRankGrad", 'optimizer: got "AdaRankGrad"; '),
        ({"type": "AdamW"}, "optimizer.type: got \"AdamW\"; 'AdaRankGrad' is needed"),
        ({"params": {}}, "optimizer.type: got nothing; 'AdaRankGrad' is needed"),
        ({"type": "adarankgrad"}, "did you mean 'AdaRankGrad'?"),
        ({"type": "AdaRankGard"}, "did you mean 'AdaRankGrad'?"),
        ({**NAMED, "params": [1]}, "optimizer.params: got [1]; an object is needed"),
        ({**NAMED, "params": {"lr": "auto"}}, 'optimizer.params.lr: got "auto"'),
        ({**NAMED, "params": {"maxrank": 4}}, "optimizer.params.maxrank: unknown key; did you"),
        ({**NAMED, "params": {"max_rank": 0}}, "optimizer.params.max_rank: got 0"),
        ({**NAMED, "params": {"max_grad_norm": 1}}, "set the top-level key 'gradient_clipping'"),
    ],
)
def test_a_faulty_optimizer_section_is_named(section: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer_settings({"optimizer": section})
    assert message in str(caught.value)


# --- refusals --------------------------------------------------------------------------------

BF16 = {"bf16": {"enabled": True}}
BF16_MASTER = {"enabled": True, "bf16_master_weights_and_grads": True}
REFUSED = {
    "fp16.enabled": {"fp16": {"enabled": True}},
    "torch_autocast.dtype": {"torch_autocast": {"enabled": True, "dtype": "float16"}, **zero(1)},
    "data_types.grad_accum_dtype": {**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero_optimization.elastic_checkpoint": zero(1, elastic_checkpoint=True),
    "checkpoint.load_universal": {
        "checkpoint": {"load_universal": True},
        **zero(2, round_robin_gradients=True),
    },
    "zero_optimization.offload_optimizer.device": {
        "optimizer": NAMED,
        **zero(3, offload_optimizer={"device": "nvme", "nvme_path": "swap"}),
    },
    "zero_optimization.offload_optimizer.ratio": {
        "optimizer": NAMED,
        **zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    },
    "zero_optimization.offload_optimizer.super_offload": {
        "optimizer": NAMED,
        **zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
    },
    "zero_optimization.zenflow": zero(2, zenflow={}),
    "zero_force_ds_cpu_optimizer": zero(2, offload_optimizer=OFFLOAD),
    "fp16.fp16_master_weights_and_grads": {
        "fp16": {"enabled": True, "fp16_master_weights_and_grads": True},
        **zero(2),
    },
    "bf16.bf16_master_weights_and_grads": {"bf16": BF16_MASTER, **zero(2)},
    "compile.offload_opt_states": {"compile": {"deepcompile": True, "offload_opt_states": True}},
    "tensor_parallel.autotp_size": {"tensor_parallel": {"autotp_size": 2}},
    "expert_parallel.autoep_size": {"expert_parallel": {"enabled": True, "autoep_size": 4}},
    "zero_optimization.zero_quantized_weights": zero(3, zero_quantized_weights=True),
    "zero_optimization.zero_quantized_nontrainable_weights": zero(
        3, zero_quantized_nontrainable_weights=True
    ),
    "zero_optimization.zero_quantized_gradients": zero(3, zero_quantized_gradients=True),
}


def test_every_rule_has_an_example() -> None:
    assert [rule.path for rule in RULES] == list(REFUSED)


@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_unsupported(REFUSED[path], cuda=False)
    message = str(caught.value)
    assert message.startswith(f"{path}: got ")
    assert message.count("; ") >= 2, "the value, the reason and the remedy are needed"
    assert "\n" not in message


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"fp16": {"enabled": True}, **zero(1)},
        {"fp16": {"enabled": "auto"}, **zero(0)},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, **zero(1)},
        {"torch_autocast": {"enabled": True, "dtype": "float16"}, **zero(0)},
        {**BF16, "data_types": {"grad_accum_dtype": "bfloat16"}},
        {**BF16, "data_types": {"grad_accum_dtype": "fp32"}, **zero(1)},
        zero(1, elastic_checkpoint=False),
        {"optimizer": NAMED, **zero(2, offload_optimizer=OFFLOAD)},
        {"zero_force_ds_cpu_optimizer": False, **zero(2, offload_optimizer=OFFLOAD)},
        zero(2, offload_optimizer={"device": "none"}),
        {"bf16": {**BF16_MASTER, "bf16_optimizer_states": True}, **zero(2)},
        zero(3, zero_hpz_partition_size=2),
        {"prescale_gradients": True, "communication_data_type": "fp32"},
        {"expert_parallel": {"enabled": False, "autoep_size": 4}},
        {"tensor_parallel": {"autotp_size": 1}},
        {"zero_optimization": True},
    ],
)
def test_what_can_work_is_left_alone(config: dict[str, Any]) -> None:
    refuse_unsupported(config, cuda=False)


def test_quantized_communication_is_for_cuda() -> None:
    refuse_unsupported(zero(3, zero_quantized_gradients=True), cuda=True)


def test_the_deprecated_offload_key_counts() -> None:
    with pytest.raises(
        ConfigError, match="zero_force_ds_cpu_optimizer: got nothing, which means true; "
    ):
        refuse_unsupported(zero(2, cpu_offload=True), cuda=False)


def test_all_faults_are_told_at_once() -> None:
    config = {"gradient_cliping": 1.0, "fp16": {"enabled": True}, **zero(0)}
    with pytest.raises(ConfigError) as caught:
        refuse_unsupported(config, cuda=False)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "gradient_cliping",
        "fp16.enabled",
    ]


@pytest.mark.parametrize("stage", [4, -1, "2", "auto", True, 1.0, None])
def test_the_stage_is_a_number_from_0_to_3(stage: Any) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage: got .*; 0, 1, 2 or 3 is"):
        refuse_unsupported({"zero_optimization": {"stage": stage}}, cuda=False)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("optimiser", "optimizer"),
        ("bf_16", "bf16"),
    ],
)
def test_a_misspelled_section_is_an_error(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: unknown key, .*did you mean '{meant}'"):
        refuse_unsupported({key: {}}, cuda=False)


@pytest.mark.parametrize("key", ["model", "data", "tokenizer", "our_run", "lora", "amp"])
def test_a_section_of_the_users_own_passes(key: str) -> None:
    refuse_unsupported({key: {}}, cuda=False)


# --- defaults --------------------------------------------------------------------------------


def test_surprising_defaults_are_told() -> None:
    clipping, stage = warn_defaults({"zero_optimization": {"overlap_comm": True}})
    assert clipping.startswith("gradient_clipping: not set")
    assert stage.startswith("zero_optimization.stage: not set")


@pytest.mark.parametrize("config", [zero(0), zero(2), {"zero_optimization": True}])
def test_explicit_settings_are_not_commented(config: dict[str, Any]) -> None:
    assert warn_defaults({"gradient_clipping": 0.0, **config}) == []
