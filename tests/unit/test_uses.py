"""What is a matrix is told by what modules do with it: experts, attention, recurrence, heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from arg_dist import classify, param_groups
from arg_dist.config import AdaRankGradConfig
from arg_dist.model_groups import uses
from arg_dist.parameter_groups import trained_views

E, D, F = 4, 16, 24


def kept_weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def module_of(name: str = "Bare", **parameters: nn.Parameter | nn.Module) -> nn.Module:
    """A module of a class of that name that holds these."""
    module: nn.Module = type(name, (nn.Module,), {})()
    for key, value in parameters.items():
        setattr(module, key, value)
    return module


def matrices(model: nn.Module, **patterns) -> set[str]:
    return {name for name, kind in classify(model, **patterns).items() if kind == "matrix"}


MIXTURES = {
    "MixtralConfig": dict(num_local_experts=8),
    "Qwen3MoeConfig": dict(num_experts=8, moe_intermediate_size=64, head_dim=16),
    "GptOssConfig": dict(num_local_experts=8, head_dim=16),
}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request):
    import transformers

    is_fused = int(transformers.__version__.split(".")[0]) >= 5
    if not is_fused or not hasattr(transformers, request.param):
        pytest.skip(f"transformers {transformers.__version__} has no fused {request.param}")
    config = getattr(transformers, request.param)(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        **MIXTURES[request.param],
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_fused_experts_of_transformers_are_stacks_of_matrices(mixture):
    found = uses(mixture)
    experts = {name for name, p in mixture.named_parameters() if ".experts." in name}
    assert {name for name in experts if found[name] == "matrix"} == {
        name for name in experts if name.endswith("_proj")
    }
    assert {found[name] for name in experts if name.endswith("bias")} <= {"vector"}
    routers = {name for name, use in found.items() if use == "router"}
    assert len(routers) == 2 and all(".mlp." in name for name in routers)
    shape = tuple(mixture.get_parameter("model.layers.0.mlp.experts.down_proj").shape)
    views = trained_views("x", shape, AdaRankGradConfig())
    assert len(views) == 8 and {(view.rows, view.columns) for view in views} == {shape[1:]}


def test_experts_that_are_named_keep_their_biases_full_rank(mixture):
    named = matrices(mixture, targets=["self_attn", "experts"])
    assert {name for name in named if "experts" in name} == {
        name for name, p in mixture.named_parameters() if ".experts." in name and p.ndim == 3
    }


EXPERTS = {
    "by the name of the class": module_of("GroupedExperts", w1=kept_weight(E, F, D)),
    "by the name of the module": module_of(experts=module_of(htoh4=kept_weight(E, D, F))),
    "by a count": module_of(inner=module_of("Mixture", num_experts=E, up=kept_weight(E, D, F))),
    "by the name of the weight": module_of(net=module_of(mlp1_weight=kept_weight(E, F, D))),
    "flat": module_of("ExpertGLU", num_experts=E, v1=kept_weight(E * F, D)),
    "in a list": module_of(
        experts=module_of(w1=nn.ParameterList(kept_weight(D, F) for _ in range(E)))
    ),
    "in a dictionary": module_of(experts=nn.ParameterDict({"w1": kept_weight(E, D, F)})),
    "one module each": module_of(experts=nn.ModuleList(nn.Linear(D, F, False) for _ in range(E))),
}


@pytest.mark.parametrize("how", EXPERTS)
def test_experts_are_recognized(how):
    model = EXPERTS[how]
    assert matrices(model) == {name for name, _ in model.named_parameters()}


PRODUCTS = {
    "attention": (nn.MultiheadAttention(D, 4), {"in_proj_weight", "out_proj.weight"}),
    "attention of other sizes": (
        nn.MultiheadAttention(D, 4, kdim=8, vdim=8, add_bias_kv=True),
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
    ),
    "encoder": (
        nn.TransformerEncoderLayer(D, 4, F),
        {f"self_attn.{name}" for name in ("in_proj_weight", "out_proj.weight")}
        | {"linear1.weight", "linear2.weight"},
    ),
    "bilinear": (nn.Bilinear(8, 6, D), {"weight"}),
    "LSTM": (
        nn.LSTM(D, F, proj_size=8),
        {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"},
    ),
    "cell": (nn.GRUCell(D, F), {"weight_ih", "weight_hh"}),
    "a linear layer of somebody's own": (
        module_of("ColumnParallelLinear", weight=kept_weight(F, D), bias=kept_weight(F)),
        {"weight"},
    ),
    "spectral norm": (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(D, F))),
        {"0.parametrizations.weight.original"},
    ),
    "convolution of one": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(D, F, 3))),
                           set()),
}  # fmt: skip


@pytest.mark.parametrize("what", PRODUCTS)
def test_weights_of_products_are_matrices_and_biases_are_not(what):
    model, expected = PRODUCTS[what]
    assert matrices(model) == expected


@pytest.mark.parametrize(
    ("class_name", "name", "shape", "use"),
    [
        ("Model", "pos_embed", (1, 65, D), "embedding"),
        ("Model", "relative_position_bias_table", (225, 4), "embedding"),
        ("Model", "query_tokens", (2, 32, D), "embedding"),
        ("Model", "latents", (64, D), "embedding"),
        ("VocabEmbedding", "weight", (100, D), "embedding"),
        ("Model", "cls", (1, 1, D), "vector"),
        ("Mixer", "A_log", (32, D), "vector"),
        ("Block", "layer_scale", (D, 1, 1), "vector"),
        ("Block", "gate_up_proj_bias", (E, D), "vector"),
        ("LayerNorm2d", "weight", (D, 8), "vector"),
        ("TopKRouter", "weight", (E, D), "router"),
        ("ShortConvolution", "weight", (D, 1, 4), "convolution"),
        ("CodebooksHead", "weight", (8, D, F), "head"),
        ("Attention", "q", (D, 4, 8), "other"),
        ("HyperConnection", "fn", (24, D), "other"),
        ("Mixture", "weight", (2, E, D, F), "other"),
    ],
)
def test_tables_gains_and_what_is_not_known_stay_full_rank(class_name, name, shape, use):
    model = module_of(block=module_of(class_name, **{name: kept_weight(*shape)}))
    assert uses(model) == {f"block.{name}": use}
    assert classify(model) == {f"block.{name}": "rest"}


def test_a_linear_layer_next_to_experts_with_an_output_for_each_is_a_router():
    blocks = [nn.Linear(D, F) for _ in range(E)]
    mixture = module_of(gate=nn.Linear(D, E), latent=nn.Linear(D, 8), experts=nn.ModuleList(blocks))
    found = uses(module_of(mlp=mixture))
    assert found["mlp.gate.weight"] == "router"
    assert found["mlp.latent.weight"] == found["mlp.experts.0.weight"] == "matrix"
    assert classify(module_of(mlp=mixture), targets=["mlp"])["mlp.gate.weight"] == "matrix"


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(D, D)
        layers = [nn.Linear(D, F), nn.ReLU(), nn.Linear(F, F), nn.ReLU(), nn.Linear(F, 10)]
        self.classifier = nn.Sequential(*layers)


class Sized(nn.Module):
    """A model whose configuration, or a method, tells its head."""

    def __init__(self, labels: int, own: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.fc = nn.Linear(D, 10)
        self.config = type("Config", (), {"num_labels": labels})()
        if own:
            self.get_classifier = lambda: self.fc


HEADED = {
    "the last of a sequence": (Vgg(), {"classifier.4.weight"}),
    "the last of a module": (
        module_of(classifier=module_of(dense=nn.Linear(D, D), out_proj=nn.Linear(D, 3))),
        {"classifier.out_proj.weight"},
    ),
    "of each task": (
        module_of(classifier=nn.ModuleDict({"a": nn.Linear(D, 3), "b": nn.Linear(D, 2)})),
        {"classifier.a.weight", "classifier.b.weight"},
    ),
    "by its size": (Sized(labels=10), {"fc.weight"}),
    "of another size": (Sized(labels=7), set()),
    "by its method": (Sized(labels=7, own=True), {"fc.weight"}),
    "by the name of the last layer": (
        module_of(body=nn.Linear(D, D), heads=nn.Sequential(nn.Linear(D, 5))),
        {"heads.0.weight"},
    ),
    "not inside a repeated block": (
        module_of(layers=nn.ModuleList(module_of(score=nn.Linear(D, D)) for _ in range(3))),
        set(),
    ),
    "not inside blocks in a sequence": (
        nn.Sequential(*(nn.ModuleDict({"score": nn.Linear(D, D)}) for _ in range(3))),
        set(),
    ),
}


@pytest.mark.parametrize("which", HEADED)
def test_heads_are_the_last_layers_of_what_is_called_so(which):
    model, heads = HEADED[which]
    found = uses(model)
    assert {name for name, use in found.items() if use == "head" and use != "vector"} == heads
    weights = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices(model) == weights - heads


def test_adapters_inside_a_head_and_beside_it_follow_the_rules_of_linear_layers():
    peft = pytest.importorskip("peft")
    model = module_of(body=nn.Linear(D, F), classifier=nn.Linear(F, 3))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=["body"], modules_to_save=["classifier"])
    )
    found = uses(adapted)
    assert {name.split(".")[-3]: use for name, use in found.items() if "lora" in name} == {
        "lora_A": "matrix", "lora_B": "matrix",
    }  # fmt: skip
    assert {use for name, use in found.items() if "classifier" in name and "weight" in name} == {
        "head"
    }


def test_a_parameter_with_two_uses_has_the_one_that_keeps_it_full_rank():
    model = module_of(table=nn.Embedding(10, D), layer=nn.Linear(D, 10, bias=False))
    model.layer.weight = model.table.weight
    assert uses(model) == {"table.weight": "embedding"}


def test_wrappers_change_no_use():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def build() -> nn.Module:
        experts = module_of("Experts", num_experts=E, w1=kept_weight(E, D, F))
        mlp = module_of(gate=nn.Linear(D, E), experts=experts)
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))
        return module_of(layers=nn.ModuleList([module_of(mlp=mlp, normed=normed)]))

    plain, wrapped = build(), build()
    block = wrapped.layers[0]
    block.mlp.experts = checkpoint_wrapper(block.mlp.experts)
    block.normed = checkpoint_wrapper(block.normed)
    wrapped.layers[0] = checkpoint_wrapper(block)
    assert uses(wrapped) == uses(plain)
    assert set(uses(plain).values()) == {"matrix", "router", "vector"}


def test_the_planner_counts_the_matrices_of_experts(mixture, tmp_path):
    from arg_dist.planning.model import load_model, matrix_names

    mixture.config.save_pretrained(tmp_path)
    planned = load_model(str(tmp_path), AdaRankGradConfig())
    groups = param_groups(mixture)
    names = {
        name for group in groups if group.get("low_rank", True) for name in group["param_names"]
    }
    shapes = {name: tuple(p.shape) for name, p in mixture.named_parameters()}
    counts = {name: 8 if len(shapes[name]) == 3 else 1 for name in names}
    assert len(matrix_names(planned.parameters)) == sum(counts.values())
    assert planned.elements == sum(math.prod(shape) for shape in shapes.values())
