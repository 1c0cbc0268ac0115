"""``arg-dist export`` and ``inspect``: what comes out of a checkpoint, and what is told of it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from tolerances import REFACTORED
from torch import Tensor, nn

import arg_dist
from arg_dist.checkpoint import index as index_of
from arg_dist.cli.main import main

TOKENS = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gpt2(**settings) -> nn.Module:
    """Tied weights, and linear layers the other way round."""
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=0,
        bos_token_id=0, use_cache=False, **settings,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """A frozen embedding; the configuration tells that the weights were once another model's."""
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32, num_labels=3,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    return model


def mixtral() -> nn.Module:
    """Experts in stacks, which its files hold one by one."""
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, num_local_experts=4, use_cache=False,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def resnet() -> nn.Module:
    """Buffers that training moves, some of them whole numbers."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


def loss_of(model: nn.Module) -> Tensor:
    if isinstance(model, transformers.ResNetForImageClassification):
        return model(pixel_values=PIXELS, labels=torch.tensor([0, 1])).loss
    labels = torch.tensor([0, 2]) if model.config.model_type == "bert" else TOKENS
    return model(input_ids=TOKENS, labels=labels).loss


def trained(net: nn.Module, folder: Path, step: int = 3, **kept: object) -> Path:
    """A checkpoint of the model after some steps, ``step-...`` in the folder."""
    groups = arg_dist.param_groups(net)
    optimizer = arg_dist.AdaRankGrad(groups, lr=1e-2, max_rank=8, process_group=None)
    for _ in range(3):
        loss_of(net.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = folder / f"step-{step:08d}"
    arg_dist.checkpoint.save(path, optimizer, **{"model": net, "step": step, **kept})
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    """The one line that a failed command prints on stderr."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("build", [gpt2, bert, mixtral, resnet])
def test_from_pretrained_gives_the_model_that_was_trained(tmp_path, build):
    torch.manual_seed(0)
    model = build()
    checkpoint = trained(model, tmp_path)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    name = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert name == [type(model).__name__]
    usual = (checkpoint / index_of.INDEX_NAME).stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}
    loaded = getattr(transformers, name[0]).from_pretrained(tmp_path / "out")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        assert torch.equal(loss_of(loaded.eval()), loss_of(model.eval()))
    assert {path.name for path in tmp_path.iterdir()} == {"out", checkpoint.name}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_type_that_is_asked_for(tmp_path, dtype):
    model = resnet()
    checkpoint = trained(model, tmp_path)
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--dtype", dtype]) == 0
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    for key, value in loaded.state_dict().items():
        trained_value = model.state_dict()[key]
        if trained_value.is_floating_point():
            trained_value = trained_value.to(getattr(torch, dtype))
        assert torch.equal(value, trained_value)


def test_what_float16_cannot_hold_is_told(tmp_path, capsys):
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[3, 3] = -7e4
    checkpoint = trained(model, tmp_path)
    line = told(capsys, "export", checkpoint, tmp_path / "out", "--dtype", "float16", code=1)
    assert "transformer.wte.weight has values beyond the float16 maximum, 65504" in line
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name}


def test_a_tokenizer_is_put_beside_the_model(tmp_path, capsys):
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"no": 0, "yes": 1}, unk_token="no"))
    )
    words.save_pretrained(tmp_path / "words")
    checkpoint = trained(gpt2(), tmp_path)
    out = tmp_path / "out"
    line = told(capsys, "export", checkpoint, out, "--tokenizer", tmp_path, code=2)
    assert f"--tokenizer {tmp_path}: no Hugging Face tokenizer found" in line
    assert main(["export", str(checkpoint), str(out), "--tokenizer", str(tmp_path / "words")]) == 0
    assert transformers.AutoTokenizer.from_pretrained(out)("yes")["input_ids"] == [1]
    assert transformers.AutoModelForCausalLM.from_pretrained(out)


