"""The decoding stage where a device is slower than its host: nobody waits for it who need not."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from scanloom.sampling.batch import ImageRequest
from scanloom.sampling.decoding import AHEAD, Decoder


class Event:
    """As torch.cuda.Event: done when the device says so, or when somebody waits for it."""

    def __init__(self) -> None:
        self.done = False
        self.waited_for = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = self.waited_for = True


class SlowDecoder(Decoder):
    """A CPU's, whose batches are under way until their events say otherwise."""

    def __init__(self, batch: int) -> None:
        super().__init__(lambda latents: latents + 1.0, batch, torch.device("cpu"))
        self.events: list[Event] = []

    def _copied(self) -> torch.cuda.Event | None:
        self.events.append(Event())
        return cast(torch.cuda.Event, self.events[-1])


def put(decoder: Decoder, *indices: int, side: int = 2) -> None:
    for index in indices:
        decoder.put(ImageRequest(index, 0, {}, 1), torch.full((1, side, side), float(index)))


def taken(decoder: Decoder, *, wait: bool = False) -> list[int]:
    made = decoder.take(wait=wait)
    for finished in made:
        np.testing.assert_array_equal(finished.image, np.float32(finished.request.index + 1.0))
    return [finished.request.index for finished in made]


def test_images_are_handed_out_in_order_as_their_batches_get_done() -> None:
    decoder = SlowDecoder(2)
    put(decoder, 0, 1, 2, 3, 4)
    decoder.start((1, 2, 2), partial=False)
    assert taken(decoder) == []
    decoder.events[1].done = True
    assert taken(decoder) == []
    decoder.events[0].done = True
    assert taken(decoder) == [0, 1, 2, 3]
    assert decoder.pending == 1
    assert not any(event.waited_for for event in decoder.events)


def test_waiting_is_for_the_first_batch_alone_and_only_where_nothing_is_done() -> None:
    decoder = SlowDecoder(1)
    put(decoder, 0, 1)
    decoder.start((1, 2, 2), partial=False)
    assert taken(decoder, wait=True) == [0]
    assert [event.waited_for for event in decoder.events] == [True, False]
    decoder.events[1].done = True
    assert taken(decoder, wait=True) == [1]
    assert not decoder.events[1].waited_for
    assert taken(decoder, wait=True) == []


def test_no_more_batches_are_under_way_than_the_device_has_use_for() -> None:
    decoder = SlowDecoder(1)
    put(decoder, *range(AHEAD + 2))
    decoder.start((1, 2, 2), partial=False)
    assert [event.waited_for for event in decoder.events] == [True, True] + [False] * AHEAD
    assert taken(decoder) == [0, 1]


def test_what_is_under_way_cannot_be_cancelled_and_what_waits_can() -> None:
    decoder = SlowDecoder(2)
    requests = [ImageRequest(index, 0, {}, 1) for index in range(3)]
    for request in requests:
        decoder.put(request, torch.full((1, 2, 2), float(request.index)))
    decoder.start((1, 2, 2), partial=False)
    assert not decoder.cancel(requests[0])
    assert decoder.cancel(requests[2])
    assert taken(decoder, wait=True) == [0, 1]
    assert decoder.pending == 0
