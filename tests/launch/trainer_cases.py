"""The ways to train with the Trainer that must all give the losses of one process."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.launch.cases import SETTINGS

STEPS, SAVED_AFTER = 12, 6
OWN = {key: value for key, value in SETTINGS.items() if key != "lr"}
"""Settings that TrainingArguments do not have."""
SHIPPED = Path(__file__).parents[2] / "ds_configs"

Door = Literal[
    "line", "json", "both", "launcher", "optimizers", "override", "none", "trl", "dpo", "set"
]
"""What names the optimizer: `optimizer_cls_and_kwargs`, the DeepSpeed JSON in the arguments, both,
the JSON of accelerate's launcher, `optimizers`, a create_optimizer, or nothing; `trl` is the line
in an SFTTrainer, `dpo` is `optimizers` in a DPOTrainer, and `set` the line as its attribute."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    `deepspeed` is a shipped file, or a stage, where DeepSpeed is started by the arguments; `zero`
    and `top` are more keys of its JSON.
    """

    name: str
    door: Door = "line"
    deepspeed: str | int | None = None
    resume: bool = False
    refused: bool = False
    bare: bool = False
    """Without AdaRankGradCallback, so that logs have no ranks."""
    arguments: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any] | None:
        """The DeepSpeed JSON; its settings are those of the line."""
        if self.deepspeed is None:
            return None
        if isinstance(self.deepspeed, str):
            config = shipped(self.deepspeed)
        else:
            config = shipped("trainer_zero2.json")
            config["zero_optimization"] = {"stage": self.deepspeed, **self.zero}
        if self.door not in ("json", "both"):
            del config["optimizer"]
        return {**config, **self.top}


def shipped(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed JSON for the Trainer, with the settings of these runs."""
    config: dict[str, Any] = json.loads((SHIPPED / name).read_text())
    config["optimizer"]["params"].update(OWN)
    return config


KEPT = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "load_best_model_at_end": True,
    "greater_is_better": True,  # so that the best is not the last, and the end has one to load
    "report_to": ["tensorboard"],
}
SAVED = {"save_strategy": "steps"}
SKIPPED = {**SAVED, "ignore_data_skip": True}
"""A resumed training begins the data anew; so these are one batch for all steps."""
WEIGHTS_ONLY = {**SAVED, "save_only_model": True}
IN_THREE = {"gradient_accumulation_steps": 3}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
NOT_REPLACED = {"zero_force_ds_cpu_optimizer": False}
GLOO = {"use_cpu": False, "ddp_backend": "gloo"}
"""What the Trainer needs on CPUs if accelerate's launcher starts DeepSpeed."""

ALONE = [
    Way("single", resume=True, arguments=KEPT),
    Way("single-accumulation", arguments=IN_THREE),
    Way("single-trl", "trl"),
    Way("single-optimizers", "optimizers", resume=True, arguments=SAVED),
    Way("forgotten", "none", refused=True),
]
DDP = [
    Way("ddp", resume=True, arguments=KEPT),
    Way("ddp-accumulation", arguments=IN_THREE),
    Way("ddp-trl", "trl"),
    Way("ddp-optimizers", "optimizers", resume=True, bare=True, arguments=KEPT),
    Way("ddp-override", "override", resume=True, bare=True, arguments=SKIPPED),
    Way("ddp-dpo", "dpo", resume=True, bare=True, arguments=SAVED),
    Way("ddp-set", "set", bare=True, arguments=WEIGHTS_ONLY),
]
DEEPSPEED = [
    Way("zero0", deepspeed=0, resume=True, arguments=KEPT),
    Way("zero1", deepspeed=1, resume=True, arguments=KEPT),
    Way("zero2", deepspeed=2, resume=True, arguments=KEPT),
    Way("zero3", deepspeed="trainer_zero3.json", resume=True, arguments=KEPT),
    Way("zero2-accumulation", deepspeed=2, arguments=IN_THREE),
    Way("zero2-offload", deepspeed=2, zero=OFFLOAD, top=NOT_REPLACED),
    Way("zero2-trl", "trl", 2),
    Way("zero3-trl", "trl", 3),
    Way("zero2-set", "set", 2, resume=True, bare=True, arguments=SAVED),
    Way("json-zero0", "json", 0),
    Way("json-zero1", "json", 1),
    Way("json-zero2", "json", "trainer_zero2.json", resume=True, arguments=KEPT),
    Way("json-zero3", "json", "trainer_zero3.json", resume=True, arguments=KEPT),
    Way("json-accumulation", "json", "trainer_zero2.json", arguments=IN_THREE),
    Way("json-decay", "json", 2, arguments={"weight_decay": 0.1, "max_steps": 1}),
    Way("dropped", "optimizers", 2, refused=True),
    Way(
        "both",
        "line",
        2,
        refused=True,
        top={"optimizer": shipped("trainer_zero2.json")["optimizer"]},
    ),
]
ACCELERATE = [Way("accelerate")]
KEPT_BY_FSDP2 = {**KEPT, **GLOO, "load_best_model_at_end": False}
"""Under FSDP2 a checkpoint of transformers 5.23 only sometimes names the best one, itself: it looks
for its own folder while it is being made."""
BY_ARGUMENTS = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
"""Saved by the first process, which is the Trainer's default."""
ACCELERATE_FSDP2 = [
    Way("fsdp2", resume=True, arguments=KEPT_BY_FSDP2),
    Way("fsdp2-trl", "trl", arguments=GLOO),
    Way("fsdp2-by-arguments", resume=True, arguments={**KEPT_BY_FSDP2, **BY_ARGUMENTS}),
]
ACCELERATE_DEEPSPEED = [
    Way("accelerate-json", "launcher", arguments=GLOO),
    Way("accelerate-both", "both", arguments=GLOO, refused=True),
]
WAYS = {
    way.name: way
    for way in [
        *(*ALONE, *DDP, *DEEPSPEED),
        *(*ACCELERATE, *ACCELERATE_FSDP2, *ACCELERATE_DEEPSPEED),
    ]
}
PREFERENCES = ("dpo", "set")
"""Doors of trainings on another task, whose losses are others."""