def test_of_a_folder_the_newest_intact_one_is_exported(tmp_path, capsys):
    model = gpt2()
    trained(model, tmp_path / "run", step=3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    broken = trained(model, tmp_path / "run", step=6)
    file = next(broken.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = told(capsys, "export", tmp_path / "run", tmp_path / "out", code=0)
    assert f"passed over: {file}: damaged" in line
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())

    assert f"{file}: damaged" in told(capsys, "export", broken, tmp_path / "other", code=1)
    next((tmp_path / "run" / "step-00000003").glob("*.safetensors")).unlink()
    line = told(capsys, "export", tmp_path / "run", tmp_path / "other", code=1)
    assert "none of its checkpoints is intact" in line and "missing" in line
    assert not (tmp_path / "other").exists()


def of_another_configuration(checkpoint: Path, **changes: object) -> None:
    """Rewrites a checkpoint's index as if the model had been configured otherwise."""
    index = index_of.read_index(checkpoint)
    values = {**index.model_config_values, **changes}
    changed = index.model_copy(update={"model_config_values": values})
    (checkpoint / index_of.INDEX_NAME).write_bytes(index_of.index_bytes(changed, "a test"))


@pytest.mark.parametrize(
    ("kept", "changes", "words"),
    [
        ({"model": None}, {}, "contains no model configuration: it was saved without model="),
        ({"weights": False}, {}, "contains optimizer state only"),
        ({}, {"architectures": ["Mine"]}, "trained as Mine: transformers"),
        ({}, {"n_head": 5}, "GPT2LMHeadModel cannot be built from its configuration"),
        ({}, {"n_positions": 16}, "transformer.wpe.weight has shape (32, 32), but the"),
        ({}, {"n_layer": 3}, "missing 'transformer.h.2."),
        ({}, {"n_layer": 1}, "contains 'transformer.h.1.attn.c_attn.bias', which GPT2LMHeadModel"),
    ],
)
def test_a_checkpoint_that_is_no_whole_model_is_told_by_name(
    tmp_path, capsys, kept, changes, words
):
    checkpoint = trained(gpt2(), tmp_path, **kept)
    if changes:
        of_another_configuration(checkpoint, **changes)
    line = told(capsys, "export", checkpoint, tmp_path / "out", code=1)
    assert f"{checkpoint}: " in line and words in line
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_weights_that_an_engine_has_untied_must_be_equal(tmp_path, capsys):
    model = gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    for parameter in (model.lm_head.weight, model.transformer.wte.weight):
        parameter.requires_grad_(False)
    equal = trained(model, tmp_path, step=1)
    of_another_configuration(equal, tie_word_embeddings=True)
    assert main(["export", str(equal), str(tmp_path / "out")]) == 0
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    different = trained(model, tmp_path, step=2)
    of_another_configuration(different, tie_word_embeddings=True)
    line = told(capsys, "export", different, tmp_path / "other", code=1)
    assert "transformer.wte.weight and lm_head.weight are tied" in line


def test_the_class_can_be_named(tmp_path, capsys):
    checkpoint = trained(gpt2(), tmp_path)
    of_another_configuration(checkpoint, architectures=["Mine"])
    arguments = ["export", checkpoint, tmp_path / "out", "--architecture"]
    assert "--architecture Tensor: transformers" in told(capsys, *arguments, "Tensor", code=2)
    assert main([*map(str, arguments), "GPT2LMHeadModel"]) == 0


def test_what_is_in_the_way_is_not_touched(tmp_path, capsys):
    checkpoint = trained(gpt2(), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    line = told(capsys, "export", checkpoint, out, code=2)
    assert f"{out}: exists and is not empty" in line
    line = told(capsys, "export", checkpoint, out / "precious", code=2)
    assert "exists and is not empty" in line
    line = told(capsys, "export", checkpoint, out / "precious" / "below", code=1)
    assert "cannot be written" in line
    (out / "precious").unlink()
    assert main(["export", str(checkpoint), str(out)]) == 0


def test_out_appears_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    checkpoint = trained(gpt2(), tmp_path)

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", disk_full)
        line = told(capsys, "export", checkpoint, tmp_path / "new" / "out", code=1)
    assert "out: cannot be written ([Errno 28] No space left on device)" in line
    assert not list((tmp_path / "new").iterdir())


def test_checkpoints_are_inspected(tmp_path, capsys):
    model = bert()
    first = trained(model, tmp_path, step=3)
    trained(model, tmp_path, step=12, weights=False)
    assert main(["inspect", str(tmp_path)]) == 0
    titles, *rows = capsys.readouterr().out.splitlines()
    assert titles.split()[:4] == ["checkpoint", "step", "processes", "MiB"]
    assert len({len(line) for line in (titles, *rows)}) == 1
    count = str(sum(parameter.numel() for parameter in model.parameters()))
    whole, state_only = (row.split() for row in rows)
    assert whole[:3] == ["step-00000003", "3", "1"]
    assert whole[4:8] == ["intact", "BertForSequenceClassification", count, "12"]
    assert 1 <= float(whole[8]) <= 8
    assert state_only[1:7] == ["12", "1", state_only[3], "intact", whole[5], "-"]
    assert float(state_only[3]) < float(whole[3])

    file = next(first.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "step-00000020").mkdir()
    assert main(["inspect", str(tmp_path)]) == 1
    _, broken, _, empty, *reasons = capsys.readouterr().out.splitlines()
    assert broken.split()[4] == "broken" and empty.split()[1:] == [*"---", "broken", *"----"]
    assert reasons[0].startswith(f"broken: {file}: damaged (has ")
    assert reasons[1].startswith(f"broken: {tmp_path / 'step-00000020'}: it has no index.json")

    assert main(["inspect", str(first)]) == 1
    assert "no such folder" in told(capsys, "inspect", tmp_path / "nothing", code=1)


def test_a_checkpoint_that_is_removed_meanwhile_is_not_called_broken(tmp_path, capsys, monkeypatch):
    checkpoint = trained(gpt2(), tmp_path)
    gone = tmp_path / "step-00000001"
    monkeypatch.setattr("arg_dist.cli.inspection.checkpoints_at", lambda _: [gone, checkpoint])
    assert main(["inspect", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_wrong_command_line_is_told_in_one_line(capsys):
    for arguments in ([], ["export"], ["export", "a", "b", "--dtype", "int8"], ["import"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


# -- an adapter to a base model -------------------------------------------------------------------


NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def adapted(base: nn.Module, folder: Path) -> nn.Module:
    """What PEFT makes of a base model and an adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder))


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@NEEDS_PEFT
@pytest.mark.parametrize("build", [gpt2, bert, mixtral])
def test_an_adapter_of_full_rank_gives_the_trained_model(tmp_path, build, capsys):
    torch.manual_seed(0)
    model = build()
    # as one fine-tunes: the base of a classifier has no head
    base = getattr(model, "bert", model)
    base.save_pretrained(tmp_path / "base")
    checkpoint = trained(model, tmp_path)
    words = ["--adapter", tmp_path / "base", "--energy", 1]
    assert main(["export", *map(str, [checkpoint, tmp_path / "adapter", *words])]) == 0
    fresh = type(model).from_pretrained(tmp_path / "base")
    before = logits_of(fresh)
    found = logits_of(adapted(fresh, tmp_path / "adapter"))
    wanted = logits_of(model)
    assert (before - wanted).abs().max() > 0.01
    REFACTORED.check(found, wanted)
    printed = capsys.readouterr().out
    assert ("saved whole" in printed) and "relative error" in printed


@NEEDS_PEFT
def test_an_adapter_is_off_by_what_is_told(tmp_path, capsys):
    torch.manual_seed(0)
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    checkpoint, distance = trained(model, tmp_path), {}
    now = dict(model.named_parameters())
    for rank in (1, 4):
        out = tmp_path / f"rank{rank}"
        words = [checkpoint, out, "--adapter", tmp_path / "base", "--rank", rank]
        assert main(["export", *map(str, words)]) == 0
        printed = capsys.readouterr().out
        assert "lm_head, transformer.wte: share one weight" in printed
        lines = re.findall(r"^(\S+): rank (\d+), relative error (\S+)$", printed, re.M)
        assert {int(found) for _, found, _ in lines} == {rank}
        base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        with_adapter = adapted(base, out)
        distance[rank] = (logits_of(with_adapter) - logits_of(model)).norm()
        merged = dict(with_adapter.merge_and_unload().named_parameters())
        for name, _, error in lines:
            key = f"{name}.weight"
            if name not in ("lm_head", "transformer.wte"):
                change = (now[key] - first[key]).norm()
                found = float((merged[key] - now[key]).norm() / change)
                assert found == pytest.approx(float(error), rel=0.06)
    assert distance[4] < distance[1]


@NEEDS_PEFT
def test_the_rank_of_an_adapter_follows_the_energy(tmp_path, capsys):
    torch.manual_seed(0)
    model = bert()
    model.save_pretrained(tmp_path / "base")
    checkpoint = trained(model, tmp_path)
    words = [checkpoint, tmp_path / "out", "--adapter", tmp_path / "base", "--energy", 0.8]
    assert main(["export", *map(str, words)]) == 0
    errors = re.findall(r"rank (\d+), relative error (\S+)$", capsys.readouterr().out, re.M)
    assert errors and all(float(error) <= 0.2**0.5 + 0.01 for _, error in errors)
    assert len({rank for rank, _ in errors}) > 1


@NEEDS_PEFT
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "{base}"], "--adapter: give either --rank or --energy"),
        (["--rank", "3"], "--rank, --energy: of an adapter; give its base model"),
        (
            ["--adapter", "{base}", "--rank", "3", "--dtype", "float16"],
            "--dtype, --tokenizer: of a",
        ),
        (["--adapter", "nowhere", "--rank", "3"], "--adapter nowhere: model.safetensors cannot be"),
        (["--adapter", "{other}", "--rank", "3"], "has none of the model's weights"),
        (
            ["--adapter", "{larger}", "--rank", "3"],
            "transformer.wte.weight has the shape (120, 32)",
        ),
    ],
)
def test_what_is_no_adapter_is_told(tmp_path, capsys, words, said):
    model = gpt2()
    checkpoint = trained(model, tmp_path)
    places = {name: tmp_path / name for name in ("base", "other", "larger")}
    model.save_pretrained(places["base"])
    resnet().save_pretrained(places["other"])
    model.resize_token_embeddings(120)
    model.save_pretrained(places["larger"])
    given = [word.format(**places) for word in words]
    assert said in told(capsys, "export", checkpoint, tmp_path / "out", *given, code=2)


def test_configurations_are_written_once(tmp_path, capsys):
    assert main(["configs", str(tmp_path / "mine")]) == 0
    shipped = Path(__file__).parents[2] / "ds_configs"
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {p.name for p in shipped.iterdir()}
    assert "exists; give another" in told(capsys, "configs", tmp_path / "mine", code=2)
