"""Plans: what is sent and kept on paper is what the algorithm asks for and keeps."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuts import cut_matrix, whole_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_steps import heard, step_of
from matrices import gaussian

from arg_dist.algorithm import StepFacts
from arg_dist.cli.main import main
from arg_dist.config import ConfigError, parse_config
from arg_dist.planning.choices import AGAINST, DTYPES, ENGINES
from arg_dist.planning.cuts import lay_out
from arg_dist.planning.figures import Plan, make_plan
from arg_dist.planning.llama import model_config
from arg_dist.planning.meshes import Mesh, boxes_on, parse_mesh
from arg_dist.planning.model import Model, describe, load_model
from arg_dist.planning.rows import Spans, sent
from arg_dist.planning.shardings import PlannedMatrix
from arg_dist.planning.traffic import matrix_traffic
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.sharding.layout import shard_matrix
from arg_dist.sharding.message_packing import Messages
from arg_dist.sharding.transfers import ALIGNMENT
from arg_dist.subspace.distributed import even_rows, exchanges_of, intersect
from arg_dist.terms import step_of_terms
from benchmarks.compare.optimizers import low_rank_matrices

pytestmark = pytest.mark.unit

SEVERAL = [name for name in ENGINES if name != "none"]
SHAPES = {
    "embedding": (101, 24),
    "up": (56, 24),
    "norm": (24,),
    "down": (24, 56),
    "square": (24, 24),
    "head": (101, 24),
}
ADAM = {"embedding": False, "head": False}


def small(**chosen: Any) -> Model:
    parameters = describe(SHAPES, parse_config(chosen), ADAM)
    return Model("small", parameters, parameters)


def plan(engine: str, processes: int, dtype: str = "fp32", copies: int = 1, **chosen: Any) -> Plan:
    return make_plan(
        small(**chosen),
        parse_config(chosen),
        engine=engine,
        processes=processes,
        copies=copies,
        dtype=dtype,
    )


def padded(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


@st.composite
def rows(draw: st.DrawFn, processes: int, size: int) -> tuple[tuple[int, int], ...]:
    kind = draw(st.sampled_from(["cut", "whole", "one", "overlapping"]))
    if kind == "whole":
        return ((0, size),) * processes
    if kind == "one":
        owner = draw(st.integers(0, processes - 1))
        return tuple((0, size if i == owner else 0) for i in range(processes))
    cuts = sorted(
        draw(st.lists(st.integers(0, size), min_size=processes - 1, max_size=processes - 1))
    )
    ends = [*zip([0, *cuts], [*cuts, size], strict=True)]
    if kind == "overlapping":  # by a row, as where rows are cut
        return tuple((max(a - 1, 0), b) if a < b else (a, b) for a, b in ends)
    return tuple(ends)


@given(st.data(), st.integers(1, 6), st.integers(1, 20), st.integers(1, 9))
def test_what_is_sent_is_what_a_communicator_packs(data, processes, size, row_bytes):
    have, want = data.draw(rows(processes, size)), data.draw(rows(processes, size))
    expected = []
    for i, mine in enumerate(have):
        others = [intersect(mine, wanted) for j, wanted in enumerate(want) if j != i]
        expected.append(sum(padded((high - low) * row_bytes) for low, high in others))
    assert sent(Spans.of(have), Spans.of(want), row_bytes).tolist() == expected


def test_spans_are_those_of_the_algorithm():
    assert Spans.of(even_rows(7, 3)).counts().tolist() == [2, 2, 3]
    assert Spans.at(1, 3, 7).counts().tolist() == [0, 7, 0]


@settings(max_examples=40)
@given(
    st.data(),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "matched", "scaled", "orthogonalized"]),
    st.integers(0, 2),
)
def test_requests_are_those_of_the_algorithm(
    data, processes, spans_columns, shard_basis, replicated, residual, passes
):
    rows, columns, rank = 12, 10, 4
    numel, chosen = rows * columns, {"residual": residual, "power_passes": passes}
    config = parse_config({"max_rank": rank, "min_rank": rank, "oversample": 2, **chosen})
    cuts = data.draw(
        st.lists(
            st.integers(1, numel - 1), min_size=processes - 1, max_size=processes - 1, unique=True
        )
    )
    ends = [0, *sorted(cuts), numel]
    ranges = tuple(pairwise(ends))
    home = data.draw(st.integers(0, processes - 1))

    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    shards = cut_matrix(
        gradient,
        ranges,
        spans_columns=spans_columns,
        shard_basis=shard_basis,
        replicated=replicated,
        home=home,
    )
    if replicated:
        ranges = ((0, numel),) * processes
    planned = PlannedMatrix(rows, columns, ranges, spans_columns, shard_basis, replicated)
    states: list[dict[str, Any]] = [{} for _ in range(processes)]
    for is_first in (True, False):
        asked: list[list[int]] = [[] for _ in range(processes)]
        steps = [step_of(*each, gradient, config) for each in zip(shards, states, strict=True)]
        run_lockstep([listening(steps[me], me, asked[me]) for me in range(processes)])
        on_paper = matrix_traffic(planned, config, rank, home, is_first=is_first)
        assert [moved.sent.tolist() for moved in on_paper] == [
            list(each) for each in zip(*asked, strict=True)
        ]


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(2, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "orthogonalized"]),
    st.sampled_from([1, 2]),
    st.integers(0, 11),
)
def test_requests_of_copies_are_those_of_the_algorithm(
    each, copies, spans_columns, shard_basis, residual, bits, home
):
    rows, columns, rank = 12, 20, 3
    chosen = {"residual": residual, "residual_sync_bits": bits, "gradient_sync": "sketch"}
    config = parse_config({"max_rank": rank, "min_rank": rank, "oversample": 1, **chosen})
    processes = each * copies
    ranges = whole_rows(rows, columns, each) * copies
    copy_of = tuple(i // each for i in range(processes))
    planned = PlannedMatrix(
        rows, columns, ranges, spans_columns, shard_basis, replicated=False, terms=True,
        copy_of=copy_of,
    )  # fmt: skip
    facts = StepFacts("w", norm_sq=float(rows * columns), kept_sq=0.0, phase=0.0)
    states: list[dict[str, Any]] = [{} for _ in range(processes)]
    for is_first in (True, False):
        asked: list[list[int]] = [[] for _ in range(processes)]
        abroad: list[list[int]] = [[] for _ in range(processes)]
        running = []
        for me in range(processes):
            sharding = shard_matrix(
                rows, columns, ranges, me=me, spans_columns=spans_columns, home=home,
                shard_basis=shard_basis, replicated=False, copy_of=copy_of,
            )  # fmt: skip
            sides = (side.touch[me] for side in (sharding.moment, sharding.basis))
            part = gaussian(*(high - low for low, high in sides), seed=me)
            own = step_of_terms(
                lambda part=part: part, part.device, states[me], sharding, config, facts
            )
            own = listening(
                own, me, abroad[me], beside=range(each * copy_of[me], each * (copy_of[me] + 1))
            )
            running.append(listening(own, me, asked[me]))
        run_lockstep(running)
        on_paper = matrix_traffic(planned, config, rank, home % processes, is_first=is_first)
        for sizes, counted in ((asked, "sent"), (abroad, "crossing")):
            assert [getattr(moved, counted).tolist() for moved in on_paper] == [
                list(sent) for sent in zip(*sizes, strict=True)
            ]


def listening(steps, me, asked, beside=()):
    """The same computation; `asked` gets the bytes that process `me` sends at each request."""
    return heard(steps, lambda request: asked.append(sent_by(request, me, beside)))


def sent_by(request, me, beside=()):
    """Bytes that process `me` sends at a request, to processes that are not `beside` it."""
    exchanges = exchanges_of(request)
    messages = Messages(exchanges, me, len(exchanges[0].want), torch.device("cpu"))
    others = (size for i, size in enumerate(messages.send_sizes) if i not in beside)
    return sum(others) * messages.dtype.itemsize


@given(st.sampled_from(SEVERAL), st.integers(1, 40), st.sampled_from(["fp32", "bf16"]))
def test_all_processes_together_keep_the_state_of_one(engine, processes, dtype):
    whole = plan("none", 1).figures["AdaRankGrad"]
    found = plan(engine, processes, dtype).figures["AdaRankGrad"]
    for key in ("projectors", "full_rank_state"):
        assert found.kept[key].sum() == whole.kept[key].sum()
    # beside the moments, each owner of a matrix has one number
    beside = found.kept["low_rank_moments"].sum() - whole.kept["low_rank_moments"].sum()
    assert 0 <= beside <= 3 * 8 * (processes - 1)
    layout = lay_out(small(), engine, processes)
    for parameter, piece in zip(layout.calls[0], layout.pieces(layout.calls[0]), strict=True):
        held = sum(stop - start for start, stop in piece.ranges)
        assert held == parameter.numel * (processes if layout.replicated else 1)


COPIES = st.tuples(st.integers(2, 9), st.integers(2, 3))
"""Processes of a copy, and copies."""
SKETCH = {"gradient_sync": "sketch"}


@settings(max_examples=10)
@given(COPIES, st.sampled_from(["fp32", "bf16"]))
def test_copies_that_exchange_sketches_keep_the_state_of_one_together(sizes, dtype):
    each, copies = sizes
    whole = plan("none", 1).figures["AdaRankGrad"]
    alone = plan("fsdp2", each, dtype).figures
    found = plan("fsdp2", each * copies, dtype, copies, **SKETCH).figures
    ours = found["AdaRankGrad"]
    assert ours.kept["full_rank_state"].sum() == whole.kept["full_rank_state"].sum()
    for figures in found.values():
        for key in ("weights", "gradients") if figures is not found["GaLore"] else ():
            expected = alone["AdaRankGrad"].kept[key]
            assert np.array_equal(figures.kept[key], np.tile(expected, copies))
    # the engine sends within a copy only; to average as well, it sends its share of them twice
    assert np.array_equal(ours.engine.total, np.tile(alone["AdaRankGrad"].engine.total, copies))
    assert not ours.engine.crossing.any() and ours.step.crossing.all()
    more = found["AdamW"].engine.crossing
    size = {"fp32": 4, "bf16": 2}[dtype] * small().elements
    assert np.all(np.abs(more - 2 * size / each * (copies - 1) / copies) <= 1)


@settings(max_examples=10)
@given(COPIES, st.sampled_from([{}, {"state_budget": "48KiB"}]))
def test_copies_that_the_engine_averages_are_each_trained_like_one(sizes, chosen):
    each, copies = sizes
    one = plan("fsdp2", each, **chosen)
    several = plan("fsdp2", each * copies, copies=copies, **chosen)
    alone, found = (made.figures["AdaRankGrad"].arrays() for made in (one, several))
    assert several.ranks == one.ranks
    engine = {"engine_sent_per_step", "engine_sent_between_copies_per_step"}
    for key in found.keys() - engine:
        assert np.array_equal(found[key], np.tile(alone[key], copies)), key
    assert np.all(found["engine_sent_per_step"] > alone["engine_sent_per_step"].max())
    assert np.array_equal(
        found["engine_sent_per_step"],
        several.figures["AdamW"].arrays()["engine_sent_per_step"],
    )


@given(st.sampled_from(SEVERAL), st.integers(1, 9), st.integers(4, 11), st.integers(1, 6))
def test_a_larger_rank_takes_no_less(engine, processes, rank, more):
    less, larger = (
        plan(engine, processes, max_rank=r).figures["AdaRankGrad"].arrays()
        for r in (rank, rank + more)
    )
    for key in ("low_rank_moments", "projectors", "step_temporaries", "sent_per_step"):
        assert (larger[key] >= less[key]).all(), key
    assert larger["optimizer_state"].sum() > less["optimizer_state"].sum()


def test_a_budget_holds_and_one_that_is_too_small_is_told():
    wide = plan("zero3", 4).figures["AdaRankGrad"].state.sum()
    fixed = plan("zero3", 4).figures["AdaRankGrad"].kept["full_rank_state"].sum()
    budget = int(fixed + (wide - fixed) * 3 // 4) + 4000  # of scalars, counted for 64 processes
    made = plan("zero3", 4, state_budget=budget)
    assert made.figures["AdaRankGrad"].state.sum() <= budget
    assert sum(made.ranks.values()) < sum(plan("zero3", 4).ranks.values())
    with pytest.raises(ConfigError, match=r"state_budget: got .* give at least"):
        plan("zero3", 4, state_budget=int(fixed))


def test_galore_keeps_what_was_counted_in_a_run():
    """The README's comparison: a quarter of the rank on `nano`, by storages, of AdamW's state."""
    model = load_model("nano", parse_config({}), vocab_size=258)
    made = make_plan(model, parse_config({}), engine="none", processes=1)
    galore, adamw = made.figures["GaLore"].kept, made.figures["AdamW"].kept
    matrices = sum(p.numel for p in model.parameters if p.views)
    kept = galore["low_rank_moments"].sum() + galore["projectors"].sum()
    assert round(100 * kept / (8 * matrices), 1) == 54.2
    assert adamw["full_rank_state"].sum() == 8 * model.elements
    assert not made.apart
    assert [peer.title for peer in plan("zero2", 2).apart] == ["GaLore"]


def adamw(parameters: list[Any], matrices: list[Any]) -> int:
    return bytes_of_a_step(torch.optim.AdamW(parameters))


def muon(parameters: list[Any], matrices: list[Any]) -> int:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
    apart = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in apart]
    return sum(map(bytes_of_a_step, [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]))


def adamw_8bit(parameters: list[Any], matrices: list[Any]) -> int:
    """By torchao 0.18, which is not in the tests' environment: every import of it prints."""
    optimizer = pytest.importorskip("torchao.optim").AdamW8bit(parameters)
    found = 0
    for parameter in parameters:
        for is_signed in (True, False):
            kept = optimizer._new_buffer(parameter, is_signed)  # a step would compile
            names = getattr(kept, "tensor_attrs", None)
            parts = [kept] if names is None else [getattr(kept, name) for name in names]
            found += sum(part.numel() * part.element_size() for part in parts)
    return found


