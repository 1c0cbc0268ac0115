"""Export what training has changed as a PEFT adapter: the difference to a base model, in low rank.

The weights of linear layers and embeddings become LoRA factors, ``W = W_base + B A``; everything
else that has changed (norms, heads that the base model lacks) is saved whole, biases as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from arg_dist.checkpoint.offline import newest_intact, whole_weight
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.cli.export import check_new, skeleton, written_whole
from arg_dist.cli.parsing import InputError
from arg_dist.subspace.factors import Factors, factored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""Of the keys in a PEFT adapter."""


@dataclass(frozen=True)
class Adapter:
    """What was exported.

    Attributes:
        checkpoint: folder of the checkpoint.
        factors: of each module in low rank, by its name.
        whole: names of modules that were saved whole.
        tied: names of modules that share a weight, whose change PEFT's merging would add twice.
        passed_over: newer checkpoints that are broken, each with the reason.
    """

    checkpoint: Path
    factors: dict[str, Factors]
    whole: list[str]
    tied: list[str]
    passed_over: list[str]


def export_adapter(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    architecture: str | None = None,
) -> Adapter:
    """Write a directory that ``PeftModel.from_pretrained(base_model, out)`` loads.

    One matrix is in memory at a time, beside the factors and what is saved whole.

    Args:
        checkpoint: a checkpoint directory, or a directory of checkpoints, of which the newest
            intact one is exported.
        out: output directory; must be new or empty.
        base: Hugging Face directory of the model that training began with, in safetensors.
        rank: of each difference; None if `energy` decides it.
        energy: share of each difference's squared norm to be kept, in (0, 1].
        architecture: model class in transformers; None for the class that was trained.

    Raises:
        InputError: an argument is invalid, or peft or transformers is not installed.
        CheckpointError: the checkpoint is broken, or does not contain the model.
    """
    out, base = check_new(out), Path(base)
    if (rank is None) == (energy is None):
        raise InputError("--adapter: give either --rank or --energy")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("--adapter requires peft; run pip install 'arg-dist[peft]'") from None
    found, index, passed_over = newest_intact(Path(checkpoint))
    model = skeleton(found, index, architecture)
    draft = Draft(model)
    with SliceReader(found, index) as reader, BaseModel(base, model) as before:
        for stored in _stored(model, reader):
            _compare(draft, stored, whole_weight(reader, stored.name), before, rank, energy)
        if not before.was_found:
            raise InputError(
                f"--adapter {base}: has none of the model's weights; give the directory of the "
                "model that training began with"
            )
        tensors = draft.finish(reader)
    _write(out, draft, tensors, base)
    tied = sorted(draft.tied & draft.factors.keys())
    return Adapter(found, draft.factors, sorted(draft.whole), tied, passed_over)


def _compare(
    draft: Draft,
    stored: Stored,
    now: Tensor,
    before: BaseModel,
    rank: int | None,
    energy: float | None,
) -> None:
    """Note what has changed of a parameter or buffer, if anything has."""
    then, module = before.weight(stored.name), draft.model.get_submodule(stored.paths[0])
    if then is None:
        return draft.save_whole(stored)
    if then.shape != now.shape:
        raise InputError(
            f"--adapter {before.folder}: {stored.name} has the shape {tuple(then.shape)} there, "
            f"and {tuple(now.shape)} in the checkpoint; give the model that training began with"
        )
    if torch.equal(then.to(now.dtype), now):
        return None
    if not _is_low_rank(module):
        return draft.save_whole(stored)
    if stored.own == "bias":
        draft.biases[stored.paths[0]] = now
        return None
    found = factored(now.float() - then.float(), rank=rank, energy=energy)
    draft.factors |= dict.fromkeys(stored.paths, found)
    draft.tied |= set(stored.paths) if len(stored.paths) > 1 else set()
    return None


