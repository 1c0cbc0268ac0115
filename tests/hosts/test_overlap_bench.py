"""The benchmark of messages under way, in short; what it says where no hosts can be made."""

import json
from pathlib import Path

import pytest

from tests.hosts.hosts import hosts, run_python, told_without_root

MEGABITS = 200


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lanes_that_take_turns_send_the_same_in_more_collectives(
    tmp_path: Path,
) -> None:
    with hosts(1):  # skips
        pass
    words = ("--model", "60m", "--rank", 16, "--rounds", 2, "--threads", 1)
    link = ("--bandwidths", f"{MEGABITS}M", "--limit", 200, "--out", tmp_path / "o.json")
    finished = run_python("-m", "benchmarks.overlap", *words, *link, folder=tmp_path, seconds=250)
    assert finished.returncode == 0, finished.stderr[-4000:]
    ((sample,),) = (t["samples"] for t in json.loads((tmp_path / "o.json").read_text())["tables"])
    assert sample["bits_per_second"] == MEGABITS * 1e6 and len(sample["processes"]) == 2
    for process in sample["processes"]:
        one, turns = (process["sent"][way] for way in ("one lane", "in turns"))
        assert one["bytes"] > 0
        # and the number of rounds of the second lane
        assert turns["bytes"] == one["bytes"] + 8
        assert (one["collectives"], turns["collectives"]) == (3, 5)
        for way in ("one lane", "in turns"):
            least = process["sent"][way]["bytes"] * 8 / (MEGABITS * 1e6)
            assert all(seconds > 0.8 * least for seconds in process["seconds"][way]["rounds"])
    assert f"{MEGABITS} Mbit/s" in finished.stdout


def test_without_root_it_says_so(tmp_path: Path) -> None:
    code = "import sys; from benchmarks.overlap import main\n"
    told = told_without_root(f"{code}sys.exit(main(['--out', 'o.json']))", tmp_path)
    assert "cannot create hosts here: " in told
    assert "require root" in told or "not found" in told
