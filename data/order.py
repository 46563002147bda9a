"""The order of samples is arithmetic, not state: nothing to save, nothing to skip when a run resumes.

    ids = batch_indices(seed=0, step=137, global_batch=32, n=5_214, manifest_hash=shards.manifest_hash)

Step 137 has these samples for any number of workers and after any number of restarts. Every epoch is another permutation.
"""

import hashlib
from typing import overload

import numpy as np

ROUNDS = 6  # 4 already make a Feistel network a pseudo-random permutation (Luby & Rackoff 1988); 2 more for very small halves


@overload
def sample_index(seed: int, epoch: int, i: int, n: int, manifest_hash: str) -> int: ...
@overload
def sample_index(seed: int, epoch: int, i: np.ndarray, n: int, manifest_hash: str) -> np.ndarray: ...
def sample_index(seed: int, epoch: int, i: int | np.ndarray, n: int, manifest_hash: str) -> int | np.ndarray:
    """Which sample stands at place `i` of an epoch: a pseudo-random permutation of range(n).

    `i` is an int or an integer array in [0, n); the result is an int or int64 array of the same shape. `manifest_hash`
    ties the order to the data: other shards, other order. Raises IndexError when a place is outside [0, n).

    A Feistel network permutes [0, 4^h), the smallest such power that holds n (at least 64, as tiny networks permute
    poorly). Places that land outside [0, n) walk on until they are inside ("cycle walking", Black & Rogaway 2002), which
    keeps it a permutation; 4^h < 4n, so that takes fewer than 4 rounds on average.
    """
    places = np.atleast_1d(np.asarray(i, dtype=np.int64))
    if n < 1 or (places.size and (places.min() < 0 or places.max() >= n)):
        raise IndexError(f"place {i} is outside an epoch of {n} samples")
    half = max(3, ((n - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch, n, manifest_hash)
    result = _feistel(places.astype(np.uint64), half, keys)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half, keys)
    indices = result.astype(np.int64)
    return int(indices[0]) if np.ndim(i) == 0 else indices.reshape(np.shape(i))


def batch_indices(seed: int, step: int, global_batch: int, n: int, manifest_hash: str) -> np.ndarray:
    """The samples of one optimizer step, int64 `[global_batch]`, in [0, n). Epochs follow each other without a gap."""
    counted = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    indices = np.empty_like(counted)
    for epoch in np.unique(counted // n):
        here = counted // n == epoch
        indices[here] = sample_index(seed, int(epoch), counted[here] % n, n, manifest_hash)
    return indices


def _keys(seed: int, epoch: int, n: int, manifest_hash: str) -> np.ndarray:
    message = f"{seed}/{epoch}/{n}/{manifest_hash}".encode()
    return np.frombuffer(hashlib.blake2b(message, digest_size=8 * ROUNDS).digest(), dtype="<u8").astype(np.uint64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Permute uint64 values below 4^half; each round mixes with the finaliser of splitmix64 (Steele et al. 2014)."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        z = right + key  # uint64 arithmetic wraps around, as it must here
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << shift) | right
