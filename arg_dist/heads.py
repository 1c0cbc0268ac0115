"""The output heads of a model, which stay full-rank.

A head is what the model itself names as one, the last linear layer if its size is that of the
configured output, or the last linear layer of a module with one of the usual names. Names inside
repeated blocks have other meanings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from arg_dist.uses import is_linear, module_outputs

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls", "pooler")
"""Common names of output heads; kept full-rank unless a target matches them."""

LAST_LAYERS = ("heads", "output_layer", "to_logits", "logits", "unembed")
"""Names of heads if they are a model's last linear layer; elsewhere they have other meanings."""

LAST_OF_ALL = "output"
"""The same of torchtitan and torchtune, for a layer itself: BERT so calls modules around layers."""

FINDERS = ("get_output_embeddings", "get_classifier")
"""Methods by which models of Hugging Face and timm name their heads."""

SIZES = ("vocab_size", "num_labels")
"""Attributes of a Hugging Face configuration that give the size of a head's output."""


def output_heads(model: nn.Module, *, by_name: bool) -> set[int]:
    """``id`` of each module of the model that is an output head.

    Args:
        model: the model, without wrappers.
        by_name: consider size and name; otherwise only what the model itself names as its head.
    """
    heads: list[nn.Module] = []
    for finder in FINDERS:
        find = getattr(model, finder, None)
        found = find() if callable(find) else None
        if isinstance(found, nn.Module):
            heads += _last_layers(found) or [found]
    if by_name:
        outside = dict(_outside_of_blocks(model))
        for name, module in outside.items():
            if name.rpartition(".")[2] in HEADS:
                heads += _last_layers(module)
        layers = [(name, module) for name, module in outside.items() if is_linear(module)]
        if layers and _is_last_head(*layers[-1], getattr(model, "config", None)):
            heads.append(layers[-1][1])
    return {id(head) for head in heads}


def _is_last_head(name: str, layer: nn.Module, config: Any) -> bool:
    """Whether a model's last linear layer is a head, by its size or its name."""
    sizes = {getattr(config, key, None) for key in SIZES} - {None}
    parts = name.split(".")
    is_named = any(part in LAST_LAYERS for part in parts) or parts[-1] == LAST_OF_ALL
    return is_named or module_outputs(layer) in sizes


def _last_layers(module: nn.Module) -> list[nn.Module]:
    """The last linear layer in a module; of each alternative if there are several."""
    if is_linear(module):
        return [module]
    inside = [found for child in module.children() if (found := _last_layers(child))]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [layer for found in inside for layer in found]
    return inside[-1] if inside else []


def _outside_of_blocks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules outside repeated blocks, in order, by name."""
    yield name, module
    if _is_repeated(module):
        return
    for part, child in module.named_children():
        yield from _outside_of_blocks(child, f"{name}.{part}" if name else part)


def _is_repeated(module: nn.Module) -> bool:
    """Whether a module is a sequence of blocks."""
    if isinstance(module, nn.Sequential):
        blocks = [type(child) for child in module if any(True for _ in child.children())]
        return len(blocks) > len(set(blocks))
    return isinstance(module, nn.ModuleList)
