"""Small models whose sizes make every cut fall inside a row, and their batches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.modeling_outputs import CausalLMOutput

from arg_dist.sharding.shard import local_part

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


class Sequential(nn.Module):
    """A language model of an embedding, layers and a head."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss)


class Block(nn.Module):
    """A layer without attention, as sequence parallelism cuts it: the norm sees some tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class FusedBlock(nn.Module):
    """A layer as GPT-2's, whose queries, keys and values are one matrix, head after head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        fused = self.qkv(self.first(hidden)).unflatten(-1, (-1, 3, self.head))
        q, k, v = fused.movedim(-2, 0).transpose(2, 3)  # 3 x batch x heads x tokens x head
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(2))
        return hidden + self.down(nn.functional.gelu(self.up(self.second(hidden))))


class Experts(nn.Module):
    """Experts in two stacks, of which a process may hold some; every token goes to all of them.

    Attributes:
        mesh: the processes among which the experts are distributed; None if all are here.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.mesh: DeviceMesh | None = None
        self.up = nn.Parameter(0.1 * torch.randn(count, width, 2 * width))
        self.down = nn.Parameter(0.1 * torch.randn(count, 2 * width, width))

    def forward(self, hidden: Tensor, shares: Tensor) -> Tensor:
        up, down, mesh = local_part(self.up), local_part(self.down), self.mesh
        if mesh is not None:
            hidden, shares = (
                DTensor.from_local(each, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
                for each in (hidden, shares)
            )
            first = mesh.get_local_rank() * len(up)
            shares = shares[..., first : first + len(up)]
        each = torch.einsum("bth,ehm->btem", hidden, up).relu()
        together = torch.einsum("btem,emh,bte->bth", each, down, shares)
        if mesh is None:
            return together
        summed = DTensor.from_local(together, mesh, [Partial()])
        return summed.redistribute(placements=[Replicate()]).to_local()


class ExpertBlock(nn.Module):
    """A layer with experts."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = Experts(experts, width)

    def forward(self, hidden: Tensor) -> Tensor:
        seen = self.norm(hidden)
        return hidden + self.experts(seen, self.gate(seen).softmax(-1))


def build(name: str) -> nn.Module:
    """The model called `name`, with the same weights every time."""
    torch.manual_seed(0)
    if name == "odd":
        return OddModel()
    if name == "sequence":
        return Sequential([Block(24), Block(24)], 24)
    if name == "fused":
        return Sequential([FusedBlock(40, 4), FusedBlock(40, 4)], 40)
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
    if name == "two experts":
        return Sequential([ExpertBlock(24, 2), ExpertBlock(24, 2)], 24)
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
