"""Bandwidths of links: parse and format bits per second."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


def bandwidth(text: str) -> float | None:
    """An argparse type: ``100M`` or ``1G`` bits per second; None for ``unlimited``."""
    if text == "unlimited":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"expected bits per second, such as 100M or 10G, or unlimited, got {text!r}"
        )
    return float(found[1]) * UNITS[found[2]]


def name_of(bits_per_second: float | None) -> str:
    """Format a bandwidth: ``100 Mbit/s``, ``1 Gbit/s``, ``unlimited``."""
    if bits_per_second is None:
        return "unlimited"
    for factor, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits_per_second >= factor:
            return f"{bits_per_second / factor:g} {unit}"
    return f"{bits_per_second:g} bit/s"
