"""Which checkpoint a job goes on from, whether it is its own, and what it takes over."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arg_dist.checkpoint.index import INDEX_NAME, Index, index_bytes
from arg_dist.cli.parsing import InputError
from arg_dist.planning.llama import model_config
from launchers.pretraining.corpus import Corpus
from launchers.pretraining.deepspeed_engine import load_loss_scale_state, loss_scale_state
from launchers.pretraining.identity import model_values, text_digest, token_digest
from launchers.pretraining.resuming import (
    KEEP,
    Found,
    check_job,
    describe_job,
    find_checkpoint,
    plan_checkpoints,
)
from launchers.pretraining.schedule import warmup_cosine_scheduler
from launchers.pretraining.tokens import Sequences

pytestmark = pytest.mark.unit

NOTHING = {"resume": None, "save_every": None, "keep": None, "time_limit": None}
COURSE = {"steps": 20, "warmup": 4, "min_lr_ratio": 0.1}


def plan(out, **given):
    return plan_checkpoints(out, "adarankgrad", **(NOTHING | given))


def job(**changes):
    described = describe_job(
        identity={
            "model": {"hidden_size": 8, "layers": 2},
            "seed": 0,
            "seq_len": 16,
            "batch_size": 12,
            "text": "a" * 64,
            "tokens": "b" * 64,
        },
        schedule=COURSE | {"clip": 1.0},
        settings={"lr": 1e-3, "energy": 0.9, "collective_timeout": 1800.0},
    )
    described = json.loads(json.dumps(described))
    for path, value in changes.items():
        section, _, key = path.partition("__")
        described[section][key] = value
    return described


def write_checkpoint(out, step, **more):
    """The folder of a checkpoint that has nothing in it but its index."""
    empty = dict(
        world_size=1, calls=step, skipped_steps=0, groups=[], states={}, weights={}, files={},
        random_states=[], scheduler=None, model_config_values=None,
    )  # fmt: skip
    index = Index(step=step, **(empty | {"job": job()} | more))
    folder = out / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / INDEX_NAME).write_bytes(index_bytes(index, "a test"))
    return folder


# -- what the command line asks for ----------------------------------------------------------------


def test_nothing_is_saved_unless_something_asks_for_it(tmp_path):
    assert not plan(tmp_path).saves
    for given in ({"resume": "auto"}, {"save_every": 5}):
        asked = plan(tmp_path, **given)
        assert asked.saves and asked.keep == KEEP
        assert asked.folder == tmp_path / "checkpoints"
    with pytest.raises(InputError, match=r"--keep 2: .* --save-every"):
        plan(tmp_path, keep=2)
    for given, option in (({"resume": "auto"}, "--resume"), ({"save_every": 5}, "--save-every")):
        with pytest.raises(InputError, match=f"{option}: .*AdaRankGrad's.* omit {option}"):
            plan_checkpoints(tmp_path, "adamw", **(NOTHING | given))


# -- which checkpoint ------------------------------------------------------------------------------


def test_a_run_does_not_start_over_another_ones_checkpoints(tmp_path):
    assert find_checkpoint(plan(tmp_path)) is None
    write_checkpoint(tmp_path, 4)
    for given in ({}, {"save_every": 5}):
        with pytest.raises(InputError, match=r"step-00000004; .*--resume auto, .*another --out"):
            find_checkpoint(plan(tmp_path, **given))


def test_auto_is_the_newest_with_a_readable_index_or_none(tmp_path):
    auto = plan(tmp_path, resume="auto")
    assert find_checkpoint(auto) is None
    older, newer = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)
    found = find_checkpoint(auto)
    assert (found.path, found.step, found.job) == (newer, 8, job())
    (newer / INDEX_NAME).write_text("{")
    assert find_checkpoint(auto).path == older
    (older / INDEX_NAME).unlink()
    assert find_checkpoint(auto) is None  # who loads then tells why


def test_a_path_may_lead_back_in_the_same_run_or_to_another_one(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    older, _ = write_checkpoint(own, 4), write_checkpoint(own, 8)
    foreign = write_checkpoint(other, 6)
    assert find_checkpoint(plan(own, resume=str(older))).step == 4
    assert find_checkpoint(plan(tmp_path / "new", resume=str(foreign))).step == 6
    with pytest.raises(InputError, match=r"--out .*own: .*step-00000008; .*another --out"):
        find_checkpoint(plan(own, resume=str(foreign)))
    with pytest.raises(InputError, match=r"--resume: .*nowhere: no such folder"):
        find_checkpoint(plan(tmp_path / "new", resume=str(tmp_path / "nowhere")))


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    write_checkpoint(tmp_path, 4, job={"epoch": 1})
    with pytest.raises(InputError, match=r"step-00000004 was not written by this program"):
        find_checkpoint(plan(tmp_path, resume="auto"))


# -- whether it is the same job --------------------------------------------------------------------

FOUND = Found("run/checkpoints/step-00000004", 4, job())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"identity__seed": 1}, "--seed 1: .*step-00000004 was trained with 0; pass --seed 0"),
        ({"identity__seq_len": 8}, "--seq-len 8: .*pass --seq-len 16"),
        ({"identity__batch_size": 16}, "--batch-size 16: .*pass --batch-size 12"),
        ({"identity__text": "c" * 64}, "--data, --text-key and --data-bytes: .*aaaa.*now cccc"),
        ({"identity__tokens": "c" * 64}, "--tokenizer: .*bbbb.*now cccc"),
        (
            {"identity__model": {"hidden_size": 16, "layers": 2}},
            r"--model: .*hidden_size=8 \(now 16\)",
        ),
        ({"schedule__steps": 3}, "--steps 3: .*already at step 4"),
    ],
)
def test_another_job_is_refused_by_the_option_that_makes_it_one(changed, words):
    with pytest.raises(InputError, match=words):
        check_job(FOUND, job(**changed), lr=None, given={})


def test_the_same_job_goes_on_without_a_word_with_keys_that_models_got_later():
    now = job(identity__model={"hidden_size": 8, "layers": 2, "invented_later": None})
    assert check_job(FOUND, now, lr=None, given={"collective_timeout": 60}) == []


def test_the_course_of_the_learning_rate_may_change_and_is_told():
    now = job(schedule__steps=40, schedule__clip=0.5, settings__lr=2e-3)
    told = check_job(FOUND, now, lr=2e-3, given={})
    assert told == [
        "--steps: 20 up to the checkpoint, 40 from now on",
        "--clip: 1.0 up to the checkpoint, 0.5 from now on",
        "--lr: 0.001 up to the checkpoint, 0.002 from now on",
    ]
    assert now["settings"]["lr"] == 2e-3


def test_settings_that_nobody_gives_are_those_of_the_checkpoint():
    # as where the one run has a DeepSpeed JSON and the other one has none
    now = job(settings__lr=5e-3, settings__energy=0.5, settings__collective_timeout=60.0)
    assert check_job(FOUND, now, lr=None, given={"collective_timeout": 60.0}) == []
    assert now["settings"] == {"lr": 1e-3, "energy": 0.9, "collective_timeout": 60.0}


def test_settings_may_have_been_saved_under_earlier_names():
    found = Found(FOUND.path, 4, {**job(), "settings": {"lr": 1e-3, "decay": 0.5}})
    now = job(settings__refresh_below=0.25)
    assert check_job(found, now, lr=None, given={"collective_timeout": 1800.0}) == []
    assert now["settings"] == {
        "lr": 1e-3, "energy": 0.9, "refresh_below": 0.5, "collective_timeout": 1800.0,
    }  # fmt: skip
    with pytest.raises(
        InputError, match=r"refresh_below=0\.25: .* trained with refresh_below=0\.5"
    ):
        check_job(found, job(settings__refresh_below=0.25), lr=None, given={"refresh_below": 0.25})


def test_a_setting_that_is_given_and_would_not_count_is_refused():
    with pytest.raises(InputError, match=r"--set energy=0.5: .*with energy=0.9.*omit it"):
        check_job(FOUND, job(settings__energy=0.5), lr=None, given={"energy": 0.5})
    assert check_job(FOUND, job(), lr=None, given={"energy": 0.9}) == []


# -- what is compared ------------------------------------------------------------------------------


def test_digests_tell_texts_and_tokens_apart():
    corpora = [
        Corpus([b"ab", b"c"], [b"d"], ""),
        Corpus([b"c", b"ab"], [b"d"], ""),
        Corpus([b"a", b"bc"], [b"d"], ""),
        Corpus([b"ab"], [b"c", b"d"], ""),
    ]
    assert len({text_digest(corpus) for corpus in corpora}) == 4
    assert text_digest(corpora[0]) == text_digest(Corpus([b"ab", b"c"], [b"d"], "elsewhere"))
    numbers = np.arange(6, dtype=np.uint16)
    streams = [(numbers, numbers[:2]), (numbers[:4], numbers[4:]), (numbers[::-1].copy(), numbers)]
    digests = {token_digest(Sequences(*pair, 2, 0, 9, "")) for pair in streams}
    assert len(digests) == 3


def test_a_models_configuration_is_what_decides_about_training():
    small, other = (model_config("nano", vocab_size=size, length=16) for size in (258, 300))
    values = model_values(small)
    assert values["hidden_size"] == 192
    assert json.loads(json.dumps(values)) == values
    assert not values.keys() & {"transformers_version", "dtype", "_name_or_path"}
    assert model_values(other) == values | {"vocab_size": 300}
    small._name_or_path = "moved"
    assert model_values(small) == values


# -- what comes back -------------------------------------------------------------------------------


def groups(count):
    return torch.optim.SGD([{"params": [torch.ones(1)]} for _ in range(count)], lr=1e-3)


def run(scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_the_learning_rate_goes_on_to_the_bit_with_other_groups():
    factory = warmup_cosine_scheduler(**COURSE)
    expected = [rate for (rate,) in run(factory(groups(1)), 20)]
    for before in (0, 2, 7, 20):
        first = factory(groups(1))
        run(first, before)
        state = json.loads(json.dumps(first.state_dict()))
        assert state == {"step": before, "peak": 1e-3}
        second = factory(groups(2))
        second.load_state_dict(state)
        assert run(second, 20 - before) == [[rate, rate] for rate in expected[before:]]


def test_a_longer_run_and_another_peak_count_from_the_next_step_on():
    first = warmup_cosine_scheduler(**COURSE)(groups(1))
    run(first, 10)
    longer = warmup_cosine_scheduler(**COURSE | {"steps": 40})
    second, expected = longer(groups(1)), longer(groups(1))
    second.load_state_dict(first.state_dict())
    whole = run(expected, 40)
    assert run(second, 10) == whole[10:20]
    second.set_peak(3e-3)
    assert second.get_last_lr() == [second.optimizer.param_groups[0]["lr"]]
    for (new,), (old,) in zip(run(second, 20), whole[20:], strict=True):
        assert new == pytest.approx(3 * old, rel=1e-12)


def test_the_dynamic_loss_scale_comes_back_where_there_is_one(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 0))
    fresh = DynamicLossScaler(2**16, 2, 1, 2, False)
    used = copy.deepcopy(fresh)
    for overflow in (True, True, True, False, False):
        used.update_scale(overflow)
    state = json.loads(json.dumps(loss_scale_state(SimpleNamespace(optimizer=Scaled(used)))))
    load_loss_scale_state(SimpleNamespace(optimizer=Scaled(fresh)), state)
    assert vars(fresh) == vars(used)
    static = SimpleNamespace(optimizer=Scaled(LossScaler(1.0)))
    none = SimpleNamespace(optimizer=SimpleNamespace())
    for engine in (static, none):
        assert loss_scale_state(engine) == {}
        load_loss_scale_state(engine, state)
    assert static.optimizer.loss_scaler.cur_scale == 1.0


class Scaled(SimpleNamespace):
    def __init__(self, scaler):
        super().__init__(loss_scaler=scaler)
