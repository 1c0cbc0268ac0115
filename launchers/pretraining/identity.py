"""What makes a job the one that wrote a checkpoint, and what of it may change on the way."""

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
"""Keys of a Hugging Face configuration that change nothing of what is trained."""

MAY_CHANGE = {
    "--steps": "steps",
    "--warmup": "warmup",
    "--min-lr-ratio": "min_lr_ratio",
    "--clip": "clip",
    "--lr": "lr",
}
"""Options that a run may be resumed with another value of, and their keys in a job's schedule."""

DATA_OPTIONS = {"text": "--data, --text-key and --data-bytes", "tokens": "--tokenizer"}


def text_digest(corpus: Corpus) -> str:
    """The sha256 of all documents in their order, each part told from the other."""
    whole = hashlib.sha256()
    for part in (corpus.training, corpus.held_out):
        whole.update(len(part).to_bytes(8, "little"))
        for document in part:
            whole.update(hashlib.sha256(document).digest())
    return whole.hexdigest()


def token_digest(sequences: Sequences) -> str:
    """The sha256 of both streams of tokens."""
    whole = hashlib.sha256()
    for stream in (sequences.training, sequences.held_out):
        whole.update(f"{stream.dtype.str} {len(stream)};".encode())
        whole.update(stream.data)
    return whole.hexdigest()


def model_values(config: PretrainedConfig) -> dict[str, Any]:
    """What of a model's configuration decides about its training, as JSON."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {k: v for k, v in values.items() if k not in NOT_THE_MODEL and k[0] != "_"}


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Looks whether a job is the one whose checkpoint lies at `where`.

    Both have the keys ``text`` and ``tokens`` (digests), ``model`` (see :func:`model_values`), and
    numbers under the names of other options.

    Raises:
        InputError: what the job is given differs; the message names the option.
    """
    wrong = f"the checkpoint {where} was trained"
    new_run = "for a new run leave out --resume and give another --out"
    for key, value in now.items():
        before = saved.get(key)
        if key == "model":
            both = {k: (before[k], value[k]) for k in value if before and k in before}
            differing = [(k, old, new) for k, (old, new) in both.items() if old != new]
            if differing:
                told = ", ".join(f"{k}={old!r} (now {new!r})" for k, old, new in differing[:3])
                raise InputError(f"--model: {wrong} with {told}; give the same model; {new_run}")
        elif key in DATA_OPTIONS and before != value:
            what = "text" if key == "text" else "tokens of the same text"
            raise InputError(
                f"{DATA_OPTIONS[key]}: {wrong} on other {what} (sha256 {str(before)[:12]}, now "
                f"{value[:12]}); give what the run was started with; {new_run}"
            )
        elif before != value:
            option = "--" + key.replace("_", "-")
            raise InputError(
                f"{option} {value}: {wrong} with {before}; give {option} {before}; {new_run}"
            )


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed job does otherwise from now on, one line for each option.

    Both have the keys of :data:`MAY_CHANGE`.
    """
    return [
        f"{option}: {saved[key]} up to the checkpoint, {now[key]} from now on"
        for option, key in MAY_CHANGE.items()
        if saved[key] != now[key]
    ]
