"""What an optimizer keeps, counted by hand and by the rule; ranks that move."""

import pytest
import torch
from torch import nn

from arg_dist.config import rank_of
from benchmarks.compare.counting import Bytes, StateCount, count, tensors_in
from benchmarks.compare.measuring import flap
from benchmarks.compare.methods import PUBLISHED, Method
from benchmarks.compare.optimizers import low_rank_matrices, prepare


class Holder:
    """An object with attributes, like a projector."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class Slotted:
    __slots__ = ("basis", "unset")

    def __init__(self, basis: torch.Tensor) -> None:
        self.basis = basis


def test_every_tensor_counts_once_wherever_it_lies():
    whole = torch.zeros(8, 8)
    view, step = whole[:2], torch.tensor(3.0)
    state = {
        "moments": [torch.zeros(5), (torch.zeros(3, dtype=torch.bfloat16),)],
        "projector": Holder(basis=view, inner=Holder(again=view), kind=Holder, name="std"),
        "slotted": Slotted(whole[4:6]),
        "step": step,
        "same": step,
        "number": 7,
    }
    state["itself"] = state
    assert len(list(tensors_in(state))) == 5
    # views count their own elements, and their storage once
    assert count(state) == Bytes(4 * (5 + 16 + 16 + 1) + 2 * 3, 4 * (5 + 64 + 1) + 2 * 3)


def test_galores_state_is_what_its_projector_keeps_alive():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.LayerNorm(12))
    training = prepare(
        Method("galore", "galore", {**PUBLISHED["galore"], "rank": 2}),
        model,
        lr=1e-2,
        weight_decay=0.0,
    )
    counted = StateCount(training.counted)
    model(torch.randn(4, 8)).square().sum().backward()
    training.optimizers[0].step()
    counted.look(training.optimizers)
    # the projector's 2 x 8 of an 8 x 8, and two moments of 12 x 2; the norm's moments beside it
    assert counted.now == Bytes(4 * (16 + 48), 4 * (64 + 48))
    assert counted.now_all == Bytes(4 * (16 + 48 + 2 * 24), 4 * (64 + 48 + 2 * 24))
    record = counted.as_json(matrix_elements=training.matrix_elements, elements=training.elements)
    assert record["matrices"]["adamw"] == 8 * 96
    assert record["all"]["adamw"] == 8 * (96 + 24)


def test_the_peak_outlives_what_was_let_go():
    parameter = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.SGD([parameter], lr=1)
    counted = StateCount([parameter])
    optimizer.state[parameter]["buffer"] = torch.zeros(10)
    counted.look([optimizer])
    optimizer.state[parameter]["buffer"] = torch.zeros(4)
    counted.look([optimizer])
    assert (counted.peak, counted.now) == (Bytes(40, 40), Bytes(16, 16))


def test_flap_is_of_the_second_half_and_a_median_over_matrices():
    ranks = {
        "still": [(1, 8, 0.9), (60, 8, 0.9), (90, 8, 0.9)],
        "moves": [(1, 90, 0.9), (40, 10, 0.9), (60, 12, 0.9), (90, 9, 0.9)],
        "wild": [(1, 4, 0.9), (80, 8, 0.9)],
        "fixed": [(1, 4, 0.9)],
    }
    assert flap(ranks, 100) == pytest.approx((2 / 10 + 3 / 12) / 2)
    assert flap({"fixed": [(1, 4, 0.9)]}, 100) is None


def test_a_rank_is_a_number_or_a_share_of_the_shorter_side():
    assert [rank_of(rank, 32) for rank in (4, 64, 0.125, 0.001)] == [4, 32, 4, 1]


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


FAMILIES = {
    "adamw": PUBLISHED["adamw"],
    "galore": {**PUBLISHED["galore"], "rank": 0.25},
    "apollo": {**PUBLISHED["apollo"], "rank": 0.25},
    "fira": {**PUBLISHED["fira"], "rank": 0.25},
    "muon": PUBLISHED["muon"],
    "normuon": PUBLISHED["normuon"],
    "soap": PUBLISHED["soap"],
    "adarankgrad": {"max_rank": 0.25},
}


def require(family: str) -> None:
    if family in ("normuon", "soap"):
        pytest.importorskip("pytorch_optimizer")


SCALAR = 4
SCALARS = {"galore": 0, "apollo": 1, "fira": 1, "adarankgrad": 4}
"""Single numbers kept for each matrix, such as the norm of a growth limiter; ours: at most."""


@pytest.mark.parametrize("family", FAMILIES)
def test_each_method_trains_all_parameters_and_projects_the_same_matrices(llama, family):
    require(family)
    matrices = low_rank_matrices(llama)
    assert sorted(matrices) == sorted(
        name for name, p in llama.named_parameters() if p.ndim == 2 and "layers" in name
    )
    training = prepare(Method(family, family, FAMILIES[family]), llama, lr=1e-3, weight_decay=0.0)
    assert {id(p) for p in training.counted} == {id(p) for p in matrices.values()}
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    ids = torch.arange(32).reshape(2, 16)
    counted = StateCount(training.counted)
    for _ in range(2):  # Muon's momentum and our warm start begin at once, too; SOAP's do not
        llama(input_ids=ids, labels=ids).loss.backward()
        for optimizer in training.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    counted.look(training.optimizers)
    assert all(not torch.equal(p, before[name]) for name, p in llama.named_parameters())
    adamw = 8 * training.matrix_elements
    if family == "adamw":
        assert counted.peak.logical == adamw + SCALAR * len(matrices)
    elif family == "muon":
        assert counted.peak.logical == adamw / 2
    elif family == "normuon":  # and a number for each row
        assert counted.peak.logical == adamw / 2 + 4 * sum(len(p) for p in matrices.values())
    elif family == "soap":  # and a statistic and a basis for each side
        sides = sum(side**2 for p in matrices.values() for side in p.shape)
        assert counted.peak.logical == adamw + 2 * 4 * sides
    else:
        # at rank 4: a basis on the shorter side, two moments on the longer one
        short_and_long = [sorted(p.shape) for p in matrices.values()]
        rule = sum(4 * 4 * (short + 2 * long) for short, long in short_and_long)
        scalars = SCALAR * SCALARS[family] * len(matrices)
        if family == "adarankgrad":  # its rank may be lower
            assert 0 < counted.peak.logical <= rule + scalars
        else:
            assert counted.peak.logical == rule + scalars


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_spares_norms_and_biases(llama, family):
    require(family)
    method = Method(family, family, FAMILIES[family])
    training = prepare(method, llama, lr=1e-3, weight_decay=0.1)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            expected = 0.0 if all(p.ndim < 2 for p in group["params"]) else 0.1
            assert group["weight_decay"] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_has_a_rate_and_betas_of_its_own(llama, family):
    require(family)
    matrices = {id(p) for p in low_rank_matrices(llama).values()}
    method = Method(family, family, FAMILIES[family])
    training = prepare(method, llama, lr=1e-3, rest_lr=5e-3, weight_decay=0.1)
    seen = set()
    for group in (group for each in training.optimizers for group in each.param_groups):
        inside = {id(p) in matrices for p in group["params"]}
        assert len(inside) == 1
        assert group["lr"] == (1e-3 if inside == {True} else 5e-3)
        if inside == {False} and family != "adarankgrad":
            assert tuple(group["betas"]) == (0.9, 0.95)
        seen |= {id(p) for p in group["params"]}
    assert seen == {id(p) for p in llama.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rate_serves_for_all_where_no_other_is_given(llama, family):
    require(family)
    training = prepare(Method(family, family, FAMILIES[family]), llama, lr=1e-3, weight_decay=0.0)
    groups = [group for each in training.optimizers for group in each.param_groups]
    assert {group["lr"] for group in groups} == {1e-3}
    rest = [g for g in groups if g["params"][0].ndim < 2]
    assert rest


def test_lora_trains_adapters_of_the_same_matrices_and_the_heads():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    shapes = [p.shape for p in low_rank_matrices(model).values()]
    assert len(shapes) == 6
    settings = {**PUBLISHED["lora"], "rank": 0.25}
    method = Method("lora", "lora", settings)
    training = prepare(method, model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0)
    assert sum(p.numel() for p in training.counted) == sum(4 * (m + n) for m, n in shapes)
    assert training.matrix_elements == sum(m * n for m, n in shapes)
    trained = {name for name, p in training.model.named_parameters() if p.requires_grad}
    rest = {name for name in trained if "lora_" not in name}
    assert len(rest) == 4 and all("pooler" in name or "classifier" in name for name in rest)
