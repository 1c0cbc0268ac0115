"""What a module does with each of its parameters: multiplies by it, looks up in it, adds it.

AdaRankGrad trains the weights of products, the 2-D weights of attention and MLP in the paper.
Modules of torch say by their class which these are. Other modules keep bare parameters, such as
fused experts (``experts x in x out``), whose class and names have to tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from arg_dist.library_internals import CONVOLUTION

Use = Literal[
    "matrix",
    "convolution",
    "embedding",
    "head",
    "router",
    "vector",
    "complex",
    "kept",
    "other",
]
"""Use of a parameter:

- `matrix`: the weight of a product, or a stack of such weights.
- `convolution`: a convolution kernel.
- `embedding`: a lookup table, or learned positions and tokens.
- `head`: the weight of an output head.
- `router`: assigns tokens to experts.
- `vector`: biases, gains and other tensors that no matrix product uses.
- `complex`: a tensor of complex numbers, which full-rank Adam trains as pairs of reals.
- `kept`: full-rank because of `targets` or `exclude`.
- `other`: a tensor of two or more dimensions whose use cannot be determined.
"""

LOOKED_UP = frozenset(
    "embed embedding embeddings embeds emb pos position positions positional token tokens query "
    "queries latent latents probe prompt prompts prefix codebook codebooks register registers "
    "anchor anchors prototype prototypes".split()
)
"""Words in the names of tables and tokens that a model learns."""

ADDED = frozenset(
    "bias biases scale scales gain gains gamma beta norm norms mask log temperature".split()
)
"""Words in the names of parameters that are added, or multiplied element by element."""

MULTIPLIED = re.compile(
    r"w|w\d+|w[qkvo]|weights?|proj|proj\d+|projection|kernels?|fc\d*|linear\d*|mlp\d*|dense\d*|"
    r"up|down|qkv|wqkv"
)
"""Words in the names of weights of products."""


TABLE_WORDS = frozenset("embed embedding embeddings embeds emb wte wpe".split())
"""Words in the names of modules that are tables, whatever else is known of them."""

HEAD = re.compile(
    r"((lm|mlm|cls|classification|score)_)?head|classifier|score|unembed(ding)?|qa_outputs"
)
"""Names of modules that are output heads."""


@dataclass(frozen=True)
class Place:
    """One use of a parameter in a model.

    Attributes:
        module_name: dotted name of the module.
        module: the module.
        name: dotted name of the parameter.
        parameter: the parameter.
    """

    module_name: str
    module: nn.Module
    name: str
    parameter: nn.Parameter


@dataclass(frozen=True)
class Owner:
    """The module that computes with a parameter, and what it calls the parameter.

    Attributes:
        module: the module; not the list, dictionary or parametrization that holds the parameter.
        path: the module's dotted name.
        label: the parameter's name in it.
    """

    module: nn.Module
    path: str
    label: str

    @property
    def words(self) -> set[str]:
        """The words of the parameter's name, in lower case."""
        apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.label).lower()
        return set(re.split(r"[_.]+", apart))

    @property
    def class_name(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's full shape; one sharded at creation records it as ``ds_shape``."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def use_by_name(name: str, shape: tuple[int, ...]) -> Use | None:
    """What the name of a bare parameter says of its use: `embedding` or `head`; None if neither.

    Args:
        name: its dotted name in the model.
        shape: its full shape.
    """
    *path, label = name.split(".")
    if len(shape) != 2:
        return None
    module = path[-1] if path and label == "weight" else label
    words = re.split(r"_|(?<=[a-z])(?=[A-Z])", module)
    if TABLE_WORDS & {word.lower() for word in words}:
        return "embedding"
    is_output = HEAD.fullmatch(module) or path == ["output"]  # as torchtitan and torchtune name it
    is_inside = len(path) > 1 and HEAD.fullmatch(path[-2]) and path[-1] in ("out_proj", "dense")
    return "head" if is_output or is_inside else None


def uses_without_model(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, Use]:
    """Embeddings and output heads among bare parameters, as far as names or shapes tell them.

    Args:
        names: their names, possibly invented (:func:`invented_name`).
        shapes: their full shapes.
    """
    if all(map(INVENTED.fullmatch, names)):
        return {names[i]: "embedding" for i in tables_by_shape(shapes)}
    uses = {name: use_by_name(name, shape) for name, shape in zip(names, shapes, strict=True)}
    return {name: use for name, use in uses.items() if use is not None}


INVENTED = re.compile(r"group\d+\.param\d+")


def invented_name(group: int, position: int) -> str:
    """Name of a parameter that was given without one."""
    return f"group{group}.param{position}"


def tables_by_shape(shapes: Sequence[tuple[int, ...]]) -> set[int]:
    """Positions of the embedding and the output head among the parameters of a language model.

    These have the vocabulary as first dimension, which is larger than any other, occurs in no other
    parameter, and lies before or behind all other matrices.

    Args:
        shapes: full shapes of the parameters in the order of the model.
    """
    matrices = [i for i, shape in enumerate(shapes) if len(shape) == 2]
    if len(matrices) < FEWEST:
        return set()
    size = max(shapes[i][0] for i in matrices)
    tables = {i for i in matrices if shapes[i][0] == size}
    elsewhere = {shape[1] for shape in shapes if len(shape) > 1} | {
        shape[0] for i, shape in enumerate(shapes) if shape and i not in tables
    }
    ends = {matrices[0], matrices[-1]}
    return tables if tables <= ends and size > max(elsewhere, default=0) else set()


FEWEST = 4
"""Matrices that a model has at least whose tables are recognized by their shapes."""


def owner_of(place: Place, modules: Mapping[str, nn.Module]) -> Owner:
    """The module that computes with a parameter; `modules` are the model's, by name."""
    path, module, label = place.module_name, place.module, place.name.rpartition(".")[2]
    if ".parametrizations." in f".{path}.":  # of torch.nn.utils.parametrize
        outer, _, tensor = f".{path}".rpartition(".parametrizations.")
        return Owner(modules.get(outer[1:], module), outer[1:], tensor)
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)) and path:
        outer, _, held = path.rpartition(".")
        return Owner(modules.get(outer, module), outer, f"{held}_{label}")
    return Owner(module, path, label)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch or of Hugging Face's GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch, of any number of dimensions."""
    return isinstance(module, CONVOLUTION.imported())