def bytes_of_a_step(optimizer: torch.optim.Optimizer) -> int:
    """Of the state after a step, without the number of steps."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = (value for each in optimizer.state.values() for value in each.values())
    return sum(each.numel() * each.element_size() for each in states if each.ndim)


@pytest.mark.parametrize("kept", [adamw, muon, adamw_8bit])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_other_optimizers_keep_as_much_as_planned(kept: Any, dtype: str):
    from launchers.pretraining.models import build_model

    config = model_config("pico", vocab_size=258, length=64)
    model = build_model("pico", config, seed=0, deepspeed_config={})
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    name = kept.__name__.replace("_", "-")
    planned = make_plan(
        load_model("pico", parse_config({}), vocab_size=258), parse_config({}), engine="none",
        processes=1, dtype=dtype, against=[name],
    ).figures[AGAINST[name]]  # fmt: skip
    matrices = list(low_rank_matrices(model).values())
    assert planned.state.tolist() == [kept(list(model.parameters()), matrices)]


def test_thousands_of_processes_are_reckoned_by_arithmetic():
    model = load_model("60m", parse_config({}))
    for engine in ("zero2", "zero3", "fsdp2"):
        made = make_plan(model, parse_config({}), engine=engine, processes=4096, dtype="bf16")
        figures = made.figures["AdaRankGrad"]
        assert len(figures.peak) == 4096
        assert figures.state.max() >= np.median(figures.state) > 0


@pytest.mark.parametrize(
    ("name", "millions"), [("1b", 1339), ("7b", 6738), ("13b", 13016), ("70b", 68977)]
)
def test_shapes_of_large_models_need_no_weights(name, millions):
    model = load_model(name, parse_config({}))
    assert model.elements / 1e6 == pytest.approx(millions, rel=0.001)


def test_a_configuration_on_disk_is_planned_with_ties_counted_once(tmp_path: Path, capsys: Any):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    out = tmp_path / "plan.json"
    line = ["plan", "--model", str(tmp_path), "--engine", "fsdp2", "--world-size", "3"]
    assert main([*line, "--rank", "8", "--set", "energy=0.9", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["parameters"] == 300 * 32 + 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32
    assert (found["settings"]["max_rank"], found["settings"]["energy"]) == (8, 0.9)
    ours = found["bytes_per_process"]["AdaRankGrad"]
    assert ours["peak"]["largest"] > ours["optimizer_state"]["largest"] > 0
    assert set(found["ranks"].values()) == {8}
    printed = capsys.readouterr().out
    assert "GaLore does not run under FSDP2" in printed
    assert "activations" in printed and "largest ranks" in printed


@pytest.mark.timeout(120)
def test_in_few_bits_llama_1b_takes_a_ninth_of_adamws_state(tmp_path: Path):
    """Llama-3.2-1B, embeddings included."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    settings = parse_config({"state_dtype": "int8", "full_rank_state": "int8"})
    model = load_model(str(tmp_path), settings)
    figures = make_plan(model, settings, engine="none", processes=1, dtype="bf16").figures
    adamw = 8 * model.elements  # both moments in fp32
    assert 0.10 < figures["AdaRankGrad"].state.sum() / adamw < 0.12
    assert model.elements == 1_235_814_400


