"""Every type, layout and memory format of a parameter: trained as AdamW trains it, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of, train
from tolerances import FP64, LOW_PRECISION, ROUNDING
from torch import nn

from arg_dist import AdaRankGrad, ConfigError
from tests.installed import GRADIENTS_OF_ANY_TYPE

FULL_RANK = {"low_rank": False, "lr": 1e-2, "weight_decay": 0.1}
FREQUENT = {"min_gap": 2, "max_gap": 3, "lr": 1e-2}

TRAINED = {
    torch.float64: FP64,
    torch.float32: ROUNDING,
    torch.bfloat16: LOW_PRECISION,
    torch.float16: LOW_PRECISION,
    torch.complex64: ROUNDING,
    torch.complex128: FP64,
    torch.complex32: LOW_PRECISION,
}
"""How near a step comes to AdamW's, computed in the next wider type that AdamW takes."""

EVERY_TYPE = sorted(
    {each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str
)


def values(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    if dtype.is_complex:
        real = gaussian(*shape, 2, seed=seed).to(torch.float64 if dtype.itemsize == 16 else None)
        return torch.view_as_complex(real.contiguous()).to(dtype)
    return gaussian(*shape, seed=seed).to(dtype)


def adamw(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """What AdamW makes of it; half types are rounded after each step, as the weights are."""
    wide = {torch.complex32: torch.complex64, torch.float16: torch.float32}.get(
        start.dtype, torch.float32 if start.dtype == torch.bfloat16 else start.dtype
    )
    parameter = nn.Parameter(start.to(wide))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, foreach=False)
    for gradient in gradients:
        feed(optimizer, gradient.to(wide))
        parameter.data = parameter.detach().to(start.dtype).to(wide)
    return parameter.detach().to(start.dtype)


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@pytest.mark.parametrize("dtype", EVERY_TYPE, ids=str)
def test_every_type_is_trained_as_by_adamw_or_refused_by_name(dtype):
    try:
        weight = nn.Parameter(torch.zeros(8, 6).to(dtype), requires_grad=True)
    except RuntimeError as error:  # of a type that torch gives no gradients
        words = ("gradients", "not implemented", "quantized")
        assert any(word in str(error) for word in words)
        return
    if dtype not in TRAINED:
        with pytest.raises(ConfigError, match=r"layer\.weight: is of type .*float.*bfloat16"):
            AdaRankGrad([("layer.weight", weight)])
        return
    gradients = [values(dtype, 8, 6, seed=seed) for seed in range(1, 6)]
    start = values(dtype, 8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [ours] = train(optimizer_of(start, **FULL_RANK), [[gradient] for gradient in gradients])
    assert ours.dtype == dtype
    wide = torch.float64 if TRAINED[dtype] is FP64 else torch.float32
    expected = as_reals(adamw(start, gradients)).to(wide)
    difference = (as_reals(ours).to(wide) - expected).abs().max()
    assert difference <= 2 * (TRAINED[dtype].relative or 1e-6) * expected.abs().max()


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_moments_are_as_precise_as_the_weights(dtype, low_rank):
    optimizer = optimizer_of(values(dtype, 8, 6), low_rank=low_rank)
    feed(optimizer, values(dtype, 8, 6, seed=1))
    state = optimizer.state[parameters_of(optimizer)[0]]["w0"]
    by_adam = dtype.is_complex or not low_rank
    assert state["exp_avg"].dtype == (torch.float64 if by_adam else torch.float32)


def test_moments_that_were_saved_in_fp32_go_on_in_fp32():
    first, second = optimizer_of(gaussian(5)), optimizer_of(gaussian(5).double())
    feed(first, gaussian(5, seed=1))
    second.load_state_dict(first.state_dict())
    feed(second, gaussian(5, seed=2).double())
    assert second.state[parameters_of(second)[0]]["w0"]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (7,), (9, 8), (3, 5, 4), (4, 3, 2, 2)])
def test_complex_numbers_are_pairs_of_reals_of_any_shape(shape):
    start = values(torch.complex64, *shape)
    gradients = [values(torch.complex64, *shape, seed=seed) for seed in range(1, 9)]
    optimizer = AdaRankGrad([("z", nn.Parameter(start.clone()))], lr=1e-2, weight_decay=0.1)
    [ours] = train(optimizer, [[gradient] for gradient in gradients])
    [pairs] = train(
        optimizer_of(torch.view_as_real(start), **FULL_RANK),
        [[torch.view_as_real(gradient)] for gradient in gradients],
    )
    assert torch.equal(torch.view_as_real(ours), pairs)
    ROUNDING.check(ours, adamw(start, gradients))
    assert optimizer.stats() == []


@pytest.mark.skipif(not GRADIENTS_OF_ANY_TYPE, reason="torch before 2.10")
def test_a_complex_gradient_may_be_a_conjugate_view_or_real():
    start, gradient = values(torch.complex64, 4, 3), values(torch.complex64, 4, 3, seed=1)
    given = []
    for each in (gradient.conj(), gradient.conj().resolve_conj(), gradient.real):
        optimizer = optimizer_of(start, **FULL_RANK)
        [weight] = parameters_of(optimizer)
        weight.grad_dtype = None
        weight.grad = each
        optimizer.step()
        given.append(weight.detach().clone())
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[2].imag, start.imag * (1 - 1e-3))


