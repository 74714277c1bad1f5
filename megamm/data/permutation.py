"""Seeded hashing and permutations with O(1) random access.

Shuffling by a stored permutation would need memory for every document and a replay for every epoch. A keyed
bijection needs neither: element i of a permutation of n is computed alone. The results depend on nothing but
integer arithmetic, so that a data order outlives versions of numpy.
"""

import math

import numpy as np

# Changing it changes every data order.
NUM_ROUNDS = 6
_MASK = (1 << 64) - 1


def hash64(values: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers to uint64 of the same shape: their places in the splitmix64 sequence of ``seed``.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    # uint64 arithmetic wraps around, as the source wants it; a Python int among the operands would turn it into floats.
    x = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(*parts: int) -> int:
    """One seed below 2^64 from several integers; any change of a part or of their order changes it."""
    seed = 0
    for part in parts:
        # Each part is hashed with what came before it, so (1, 2) and (2, 1) differ.
        seed = int(hash64(np.array([part & _MASK], np.uint64), seed)[0])
    return seed


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Map positions to elements under a pseudo-random permutation of range(n).

    A Feistel network over pairs (left, right) of mixed radix, whose product exceeds n by at most sqrt(n); values
    of n or more are mapped again until they fall below it (cycle walking; Black and Rogaway, CT-RSA 2002).

    Args:
        index: integers in [0, n), any shape.
        n: size of the permuted range, at least 1.
        seed: any integer.

    Returns:
        int64, same shape; distinct for distinct ``index``.
    """
    width = math.isqrt(n - 1) + 1  # the root of n, rounded up, without floats
    height = -(-n // width)
    seeds = hash64(np.arange(NUM_ROUNDS), seed).tolist()  # a key for each round
    out = np.array(index, np.uint64)
    todo = np.ones(out.shape, bool)
    # Ends soon: at most about one value in sqrt(n) lies outside.
    while todo.any():
        out[todo] = _feistel(out[todo], np.uint64(height), np.uint64(width), seeds)
        todo = out >= n
    return out.astype(np.int64)


def _feistel(x: np.ndarray, height: np.uint64, width: np.uint64, seeds: list[int]) -> np.ndarray:
    left, right = np.divmod(x, width)
    for round_, seed in enumerate(seeds):
        # Each half in turn is moved by a hash of the other one, which can be taken back: a bijection, whatever the
        # hash.
        if round_ % 2:
            right = (right + hash64(left, seed) % width) % width
        else:
            left = (left + hash64(right, seed) % height) % height
    return left * width + right
