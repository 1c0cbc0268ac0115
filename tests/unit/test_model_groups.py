"""Which parameters of a model are low-rank matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from matrices import gaussian
from torch import nn

from arg_dist import AdaRankGrad, ConfigError, classify, param_groups

ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


class Vision(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4))


def names_of(model: nn.Module, kind: str, **patterns) -> set[str]:
    return {name for name, of_kind in classify(model, **patterns).items() if of_kind == kind}


def test_llamas_attention_and_mlp_are_matrices(llama):
    expected = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ATTENTION + MLP}
    assert names_of(llama, "matrix") == expected
    assert names_of(llama, "rest") == dict(llama.named_parameters()).keys() - expected


def test_gpt2s_conv1d_are_matrices_and_the_tied_embedding_counts_once(gpt2):
    block = "transformer.h.0."
    expected = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert names_of(gpt2, "matrix") == {f"{block}{name}.weight" for name in expected}
    rest = names_of(gpt2, "rest")
    assert {"transformer.wte.weight", "transformer.wpe.weight", f"{block}ln_1.weight"} <= rest
    assert "lm_head.weight" not in rest and gpt2.lm_head.weight is gpt2.transformer.wte.weight


@pytest.mark.parametrize("last", ["output", "output.dense"])
def test_a_last_layer_called_output_is_a_head_as_torchtitan_and_torchtune_name_it(last):
    inner = nn.Linear(6, 12) if last == "output" else nn.ModuleDict({"dense": nn.Linear(6, 12)})
    model = nn.ModuleDict({"tok_embeddings": nn.Embedding(12, 6), "layers": nn.ModuleDict()})
    model["layers"]["0"] = nn.ModuleDict({"output": nn.Linear(6, 6)})
    model["output"] = inner
    expected = {"layers.0.output.weight"} | ({f"{last}.weight"} if "." in last else set())
    assert names_of(model, "matrix") == expected


@pytest.mark.parametrize("first", ["embedding", "decoder"])
def test_an_embedding_that_a_linear_layer_shares_stays_full_rank(first):
    layers = {"embedding": nn.Embedding(12, 6), "decoder": nn.Linear(6, 12, bias=False)}
    layers["decoder"].weight = layers["embedding"].weight
    model = nn.ModuleDict({first: layers.pop(first), **layers})
    assert classify(model) == {f"{first}.weight": "rest"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"targets": ["self_attn"]}, ATTENTION),
        ({"targets": ["layers.*.mlp"]}, MLP),
        ({"targets": ["*_proj"], "exclude": ["mlp"]}, ATTENTION),
        ({"exclude": ["[qkvo]_proj"]}, MLP),
    ],
)
def test_patterns_choose_modules_and_what_lies_inside(llama, patterns, expected):
    assert names_of(llama, "matrix", **patterns) == {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in expected
    }


def test_a_head_that_a_target_names_is_a_matrix(llama):
    assert names_of(llama, "matrix", targets=["lm_head"]) == {"lm_head.weight"}


@pytest.mark.parametrize("key", ["targets", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(llama, key):
    with pytest.raises(ConfigError, match=rf"{key}: the pattern 'q_prj' matches no module.*q_proj"):
        param_groups(llama, **{key: ["mlp", "q_prj"]})


def test_groups_hold_every_parameter_once_with_its_name_and_settings(llama):
    groups = param_groups(llama, max_rank=0.25, weight_decay=0.1)
    assert [group.get("low_rank", True) for group in groups] == [True, False]
    assert all((group["max_rank"], group["weight_decay"]) == (0.25, 0.1) for group in groups)
    named = [
        pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    assert {name: id(p) for name, p in named} == {n: id(p) for n, p in llama.named_parameters()}
    assert len(named) == len(dict(named))
    assert AdaRankGrad(groups).is_classified


def test_convolutions_are_low_rank_on_request_and_flattened():
    assert names_of(Vision(), "convolution") == set()
    assert names_of(Vision(), "convolution", convolutions=True) == {"0.weight"}
    by_view = {group.get("view"): group for group in param_groups(Vision(), convolutions=True)}
    assert by_view["flatten"]["param_names"] == ["0.weight"]


def test_frozen_parameters_are_left_out():
    model = Vision()
    model[2].weight.requires_grad_(False)
    assert "2.weight" not in classify(model)
    with pytest.raises(ConfigError, match="Vision has no trainable parameter"):
        param_groups(model.requires_grad_(False))


def test_bare_parameters_are_named_by_group_and_position():
    groups = [{"params": [nn.Parameter(gaussian(4, 3))]}, {"params": nn.Parameter(gaussian(4))}]
    optimizer = AdaRankGrad(groups)
    assert list(optimizer.parameter_names().values()) == ["group0.param0", "group1.param0"]
    assert not optimizer.is_classified


def test_wrappers_change_no_name(llama):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected = classify(llama)
    assert classify(torch.compile(llama)) == expected
    assert classify(nn.DataParallel(llama)) == expected
    wrapped = copy.deepcopy(llama)
    wrapped.model.layers[0] = checkpoint_wrapper(wrapped.model.layers[0])
    wrapped.model.layers[1].compile()
    assert classify(wrapped) == expected
    groups = param_groups(torch.compile(nn.DataParallel(wrapped)))
    assert {name for group in groups for name in group["param_names"]} == expected.keys()


def test_vectors_may_be_left_undecayed(llama):
    groups = param_groups(llama, weight_decay=0.1, decay_vectors=False)
    of_decay = {d: [p for g in groups if g["weight_decay"] == d for p in g["params"]]
                for d in (0.0, 0.1)}  # fmt: skip
    assert {p.ndim for p in of_decay[0.0]} == {1}
    assert {p.ndim for p in of_decay[0.1]} == {2}
    AdaRankGrad(groups)
