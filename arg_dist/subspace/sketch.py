"""Random signs that depend on what is sketched, never on the process or the device.

They are a hash of their place by integer arithmetic, which has the same result everywhere, so that
any process draws any part of a matrix where it needs it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CPU = torch.device("cpu")
WORD = 32
"""Signs from one word."""
SIGN_BIT, ONE = -(2**31), 0x3F800000
"""In the bits of an fp32 number: its sign, and those of 1.0."""


def random_signs(
    rows: tuple[int, int],
    columns: int,
    *,
    seed: int,
    name: str,
    refresh: int,
    device: torch.device = CPU,
) -> Tensor:
    """Rows ``[low, high)`` of the sketch matrix Omega, 1 or -1, of one refresh of one matrix.

    SSRF (arXiv 2410.17881, algorithm 1) has Gaussian entries. Signs give as good a low-rank
    approximation (Clarkson and Woodruff 2009), and are what Hutch++ estimates norms with (Meyer et
    al. 2021, algorithm 1). Only a handful of rows may get columns that are alike: what the sketch
    then misses, a power pass finds.

    Beside the result, two int64 words for each 32 columns of a row are allocated.

    Args:
        rows: half-open interval of rows.
        columns: width of the sketch.
        seed: the user's seed.
        name: the matrix's name.
        refresh: number of previous refreshes of this matrix.
        device: where they are computed.

    Returns:
        ``(high - low) x columns``, fp32.
    """
    low, high = rows[0], max(rows)  # an interval may end before it begins
    count, rest = divmod(columns, WORD)
    each = count + (rest > 0)
    words = hashed(f"{seed}|{name}|{refresh}|{columns}", (low * each, high * each), device)
    words = (words >> WORD).to(torch.int32).view(high - low, each)
    # of each word, bit 31 - i becomes the sign bit of column i
    bits = torch.empty(high - low, columns, dtype=torch.int32, device=device)
    places = torch.arange(WORD, dtype=torch.int32, device=device)
    whole = bits[:, : count * WORD].view(high - low, count, WORD)
    torch.bitwise_left_shift(words[:, :count, None], places, out=whole)
    torch.bitwise_left_shift(words[:, count:], places[:rest], out=bits[:, count * WORD :])
    return bits.bitwise_and_(SIGN_BIT).bitwise_or_(ONE).view(torch.float32)


def uniform(text: str, count: int, device: torch.device = CPU) -> Tensor:
    """``count`` numbers, fp64, in [-1, 1), which `text` seeds."""
    return hashed(text, (0, count), device).double().mul_(2.0**-63)


def hashed(text: str, places: tuple[int, int], device: torch.device = CPU) -> Tensor:
    """``high - low`` int64 words: numbers ``[low, high)`` of a sequence that `text` seeds.

    SplitMix64 (Steele, Lea and Flood 2014), whose k-th number needs none of those before it:
    ``mix(seed + k gamma)``, modulo 2^64.
    """
    key = _signed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    words = torch.arange(*places, dtype=torch.int64, device=device).mul_(GAMMA).add_(key)
    for shift, factor in MIX:
        # z <- (z ^ (z >>> shift)) factor, where >> would fill up with the sign
        words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return words


def _signed(word: int) -> int:
    """The int64 of the same bits as 64 bits without a sign."""
    return word - 2**64 if word >= 2**63 else word


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
