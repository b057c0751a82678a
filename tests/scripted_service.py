"""A service that answers as it is written down, so that its client needs no network and no time passes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from scanloom.client.flow import Compute, Flow, NoAnswer, Pause, Reply, Send, Together, carry_out
from scanloom.client.session import Session

T = TypeVar("T")
KEY = "scanloom_lab_" + "k" * 40
URL = "http://127.0.0.1:8000"


@dataclass
class Script:
    """Carries a flow out with answers that are written down; time passes by its pauses alone."""

    replies: list[Reply | NoAnswer]
    now: float = 0.0
    sent: list[Send] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def session(self, patience_s: float = 300.0, chance: float = 0.0) -> Session:
        return Session(URL, KEY, patience_s, lambda: self.now, lambda: chance)

    def run(self, flow: Flow[T]) -> T:
        return carry_out(flow, self._do)

    def _do(self, step: Any) -> Any:
        match step:
            case Pause(seconds):
                self.pauses.append(seconds)
                self.now += seconds
                return None
            case Compute(work):
                return work()
            case Together(flows, _):
                return [self.run(flow) for flow in flows]
            case Send():
                self.sent.append(step)
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
                if isinstance(reply, NoAnswer):
                    raise reply
                sink = step.into(reply) if step.into else None
                if sink is not None:
                    sink.write(reply.body)
                    sink.close()
                    return Reply(reply.status, reply.headers)
                return reply


def reply(content: object, status: int = 200, **headers: str) -> Reply:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


GENERATORS: dict[str, Any] = {"generators": []}
JOB: dict[str, Any] = {
    "id": "d-1", "state": "accepted", "generator": "tiny", "generator_digest": "ab", "plan": "cd", "images": 10,
    "seed": 0,
    "created": "2026-01-01T00:00:00+00:00", "request": "r-1",
    "progress": {"images_total": 10, "images_done": 0, "images_per_s": None, "eta_s": None},
}  # fmt: skip
