"""What the client does, as generators without input and output of their own, and what carries them out.

A flow yields steps (send this, wait so long, do these at once) and is given what came of each; a transport carries the
steps out, blocking or in an event loop. So every call is written once, and tested without a network.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import httpx

_PIECE = 1 << 20
_CONNECT_S = 10.0

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


class NoAnswer(Exception):
    """A request was not answered, or not to its end; it may have been carried out all the same."""


class Sink(Protocol):
    """Takes a body piece by piece."""

    def write(self, piece: bytes, /) -> object:
        """The next piece."""

    def close(self) -> object:
        """There are no more."""


@dataclass(frozen=True)
class Reply:
    """An answer; `body` is empty where a sink took it. Names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Send:
    """Send a request -> Reply, or NoAnswer. `silence_s`: how long nothing may come."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    silence_s: float = 60.0
    into: Callable[[Reply], Sink | None] | None = None
    """Where the body goes of an answer with this status and these headers; None: into the reply."""


@dataclass(frozen=True)
class Pause:
    """Wait -> None."""

    seconds: float


@dataclass(frozen=True)
class Compute:
    """Do something that takes a while, such as reading a file -> what it returns."""

    work: Callable[[], Any]


@dataclass(frozen=True)
class Together:
    """Carry out flows, some at once -> what they return, in their order. The first error ends all."""

    flows: Sequence[Flow[Any]]
    at_once: int


Step = Send | Pause | Compute | Together
Flow = Generator[Step, Any, T]


def send(step: Send) -> Flow[Reply]:
    """The answer to a request. NoAnswer."""
    reply: Reply = yield step
    return reply


def compute(work: Callable[[], T]) -> Flow[T]:
    """What a function gives that takes a while."""
    result: T = yield Compute(work)
    return result


def together(flows: Sequence[Flow[T]], at_once: int) -> Flow[list[T]]:
    """What each of the flows gives."""
    results: list[T] = yield Together(flows, at_once)
    return results


def carry_out(flow: Flow[T], do: Callable[[Step], object]) -> T:
    """What a flow gives, or raises, whose steps `do` does; what a step raises is the flow's to deal with."""
    try:
        step = next(flow)
        while True:
            try:
                result = do(step)
            except Exception as error:  # noqa: BLE001 - it is the flow's to deal with
                step = flow.throw(error)
            else:
                step = flow.send(result)
    except StopIteration as done:
        value: T = done.value
        return value
    finally:
        flow.close()


# --- transports -----------------------------------------------------------------------------------------------


class Blocking:
    """Carries flows out in the caller's thread."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def run(self, flow: Flow[T]) -> T:
        """What the flow gives, or raises."""
        return carry_out(flow, self._do)

    def _do(self, step: Step) -> object:
        match step:
            case Send():
                return self._send(step)
            case Pause(seconds):
                time.sleep(seconds)
                return None
            case Compute(work):
                return work()
            case Together(flows, at_once):
                with ThreadPoolExecutor(at_once) as pool:
                    return list(pool.map(self.run, flows))

    def _send(self, step: Send) -> Reply:
        try:
            with self.http.stream(**_request(step)) as response:
                sink = _sink(step, response)
                if sink is None:
                    return _reply(response, response.read())
                try:
                    for piece in response.iter_bytes(_PIECE):
                        sink.write(piece)
                finally:
                    sink.close()
                return _reply(response)
        except httpx.RequestError as error:
            raise NoAnswer(_reason(error)) from error


class InLoop:
    """Carries flows out in an asyncio event loop."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def run(self, flow: Flow[T]) -> T:
        """What the flow gives, or raises."""
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._do(step)
                except Exception as error:  # noqa: BLE001 - it is the flow's to deal with
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as done:
            value: T = done.value
            return value
        finally:
            flow.close()

    async def _do(self, step: Step) -> object:
        match step:
            case Send():
                return await self._send(step)
            case Pause(seconds):
                await asyncio.sleep(seconds)
                return None
            case Compute(work):
                return await asyncio.to_thread(work)
            case Together(flows, at_once):
                return await self._together(flows, asyncio.Semaphore(at_once))

    async def _together(self, flows: Sequence[Flow[Any]], limit: asyncio.Semaphore) -> list[Any]:
        async def one(flow: Flow[Any]) -> Any:
            async with limit:
                return await self.run(flow)

        tasks = [asyncio.create_task(one(flow)) for flow in flows]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, step: Send) -> Reply:
        try:
            async with self.http.stream(**_request(step)) as response:
                sink = _sink(step, response)
                if sink is None:
                    return _reply(response, await response.aread())
                try:
                    async for piece in response.aiter_bytes(_PIECE):
                        await asyncio.to_thread(sink.write, piece)
                finally:
                    sink.close()
                return _reply(response)
        except httpx.RequestError as error:
            raise NoAnswer(_reason(error)) from error


def _request(step: Send) -> dict[str, Any]:
    timeout = httpx.Timeout(step.silence_s, connect=min(_CONNECT_S, step.silence_s))
    return {
        "method": step.method,
        "url": step.url,
        "headers": dict(step.headers),
        "content": step.body,
        "timeout": timeout,
        # It would carry the key to another place.
        "follow_redirects": False,
    }


def _sink(step: Send, response: httpx.Response) -> Sink | None:
    return step.into(_reply(response)) if step.into else None


def _reply(response: httpx.Response, body: bytes = b"") -> Reply:
    return Reply(response.status_code, {name.lower(): value for name, value in response.headers.items()}, body)


def _reason(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__


# --- flows as methods -----------------------------------------------------------------------------------------


class Now(Generic[S]):
    """An object whose methods are flows over `subject`, carried out while the caller waits."""

    def __init__(self, subject: S, transport: Blocking) -> None:
        self._subject, self._transport = subject, transport


class Later(Generic[S]):
    """An object whose methods are flows over `subject`, as coroutines."""

    def __init__(self, subject: S, transport: InLoop) -> None:
        self._subject, self._transport = subject, transport


def now(flow: Callable[Concatenate[S, P], Flow[T]]) -> Callable[Concatenate[Now[S], P], T]:
    """The flow as a method."""
    return now_as(flow, lambda result, _: result)


def now_as(
    flow: Callable[Concatenate[S, P], Flow[T]], make: Callable[[T, Blocking], R]
) -> Callable[Concatenate[Now[S], P], R]:
    """The flow as a method that returns what `make` makes of its result."""

    @functools.wraps(flow)
    def method(self: Now[S], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return make(self._transport.run(flow(self._subject, *args, **kwargs)), self._transport)

    _sign(method, flow)
    return method


def later(flow: Callable[Concatenate[S, P], Flow[T]]) -> Callable[Concatenate[Later[S], P], Coroutine[Any, Any, T]]:
    """The flow as a coroutine method."""
    return later_as(flow, lambda result, _: result)


def later_as(
    flow: Callable[Concatenate[S, P], Flow[T]], make: Callable[[T, InLoop], R]
) -> Callable[Concatenate[Later[S], P], Coroutine[Any, Any, R]]:
    """The flow as a coroutine method that returns what `make` makes of its result."""

    @functools.wraps(flow)
    async def method(self: Later[S], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return make(await self._transport.run(flow(self._subject, *args, **kwargs)), self._transport)

    _sign(method, flow)
    return method


def _sign(method: Callable[..., Any], flow: Callable[..., Any]) -> None:
    # For help(): that the method is a flow inside is nobody's business.
    signature = inspect.signature(flow).replace(return_annotation=inspect.Signature.empty)
    vars(method)["__signature__"] = signature
