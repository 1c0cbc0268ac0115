"""What must end in an error on every process, tried one after the other in one launch.

    deepspeed --num_gpus 2 tests/launch/faults.py --out DIRECTORY

Each process writes what it was told, and whether its weights and state stayed as they were.
"""

import argparse
import faulthandler
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(140), exit=True)

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

import models  # noqa: E402
from cases import SETTINGS, Case  # noqa: E402

import arg_dist  # noqa: E402


def told(action: Callable[[], Any]) -> dict[str, Any]:
    """The error that `action` ends in, and how long that took."""
    began = time.monotonic()
    try:
        action()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    else:
        kind, message = "", "no error"
    return {"kind": kind, "message": message, "seconds": time.monotonic() - began}


def engine_of(case: Case, **settings: Any) -> Any:
    config = case.config(micro_batch=4)
    config["gradient_clipping"] = 0.0
    config["optimizer"]["params"].update(settings)
    return arg_dist.initialize(model=models.build(case.model), config=config)[0]


def one_step(engine: Any, poison: str = "") -> None:
    """A step; the gradient of the parameter called `poison` is NaN on process 1."""
    tokens = models.batch(0)[:4]
    loss = engine(input_ids=tokens, labels=tokens).loss
    hooks = []
    for name, parameter in engine.module.named_parameters():
        if name == poison and dist.get_rank() == 1:
            hooks.append(parameter.register_hook(lambda gradient: gradient * float("nan")))
    engine.backward(loss)
    engine.step()
    for hook in hooks:
        hook.remove()


def snapshot(optimizer: arg_dist.AdaRankGrad) -> list[torch.Tensor]:
    found = []
    for target, matrices in optimizer.state.items():
        found.append(target.detach().clone())
        for state in matrices.values():
            found += [value.clone() for value in state.values() if torch.is_tensor(value)]
    return found


def nan_gradient(stage: int) -> dict[str, Any]:
    poison = "model.layers.1.mlp.up_proj.weight"
    engine = engine_of(Case("nan", "llama", stage))
    one_step(engine)
    before = snapshot(engine.basic_optimizer)
    result = told(lambda: one_step(engine, poison))
    after = snapshot(engine.basic_optimizer)
    result["skipped"] = engine.skipped_steps
    result["intact"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    engine.destroy()
    return result


def different_configs() -> None:
    engine_of(Case("different", "llama", 2), max_rank=12 + dist.get_rank())


def different_settings() -> None:
    model = models.build("llama")
    settings = {**SETTINGS, "max_rank": 12 + dist.get_rank()}
    optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model), **settings)
    config = Case("different", "llama", 2).config(micro_batch=4)
    del config["optimizer"]
    one_step(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])


def unknown_key() -> None:
    parameters = list(models.build("llama").parameters())
    config = Case("unknown", "llama", 2).config(micro_batch=4)
    config["optimizer"]["params"]["max_rnak"] = 3
    deepspeed.initialize(model=models.build("llama"), model_parameters=parameters, config=config)


def elastic_checkpoint(way: str) -> None:
    case = Case("elastic", "llama", 2, {"elastic_checkpoint": True})
    model, config = models.build("llama"), case.config(micro_batch=4)
    if way == "client":
        del config["optimizer"]
        optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model))
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    else:
        parameters = list(model.parameters())
        deepspeed.initialize(model=model, model_parameters=parameters, config=config)


def fp16_at_stage_0() -> None:
    case = Case("fp16", "llama", 0, top={"fp16": {"enabled": True}})
    with case.environment():
        parameters = list(models.build("llama").parameters())
        deepspeed.initialize(
            model=models.build("llama"), model_parameters=parameters, config=case.config(4)
        )


def replaced(step_first: bool) -> None:
    """DeepSpeed is handed AdamW for a model for which an AdaRankGrad was built, and is gone."""
    model = models.build("llama")
    config = Case("replaced", "llama", 2).config(micro_batch=4)
    del config["optimizer"]
    optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model), process_group=None)
    if step_first:
        optimizer.step()
    del optimizer
    adamw = torch.optim.AdamW(model.parameters())
    deepspeed.initialize(model=model, optimizer=adamw, config=config)[0].destroy()


LATE = [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def late_weights(stage: int, precision: str, then: str) -> dict[str, Any]:
    """Weights that are loaded into an engine's model, and how far a step moves them from there."""
    top = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    engine = engine_of(Case("late", "llama", stage, top=top))
    parameters = list(engine.module.parameters())
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        for parameter in parameters if dist.get_rank() == 0 or stage < 3 else []:
            parameter.fill_(0.5)
    if then == "-refreshed":
        engine.optimizer.refresh_fp32_params()
    result = told(lambda: one_step(engine))
    with deepspeed.zero.GatheredParameters(parameters):
        result["moved"] = max(float((p.detach() - 0.5).abs().max()) for p in parameters)
    engine.destroy()
    return result


def foreign_keys(stage: int) -> dict[str, Any]:
    """Groups as DeepSpeed's own tests and its MoE splitter build them, with names of their own."""
    model = models.build("llama")
    case = Case("keys", "llama", stage)
    config = case.config(micro_batch=4)
    del config["optimizer"]
    groups = arg_dist.param_groups(model)
    for i, group in enumerate(groups):
        group["name"] = f"group {i}"
    optimizer = arg_dist.AdaRankGrad(groups, **case.settings)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    result = told(lambda: one_step(engine))
    result["names"] = [group["name"] for group in optimizer.param_groups]
    engine.destroy()
    return result


def complex_weights() -> None:
    model = models.build("llama")
    model.phases = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    config = Case("complex", "llama", 2, top={"bf16": {"enabled": True}}).config(micro_batch=4)
    arg_dist.initialize(model=model, config=config)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {
        "nan-zero0": nan_gradient(0),
        "nan-zero2": nan_gradient(2),
        "nan-zero3": nan_gradient(3),
        "different-configs": told(different_configs),
        "different-settings": told(different_settings),
        "unknown-key": told(unknown_key),
        "elastic-json": told(lambda: elastic_checkpoint("json")),
        "elastic-client": told(lambda: elastic_checkpoint("client")),
        "fp16-zero0": told(fp16_at_stage_0),
        **{
            f"late-{stage}-{precision}{then}": late_weights(stage, precision, then)
            for stage, precision in LATE
            for then in ("", "-refreshed")
        },
        **{f"keys-{stage}": foreign_keys(stage) for stage in (1, 3)},
        "complex": told(complex_weights),
        "replaced": told(lambda: replaced(step_first=False)),
        "another-later": told(lambda: replaced(step_first=True)),
    }
    file = options.out / f"process{dist.get_rank()}.json"
    file.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
