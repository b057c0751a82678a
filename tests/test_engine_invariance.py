"""A thousand images, whatever the slots, the workers and the order: the same bits on CPUs of one thread each."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scanloom.attributes import Attributes
from scanloom.models.generator import load_generator
from scanloom.sampling.engine import Engine, ImageRequest
from tests.tiny_generator import publish_generator

IMAGES = 1000
Images = dict[int, NDArray[np.float32]]


def wanted(index: int) -> ImageRequest:
    """One to four steps; what is asked for differs from image to image."""
    told: Attributes = {"age": 25.0 + index % 60, "sex": "FM"[index % 2], "view": "PA"}
    return ImageRequest(index, 11, told, steps=1 + index % 4)


def work(uri: str, slots: int, rows: int | None, indices: Sequence[int]) -> Images:
    """What one worker makes, in a process of its own."""
    torch.set_num_threads(1)
    engine = Engine(load_generator(uri), slots, rows=rows)
    return {f.request.index: f.image for f in engine.run(wanted(index) for index in indices)}


def generate(pool: ProcessPoolExecutor, uri: str, slots: int, rows: int | None, workers: int, seed: int) -> Any:
    """[IMAGES, 1, H, W] float32, made in a shuffled order."""
    order = list(range(IMAGES))
    random.Random(seed).shuffle(order)
    parts = [pool.submit(work, uri, slots, rows, order[worker::workers]) for worker in range(workers)]
    made: Images = {index: image for part in parts for index, image in part.result().items()}
    assert len(made) == IMAGES
    return np.stack([made[index] for index in range(IMAGES)])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("generator")
    publish_generator(str(folder))
    return str(folder)


@pytest.mark.slow
def test_a_thousand_images_do_not_depend_on_slots_workers_or_order(uri: str) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        expected = generate(pool, uri, slots=8, rows=1, workers=1, seed=0)
        assert len(np.unique(expected.reshape(IMAGES, -1), axis=0)) == IMAGES
        for seed, (slots, workers) in enumerate([(1, 1), (2, 1), (8, 1), (1, 2), (2, 2), (8, 2)], 1):
            made = generate(pool, uri, slots, 1, workers, seed)
            assert np.abs(made - expected).max() == 0.0, f"{slots} slots, {workers} workers"


@pytest.mark.slow
def test_the_batch_shape_alone_moves_the_last_bits(uri: str) -> None:
    """Each number of slots with the rows that are its own unless said otherwise; docs/engine.md has the figures."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        expected = generate(pool, uri, slots=1, rows=None, workers=2, seed=0)
        for seed, slots in enumerate((2, 8, 32), 1):
            made = generate(pool, uri, slots, None, 2, seed)
            again = generate(pool, uri, slots, None, 1, seed + 10)
            np.testing.assert_array_equal(made, again)
            levels = [np.rint(images * 255.0) for images in (made, expected)]
            moved = np.abs(levels[0] - levels[1])
            print(  # noqa: T201
                f"{slots} slots beside 1: {np.abs(made - expected).max():.2e} of full range, "
                f"{int((moved > 0).sum())} of {moved.size} pixels moved by {int(moved.max())} level of 8 bits"
            )
            assert np.abs(made - expected).max() < 1e-5
            assert moved.max() <= 1
