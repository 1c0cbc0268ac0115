"""Fine-tuning tasks: their examples, the model's head, and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from arg_dist.cli.parsing import InputError
from launchers.finetuning.checkpoint import load_model, read_config, read_tokenizer
from launchers.finetuning.metrics import metrics_of_logits
from launchers.finetuning.rows import Columns, Row, label_names, label_numbers, read_rows
from launchers.pretraining.corpus import distinct, documents_of, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """Everything that the Trainer needs for a job except its hyperparameters.

    Attributes:
        training: examples with `input_ids` and `labels` (classification: one number each).
        held_out: the examples for evaluation.
        build_model: loads the checkpoint; call it after setting the seed and connecting the
            processes.
        collator: collates examples into a batch.
        compute_metrics: None if the loss is the only metric.
        compute_loss: replaces the model's own loss where that is not reliable.
        measure: key of the metric that judges a run, one of `launchers.reporting.MEASURES`.
        facts: what the report records about the data.
    """

    training: Examples
    held_out: Examples
    tokenizer: PreTrainedTokenizerBase
    build_model: Callable[[], PreTrainedModel]
    collator: Callable[[Examples], Any]
    measure: str
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    compute_loss: Callable[..., Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def text_classification(
    model: str, *, training: Sequence[str], held_out: Sequence[str], columns: Columns,
    max_length: int,
) -> Task:  # fmt: skip
    """Texts, or pairs of texts, and their labels, truncated to `max_length` tokens.

    The labels are those of the training files. The report counts the truncated examples.

    Raises:
        InputError: a file, a row, a label or the checkpoint cannot be used.
    """
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    config = read_config(model, max_length)
    tokenizer = read_tokenizer(model)
    if tokenizer.pad_token is None:
        raise InputError(
            f"--model {model}: its tokenizer has neither a padding nor an end-of-text token"
        )
    training_rows = read_rows(training, columns, "--train")
    names = label_names(training_rows, "--train")
    held_out_rows = read_rows(held_out, columns, "--eval")
    parts: list[Examples] = []
    cut: list[int] = []
    for rows, option in ((training_rows, "--train"), (held_out_rows, "--eval")):
        numbers = label_numbers(rows, names, option)
        encoded = _encode(tokenizer, rows)
        cut.append(sum(len(example["input_ids"]) > max_length for example in encoded))
        if cut[-1]:
            encoded = _encode(tokenizer, rows, truncation=True, max_length=max_length)
        pairs = zip(encoded, numbers, strict=True)
        parts.append([{**example, "labels": number} for example, number in pairs])
    settings: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "pad_token_id": tokenizer.pad_token_id,
    }
    # a head for other labels is replaced
    settings["ignore_mismatched_sizes"] = config.num_labels != len(names)
    return Task(
        training=parts[0],
        held_out=parts[1],
        tokenizer=tokenizer,
        build_model=partial(load_model, AutoModelForSequenceClassification, model, **settings),
        collator=DataCollatorWithPadding(tokenizer),
        measure="matthews",
        compute_metrics=metrics_of_logits(),
        compute_loss=cross_entropy_share,
        facts={
            "data": ", ".join([*training, *held_out]),
            "labels": names,
            "examples": [len(part) for part in parts],
            "examples_cut_to_max_length": cut,
            "max_length": max_length,
        },
    )


def cross_entropy_share(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """This part's share of the global batch's mean loss: its sum / examples of the whole batch.

    The Trainer assumes that a model's loss is such a share if its ``forward`` has ``**kwargs``.
    Some classifiers ignore that and return the mean over their own examples: loss and gradient are
    then too large by the number of processes times the number of accumulation steps.

    Args:
        outputs: the model's outputs; logits are `examples x labels`.
        labels: one number per example.
        num_items_in_batch: examples of the whole batch; None if they are those of `labels`.
    """
    logits = outputs["logits"].float()
    total = cross_entropy(logits, labels.to(logits.device).flatten(), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], **settings: Any) -> Examples:
    texts = [row.text for row in rows]
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    # Padding creates the mask; token types, if a model has them, separate the texts of a pair.
    encoded = tokenizer(texts, pairs, return_attention_mask=False, verbose=False, **settings)
    return [dict(zip(encoded, parts, strict=True)) for parts in zip(*encoded.values(), strict=True)]


def causal_language_model(
    model: str, *, training: Sequence[str], held_out: Sequence[str], text_key: str, max_length: int
) -> Task:
    """Concatenated documents in blocks of `max_length` tokens, judged by the loss.

    Without held-out files about 3 % of the training text is held out.

    Raises:
        InputError: a file cannot be read, the text is shorter than one block, or the checkpoint
            cannot be used.
    """
    from transformers import AutoModelForCausalLM, default_data_collator

    read_config(model, max_length)
    tokenizer = read_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {model}: its tokenizer has no end-of-text token (eos_token)")
    documents = _documents(training, text_key, "--train")
    if held_out:
        texts = documents, _documents(held_out, text_key, "--eval")
    else:
        texts = split(distinct(documents))
    parts: list[Examples] = []
    for part, option in zip(texts, ("--train", "--eval" if held_out else "--train"), strict=True):
        blocks = _blocks(tokenizer, part, max_length)
        if not blocks:
            raise InputError(
                f"{option}: the {'held-out' if parts else 'training'} text is shorter than one "
                f"block of --max-length {max_length} tokens; use more text or a smaller length"
            )
        parts.append([{"input_ids": block, "labels": block} for block in blocks])
    return Task(
        training=parts[0],
        held_out=parts[1],
        tokenizer=tokenizer,
        build_model=partial(load_model, AutoModelForCausalLM, model, use_cache=False),
        collator=default_data_collator,
        measure="held_out_loss",
        facts={
            "data": ", ".join([*training, *held_out]),
            "examples": [len(part) for part in parts],
            "max_length": max_length,
        },
    )


def _documents(paths: Sequence[str], text_key: str, option: str) -> list[bytes]:
    found = [document for path in paths for document in documents_of(path, text_key, option)]
    if not any(document.strip() for document in found):
        raise InputError(f"{option} {', '.join(paths)}: no text found")
    return found


def _blocks(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[bytes], length: int
) -> list[list[int]]:
    """All full blocks of the documents' tokens, each document closed by the end token."""
    tokens: list[int] = []
    for document in documents:
        text = document.decode("utf-8", errors="replace")
        tokens += tokenizer.encode(text, add_special_tokens=False, verbose=False)
        tokens.append(tokenizer.eos_token_id)
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
