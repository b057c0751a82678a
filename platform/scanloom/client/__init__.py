"""The service from Python: `Client` where one waits for answers, `AsyncClient` in an event loop.

    with Client("https://scanloom.example", key="...") as client:
        images = client.images.generate({"sex": "F", "age": 61}, count=4)
        images.save("images")
        client.datasets.create(10_000).wait(progress=True).download("dataset")

Every call is tried again where that can help, and comes to the same however often it is sent. What goes wrong is an
error named by what to do about it, all of them below `ServiceError`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import httpx

from scanloom.api import DatasetJob, DatasetState
from scanloom.client import datasets as _datasets
from scanloom.client import download as _download
from scanloom.client import generators as _generators
from scanloom.client import images as _images
from scanloom.client.errors import (
    Busy,
    DamagedDownload,
    JobFailed,
    NotAllowed,
    NotFound,
    RequestRefused,
    ServiceDown,
    ServiceError,
    StillRunning,
)
from scanloom.client.flow import Blocking, InLoop, Later, Now, later, later_as, now, now_as
from scanloom.client.images import Images
from scanloom.client.session import PATIENCE_S, Session, session_of

__all__ = [
    "AsyncClient",
    "AsyncDataset",
    "Busy",
    "Client",
    "DamagedDownload",
    "Dataset",
    "Images",
    "JobFailed",
    "NotAllowed",
    "NotFound",
    "RequestRefused",
    "ServiceDown",
    "ServiceError",
    "StillRunning",
]


class _Told:
    """What the service said last of a dataset."""

    _subject: _datasets.Ordered

    @property
    def job(self) -> DatasetJob:
        return self._subject.job

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def state(self) -> DatasetState:
        return self.job.state

    def __repr__(self) -> str:
        done = self.job.progress
        return f"{type(self).__name__}({self.id!r}, {self.state}, {done.images_done} of {done.images_total} images)"


# --- while one waits ------------------------------------------------------------------------------------------


class Dataset(_Told, Now[_datasets.Ordered]):
    """An ordered dataset."""

    refresh = now(_datasets.refresh)
    cancel = now(_datasets.cancel)
    result = now(_datasets.result)
    download = now(_download.download)
    wait = now_as(_datasets.wait, lambda ordered, transport: Dataset(ordered, transport))


class _Images(Now[Session]):
    generate = now(_images.generate)


class _Datasets(Now[Session]):
    create = now_as(_datasets.create, Dataset)
    get = now_as(_datasets.find, Dataset)
    list = now_as(_datasets.every, lambda found, transport: [Dataset(ordered, transport) for ordered in found])


class _Generators(Now[Session]):
    get = now(_generators.find)
    list = now(_generators.every)


class Client:
    """A service and a key, by default those of SCANLOOM_URL and SCANLOOM_API_KEY.

    `patience_s`: how long one call may take with all its retries. `http`: a client of one's own, for proxies or
    certificates; it stays open. May be shared between threads.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        http: httpx.Client | None = None,
    ) -> None:
        self._session = session_of(url, key, patience_s)
        self._http, self._own = http or httpx.Client(), http is None
        transport = Blocking(self._http)
        self.images = _Images(self._session, transport)
        self.datasets = _Datasets(self._session, transport)
        self.generators = _Generators(self._session, transport)

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._session.url!r})"


# --- in an event loop -----------------------------------------------------------------------------------------


class AsyncDataset(_Told, Later[_datasets.Ordered]):
    """An ordered dataset."""

    refresh = later(_datasets.refresh)
    cancel = later(_datasets.cancel)
    result = later(_datasets.result)
    download = later(_download.download)
    wait = later_as(_datasets.wait, lambda ordered, transport: AsyncDataset(ordered, transport))


class _AsyncImages(Later[Session]):
    generate = later(_images.generate)


class _AsyncDatasets(Later[Session]):
    create = later_as(_datasets.create, AsyncDataset)
    get = later_as(_datasets.find, AsyncDataset)
    list = later_as(_datasets.every, lambda found, transport: [AsyncDataset(ordered, transport) for ordered in found])


class _AsyncGenerators(Later[Session]):
    get = later(_generators.find)
    list = later(_generators.every)


class AsyncClient:
    """As Client, with methods that are awaited, in an asyncio event loop."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._session = session_of(url, key, patience_s)
        self._http, self._own = http or httpx.AsyncClient(), http is None
        transport = InLoop(self._http)
        self.images = _AsyncImages(self._session, transport)
        self.datasets = _AsyncDatasets(self._session, transport)
        self.generators = _AsyncGenerators(self._session, transport)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncClient({self._session.url!r})"
