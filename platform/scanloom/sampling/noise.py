"""Random numbers that depend on what they are for, never on batch, rank, retry or library version.

numpy keeps the raw stream of its bit generators for ever, but not what `Generator.normal` or `shuffle` make of it
(NEP 19), so the way from bits to numbers is spelled out here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Streams that share a seed and an index and nothing else (the highest word of Philox's counter)."""

    NOISE = 0
    ORDER = 1
    NUMBERS = 2


def bits(seed: int, index: int, count: int, stream: Stream, attempt: int = 0) -> NDArray[np.uint64]:
    """uint64 [count], each bit fair; seed, index and attempt in [0, 2**64) (Salmon et al. 2011, Philox4x64-10)."""
    key = np.array([seed, index], dtype=np.uint64)
    # The lower words count blocks of 256 bits; no draw ever reaches the third.
    counter = np.array([0, 0, attempt, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniforms(seed: int, index: int, count: int, stream: Stream) -> NDArray[np.float64]:
    """float64 [count] in [0, 1), multiples of 2**-53."""
    return _unit(bits(seed, index, count, stream))


def permutation(seed: int, index: int, count: int) -> NDArray[np.int64]:
    """int64 [count]: a uniformly random order of range(count)."""
    # Ties of 64-bit keys have a chance of count**2 / 2**65; the stable sort makes even those reproducible.
    return np.argsort(bits(seed, index, count, Stream.ORDER), kind="stable")


def gaussian_noise(seed: int, index: int, shape: Sequence[int], attempt: int = 0) -> NDArray[np.float32]:
    """float32 [*shape], standard normal (Box and Muller 1958): the starting noise of image `index`.

    An image that is drawn again starts from the noise of its next attempt, which shares nothing with the others.
    Computed in float64 and then rounded, so that another machine's last-bit differences in log and cos vanish.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    raw = bits(seed, index, 2 * pairs, Stream.NOISE, attempt)
    # 1 - u lies in (0, 1]: the logarithm is finite.
    radius = np.sqrt(-2.0 * np.log(1.0 - _unit(raw[:pairs])))
    angle = 2.0 * np.pi * _unit(raw[pairs:])
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return normal.astype(np.float32).reshape(shape)


def _unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
