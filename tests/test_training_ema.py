"""The average of weights: moves, settles, and can be continued."""

import torch

from scanloom.training.ema import Ema


def test_ema_moves_and_settles_on_constant_weights() -> None:
    weight = torch.zeros(3)
    ema = Ema([weight], decay=0.9)
    weight.fill_(1.0)
    ema.update()
    # The first update counts 9/10: warm-up decay is (1 + 0) / (10 + 0).
    assert torch.allclose(ema.shadow[0], torch.full((3,), 0.9))
    for _ in range(200):
        ema.update()
    assert torch.allclose(ema.shadow[0], torch.ones(3))


def test_ema_continues_from_its_updates_and_shadow_as_if_never_stopped() -> None:
    weight = torch.zeros(2)
    straight, stopped = Ema([weight], 0.99), Ema([weight], 0.99)
    for value in (1.0, 2.0, 3.0):
        weight.fill_(value)
        straight.update()
        stopped.update()
        resumed = Ema([weight], 0.99)
        resumed.updates = stopped.updates
        resumed.shadow[0].copy_(stopped.shadow[0])
        stopped = resumed
    assert torch.equal(straight.shadow[0], stopped.shadow[0])


def test_a_worker_that_owns_nothing_averages_nothing() -> None:
    ema = Ema([], 0.9)
    ema.update()
    assert ema.updates == 1