class BaseModel:
    """The weights of a Hugging Face directory, one at a time; a context manager."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder, self._prefix = folder, f"{model.base_model_prefix}."
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self.was_found = False

    def __enter__(self) -> BaseModel:
        index, single = self.folder / "model.safetensors.index.json", "model.safetensors"
        try:
            if index.exists():
                self._where = json.loads(index.read_text())["weight_map"]
            else:
                keys = self._file(single).keys()
                self._where = dict.fromkeys(keys, single)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"--adapter {self.folder}: {single} cannot be read ({error}); give the directory "
                "of a model that save_pretrained has written"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def weight(self, name: str) -> Tensor | None:
        """A parameter; None if the model has none of that name, with or without its prefix."""
        bare = name.removeprefix(self._prefix)
        for key in (name, bare, self._prefix + name):
            if key in self._where:
                self.was_found = True
                weight: Tensor = self._file(self._where[key]).get_tensor(key)
                return weight
        return None

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return self._files[name]


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer of the checkpoint.

    Attributes:
        name: its name.
        own: its name in its module.
        paths: names of the modules that have it; several if it is tied.
    """

    name: str
    own: str
    paths: tuple[str, ...]


def _stored(model: nn.Module, reader: SliceReader) -> Iterator[Stored]:
    """All parameters and buffers of the checkpoint, each once."""
    places: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for own, tensor in _tensors(module):
            places.setdefault(id(tensor), []).append((path, own))
    for found in places.values():
        names = [f"{path}.{own}" if path else own for path, own in found]
        stored = next((name for name in names if name in reader.index.weights), None)
        if stored is not None:
            yield Stored(stored, found[0][1], tuple(path for path, _ in found))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, with their names in it."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _keys_of(module: nn.Module, path: str, found: Factors) -> dict[str, Tensor]:
    """The factors by the keys under which PEFT looks for those of a module's weight."""
    is_table = isinstance(module, nn.Embedding)
    # PEFT keeps B A of out x in; an embedding and GPT-2's Conv1D lie the other way round
    turned = is_table or not isinstance(module, nn.Linear)
    A, B = (found.left.T, found.right.T) if turned else (found.right, found.left)
    names = (
        ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
    )
    pairs = zip(names, (A, B), strict=True)  # copies, as tied weights share them
    return {
        f"{PREFIX}{path}.{name}": factor.clone(memory_format=torch.contiguous_format)
        for name, factor in pairs
    }


def _is_low_rank(module: nn.Module) -> bool:
    """Whether PEFT has low-rank factors for a module's weight."""
    return isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"


@dataclass
class Draft:
    """An adapter as it is put together.

    Attributes:
        model: the model, without weights.
        factors: of each module's weight, by the module's name.
        biases: of modules, by their names.
        whole: names of modules that are saved whole.
        tied: names of modules that share a weight.
    """

    model: nn.Module
    factors: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)

    def save_whole(self, stored: Stored) -> None:
        """Save the module of a parameter as it is.

        Raises:
            InputError: it is the model itself.
        """
        if stored.paths[0] == "":
            raise InputError(
                f"--adapter: {stored.name} has changed, and lies in no module that an adapter can "
                "save; export the whole model, without --adapter"
            )
        self.whole.add(stored.paths[0])

    def finish(self, reader: SliceReader) -> dict[str, Tensor]:
        """All tensors of the adapter, by their keys."""
        self.whole |= self.biases.keys() - self.factors.keys()
        inside = tuple(f"{path}." for path in self.whole)
        self.whole = {path for path in self.whole if not path.startswith(inside)}
        for path in [p for p in self.factors if f"{p}.".startswith(inside)]:
            del self.factors[path]
        tensors: dict[str, Tensor] = {}
        for path, found in self.factors.items():
            tensors |= _keys_of(self.model.get_submodule(path), path, found)
            if path in self.biases:
                tensors[f"{PREFIX}{path}.base_layer.bias"] = self.biases[path]
        for path in self.whole:
            for own in self.model.get_submodule(path).state_dict():
                name = f"{path}.{own}"
                if name in reader.index.weights:
                    tensors[PREFIX + name] = whole_weight(reader, name)
        return tensors


def _write(out: Path, draft: Draft, tensors: dict[str, Tensor], base: Path) -> None:
    from peft import LoraConfig

    ranks = {path: found.rank for path, found in draft.factors.items()}
    usual = max(ranks.values(), default=1)
    is_causal = type(draft.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    config = LoraConfig(
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM" if is_causal else None,
        r=usual,
        lora_alpha=usual,  # so that nothing is scaled
        rank_pattern={path: rank for path, rank in ranks.items() if rank != usual},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != usual},
        target_modules=sorted(ranks),
        modules_to_save=sorted(draft.whole) or None,
        bias="lora_only" if draft.biases.keys() & ranks.keys() else "none",
        inference_mode=True,
    )
    with written_whole(out) as folder:
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
