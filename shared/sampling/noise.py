"""The noise of sampling: a pure function of (seed, position, token id, stream).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based
generator of four 32-bit words per call:

    key     = (seed's low 32 bits, seed's high 32 bits)
    counter = (token id >> 2, position, stream, 0)
    x       = output word (token id & 3)
    u       = (x + 0.5) * 2**-32                          in (0, 1), exact in float64
    g       = -log(-log(u))                               standard Gumbel noise, float64

Invariant: the words are integers, the same on every machine; nothing here has state. All integer work is 32-bit
multiplications (low and high halves) and exclusive ors, so that it carries over to a GPU kernel as it stands.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

UInt32 = npt.NDArray[np.uint32]
Float64 = npt.NDArray[np.float64]

COUPLED: Final = 0
"""Stream of the noise that target and draft share in coupled sampling."""
DRAFT: Final = 1
"""Stream from which a draft samples its proposals in rejection sampling."""
ACCEPT: Final = 2
"""Stream of the uniform in rejection sampling's u < p/q; token id 0 stands for the whole position."""
RESIDUAL: Final = 3
"""Stream of rejection sampling's recovered and bonus tokens."""

_ROUNDS: Final = 10
_MULTIPLIER_0: Final = 0xD2511F53
_MULTIPLIER_1: Final = 0xCD9E8D57
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = np.array([[_MULTIPLIER_0], [_MULTIPLIER_1]], np.uint64)
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)
_FEW: Final = 8
"""Up to so many ids, Python's integers are quicker than vectors."""
_BLOCKS_AT_A_TIME: Final = 4096
"""Counters in one vectorised pass over a whole vocabulary: the temporaries stay in the L2 cache."""


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, int]) -> tuple[UInt32, ...]:
    """The ten round keys, each a [2, 1] uint32 column."""
    return tuple(
        np.array([[(key[0] + r * _WEYL_0) & _MASK], [(key[1] + r * _WEYL_1) & _MASK]], np.uint32)
        for r in range(_ROUNDS)
    )


def philox4x32(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    key: tuple[int, int],
    shape: tuple[int, ...],
) -> UInt32:
    """Philox4x32-10 of n counters; each of the counter's four words is an array that broadcasts to `shape`.

    Returns: [4, n] uint32, the four output words of every counter, counters in C order of `shape`.
    """
    n = math.prod(shape)
    # The multiplicands (words 0 and 2) are the low halves of 64-bit lanes whose high halves stay zero: one
    # multiplication yields both halves of both products, nothing is masked, and a round is three NumPy calls.
    lanes = np.zeros((2, n), np.uint64)
    halves: UInt32 = lanes.view(np.uint32)
    multiplied: UInt32 = halves[:, _LOW::2]
    added: UInt32 = np.empty((2, n), np.uint32)
    multiplied[0].reshape(shape)[...] = counter[0]
    added[0].reshape(shape)[...] = counter[1]
    multiplied[1].reshape(shape)[...] = counter[2]
    added[1].reshape(shape)[...] = counter[3]
    products = np.empty((2, 2, n), np.uint64)
    views: UInt32 = products.view(np.uint32)
    # The next round's word 0 takes the high half of word 2's product and the other way round: rows in reverse.
    high = (views[0, ::-1, _HIGH::2], views[1, ::-1, _HIGH::2])
    low = (views[0, ::-1, _LOW::2], views[1, ::-1, _LOW::2])
    out: UInt32 = np.empty((4, n), np.uint32)
    multiply, xor = np.multiply, np.bitwise_xor
    for r, round_key in enumerate(_round_keys(key)):
        now = r & 1
        multiply(lanes, _MULTIPLIERS, out=products[now])
        target = multiplied if r < _ROUNDS - 1 else out[0::2]
        xor(high[now], added, out=target)
        xor(target, round_key, out=target)
        added = low[now]
    out[1::2] = added
    return out


def gumbel_of_words(words: UInt32) -> Float64:
    """The Gumbel noise of 32-bit words, strictly increasing in the word: float64 of the same shape."""
    u = words.astype(np.float64)
    u += 0.5
    u *= 2.0**-32
    np.log(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)


GUMBEL_MAX: Final = float(gumbel_of_words(np.array([_MASK], np.uint32))[0])
"""The largest noise there is (x = 2**32 - 1), about 22.87."""
GUMBEL_MIN: Final = float(gumbel_of_words(np.array([0], np.uint32))[0])
"""The smallest noise there is (x = 0), about -3.13."""


def gumbel(seed: int, positions: int | npt.NDArray[np.integer], ids: npt.NDArray[np.integer], stream: int) -> Float64:
    """Standard Gumbel noise of tokens at positions.

    Args:
        seed: 0 <= seed < 2**64.
        positions: integers in [0, 2**32) that broadcast to the shape of `ids`.
        ids: token ids, non-negative integers of any shape.
        stream: COUPLED, DRAFT or RESIDUAL.

    Returns: float64 of the shape of `ids`, in [GUMBEL_MIN, GUMBEL_MAX].
    """
    n = ids.size
    if n <= _FEW and ids.ndim == 1 and isinstance(positions, int):
        return gumbel_of_words(np.array([_word(seed, positions, token, stream) for token in ids.tolist()], np.uint32))
    out = philox4x32((ids >> 2, positions, stream, 0), (seed & _MASK, seed >> 32), ids.shape)
    word = (ids & 3).ravel() * n
    word += np.arange(n)
    return gumbel_of_words(out.ravel()[word]).reshape(ids.shape)


def words_of_all(seed: int, position: int, n_vocab: int, stream: int) -> UInt32:
    """The 32-bit words of token ids 0 .. n_vocab - 1 at one position, a Philox call for four: [n_vocab] uint32."""
    n_blocks = (n_vocab + 3) // 4
    words = np.empty((n_blocks, 4), np.uint32)
    key = (seed & _MASK, seed >> 32)
    for first in range(0, n_blocks, _BLOCKS_AT_A_TIME):
        blocks = np.arange(first, min(first + _BLOCKS_AT_A_TIME, n_blocks), dtype=np.uint32)
        words[first : first + len(blocks)] = philox4x32((blocks, position, stream, 0), key, blocks.shape).T
    return words.ravel()[:n_vocab]


def gumbel_of_all(seed: int, position: int, n_vocab: int, stream: int) -> Float64:
    """`gumbel` of token ids 0 .. n_vocab - 1 at one position: [n_vocab] float64."""
    return gumbel_of_words(words_of_all(seed, position, n_vocab, stream))


def uniform(seed: int, position: int, stream: int) -> float:
    """The uniform u in (0, 1) of a whole position (token id 0), without NumPy."""
    return (_word(seed, position, 0, stream) + 0.5) * 2.0**-32


def _word(seed: int, position: int, token: int, stream: int) -> int:
    """One id's 32-bit word in Python integers."""
    k0, k1 = seed & _MASK, seed >> 32
    c0, c1, c2, c3 = token >> 2, position, stream, 0
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return (c0, c1, c2, c3)[token & 3]
