"""From element ranges to who touches, keeps and updates which rows."""

from __future__ import annotations

import pytest
from cuts import element_ranges, whole_rows
from hypothesis import given
from hypothesis import strategies as st

from arg_dist.sharding.layout import (
    MatrixView,
    basis_spans_columns,
    check_tiling,
    clip_ranges,
    matrix_views,
    shard_elements,
    shard_matrix,
)
from arg_dist.subspace.distributed import is_within

ROWS, COLUMNS = 7, 5


def sharding(ranges, spans_columns=True, shard_basis=True, replicated=False, home=0):
    return shard_matrix(
        ROWS,
        COLUMNS,
        ranges,
        me=0,
        spans_columns=spans_columns,
        home=home,
        shard_basis=shard_basis,
        replicated=replicated,
    )


def rows_of(intervals):
    return sorted(row for interval in intervals for row in range(*interval))


@given(element_ranges(ROWS * COLUMNS), st.booleans(), st.booleans(), st.booleans())
def test_state_is_kept_once_by_those_who_touch_it(ranges, spans_columns, shard_basis, replicated):
    if replicated:
        ranges = ((0, ROWS * COLUMNS),) * len(ranges)
    found = sharding(ranges, spans_columns, shard_basis, replicated)
    for side in (found.moment, found.basis):
        assert rows_of(side.keep) == list(range(side.size))
        assert all(map(is_within, side.keep, side.touch))
        assert all(map(is_within, side.touch, side.update))
    assert found.store == (found.basis.keep if shard_basis else found.basis.touch)
    assert (found.moment.size, found.basis.size) == ((7, 5) if spans_columns else (5, 7))


@given(element_ranges(ROWS * COLUMNS))
def test_a_process_touches_exactly_the_rows_that_its_elements_lie_in(ranges):
    for (start, stop), touched in zip(ranges, sharding(ranges).moment.touch, strict=True):
        assert set(range(*touched)) == {element // COLUMNS for element in range(start, stop)}


@given(element_ranges(ROWS * COLUMNS), st.integers(0, 20))
def test_home_is_an_owner_and_homes_go_around(ranges, home):
    found = sharding(ranges, home=home)
    assert found.owners == tuple(i for i, (start, stop) in enumerate(ranges) if start < stop)
    assert found.home == found.owners[home % len(found.owners)]


def test_a_cut_row_is_kept_by_the_holder_of_its_first_element():
    found = sharding(((0, 13), (13, 14), (14, 35)))
    assert found.moment.touch == ((0, 3), (2, 3), (2, 7))
    assert found.moment.keep == ((0, 3), (3, 3), (3, 7))


def test_whole_rows_need_nobody_on_the_moments_side():
    moment = sharding(whole_rows(ROWS, COLUMNS, 3)).moment
    assert moment.touch == moment.keep == moment.update == ((0, 3), (3, 6), (6, 7))


def test_processes_without_elements_take_no_part():
    found = sharding(((0, 0), (0, 35), (35, 35)))
    assert found.owners == (1,)
    assert found.basis.touch == ((0, 0), (0, 5), (0, 0))
    assert found.whole(4) == found.at_home(4) == found.shares(4) == ((0, 0), (0, 4), (0, 0))


def test_elements_of_replicated_tensors_are_shared_out():
    everything = ((0, 7),) * 3
    assert shard_elements(everything, 7, replicated=True).keep == ((0, 2), (2, 4), (4, 7))
    assert shard_elements(everything, 7, replicated=True).update == everything
    parts = ((0, 3), (3, 3), (3, 7))
    assert shard_elements(parts, 7, replicated=False).keep == parts


@pytest.mark.parametrize(
    ("shape", "view", "expected"),
    [
        ((), "auto", []),
        ((5,), "auto", []),
        ((0, 3), "auto", []),
        ((4, 6), "auto", [("w", 4, 6, 0)]),
        ((2, 4, 6), "auto", [("w[0]", 4, 6, 0), ("w[1]", 4, 6, 24)]),
        ((2, 4, 6), "flatten", [("w", 2, 24, 0)]),
        ((8, 3, 2, 2), "auto", [("w", 8, 12, 0)]),
        ((2, 1, 3, 4), "stack", [("w[0]", 3, 4, 0), ("w[1]", 3, 4, 12)]),
    ],
)
def test_a_parameter_is_seen_as_matrices(shape, view, expected):
    assert matrix_views("w", shape, view) == [MatrixView(*fields) for fields in expected]


@pytest.mark.parametrize(
    ("rows", "columns", "side", "expected"),
    [
        (7, 5, "auto", True), (5, 7, "auto", False), (5, 5, "auto", True),
        (5, 7, "right", True), (7, 5, "left", False),
    ],
)  # fmt: skip
def test_the_basis_spans_the_shorter_side_unless_told(rows, columns, side, expected):
    assert basis_spans_columns(rows, columns, side, transposed=False) is expected
    # the same matrix, lying transposed
    assert basis_spans_columns(columns, rows, side, transposed=True) is not expected


@given(element_ranges(60))
def test_matrices_of_a_stack_get_their_part_of_each_range(ranges):
    clipped = [clip_ranges(ranges, offset, 20) for offset in (0, 20, 40)]
    for process, (start, stop) in enumerate(ranges):
        held = [20 * i + element for i, of in enumerate(clipped) for element in range(*of[process])]
        assert held == list(range(start, stop))


@pytest.mark.parametrize(
    "ranges",
    [
        ((0, 5), (6, 9)),
        ((0, 6), (5, 9)),
        ((0, 5),),
        ((0, 9), (0, 9)),
    ],
)
def test_ranges_that_do_not_tile_a_parameter_are_refused_by_name(ranges):
    check_tiling("layers.0", ((5, 9), (0, 0), (0, 5)), 9)
    with pytest.raises(RuntimeError, match=r"layers\.0: .* its 9 elements exactly once"):
        check_tiling("layers.0", ranges, 9)