@pytest.mark.skipif(not GRADIENTS_OF_ANY_TYPE, reason="torch before 2.10")
def test_a_complex_gradient_of_a_real_parameter_is_refused_by_name():
    optimizer = optimizer_of(gaussian(8, 6))
    [weight] = parameters_of(optimizer)
    weight.grad_dtype = None
    weight.grad = values(torch.complex64, 8, 6)
    with pytest.raises(RuntimeError, match=r"the gradient of w0 is of type torch.complex64"):
        optimizer.step()
    assert torch.equal(weight, gaussian(8, 6))


@pytest.mark.skipif(not GRADIENTS_OF_ANY_TYPE, reason="torch before 2.10")
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_may_be_more_precise_than_its_parameter(dtype, low_rank):
    start, gradient = gaussian(8, 6).bfloat16(), gaussian(8, 6, seed=1).bfloat16()
    ends = []
    for given in (gradient, gradient.to(dtype)):
        optimizer = optimizer_of(start, low_rank=low_rank, lr=0.1)
        [weight] = parameters_of(optimizer)
        weight.grad_dtype = None
        weight.grad = given
        optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends) and not torch.equal(ends[0], start)


# -- layouts and classes ---------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor that wraps another one, as libraries for quantized training have them."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(function))


class Marked(torch.Tensor):
    """A plain subclass, which holds its values itself."""


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gaussian(4, 3).to_sparse(), "layout sparse_coo"),
        (lambda: gaussian(4, 3).to_sparse_csr(), "layout sparse_csr"),
        (lambda: gaussian(4, 3).to_mkldnn(), "layout _mkldnn"),
        (nested, "layout nested"),
        (lambda: Wrapper(gaussian(4, 3)), "a Wrapper, a subclass of Tensor that wraps"),
    ],
)
def test_other_layouts_are_refused_when_the_optimizer_is_built(make, words):
    weight = make().requires_grad_()
    with pytest.raises(ConfigError, match=f"odd: is .*{words}.*AdaRankGrad cannot train it"):
        AdaRankGrad([("w", nn.Parameter(gaussian(8, 6))), ("odd", weight)])


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    optimizer = optimizer_of(gaussian(8, 6))
    odd = gaussian(4, 3).to(torch.float8_e4m3fn).requires_grad_()
    with pytest.raises(ConfigError, match=r"group1\.param0: is of type float8_e4m3fn"):
        optimizer.add_param_group({"params": [odd]})
    feed(optimizer, gaussian(8, 6))
    assert len(optimizer.param_groups) == 1 and optimizer.stats()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e5m2])
def test_what_is_frozen_may_be_of_any_type(dtype):
    frozen = nn.Parameter(torch.ones(4, 3).to(dtype), requires_grad=False)
    optimizer = AdaRankGrad([("q", frozen), ("w", nn.Parameter(gaussian(8, 6)))], max_rank=4)
    feed(optimizer, None, gaussian(8, 6))
    assert torch.equal(frozen.float(), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.ones(6).expand(8, 6), r"several elements in one place \(shape \(8, 6\), strides"),
        (torch.ones(8, 6).to(torch.float8_e4m3fn), "too coarse to hold an update"),
    ],
)
def test_what_a_parameter_has_become_is_seen_at_the_first_step(data, words):
    first, second = nn.Parameter(gaussian(8, 6)), nn.Parameter(gaussian(8, 6))
    optimizer = AdaRankGrad([("first", first), ("second", second)], max_rank=4)
    first.grad = gaussian(8, 6)
    second.data = data
    with pytest.raises(ConfigError, match=f"second: .*{words}"):
        optimizer.step()
    assert torch.equal(first, gaussian(8, 6))


def test_a_parameter_on_the_meta_device_is_refused_before_anything_changes():
    first, second = nn.Parameter(gaussian(8, 6)), nn.Parameter(torch.ones(8, 6, device="meta"))
    optimizer = AdaRankGrad([("first", first), ("second", second)], max_rank=4)
    first.grad = gaussian(8, 6)
    with pytest.raises(ConfigError, match=r"second: is on the meta device.*after the model has"):
        optimizer.step()
    assert torch.equal(first, gaussian(8, 6))


def test_a_lazy_module_is_trained_once_it_knows_its_shape():
    model = nn.Sequential(nn.LazyLinear(6))
    early, late = (AdaRankGrad(model.parameters(), max_rank=2, min_rank=1) for _ in range(2))
    with pytest.raises(ConfigError, match=r"group0\.param0: is not initialized \(a lazy module\)"):
        early.step()
    model(torch.ones(2, 8)).sum().backward()
    before = model[0].weight.detach().clone()
    late.step()
    assert not torch.equal(model[0].weight, before)


