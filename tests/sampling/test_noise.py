"""The counter-based noise."""

import math

import numpy as np
import pytest
from scipy import stats

from shared.sampling import noise

ALL_ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The generator is Random123's Philox4x32-10: its published known-answer vectors."""
    out = noise.philox4x32(counter, key, (1,))
    assert out.dtype == np.uint32
    assert tuple(out[:, 0].tolist()) == expected


def plain_word(seed, position, token, stream):
    """One word in Python integers, straight from the paper."""
    c = [token >> 2, position, stream, 0]
    k = [seed & ALL_ONES, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ALL_ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ALL_ONES]
        k = [(k[0] + 0x9E3779B9) & ALL_ONES, (k[1] + 0xBB67AE85) & ALL_ONES]
    return c[token & 3]


def test_noise_is_a_function_of_seed_position_token_and_stream():
    """Each element is -log(-log(u)) of its own word, wherever it stands in whatever array."""
    ids = np.array([[0, 1, 2, 3, 4, 5], [151935, 7, 7, 8191, 2, 0]], np.int32)
    positions = np.array([[11], [2**32 - 1]], np.uint32)
    seed = 0xFEDCBA9876543210
    for stream in (noise.COUPLED, noise.DRAFT, noise.ACCEPT, noise.RESIDUAL):
        g = noise.gumbel(seed, positions, ids, stream)
        assert g.dtype == np.float64
        for row in range(2):
            for column in range(6):
                x = plain_word(seed, int(positions[row, 0]), int(ids[row, column]), stream)
                expected = -math.log(-math.log((x + 0.5) * 2.0**-32))
                assert g[row, column] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("n_vocab", [1, 3, 4, 5, 8192, 4096 * 4 + 7])
def test_whole_vocabulary_equals_single_ids_bitwise(n_vocab):
    """The path over a whole vocabulary gives bitwise what the path over chosen ids gives."""
    every = noise.gumbel_of_all(5, 77, n_vocab, noise.COUPLED)
    assert every.shape == (n_vocab,)
    ids = np.arange(n_vocab, dtype=np.int32)[::-3]
    assert np.array_equal(every[ids], noise.gumbel(5, 77, ids, noise.COUPLED))
    for token in {0, n_vocab // 2, n_vocab - 1}:
        one = noise.gumbel(5, 77, np.array([token], np.int32), noise.COUPLED)
        assert one[0] == every[token]
    for n in range(1, 14):
        assert np.array_equal(every[ids[:n]], noise.gumbel(5, 77, ids[:n], noise.COUPLED))


def test_uniform_is_the_word_of_token_zero():
    """The uniform of a position agrees with the vectorised generator."""
    for seed in (0, 1, 2**64 - 1, 123456789012345):
        for position in (0, 5, 2**32 - 1):
            word = int(noise.words_of_all(seed, position, 1, noise.ACCEPT)[0])
            u = noise.uniform(seed, position, noise.ACCEPT)
            assert u == (word + 0.5) * 2.0**-32
            assert 0 < u < 1


def test_bounds_and_monotony():
    """Noise grows strictly with its word, from GUMBEL_MIN to GUMBEL_MAX, both attained and finite."""
    words = np.array([0, 1, 2, 3, 1000, 2**31 - 1, 2**31, 2**31 + 1, ALL_ONES - 2, ALL_ONES - 1, ALL_ONES], np.uint32)
    g = noise.gumbel_of_words(words)
    assert (np.diff(g) > 0).all()
    assert g[0] == noise.GUMBEL_MIN
    assert g[-1] == noise.GUMBEL_MAX
    assert abs(noise.GUMBEL_MAX - 33 * math.log(2)) < 1e-9


def test_standard_gumbel_and_independence():
    """Noise is standard Gumbel, and uncorrelated between neighbouring ids, positions, seeds and streams."""
    n = 40_000
    base = noise.gumbel_of_all(1, 100, n, noise.COUPLED)
    assert stats.kstest(base, stats.gumbel_r.cdf).pvalue > 1e-4
    others = [
        noise.gumbel_of_all(1, 101, n, noise.COUPLED),
        noise.gumbel_of_all(2, 100, n, noise.COUPLED),
        noise.gumbel_of_all(1 + 2**32, 100, n, noise.COUPLED),
        noise.gumbel_of_all(1, 100, n, noise.DRAFT),
        noise.gumbel_of_all(1, 100, n, noise.RESIDUAL),
        np.roll(base, 1),
    ]
    for other in others:
        assert abs(stats.spearmanr(base, other).statistic) < 4 / math.sqrt(n)
