"""Two checkpoints of a few thousand parameters and what they can learn in seconds, from nothing."""

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FILLERS = ["not", "the", "a", "film", "is", "was", "very", "plot", "cast", "fine"]
VERDICTS = ["bad", "good"]


def write_checkpoints(folder: Path) -> None:
    """A BERT without a head in ``folder/bert``, a Llama in ``folder/llama``."""
    vocabulary = [*SPECIAL, *VERDICTS, *FILLERS]
    bert_ends = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    set_seed(0)
    size = {"vocab_size": len(vocabulary), "hidden_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    bert = BertModel(
        BertConfig(
            **size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2
        )
    )
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    llama = LlamaForCausalLM(LlamaConfig(**size, **ids, num_key_value_heads=1))
    for name, model, ends in (("bert", bert, bert_ends), ("llama", llama, None)):
        words = models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
        tokenizer = Tokenizer(words)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if ends is not None:
            tokenizer.post_processor = ends
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]",
            cls_token="[CLS]", sep_token="[SEP]", bos_token="[CLS]", eos_token="[SEP]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        ).save_pretrained(folder / name)  # fmt: skip


def reviews(count: int, *, seed: int) -> Iterator[tuple[str, str]]:
    """Texts in which one word gives the verdict, and that word."""
    chance = random.Random(seed)
    for _ in range(count):
        words = [chance.choice(FILLERS) for _ in range(chance.randint(3, 8))]
        verdict = chance.choice(VERDICTS)
        words.insert(chance.randrange(len(words) + 1), verdict)
        yield " ".join(words), verdict


def write_data(folder: Path) -> None:
    """``train.csv`` and ``dev.csv`` with a header, ``text.txt`` of sentences that go in circles."""
    for name, count, seed in (("train", 256, 1), ("dev", 64, 2)):
        lines = [f"{text},{verdict}" for text, verdict in reviews(count, seed=seed)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (folder / "text.txt").write_text(" ".join([*FILLERS, *VERDICTS] * 200))
