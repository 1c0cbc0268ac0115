"""Methods of libraries with something of ours around them."""

import pytest
import torch

import arg_dist
from arg_dist.engines.patching import wrap_method
from arg_dist.library_internals import Internal
from arg_dist.library_internals import Library as OtherLibrary

pytestmark = pytest.mark.unit

LIBRARY = OtherLibrary("library", "library", oldest="1.0", tested="1.2")


class Library:
    """Something that is not ours."""

    def double(self, number: int, *, plus: int = 0) -> int:
        """Twice `number`."""
        return 2 * number + plus


def shout(method, library, number, **more):
    return -method(library, number, **more)


def wrap(owner: type, name: str) -> None:
    wrap_method(owner, Internal(LIBRARY, "Library", name, "doubling"), shout)


def test_a_method_is_wrapped_once():
    owner = type("Fresh", (Library,), dict(vars(Library)))
    for _ in range(3):
        wrap(owner, "double")
    assert owner().double(3, plus=1) == -7
    assert owner.double.__doc__ == "Twice `number`."
    assert Library().double(3) == 6


def test_a_class_whose_parent_is_wrapped_is_not_wrapped_again():
    parent = type("Parent", (Library,), dict(vars(Library)))
    child = type("Child", (parent,), {})
    wrap(parent, "double")
    wrap(child, "double")
    assert child().double(3) == -6


def test_a_method_that_is_gone_is_an_error_with_the_tested_version():
    with pytest.raises(RuntimeError, match=r"library: Library has no triple .*tested: 1\.2"):
        wrap(Library, "triple")


def test_a_users_hooks_before_the_step_are_called_in_the_first_one_too():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    optimizer = arg_dist.AdaRankGrad([("weight", weight)])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.step()
    optimizer.step()
    assert calls == ["before", "before"]
