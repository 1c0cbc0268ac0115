"""The DeepSpeed configurations under which training must give the one-process losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

STEPS = 20
SETTINGS: dict[str, Any] = {
    "lr": 5e-3,
    "max_rank": 12,
    "min_rank": 2,
    "energy": 0.7,
    "max_gap": 6,
    "min_gap": 3,
    "hysteresis": 0.0,
    "residual_momentum": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One model under one configuration."""

    name: str
    model: str
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    way: str = "initialize"
    zero_init: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's."""
        return {**SETTINGS, **self.more}

    @property
    def reference(self) -> str:
        """The model and other settings, by which its reference is called."""
        return "-".join([self.model, *(f"{key}={value}" for key, value in self.more.items())])

    @property
    def precision(self) -> str:
        return next((p for p in ("bf16", "fp16") if p in self.top), "fp32")

    def config(self, micro_batch: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdaRankGrad", "params": self.settings},
            "zero_optimization": {"stage": self.stage, **self.zero},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            **self.top,
        }

    @contextmanager
    def environment(self) -> Iterator[None]:
        """CPUs without AVX512_FP16 refuse fp16, though torch can do it, slowly."""
        if self.precision != "fp16":
            yield
            return
        import torch
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        before = CPU_Accelerator.is_fp16_supported, CPU_Accelerator.supported_dtypes
        CPU_Accelerator.is_fp16_supported = lambda self: True
        CPU_Accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]
        yield
        CPU_Accelerator.is_fp16_supported, CPU_Accelerator.supported_dtypes = before


WHOLE = {"stage3_param_persistence_threshold": 0}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 12}}
MOMENTUM = {"residual_momentum": 0.9}
FEW_BITS = {"state_dtype": "int8", "full_rank_state": "int8"}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

EVERYWHERE = [
    Case(f"{model}-zero{stage}", model, stage, WHOLE if stage == 3 else {})
    for model in ("llama", "gpt2", "odd")
    for stage in (0, 1, 2, 3)
]
"""Run with 1 and 2 processes; see :func:`everywhere`."""
SHARDED = [case for case in EVERYWHERE if case.model == "llama"]
"""Run with 8 processes, too."""

PROCESSES = {"llama": (1, 2, 4), "gpt2": (1, 2), "odd": (1, 2, 3, 4)}
"""With how many processes the models run everywhere: those of odd sizes are cut in odd ways."""


def everywhere(processes: int) -> list[Case]:
    """The cases of `EVERYWHERE` that run with so many processes."""
    return [case for case in EVERYWHERE if processes in PROCESSES[case.model]]


