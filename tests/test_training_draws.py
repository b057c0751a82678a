"""Training's randomness: a function of seed and position, of nothing else."""

import numpy as np
import torch

from scanloom.training.draws import draw, positions, rows_at


def test_workers_share_a_step_without_overlap_and_in_the_order_of_one_worker() -> None:
    alone = list(positions(step=3, batch_size=12, rank=0, workers=1))
    parts = [list(positions(step=3, batch_size=12, rank=rank, workers=3)) for rank in range(3)]
    assert [position for part in parts for position in part] == alone


def test_every_epoch_visits_every_row_once_in_another_order() -> None:
    rows = 17
    first, second = rows_at(range(rows), rows, seed=5), rows_at(range(rows, 2 * rows), rows, seed=5)
    assert sorted(first) == sorted(second) == list(range(rows))
    assert list(first) != list(second)
    assert list(rows_at(range(rows), rows, seed=6)) != list(first)


def test_a_row_draws_the_same_noise_whatever_batch_it_is_in() -> None:
    together = draw(range(8), (2, 3, 3), uniforms=4, seed=9)
    alone = draw([5], (2, 3, 3), uniforms=4, seed=9)
    assert torch.equal(together.noise_BCHW[5], alone.noise_BCHW[0])
    assert torch.equal(together.posterior_BCHW[5], alone.posterior_BCHW[0])
    assert torch.equal(together.uniform_BU[5], alone.uniform_BU[0])


def test_ranks_and_steps_never_draw_the_same_noise() -> None:
    drawn = draw(range(256), (1, 8, 8), uniforms=1, seed=0).noise_BCHW.flatten(1).numpy()
    correlation = np.corrcoef(drawn) - np.eye(256)
    # 64 independent samples: |r| of 0.65 is beyond five standard errors.
    assert np.abs(correlation).max() < 0.65


def test_draws_are_standard_normal_and_uniform() -> None:
    drawn = draw(range(512), (1, 16, 16), uniforms=8, seed=1)
    for normal in (drawn.noise_BCHW, drawn.posterior_BCHW):
        assert abs(float(normal.mean())) < 0.01
        assert abs(float(normal.std()) - 1) < 0.01
    assert abs(float(drawn.uniform_BU.mean()) - 0.5) < 0.02
    assert 0 <= float(drawn.uniform_BU.min()) < float(drawn.uniform_BU.max()) < 1
