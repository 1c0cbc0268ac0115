"""Model sizes, the job's configuration, and the learning rate's course."""

from __future__ import annotations

import json

import pytest
import torch

from arg_dist.cli.parsing import InputError, parse_overrides
from arg_dist.config import ConfigError
from arg_dist.planning.llama import LLAMA_SIZES, model_config
from launchers.pretraining.job_config import (
    choose_optimizer,
    read_deepspeed_config,
    set_batch,
    set_optimizer,
)
from launchers.pretraining.models import build_model, count_parameters, zero_stage
from launchers.pretraining.schedule import warmup_cosine

pytestmark = pytest.mark.unit


def test_nano_has_about_three_million_parameters_and_repeatable_weights():
    config = model_config("nano", vocab_size=258, length=128)
    model = build_model("nano", config, seed=1, deepspeed_config={})
    assert 2.5e6 < count_parameters(model) < 3.5e6
    again = build_model("nano", config, seed=1, deepspeed_config={})
    other = build_model("nano", config, seed=2, deepspeed_config={})
    weight, same, different = (each.lm_head.weight for each in (model, again, other))
    assert torch.equal(weight, same)
    assert not torch.equal(weight, different)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("name", "millions"), [("60m", 58), ("130m", 134), ("350m", 368), ("1b", 1339), ("7b", 6738)]
)
def test_sizes_have_the_parameters_of_the_galore_paper(name, millions):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = model_config(name, vocab_size=32000, length=256)
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.005)


def test_a_checkpoint_directory_brings_its_weights(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    saved = LlamaForCausalLM(tiny)
    saved.save_pretrained(tmp_path)
    config = model_config(str(tmp_path), vocab_size=258, length=64)
    loaded = build_model(str(tmp_path), config, seed=0, deepspeed_config={})
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    with pytest.raises(ConfigError, match="has 258 tokens, but the tokenizer has 300"):
        model_config(str(tmp_path), vocab_size=300, length=64)
    with pytest.raises(ConfigError, match=r"--seq-len 65: .* has only 64 positions"):
        model_config(str(tmp_path), vocab_size=258, length=65)


def test_an_unknown_model_is_told_with_the_known_ones():
    with pytest.raises(
        ConfigError, match="61m: neither a path nor one of " + ", ".join(LLAMA_SIZES)
    ):
        model_config("61m", vocab_size=258, length=8)


def test_the_json_loses_its_autos(tmp_path):
    path = tmp_path / "ds.json"
    section = {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6}}
    path.write_text(json.dumps({"train_batch_size": "auto", "optimizer": section}))
    config = read_deepspeed_config(str(path))
    assert config == {"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ('{"a":', "not valid JSON"), ("[]", "an object is needed")],
)
def test_an_unusable_json_is_told(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_deepspeed_config(str(path))


@pytest.mark.parametrize(
    ("given", "wanted", "world_size", "expected"),
    [
        ({"train_batch_size": 16}, None, 1, (16, 16, 1)),
        ({"train_batch_size": 16}, None, 4, (16, 4, 1)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 2}, None, 2, (16, 4, 2)),
        ({"train_micro_batch_size_per_gpu": 4}, None, 2, (8, 4, 1)),
        ({"train_micro_batch_size_per_gpu": 4, "train_batch_size": 16}, None, 1, (16, 4, 4)),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
            32, 2, (32, 4, 4),
        ),
    ],
)  # fmt: skip
def test_what_the_batch_leaves_open_follows(given, wanted, world_size, expected):
    config = dict(given)
    assert set_batch(config, wanted, world_size) == expected
    assert tuple(config[key] for key in (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    )) == expected  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no batch size"),
        ({"train_batch_size": 16}, "16 sequences cannot be divided among 3 processes"),
        ({"train_batch_size": 0}, "train_batch_size: a whole number of at least 1"),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3}, "not divisible into micro"),
    ],
)
def test_batches_that_do_not_multiply_up_are_told(given, message):
    with pytest.raises(InputError, match=message):
        set_batch(given, None, 3)


def test_overrides_are_json_or_text():
    assert parse_overrides(["energy=0.8", "side=left", "betas=[0.9,0.95]"]) == {
        "energy": 0.8, "side": "left", "betas": [0.9, 0.95],
    }  # fmt: skip
    with pytest.raises(InputError, match="--set energy: expected key=value"):
        parse_overrides(["energy"])


def test_one_json_serves_both_optimizers():
    section = {"type": "AdaRankGrad", "params": {"lr": 1e-3, "max_rank": 48, "eps": 1e-6}}
    config = {"optimizer": section}
    assert choose_optimizer(config, None) == "adarankgrad"
    settings = set_optimizer(config, "adarankgrad", {"energy": 0.8}, lr=None)
    assert (settings["energy"], settings["max_rank"], settings["min_rank"]) == (0.8, 48, 4)
    with pytest.raises(InputError, match=r"optimizer\.params\.enrgy: unknown key; did you mean"):
        set_optimizer(config, "adarankgrad", {"enrgy": 0.8}, lr=None)
    set_optimizer(config, "adamw", {}, lr=2e-3)
    params = {"lr": 2e-3, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}
    assert config["optimizer"] == {"type": "AdamW", "params": params}
    with pytest.raises(InputError, match="--set max_rank: adamw accepts only lr"):
        set_optimizer(config, "adamw", {"max_rank": 8}, lr=None)
    with pytest.raises(InputError, match="got 'lamb'"):
        choose_optimizer({"optimizer": {"type": "Lamb"}}, None)


def test_the_zero_stage_is_read_from_the_json():
    assert zero_stage({}) == 0
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3


def test_the_learning_rate_warms_up_and_ends_at_its_share():
    course = [warmup_cosine(s, steps=100, warmup=10, min_lr_ratio=0.1) for s in range(100)]
    assert course[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(course) == course[10] == 1.0
    assert course[-1] == pytest.approx(0.1)
    assert course[10:] == sorted(course[10:], reverse=True)
