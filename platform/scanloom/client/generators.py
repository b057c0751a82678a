"""What the service can make images with."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from scanloom.api import GeneratorInfo, Generators
from scanloom.client.flow import Flow
from scanloom.client.session import Session, get


def every(session: Session) -> Flow[Sequence[GeneratorInfo]]:
    """All generators that are served, with their attributes and what each was trained on."""
    return (yield from get(session, "/v1/generators", Generators)).generators


def find(session: Session, name: str) -> Flow[GeneratorInfo]:
    """The generator that is served under this name. Raises NotFound."""
    return get(session, f"/v1/generators/{quote(name, safe='')}", GeneratorInfo)
