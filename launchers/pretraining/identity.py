"""Job identity: what must match the checkpoint on resume, and what may change."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from arg_dist.cli.parsing import InputError
from launchers.pretraining.corpus import Corpus
from launchers.pretraining.tokens import Sequences

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of a Hugging Face configuration that do not affect training."""

MAY_CHANGE = {
    "--steps": "steps",
    "--warmup": "warmup",
    "--min-lr-ratio": "min_lr_ratio",
    "--clip": "clip",
    "--lr": "lr",
}
"""Options that may change on resume, and their keys in a job's schedule."""

DATA_OPTIONS = {"text": "--data, --text-key and --data-bytes", "tokens": "--tokenizer"}


def text_digest(corpus: Corpus) -> str:
    """The sha256 of all documents in order, with the boundary between the two parts."""
    whole = hashlib.sha256()
    for part in (corpus.training, corpus.held_out):
        whole.update(len(part).to_bytes(8, "little"))
        for document in part:
            whole.update(hashlib.sha256(document).digest())
    return whole.hexdigest()


def token_digest(sequences: Sequences) -> str:
    """The sha256 of both token streams."""
    whole = hashlib.sha256()
    for stream in (sequences.training, sequences.held_out):
        whole.update(f"{stream.dtype.str} {len(stream)};".encode())
        whole.update(stream.data)
    return whole.hexdigest()


def model_values(config: PretrainedConfig) -> dict[str, Any]:
    """The entries of a model's configuration that affect training, as JSON."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {k: v for k, v in values.items() if k not in NOT_THE_MODEL and k[0] != "_"}


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Checks that a job is the one that wrote the checkpoint `where`.

    Both have the keys ``text`` and ``tokens`` (digests), ``model`` (see :func:`model_values`), and
    numbers under the names of other options.

    Raises:
        InputError: a value differs; the message names the option.
    """
    wrong = f"the checkpoint {where} was trained"
    new_run = "for a new run omit --resume and choose another --out"
    for key, value in now.items():
        before = saved.get(key)
        if key == "model":
            both = {k: (before[k], value[k]) for k in value if before and k in before}
            differing = [(k, old, new) for k, (old, new) in both.items() if old != new]
            if differing:
                listed = ", ".join(f"{k}={old!r} (now {new!r})" for k, old, new in differing[:3])
                raise InputError(f"--model: {wrong} with {listed}; pass the same model; {new_run}")
        elif key in DATA_OPTIONS and before != value:
            what = "text" if key == "text" else "tokens of the same text"
            raise InputError(
                f"{DATA_OPTIONS[key]}: {wrong} on other {what} (sha256 {str(before)[:12]}, now "
                f"{value[:12]}); pass what the run was started with; {new_run}"
            )
        elif before != value:
            option = "--" + key.replace("_", "-")
            raise InputError(
                f"{option} {value}: {wrong} with {before}; pass {option} {before}; {new_run}"
            )


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that a resumed job changes, one line each.

    Both have the keys of :data:`MAY_CHANGE`.
    """
    return [
        f"{option}: {saved[key]} up to the checkpoint, {now[key]} from now on"
        for option, key in MAY_CHANGE.items()
        if saved[key] != now[key]
    ]
