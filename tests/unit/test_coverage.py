"""How much is trained in low rank is told at the first step, and what may be an oversight."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from one_process import parameters_of
from torch import nn

from arg_dist import AdaRankGrad, param_groups
from arg_dist.uses import tables_by_shape, use_by_name


class Net(nn.Module):
    """A layer, a table, a head, and something of one's own."""

    def __init__(self, own: tuple[int, ...] = (32, 16), name: str = "mixing") -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.layer = nn.Linear(16, 32)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.inner = nn.Module()
        self.inner.register_parameter(name, nn.Parameter(torch.zeros(own)))


def first_step(optimizer: AdaRankGrad) -> list[str]:
    """The warnings of the first step."""
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    return [str(warning.message) for warning in caught]


def of(model: nn.Module, *, max_rank: float | int = 0.25, **patterns) -> list[str]:
    return first_step(AdaRankGrad(param_groups(model, **patterns), max_rank=max_rank))


def test_one_line_tells_what_is_in_low_rank_and_what_is_not(caplog):
    with caplog.at_level(logging.INFO, "arg_dist"):
        assert of(Net(name="weight")) == []
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "AdaRankGrad trains 2 matrices in low rank, 43.8 % of 2,336 weights; full-rank Adam "
        "trains embeddings 27.4 %, output heads 27.4 %, norms, biases and other vectors 1.37 %"
    )


def test_a_tensor_of_unknown_use_is_told_with_the_targets_that_train_it():
    (warning,) = of(Net())
    assert "full-rank Adam trains 50 % of the weights of matrices" in warning
    assert "inner.mixing (32, 16)" in warning and "targets=['inner', 'layer']" in warning
    assert of(Net(), targets=["inner", "layer"]) == []


@pytest.mark.parametrize("patterns", [{"targets": ["layer"]}, {"exclude": ["inner", "lm_head"]}])
def test_what_was_left_on_purpose_is_not_told(patterns):
    assert of(Net(), **patterns) == []


def test_little_is_not_told():
    assert of(Net(own=(2, 16))) == []


def test_convolutions_are_told_with_the_argument_that_trains_them():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    (warning,) = of(model)
    assert "0.weight (8, 8, 3, 3). To train them" in warning and "convolutions=True" in warning
    assert of(model, convolutions=True) == []


def test_a_max_rank_that_leaves_everything_to_adam_is_told():
    (warning,) = of(Net(own=(2, 16)), max_rank=64)
    assert "trains 100 % of the weights" in warning and "lower max_rank" in warning


def test_groups_that_say_what_is_low_rank_are_taken_at_their_word():
    model = Net()
    groups = [
        {"params": [model.layer.weight], "low_rank": True},
        {"params": [model.table.weight, model.inner.mixing], "low_rank": False},
    ]
    assert first_step(AdaRankGrad(groups)) == []


@pytest.mark.parametrize("named", [False, True])
def test_bare_parameters_are_told_that_nothing_is_known_of_the_model(named):
    model = Net()
    parameters = model.named_parameters() if named else model.parameters()
    (warning,) = first_step(AdaRankGrad(parameters))
    assert "every tensor of two or more dimensions is trained in low rank" in warning
    assert "Pass the model (AdaRankGrad(model, ...))" in warning
    assert ("but for embeddings and output heads: lm_head.weight (40, 16)." in warning) == named


def test_embeddings_and_heads_are_recognized_without_the_model():
    shapes = [(500, 32), (32, 32), (32,), (96, 32), (32, 96), (500, 32)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = AdaRankGrad(weights, max_rank=4, min_rank=1)
    (warning,) = first_step(optimizer)
    assert "group0.param0 (500, 32), group0.param5 (500, 32)." in warning
    assert len(optimizer.stats()) == 3
    low_rank = AdaRankGrad(weights, max_rank=4, min_rank=1, low_rank=True)
    assert first_step(low_rank) == [] and len(low_rank.stats()) == 5


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("tok_embeddings.weight", "embedding"),
        ("encoder.wordEmbeddings.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("classifier.out_proj.weight", "head"),
        ("bert.encoder.layer.0.attention.self.query.weight", None),
        ("encoder.layer.0.output.dense.weight", None),
        ("layers.0.mlp.up_proj.weight", None),
        ("layers.0.attn.head_proj.weight", None),
    ],
)
def test_what_names_say_of_matrices(name, use):
    assert use_by_name(name, (64, 32)) == use
    assert use_by_name(name, (64,)) is None


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(500, 32), (500, 16), (32, 32), (96, 32), (32, 96)], set()),  # two tables at the front
        ([(100, 784), (100,), (50, 100), (20, 50), (10, 20)], set()),  # a perceptron
        ([(96, 32), (32, 96), (32, 32), (32, 32)], set()),
        ([(500, 32), (40, 32), (32, 32), (96, 32), (32, 96)], {0}),  # tied
        ([(500, 32), (32, 32), (500, 32)], set()),  # too few to tell
        ([(64, 3, 7, 7), (64,), (1000, 512)], set()),
    ],
)
def test_what_shapes_say_of_matrices(shapes, found):
    assert tables_by_shape(shapes) == found


def test_a_model_stands_for_its_groups():
    one, other = (
        AdaRankGrad(Net(), lr=0.1, exclude=["layer"]),
        AdaRankGrad(param_groups(Net(), exclude=["layer"]), lr=0.1),
    )
    for ours, theirs in zip(one.param_groups, other.param_groups, strict=True):
        ours, theirs = dict(ours), dict(theirs)
        assert [p.shape for p in ours.pop("params")] == [p.shape for p in theirs.pop("params")]
        assert {**ours, "exclude": None} == {**theirs, "exclude": None}
    assert first_step(one) == first_step(other)


def test_names_that_an_engine_brings_are_as_good_as_a_model():
    model = Net()
    optimizer = AdaRankGrad(list(model.parameters()))
    uses = {"table.weight": "embedding", "lm_head.weight": "head", "inner.mixing": "other"}
    names = {f"group0.param{i}": name for i, (name, _) in enumerate(model.named_parameters())}
    optimizer.adopt_names(names, list(uses), {**uses, "layer.weight": "matrix"})
    (warning,) = first_step(optimizer)
    assert "inner.mixing (32, 16)" in warning


def test_a_tensor_of_the_model_itself_is_trained_by_a_group_of_its_own():
    model = Net()
    model.mix = nn.Parameter(torch.randn(32, 32))
    [told] = of(model)
    assert "mix (32, 32)" in told
    assert "low_rank=True" in told


def test_complex_tensors_are_not_told_as_matrices_left_to_adam(caplog):
    model = Net()
    model.register_parameter("mix", nn.Parameter(torch.randn(32, 32, dtype=torch.complex64)))
    with caplog.at_level("INFO", "arg_dist"):
        assert not [told for told in of(model) if "mix (" in told]
    assert "complex tensors" in caplog.text
