"""What the HTTP face of the service is put together from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.access import Gatekeeper
from serve.audit_log import AuditLog
from serve.catalogue import Offer
from serve.config import Service
from serve.ledger import Ledger
from serve.metrics import Metrics
from serve.quotas import Quotas


@dataclass(frozen=True)
class Parts:
    """All that a gateway needs; each part knows nothing of HTTP."""

    service: Service
    make: Callable[[ImageOrder], Awaitable[MadeImages]]
    """Has images made; cancelling it frees their slots."""
    ready: Callable[[], Awaitable[bool]]
    """Whether images can be made now."""
    gatekeeper: Gatekeeper
    quotas: Quotas
    audit: AuditLog
    ledger: Ledger | None
    """None: no datasets can be ordered."""
    catalogue: Mapping[str, Offer]
    """By the names under which generators are served, the first being that of requests that name none."""
    measure: Metrics