def test_one_process_sends_nothing():
    figures = plan("none", 1).figures["AdaRankGrad"]
    arrays = figures.arrays()
    assert not any(int(arrays[key][0]) for key in arrays if "sent" in key)
    assert figures.step_collectives == figures.refresh_collectives == 0


IN_COPIES = ["--model", "nano", "--engine", "fsdp2", "--world-size", "4", "--copies", "2"]
IN_COPIES += ["--set", "gradient_sync=sketch"]


def test_copies_are_named_in_the_plan(tmp_path: Path, capsys: Any):
    out = tmp_path / "plan.json"
    assert main(["plan", *IN_COPIES, "--vocab-size", "258", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["copies"] == 2
    printed = capsys.readouterr().out
    assert "FSDP2, 4 processes, 2 copies" in printed and printed.count("between copies") == 3


def test_a_mesh_is_named_in_the_plan(tmp_path: Path, capsys: Any):
    out, mesh = tmp_path / "plan.json", "replicate=2,fsdp=2,tp=2"
    words = ["plan", "--model", "nano", "--engine", "fsdp2", "--mesh", mesh, "--vocab-size", "258"]
    assert main([*words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["mesh"], found["world_size"], found["copies"]) == (mesh, 8, 1)
    assert f"FSDP2, 8 processes ({mesh})" in capsys.readouterr().out


def test_meshes_without_tensor_parallelism_are_those_of_world_size_and_copies():
    model, chosen = load_model("nano", parse_config({}), vocab_size=258), parse_config({})
    by_mesh = make_plan(model, chosen, engine="fsdp2", mesh=parse_mesh("replicate=2,fsdp=2"))
    by_copies = make_plan(model, chosen, engine="fsdp2", processes=4, copies=2)
    assert by_mesh.as_json() == by_copies.as_json()


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.data())
def test_boxes_cover_a_parameter_once_in_each_replica(replicate, fsdp, tp, data):
    mesh = Mesh(replicate, fsdp, tp)
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    times = np.zeros(shape, int)
    for box in zip(*boxes_on(mesh, shape, cut), strict=True):
        times[tuple(slice(*bounds) for bounds in box)] += 1
    assert np.all(times == replicate * (tp if cut is None else 1))


def test_a_plan_of_separate_pieces_is_refused_and_so_is_none():
    parameters = describe({"layers.0.experts.gate_up_proj": (2, 8, 4)}, parse_config({}))
    packed = Model(
        "moe", parameters, parameters, {"layers.*.experts.gate_up_proj": "packed_colwise"}
    )
    with pytest.raises(ConfigError, match=r"gate_up_proj in separate pieces \(packed_colwise\)"):
        lay_out(packed, "fsdp2", 4, mesh=Mesh(1, 2, 2))
    with pytest.raises(ConfigError, match="--model small has no tensor-parallel plan"):
        lay_out(small(), "fsdp2", 4, mesh=Mesh(1, 2, 2))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--model", "nano", "--engine", "fsdp2", "--mesh", "fsdp=2,dp=2"],
            "--mesh fsdp=2,dp=2: got 'dp=2'; give sizes of at least 1",
        ),
        (
            ["--model", "nano", "--engine", "zero3", "--mesh", "fsdp=2"],
            "--mesh fsdp=2: its axes are those of --engine fsdp2; got --engine zero3",
        ),
        (
            ["--model", "nano", "--engine", "fsdp2", "--mesh", "fsdp=2", "--world-size", "2"],
            "--mesh: conflicts with --world-size",
        ),
        (
            ["--model", "8b", "--engine", "zero3"],
            "--model 8b: neither a path nor one of pico, nano",
        ),
        (
            ["--model", "nano", "--engine", "zero4"],
            "--engine zero4: unknown; choose from none, ddp, zero0",
        ),
        (["--model", "nano", "--engine", "none", "--world-size", "2"], "--world-size 2: --engine"),
        (["--model", "nano", "--engine", "ddp", "--rank", "1.5"], "an integer of at least 1"),
        (["--model", "nano", "--engine", "ddp", "--set", "max_rnk=3"], "did you mean 'max_rank'"),
        (["--model", "nano", "--engine", "ddp", "--rank", "8", "--set", "max_rank=8"], "leave one"),
        (["--model", "nano", "--engine", "ddp", "--set", "state_budget=1KiB"], "give at least"),
        (["--model", "nano", "--engine", "ddp", "--json", "/nowhere/x"], "--json /nowhere/x: No"),
        (["--model", ".", "--engine", "ddp", "--vocab-size", "9"], "has a vocabulary of its own"),
        (
            ["--model", "nano", "--engine", "fsdp2", "--world-size", "6", "--copies", "4"],
            "--copies 4: --world-size 6 cannot be divided by it",
        ),
        (
            ["--model", "nano", "--engine", "fsdp2", "--world-size", "4", "--copies", "4"],
            "leaves each copy a single process of --world-size 4",
        ),
        (
            ["--model", "nano", "--engine", "ddp", "--world-size", "4", "--copies", "2"],
            "--engine ddp has one on every process; choose --engine fsdp2",
        ),
        (
            ["--model", "nano", "--engine", "zero3", "--world-size", "4", "--copies", "2"],
            "--engine zero3 shards a single one; choose --engine fsdp2",
        ),
        ([*IN_COPIES, "--set", "residual=matched"], 'residual="matched" needs the norms of whole'),
        ([*IN_COPIES, "--set", "gradient_budget=1MiB"], "gradient_budget: the engine sums"),
        (IN_COPIES[:-4] + IN_COPIES[-2:], "or --copies for several sharded models"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(words, told, capsys):
    try:
        code = main(["plan", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert told in capsys.readouterr().err


def test_an_unknown_engine_is_an_error_of_the_function_too():
    with pytest.raises(ConfigError, match=r"--engine fsdp3: unknown; choose from .*fsdp2$"):
        plan("fsdp3", 2)
