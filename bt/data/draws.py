"""Random draws that are functions of what they are for, never of which process makes them.

Per-pair draws are counter based: a hash of (seed, purpose, epoch, pair, column) is the random number, so a pair gets
the same draw on any rank, in any worker and after resuming. Permutations come from NumPy generators seeded likewise.
"""

from __future__ import annotations

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of the Weyl sequence in splitmix64
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in place on a fresh uint64 array."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _absorb(state: np.ndarray, value: np.ndarray | int) -> np.ndarray:
    """The state after one more number has been hashed into it."""
    value = np.asarray(value).astype(np.uint64)
    value *= _GOLDEN
    return _mix(value + state + _GOLDEN)


def words(seed: int, purpose: str, epochs, ids, columns: int = 1, first: int = 0) -> np.ndarray:
    """(len(ids), columns) uint64 random words; column c is the draw number `first + c` of each id.

    epochs: an integer or one per id. purpose: any name; it is hashed with CRC-32, which no process salts.
    """
    with np.errstate(over="ignore"):
        state = _absorb(np.zeros(1, np.uint64), np.uint64(seed & _MASK))
        state = _absorb(state, zlib.crc32(purpose.encode()))
        state = _absorb(state, epochs)
        state = _absorb(state, ids)
        return _absorb(state[:, None], np.arange(first, first + columns, dtype=np.uint64)[None])


def uniforms(seed: int, purpose: str, epochs, ids, columns: int = 1, first: int = 0) -> np.ndarray:
    """(len(ids), columns) float64 in [0, 1): the upper 53 bits of `words`."""
    return (words(seed, purpose, epochs, ids, columns, first) >> np.uint64(11)) * 2.0**-53


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator of its own for (seed, purpose, numbers)."""
    return np.random.default_rng(np.random.SeedSequence([seed & _MASK, zlib.crc32(purpose.encode()), *numbers]))
