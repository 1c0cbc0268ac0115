"""Small models whose sizes make every cut fall inside a row, and their batches."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 211
BATCH = 24
LENGTH = 16
TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "use_cache": False,
}
"""A configuration of transformers, without the vocabulary; cuts fall inside its rows."""

TINY_MOE: dict[str, Any] = {
    **TINY_LLAMA,
    "hidden_size": 40,
    "intermediate_size": 28,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
"""A configuration with experts, which transformers keeps as one tensor a layer."""


class Scale(nn.Module):
    """Multiplies by one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))  # DeepSpeed cannot broadcast 0 dimensions

    def forward(self, hidden: Tensor) -> Tensor:
        return self.factor * hidden


class OddModel(nn.Module):
    """Primes, 1 x n, a scalar, a frozen and an unused parameter, a buffer; a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 23)
        self.narrow = nn.Linear(23, 29)
        self.wide = nn.Linear(29, 101, bias=False)
        self.frozen = nn.Linear(101, 101)
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, 101))
        self.gate = nn.Linear(101, 1)
        self.scalar = Scale()
        self.unused = nn.Linear(17, 19)
        self.head = nn.Linear(101, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        hidden = torch.tanh(self.wide(torch.tanh(self.narrow(self.embedding(input_ids)))))
        hidden = hidden + 0.1 * self.frozen(hidden) + self.shift.to(hidden.dtype)
        hidden = self.scalar(hidden) * torch.sigmoid(self.gate(hidden))
        logits = self.head(hidden)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss)


def build(name: str) -> nn.Module:
    """The model called `name`, with the same weights every time."""
    torch.manual_seed(0)
    if name == "odd":
        return OddModel()
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=60,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="eager",
        )
        return GPT2LMHeadModel(config)
    if name == "moe":
        from transformers import MixtralConfig, MixtralForCausalLM

        # every token goes to every expert: no rounding can send it elsewhere
        experts = {"num_local_experts": 4, "num_experts_per_tok": 4}
        return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **TINY_MOE, **experts))
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCABULARY, **TINY_LLAMA, attn_implementation="eager")
    return LlamaForCausalLM(config)


def batch(step: int) -> Tensor:
    """``BATCH x LENGTH`` tokens of one step, the same for every number of processes."""
    generator = torch.Generator().manual_seed(777 + step % 4)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