VARIANTS = [
    Case("zero2-round-robin", "llama", 2, {"round_robin_gradients": True}),
    Case("zero1-offload", "llama", 1, OFFLOAD),
    Case("zero2-offload", "llama", 2, OFFLOAD),
    Case("zero3-offload", "llama", 3, OFFLOAD),
    Case("zero2-overlap", "llama", 2, {"overlap_comm": True, "reduce_bucket_size": 4000}),
    Case("zero3-small-sub-groups", "llama", 3, {**WHOLE, "sub_group_size": 15000}),
    Case("zero3-persistent", "llama", 3, {"stage3_param_persistence_threshold": 100000}),
    Case("zero3-zero-init", "llama", 3, WHOLE, zero_init=True),
    Case("zero1-overlap", "llama", 1, {"overlap_comm": True, "reduce_bucket_size": 4000}),
    Case("zero3-overlap", "llama", 3, {**WHOLE, "overlap_comm": True, "reduce_bucket_size": 4000}),
    Case("zero1-accumulation", "llama", 1, accumulation=2),
    Case("zero0-accumulation", "llama", 0, accumulation=2),
    Case("zero2-accumulation", "llama", 2, accumulation=2),
    Case("zero3-accumulation", "llama", 3, WHOLE, accumulation=2),
    Case("zero0-json", "llama", 0, way="json"),
    Case("zero2-json", "llama", 2, way="json"),
    Case("zero3-json", "gpt2", 3, WHOLE, way="json"),
    Case("zero0-client", "gpt2", 0, way="client"),
    Case("zero2-client", "gpt2", 2, way="client"),
    Case("zero3-client", "llama", 3, WHOLE, way="client"),
    Case("zero0-bf16", "llama", 0, top=BF16),
    Case("zero1-bf16", "llama", 1, top=BF16),
    Case("zero1-bf16-fp32-accumulation", "llama", 1, top={**BF16, **FP32_ACCUMULATION}),
    Case("zero2-bf16", "llama", 2, top=BF16),
    Case("zero3-bf16", "llama", 3, WHOLE, top=BF16),
    Case("zero2-bf16-fp32-accumulation", "llama", 2, top={**BF16, **FP32_ACCUMULATION}),
    Case("zero3-bf16-fp32-accumulation", "llama", 3, WHOLE, top={**BF16, **FP32_ACCUMULATION}),
    Case("zero3-bf16-offload", "llama", 3, {**WHOLE, **OFFLOAD}, top=BF16),
    Case("zero1-fp16", "llama", 1, top=FP16),
    Case("zero2-fp16", "llama", 2, top=FP16),
    Case("zero3-fp16", "llama", 3, WHOLE, top=FP16),
    *(Case(f"zero{stage}-momentum", "llama", stage, WHOLE if stage == 3 else {}, more=MOMENTUM)
      for stage in (0, 1, 2, 3)),
    Case("zero2-few-bits", "llama", 2, more=FEW_BITS),
    Case("zero3-few-bits", "llama", 3, WHOLE, more=FEW_BITS),
    Case("zero2-experts", "moe", 2),
    Case("zero3-experts", "moe", 3, WHOLE),
]  # fmt: skip
"""Run with 2 processes; `json` and `client` are the other ways in."""

SMALL_SUB_GROUPS = {"stage3_param_persistence_threshold": 50, "sub_group_size": 4000}
GROUPS = [
    Case("odd-zero1-groups", "odd", 1, way="client"),
    Case("odd-zero3-groups", "odd", 3, SMALL_SUB_GROUPS, way="client"),
    Case("odd-zero1-bf16-groups", "odd", 1, top={**BF16, **FP32_ACCUMULATION}, way="client"),
    Case("odd-zero3-bf16-groups", "odd", 3, SMALL_SUB_GROUPS, top=BF16, way="client"),
]  # fmt: skip
"""Several parameter groups; some of stage 3's parameters persist."""

ODD_BUDGET = {"state_budget": "66KiB"}
LLAMA_BUDGET = {"state_budget": "360KiB"}
SUB_GROUPS = {**WHOLE, "sub_group_size": 15000}
BUDGETED = [
    Case("odd-zero1-groups-budget", "odd", 1, way="client", more=ODD_BUDGET),
    Case("llama-zero2-budget", "llama", 2, more=LLAMA_BUDGET),
    Case("llama-zero3-sub-groups-budget", "llama", 3, SUB_GROUPS, more=LLAMA_BUDGET),
    Case("odd-zero3-groups-budget", "odd", 3, SMALL_SUB_GROUPS, way="client", more=ODD_BUDGET),
]  # fmt: skip
"""The optimizer is shown its matrices in parts, and has one budget for all; 1 to 4 processes."""

CASES = {case.name: case for case in EVERYWHERE + VARIANTS + GROUPS + BUDGETED}

RESUMED = [
    *("llama-zero0", "llama-zero1", "llama-zero2", "llama-zero3", "odd-zero3-groups"),
    *("zero2-offload", "zero3-bf16-offload", "zero2-momentum", "zero3-momentum"),
    *("zero2-few-bits", "zero3-few-bits"),
    *("zero0-bf16", "odd-zero1-bf16-groups", "zero2-bf16", "odd-zero3-bf16-groups"),
]
"""Saved in mid-run and resumed, with 2 processes."""

MOVED = [
    "llama-zero0",
    "odd-zero1-groups",
    "llama-zero2",
    "odd-zero3-groups",
    "zero1-bf16-fp32-accumulation",
]
"""Saved with 4 processes by DeepSpeed, and resumed with 2: at stages 1 to 3 after conversion."""
