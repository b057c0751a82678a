"""What the service says of itself in numbers: counters, gauges and histograms through Ray, and one page of them all.

Every process of the service hands its numbers to the metrics agent of its node, which Ray runs; a Prometheus server can
read those agents, or `GET /metrics`, which gathers ours of all nodes. Ray puts `ray_` before each name and adds labels
of its own (WorkerId, NodeAddress, ...). Without Ray nothing is counted.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import ray
from ray.util import metrics

PREFIX = "ray_scanloom_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_VALUES = 64
"""Values of a label that are told apart, by process; further ones are counted together, as `other`."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SCRAPE_S = 2.0
_LARGEST_PAGE = 16 << 20


class Metrics:
    """Counts for one process of the service; safe to use from any thread."""

    def __init__(self, agents: Callable[[], Sequence[str]] | None = None) -> None:
        """`agents` gives the URLs whose pages `exposition` gathers; None: of the metrics agents of Ray's nodes."""
        self._agents = agents or _agents
        self._families = _Families() if ray.is_initialized() else None
        self._seen: dict[str, set[str]] = {}
        self._steps = self._images = 0

    def answered(self, route: str, tenant: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is its template, such as `/v1/datasets/{id}`; tenant "" where unknown."""
        if self._families:
            at = {"route": self._bounded("route", route), "tenant": self._bounded("tenant", tenant)}
            self._families.requests.inc(1, at | {"status": str(status)})
            self._families.latency.observe(max(seconds, 0.0), at)

    def refused(self, reason: str) -> None:
        """A request was refused; `reason` is the kind of its problem, such as `busy`."""
        if self._families:
            self._families.refused.inc(1, {"reason": self._bounded("reason", reason)})

    def asked(self, images: int) -> None:
        """Images were asked for and let through to the engines."""
        if self._families and images > 0:
            self._families.asked.inc(images)

    def engine(self, *, slots: int, used: int, waiting: int, loaded: int, steps: int, images: int) -> None:
        """How an engine stands: its slots and those in use, images that wait for some, generators in memory, and how
        many steps it took and images it made since it started."""
        if not self._families:
            return
        gauges = {"slots": slots, "slots_used": used, "images_waiting": waiting, "generators_loaded": loaded}
        for name, value in gauges.items():
            self._families.gauges[name].set(value)
        if steps > self._steps:
            self._families.steps.inc(steps - self._steps)
        if images > self._images:
            self._families.images.inc(images - self._images)
        self._steps, self._images = steps, images

    def redrawn(self, reason: str, images: int = 1) -> None:
        """Images were drawn and not let out, for what the quality checks call `reason`."""
        if self._families and images > 0:
            self._families.redrawn.inc(images, {"reason": self._bounded("redrawn", reason)})

    async def exposition(self) -> bytes:
        """Our families on all nodes, in Prometheus' text format; a node that does not answer is counted in it."""
        agents = await asyncio.to_thread(self._agents)
        pages = await asyncio.gather(*(asyncio.to_thread(_page, agent) for agent in agents))
        there = [page for page in pages if page is not None]
        nodes = _Family(
            [f"# HELP {PREFIX}nodes Nodes whose numbers are on this page, and such that did not answer.",
             f"# TYPE {PREFIX}nodes gauge"],
            [f'{PREFIX}nodes{{state="read"}} {len(there)}',
             f'{PREFIX}nodes{{state="silent"}} {len(pages) - len(there)}'],
        )  # fmt: skip
        found = {**_gathered(there), f"{PREFIX}nodes": nodes}
        return "".join(f"{line}\n" for name in sorted(found) for line in found[name].lines()).encode()

    def _bounded(self, label: str, value: str) -> str:
        # Whoever chooses a label's values could otherwise fill the memory of all who keep them.
        seen = self._seen.setdefault(label, set())
        if value not in seen and len(seen) >= MOST_VALUES:
            return "other"
        seen.add(value)
        return value


class _Families:
    """What is counted, as Ray knows it."""

    def __init__(self) -> None:
        self.requests = metrics.Counter(
            "scanloom_requests", "Requests answered.", tag_keys=("route", "tenant", "status")
        )
        self.latency = metrics.Histogram(
            "scanloom_request_seconds", "From a request's first byte to the end of its answer.",
            boundaries=list(SECONDS), tag_keys=("route", "tenant"),
        )  # fmt: skip
        self.refused = metrics.Counter("scanloom_refused", "Requests refused, by problem.", tag_keys=("reason",))
        self.asked = metrics.Counter("scanloom_images_asked", "Images that requests let through asked for.")
        self.steps = metrics.Counter("scanloom_engine_steps", "Calls of the denoiser.")
        self.images = metrics.Counter("scanloom_engine_images", "Images made and let out.")
        self.redrawn = metrics.Counter(
            "scanloom_engine_redrawn", "Images drawn and refused by the quality checks.", tag_keys=("reason",)
        )
        self.gauges = {
            name: metrics.Gauge(f"scanloom_engine_{name}", told)
            for name, told in {
                "slots": "Slots of an engine.",
                "slots_used": "Slots in which an image is made.",
                "images_waiting": "Images that wait for slots.",
                "generators_loaded": "Generators in memory.",
            }.items()
        }


# --- the page -------------------------------------------------------------------------------------------------


@dataclass
class _Family:
    head: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return self.head + self.samples


def _agents() -> list[str]:
    if not ray.is_initialized():
        return []
    return [
        f"http://{_bracketed(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _page(url: str) -> str | None:
    """None where the agent does not answer in time, or not with a page."""
    try:
        with urllib.request.urlopen(url, timeout=_SCRAPE_S) as answer:
            return bytes(answer.read(_LARGEST_PAGE)).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None


def _gathered(pages: Iterable[str]) -> dict[str, _Family]:
    """Our families, by name, each with its head once and the samples of all pages: as the format wants it."""
    found: dict[str, _Family] = {}
    for page in pages:
        headed = set(found)
        name = ""
        for line in page.splitlines():
            if told := re.match(r"# (?:HELP|TYPE) (\S+)", line):
                name = told[1]
                if name.startswith(PREFIX) and name not in headed:
                    found.setdefault(name, _Family()).head.append(line)
            elif name.startswith(PREFIX) and line.startswith(name):
                found[name].samples.append(line)
    return found
