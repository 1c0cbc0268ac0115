"""What the benchmark of links makes of its notes."""

import pytest
from rich.console import Console

from benchmarks.network.bandwidth import name_of
from benchmarks.network.results import cells, combine, markdown, print_table
from benchmarks.network.trial import measured
from tests.hosts.namespaces import NetworkError, read_traffic

NOTES = [
    {"clock": 10.0, "waited": 4.0, "sent": 1000, "received": 5000},
    {"clock": 11.0, "waited": 4.5, "sent": 1100, "received": 5300},
    {"clock": 13.0, "waited": 5.5, "sent": 1200, "received": 5600},
    {"clock": 14.0, "waited": 5.5, "sent": 1300, "received": 5900},
]


def test_a_step_is_measured_from_the_end_of_the_one_before() -> None:
    busy = [{**entry, "waited": 0.0} for entry in NOTES]
    found = measured([NOTES, busy], warmup=1)
    assert found == {"seconds": 1.0, "waiting": (1.5 / 4 + 0) / 2, "sent": 100, "received": 300}
    assert measured([NOTES, busy], warmup=2)["seconds"] == 1.5


def test_rows_are_medians_of_the_runs_in_their_order() -> None:
    runs = [
        {"optimizer": optimizer, "bits_per_second": bits, "seconds": seconds, "waiting": 0.5}
        | {"sent": 2048.0, "received": 2**20, "optimizer_bytes": own}
        for seconds in (3.0, 1.0, 2.0)
        for bits in (1e8, None)
        for optimizer, own in (("adamw", None), ("adarankgrad", 512.0))
    ]
    rows = combine(runs)
    assert [(row["bits_per_second"], row["optimizer"]) for row in rows] == [
        *((1e8, "adamw"), (1e8, "adarankgrad"), (None, "adamw"), (None, "adarankgrad"))
    ]
    assert all((r["seconds"], r["fastest"], r["slowest"]) == (2.0, 1.0, 3.0) for r in rows)
    expected = ["100 Mbit/s", "AdaRankGrad", "2.000 s", "1.000 - 3.000", "50 %"]
    assert cells(rows[1]) == [*expected, "2.0 KiB, 1.0 MiB", "512 B"]
    assert cells(rows[2])[-1] == "-"
    assert markdown(rows).count("\n") == 6
    console = Console(record=True, width=150)
    print_table(rows, console)
    assert "unlimited" in console.export_text()


@pytest.mark.parametrize(
    ("bits", "name"),
    [
        (None, "unlimited"),
        (1e8, "100 Mbit/s"),
        (2.5e9, "2.5 Gbit/s"),
        (1e4, "10 kbit/s"),
        (9, "9 bit/s"),
    ],
)
def test_bandwidths_have_names(bits: float | None, name: str) -> None:
    assert name_of(bits) == name


def test_traffic_is_that_of_the_interface() -> None:
    table = "face |bytes packets\n    lo: 7 1 0 0 0 0 0 0 8 1\n  eth0: 11 1 0 0 0 0 0 0 12 1\n"
    assert (read_traffic(table, "eth0").received, read_traffic(table, "eth0").sent) == (11, 12)
    with pytest.raises(NetworkError, match="no interface eth1"):
        read_traffic(table, "eth1")
