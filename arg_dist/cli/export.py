"""Export a checkpoint to a Hugging Face model directory, in one process without the engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from arg_dist.checkpoint.files import sync_folder
from arg_dist.checkpoint.index import CheckpointError, Index
from arg_dist.checkpoint.offline import newest_intact, whole_weight
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.cli.parsing import InputError
from arg_dist.planning.local_models import tokenizer_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        checkpoint: directory of the exported checkpoint.
        step: optimizer steps the job had taken at the checkpoint.
        architecture: name of the model class.
        parameters: number of parameters.
        passed_over: newer checkpoints that are broken, each with the reason.
    """

    checkpoint: Path
    step: int
    architecture: str
    parameters: int
    passed_over: list[str]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    tokenizer: str | None = None,
    architecture: str | None = None,
) -> Exported:
    """Write the model of a checkpoint in the format that ``from_pretrained`` reads.

    The checkpoint is verified first. `out` is renamed into place once all files are on disk. Peak
    memory is the model in `dtype` plus one tensor.

    Args:
        checkpoint: a checkpoint directory, or a directory of checkpoints, of which the newest
            intact one is exported.
        out: output directory; must be new or empty.
        dtype: data type of the weights: `float32` (as stored), `bfloat16` or `float16`.
        tokenizer: directory of a tokenizer to save with the model.
        architecture: model class in transformers; None for the class that was trained.

    Raises:
        InputError: `out`, `dtype`, `tokenizer` or `architecture` is invalid, or transformers is
            not installed.
        CheckpointError: the checkpoint is broken or does not contain the model, or `out` cannot be
            written.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown; choose from {', '.join(DTYPES)}")
    out = check_new(out)
    loaded_tokenizer = None if tokenizer is None else tokenizer_at(tokenizer, "--tokenizer")
    found, index, passed_over = newest_intact(Path(checkpoint))
    model = skeleton(found, index, architecture).to(DTYPES[dtype])
    with SliceReader(found, index) as reader:
        weights = _weights(found, reader, model, DTYPES[dtype])
    _write(out, model, weights, loaded_tokenizer)
    name = type(model).__name__
    return Exported(found, index.step, name, model.num_parameters(), passed_over)


def check_new(out: str | Path) -> Path:
    """The absolute path of an output directory.

    Raises:
        InputError: it exists and is not empty, or transformers is not installed.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose a new directory, or remove it")
    try:
        import transformers
    except ImportError:
        raise InputError(
            "export requires transformers; run pip install 'arg-dist[transformers]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return out


def skeleton(checkpoint: Path, index: Index, architecture: str | None) -> PreTrainedModel:
    """The model of a checkpoint on the meta device, without memory for its weights.

    Raises:
        InputError: transformers has no class `architecture`.
        CheckpointError: the checkpoint does not contain a model, or one that cannot be built.
    """
    import transformers

    if not index.weights:
        raise CheckpointError(
            f"{checkpoint}: contains optimizer state only; use one that was saved with weights"
        )
    values = index.model_config_values
    if values is None:
        raise CheckpointError(
            f"{checkpoint}: contains no model configuration: it was saved without model=, or the "
            "model is not a transformers model; save with model= to export"
        )
    name: str = architecture or values["architectures"][0]
    model_class: Any = getattr(transformers, name, None)
    is_class = isinstance(model_class, type)
    if not (is_class and issubclass(model_class, transformers.PreTrainedModel)):
        error_class = InputError if architecture else CheckpointError
        where = f"--architecture {name}" if architecture else f"{checkpoint}: trained as {name}"
        raise error_class(
            f"{where}: transformers {transformers.__version__} has no such model class; pass one "
            "with --architecture, such as LlamaForCausalLM"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(model_class.config_class.from_dict(values))
            return model
    except Exception as error:  # model code may raise anything about a configuration
        raise CheckpointError(
            f"{checkpoint}: {name} cannot be built from its configuration: {error}"
        ) from None


def _weights(
    checkpoint: Path, reader: SliceReader, model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers; one entry per set of tied weights."""
    stored = reader.index.weights
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    known = {name for aliases in names.values() for name in aliases}
    kind = type(model).__name__
    strange = sorted(stored.keys() - known)
    if strange:
        raise CheckpointError(f"{checkpoint}: contains {strange[0]!r}, which {kind} does not have")
    weights = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for aliases in names.values():
        held = [name for name in aliases if name in stored]
        if not held:
            raise CheckpointError(
                f"{checkpoint}: missing {aliases[0]!r}, which {kind} requires; save it with model="
            )
        first = held[0]
        if stored[first].shape != shapes[first]:
            raise CheckpointError(
                f"{checkpoint}: {first} has shape {stored[first].shape}, but the model's "
                f"configuration implies {shapes[first]}"
            )
        values = whole_weight(reader, first)
        for other in held[1:]:
            if not torch.equal(values, whole_weight(reader, other)):
                raise CheckpointError(
                    f"{checkpoint}: {first} and {other} are tied in the model's configuration, "
                    "but their values differ"
                )
        weights[first] = _cast(checkpoint, first, values, dtype)
    return weights


def _cast(checkpoint: Path, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    if not values.is_floating_point():
        return values
    if dtype == torch.float16 and values.numel():
        low, high = values.aminmax()
        largest = torch.finfo(dtype).max
        if max(-float(low), float(high)) > largest:
            raise CheckpointError(
                f"{checkpoint}: {name} has values beyond the float16 maximum, {largest:g}; "
                "export with --dtype bfloat16"
            )
    return values.to(dtype)


def _write(
    out: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    with written_whole(out) as folder:
        model.save_pretrained(folder, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A sibling directory of `out` to write to, which is then synced and renamed to `out`.

    Raises:
        CheckpointError: it cannot be written; nothing is left.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
        partial.mkdir(parents=True)
        yield partial
        usual = partial.stat().st_mode & 0o666
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(usual)  # safetensors creates files readable by the owner only
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # no-op after a successful rename