def test_a_plain_subclass_is_trained_like_its_tensor():
    marked = nn.Parameter(gaussian(8, 6).as_subclass(Marked))
    optimizer = AdaRankGrad([("w0", marked)], max_rank=4, min_rank=1, **FREQUENT)
    plain = optimizer_of(gaussian(8, 6), **FREQUENT)
    gradients = [[gaussian(8, 6, seed=seed)] for seed in range(1, 6)]
    assert torch.equal(
        train(optimizer, gradients)[0].as_subclass(torch.Tensor), train(plain, gradients)[0]
    )


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_a_gradient_of_another_layout_is_refused_before_anything_changes(layout):
    optimizer = optimizer_of(gaussian(8, 6), gaussian(8, 6))
    first, second = parameters_of(optimizer)
    first.grad = gaussian(8, 6)
    try:
        second.grad = getattr(gaussian(8, 6), layout)()
    except RuntimeError:
        pytest.skip("torch itself refuses such a gradient")
    with pytest.raises(RuntimeError, match=r"the gradient of w1 (is sparse|has the layout)"):
        optimizer.step()
    assert torch.equal(first, gaussian(8, 6))


# -- strides ---------------------------------------------------------------------------------------


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the dimensions in the opposite order in memory."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def spread_out(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with gaps in memory, as a slice of a larger tensor has them."""
    return torch.stack([tensor, tensor], -1)[..., 0]


FORMATS = [transposed, channels_last, spread_out]
SHAPES = [(12, 8), (8, 12), (3, 10, 8), (6, 3, 3, 2), (2, 3, 8, 6), (9,), ()]


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1}, {"residual": "none"}, {"low_rank": False}]
)
@pytest.mark.parametrize("view", ["auto", "stack", "flatten"])
@pytest.mark.parametrize("change", FORMATS)
@pytest.mark.parametrize("of", ["weights", "gradients", "both"])
def test_strides_change_nothing(of, change, view, settings):
    settings = {**FREQUENT, **settings, "view": view, "max_rank": 3}
    weights = [gaussian(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    plain = optimizer_of(*weights, **settings)
    named = [
        (f"w{i}", nn.Parameter(change(weight) if of != "gradients" else weight.clone()))
        for i, weight in enumerate(weights)
    ]
    ours = AdaRankGrad(named, **{"min_rank": 1, **settings})
    for step in range(5):
        gradients = [gaussian(*shape, seed=100 + 10 * step + i) for i, shape in enumerate(SHAPES)]
        feed(plain, *gradients)
        for (_, parameter), gradient in zip(named, gradients, strict=True):
            parameter.grad = change(gradient) if of != "weights" else gradient
        ours.step()
    for (_, parameter), expected, start in zip(named, parameters_of(plain), weights, strict=True):
        ROUNDING.check(parameter.detach(), expected.detach())
        kept = change(start).stride() if of != "gradients" else start.stride()
        assert parameter.stride() == kept
    assert len(ours.stats()) == len(plain.stats())


@pytest.mark.parametrize("step", [0, 3])
def test_the_memory_format_may_change_between_steps(step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = AdaRankGrad(model.named_parameters(), max_rank=3, min_rank=1, **FREQUENT)
    for number in range(6):
        if number == step:
            model.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(gaussian(2, 3, 6, 6, seed=number)).square().mean().backward()
        optimizer.step()
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    for parameter, start in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, start)


@pytest.mark.parametrize("shape", [(8, 6), (3, 8, 6), (7,)])
def test_an_expanded_gradient_is_a_gradient(shape):
    whole, expanded = optimizer_of(gaussian(*shape)), optimizer_of(gaussian(*shape))
    one = torch.tensor(0.5).expand(shape)
    for optimizer, gradient in ((whole, one.contiguous()), (expanded, one)):
        for parameter in parameters_of(optimizer):
            parameter.grad = gradient
        optimizer.step()
    ROUNDING.check(parameters_of(expanded)[0].detach(), parameters_of(whole)[0].detach())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 3, 3, 3)])
@pytest.mark.parametrize("beside", [True, False])
def test_what_has_no_elements_is_passed_by(shape, beside):
    weights = [torch.zeros(shape), *([gaussian(8, 6)] if beside else [])]
    optimizer = optimizer_of(*weights, **FREQUENT)
    for step in range(3):
        feed(
            optimizer,
            *(gaussian(*w.shape, seed=step) if w.numel() else torch.zeros(shape) for w in weights),
        )
    feed(optimizer, *[None for _ in weights])
    other = optimizer_of(*weights, **FREQUENT)
    other.load_state_dict(optimizer.state_dict())
    assert parameters_of(optimizer)[0].shape == shape
    assert len(optimizer.stats()) == beside
