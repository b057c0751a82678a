"""ZeRO stage 1 between workers without GPUs: every worker gets its share of the mean gradient, and sends its weights.

DeepSpeed has all workers sum all gradients once the last of them is known, although each steps only its share of the
weights; and gloo sums and gathers along a ring, with every worker waiting for its neighbour at every turn. Here each
worker sends every other what that one steps and nothing else (reduce-scatter by pairwise exchange: Thakur, Rabenseifner
& Gropp 2005), piece by piece while the backward pass computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed
from torch import Tensor

PIECE = 1 << 20
"""Numbers of a message: smaller ones cost more than they hide, and the last one is sent when all is computed."""


@dataclass(frozen=True)
class Piece:
    """A slice of the row of all parameters, within one worker's share, that is sent as one message."""

    owner: int
    start: int
    stop: int
    parameters: frozenset[int]
    """Those that lie in it, wholly or in part, by their place in the row."""


class Exchange:
    """What takes the place of DeepSpeed's collectives, for its optimizer of stage 1 with one group of parameters.

    Around the last backward pass of a batch: `begin`, the pass, `finish`, DeepSpeed's step, `spread`.
    """

    def __init__(self, optimizer: Any) -> None:
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        (self._parameters,), (flat,) = optimizer.bit16_groups, optimizer.bit16_groups_flat
        self._optimizer = optimizer
        self._rank, self._workers = rank, workers
        self._weights = flat.detach()
        self._gradients = torch.zeros_like(self._weights)
        """In a row like the weights, divided by the number of workers; zero where no parameter lies."""
        self._slots = [self._gradients.as_strided(p.shape, p.stride(), p.storage_offset()) for p in self._parameters]
        share = len(flat) // workers
        self._own = slice(rank * share, (rank + 1) * share)
        self._received = {other: self._gradients.new_zeros(share) for other in range(workers) if other != rank}
        spans = [(p.storage_offset(), p.storage_offset() + p.numel()) for p in self._parameters]
        self._pieces = list(pieces(spans, share, workers))
        self._within = [[n for n, p in enumerate(self._pieces) if i in p.parameters] for i in range(len(spans))]
        self._missing: dict[int, set[int]] = {}
        """By piece that is not yet sent, the parameters whose gradients it waits for."""
        self._under_way: list[torch.distributed.Work | None] = []
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._known, index))
        # In a group of its own a worker has nobody to gather from, and DeepSpeed's step ends with its own share.
        alone, _ = torch.distributed.new_subgroups(group_size=1)
        optimizer.real_dp_process_group = [alone]
        optimizer.parallel_partitioned_bit16_groups = [[optimizer.parallel_partitioned_bit16_groups[0][rank]]]

    def begin(self) -> None:
        """From here on send gradients as the backward pass makes them."""
        self._missing = {number: set(piece.parameters) for number, piece in enumerate(self._pieces)}
        offset = self._own.start
        for number, piece in enumerate(self._pieces):
            if piece.owner == self._rank:
                for other, into in self._received.items():
                    self._receive(into[piece.start - offset : piece.stop - offset], other, number)

    @torch.no_grad()
    def finish(self) -> None:
        """Hand the optimizer its share of the mean gradient of all workers. Collective."""
        for index in set[int]().union(*self._missing.values()):
            # The pass did not come by this parameter: an earlier one of the batch may have.
            self._take(index, self._optimizer.get_gradient_for_reduction(self._parameters[index]))
        self._settle()
        mean = self._gradients[self._own].to(self._optimizer.single_partition_of_fp32_groups[0].dtype)
        for received in self._received.values():
            mean += received
        self._optimizer.averaged_gradients[0] = [mean]

    def spread(self) -> None:
        """Send the weights that this worker's step has changed to all others, and receive theirs. Collective."""
        for number, piece in enumerate(self._pieces):
            values = self._weights[piece.start : piece.stop]
            if piece.owner == self._rank:
                for other in self._received:
                    self._send(values, other, number)
            else:
                self._receive(values, piece.owner, number)
        self._settle()

    def _known(self, index: int, parameter: Tensor) -> None:
        gradient = self._optimizer.get_gradient_for_reduction(parameter)
        if self._missing and gradient is not None:
            self._take(index, gradient)
            self._optimizer.clear_grad_attribute(parameter)

    def _take(self, index: int, gradient: Tensor | None) -> None:
        if gradient is None:
            self._slots[index].zero_()
        else:
            torch.mul(gradient, 1 / self._workers, out=self._slots[index])
        for number in self._within[index]:
            self._missing[number].remove(index)
            if not self._missing[number]:
                del self._missing[number]
                piece = self._pieces[number]
                if piece.owner != self._rank:
                    self._send(self._gradients[piece.start : piece.stop], piece.owner, number)

    def _send(self, values: Tensor, to: int, tag: int) -> None:
        self._under_way.append(torch.distributed.isend(values, to, tag=tag))

    def _receive(self, into: Tensor, sender: int, tag: int) -> None:
        self._under_way.append(torch.distributed.irecv(into, sender, tag=tag))

    def _settle(self) -> None:
        for message in filter(None, self._under_way):
            message.wait()
        self._under_way.clear()


def pieces(spans: Sequence[tuple[int, int]], share: int, workers: int) -> Iterator[Piece]:
    """Every share cut where parameters begin, so that few share a message; `spans` are their [start, stop) in order."""
    for owner in range(workers):
        cuts, end = [owner * share], (owner + 1) * share
        for start, _ in spans:
            if cuts[-1] + PIECE <= start < end:
                cuts.append(start)
        for start, stop in pairwise([*cuts, end]):
            within = [index for index, (first, last) in enumerate(spans) if first < stop and start < last]
            if within:  # else it is padding
                yield Piece(owner, start, stop, frozenset(within))
