"""Counter-based randomness of training: a row's noise depends on (seed, position) alone.

A position numbers the rows of a run in the order in which they are trained on, over all epochs and all workers. So a
run needs no saved random state: it resumes at any step with the draws it would have had, and any number of workers
draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What one batch of B rows draws."""

    posterior_BCHW: Tensor
    """Standard normal; samples the latent from its mean and log-variance."""
    noise_BCHW: Tensor
    """Standard normal; the diffusion noise."""
    uniform_BU: Tensor
    """Uniform [0, 1): timestep first, then one a dropout decision."""


def positions(step: int, batch_size: int, rank: int, workers: int) -> range:
    """The positions that worker `rank` trains on in a step: a contiguous part of the step's global batch."""
    share = batch_size // workers
    start = step * batch_size + rank * share
    return range(start, start + share)


def rows_at(where: Sequence[int], rows: int, seed: int) -> NDArray[np.int64]:
    """Row numbers at these positions: every epoch is a permutation of its own, and epochs follow without a gap."""
    return np.array([_epoch(rows, seed, p // rows)[p % rows] for p in where], dtype=np.int64)


@lru_cache(maxsize=4)
def _epoch(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=_key(seed, epoch))).permutation(rows)


def draw(where: Sequence[int], shape: tuple[int, ...], uniforms: int, seed: int) -> Draws:
    """The draws of the rows at these positions, for latents or images of `shape`."""
    posterior, noise, uniform = [], [], []
    for position in where:
        generator = torch.Generator().manual_seed(_key(seed ^ 0x5EED, position) & (2**63 - 1))
        both = torch.randn((2, *shape), generator=generator)
        posterior.append(both[0])
        noise.append(both[1])
        uniform.append(torch.rand(uniforms, generator=generator))
    return Draws(torch.stack(posterior), torch.stack(noise), torch.stack(uniform))


def _key(seed: int, counter: int) -> int:
    return int(np.random.SeedSequence((seed, counter)).generate_state(1, np.uint64)[0])