def use_of(owner: Owner, shape: tuple[int, ...], modules: Mapping[str, nn.Module]) -> Use:
    """How a module uses a parameter.

    Args:
        owner: the module, and the parameter's name in it.
        shape: the parameter's full shape.
        modules: all modules of the model, by name.
    """
    module, dimensions = owner.module, len(shape)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if dimensions < 2:
        return "vector"
    if is_linear(module):
        return "router" if _experts_beside(owner, modules) == module_outputs(module) else "matrix"
    if is_convolution(module):
        return "convolution" if dimensions > 2 else "vector"
    if isinstance(module, nn.MultiheadAttention):
        return "matrix" if owner.label.endswith("proj_weight") else "vector"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)):
        return "matrix" if owner.label.startswith("weight") else "vector"
    if sum(length > 1 for length in shape) < 2:
        return "vector"
    return _use_of_bare(owner, shape)


def module_outputs(module: nn.Module) -> int | None:
    """Number of outputs of a linear layer; None for other modules."""
    outputs = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return outputs if isinstance(outputs, int) else None


def is_added(owner: Owner, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is one or more biases or gains, such as the ``E x n`` ones of experts."""
    of_each_expert = len(shape) == 2 and shape[0] == experts_of(owner.module)
    return bool(owner.words & ADDED) or (of_each_expert and not _is_router(owner))


def experts_of(module: nn.Module) -> int | None:
    """Number of experts whose weights a module holds; None if it does not say or has none."""
    counts = [
        value
        for name, value in vars(module).items()
        if "expert" in name and type(value) is int and value > 1
    ]
    stacks = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
    held = [count for count in counts if count in stacks]
    if held:
        return held[0]
    if "expert" in type(module).__name__.lower() and len(stacks) == 1:
        return stacks.pop()
    return None


def _use_of_bare(owner: Owner, shape: tuple[int, ...]) -> Use:
    """Use of a bare parameter, by the names of its module and its own."""
    name = owner.class_name
    if "Embed" in name or owner.words & LOOKED_UP:
        return "embedding"
    if _is_router(owner):
        return "router"
    if "Norm" in name or is_added(owner, shape):
        return "vector"
    if "Conv" in name:
        return "convolution"
    if name.endswith("Head"):
        return "head"
    is_weight = _holds_experts(owner) or any(map(MULTIPLIED.fullmatch, owner.words))
    return "matrix" if is_weight and len(shape) <= 3 else "other"


def _is_router(owner: Owner) -> bool:
    return "router" in owner.class_name.lower() or "router" in owner.words


def _experts_beside(owner: Owner, modules: Mapping[str, nn.Module]) -> int:
    """Number of experts in the modules next to one; 0 if there are none."""
    outer = owner.path.rpartition(".")[0]
    around = modules.get(outer, owner.module)
    for name, _ in around.named_children():
        beside = modules.get(f"{outer}.{name}" if outer else name, owner.module)
        if "expert" in name and beside is not owner.module:
            count = len(beside) if isinstance(beside, nn.ModuleList) else experts_of(beside)
            if count:
                return count
    return 0


def _holds_experts(owner: Owner) -> bool:
    near = [owner.class_name, *owner.path.split(".")[-2:]]
    return experts_of(owner.module) is not None or any("expert" in name.lower() for name in near)
