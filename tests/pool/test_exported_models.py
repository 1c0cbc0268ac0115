"""What processes train together, the command exports and from_pretrained loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

import arg_dist
from arg_dist.cli.main import main
from tests.launch import models, torch_engines
from tests.launch.launching import ROOT, environment
from tests.patience import patient

STEPS = 6


def train_and_save(group: dist.ProcessGroup, engine: str, name: str, folder: Path) -> Tensor:
    """Some steps and a checkpoint; the logits of the trained model, under its engine."""
    training = getattr(torch_engines, engine).start(group, name)
    me, share = dist.get_rank(group), models.BATCH // dist.get_world_size(group)
    for step in range(STEPS):
        tokens = models.batch(step)[me * share : (me + 1) * share]
        training.micro_step(tokens, 1.0, last=True)
    checkpoint = folder / f"step-{STEPS:08d}"
    arg_dist.checkpoint.save(checkpoint, training.optimizer, model=training.model, step=STEPS)
    with torch.no_grad():
        return training.model.eval()(input_ids=models.batch(STEPS)).logits


def run(*command: object) -> str:
    """What a command prints, in a process that knows nothing of others."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=patient(100)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("processes", "engine", "name", "program"),
    [
        (3, "ROWS", "llama", [Path(sys.executable).with_name("arg-dist")]),
        (2, "DDP", "gpt2", [sys.executable, "-m", "arg_dist"]),
    ],
)
def test_the_exported_model_is_the_trained_one(
    pool, tmp_path, capsys, processes, engine, name, program
):
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    trained = pool.run(train_and_save, processes, engine, name, folder, seconds=60)
    assert f"written: {out}" in run(*program, "export", folder, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        logits = loaded(input_ids=models.batch(STEPS)).logits
    assert all(torch.equal(logits, theirs) for theirs in trained)

    assert main(["inspect", str(folder)]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:3] == [f"step-{STEPS:08d}", str(STEPS), str(processes)]
    assert row[4:7] == ["intact", type(loaded).__name__, str(loaded.num_parameters())]
