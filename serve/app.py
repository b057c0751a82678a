"""The service on Ray Serve: a gateway that speaks HTTP, engines that make images, a dispatcher for datasets.

`app` is what a Serve config file names as `import_path: serve.app:app`; its `args` are the service's settings.
"""

# No `annotations` from __future__: Serve looks at the class that a builder's argument is annotated with.

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scanloom.store import Store
from serve.access import Gatekeeper
from serve.audit_log import AuditLog
from serve.catalogue import read_catalogue
from serve.config import Replicas, Service
from serve.dispatcher import Dispatcher
from serve.engines import RETRY_AFTER_S, Engines
from serve.gateway import Parts, gateway
from serve.ledger import Ledger
from serve.logs import log_to_stderr
from serve.metrics import Metrics
from serve.quotas import Quotas
from serve.readiness import Readiness
from serve.replica import Replica

SPARE_REQUESTS = 64
"""That a replica is sent beyond those that it takes: it refuses by itself, at once, and knows for how long."""
OTHER_REQUESTS = 256
"""That a gateway answers at once beside those for images."""
AT_ONCE = {"env_vars": {"RAY_worker_niceness": "0"}}
"""Ray runs all workers at niceness 15; those for whom somebody waits go before the jobs of datasets."""
REQUEST_ID = b"x-request-id"
LOOK_BACK_S = 12.0
"""Over which requests are averaged to tell how many engines it takes; Serve warns at 10 s and less."""


def app(service: Service) -> Application:
    """The application of these settings."""
    engines = serve.deployment(name="engines", **_of_engines(service.replicas))(Replica).bind(service)
    dispatcher = None
    if service.datasets:
        dispatcher = serve.deployment(name="dispatcher", **_of_dispatcher())(Dispatcher).bind(service)
    ingress = serve.deployment(name="gateway", **_of_gateway(service))(serve.ingress()(Gateway))
    return ingress.bind(service, engines, dispatcher)


class Gateway:
    """The parts of the HTTP application, put together in the process that runs it."""

    def __init__(
        self, service: Service, engines: DeploymentHandle[Any], dispatcher: DeploymentHandle[Any] | None
    ) -> None:
        """The dispatcher is only named, so that Serve runs it: the two meet in the store."""
        log_to_stderr()
        self._parts = Parts(
            service=service,
            make=Engines(engines.make).make,
            # Where there may be no engine at all, one is started for the first request.
            ready=Readiness(lambda: service.replicas.least == 0 or _running(engines.deployment_id)),
            gatekeeper=Gatekeeper(service.access),
            quotas=Quotas(service),
            audit=AuditLog(Store(service.audit_store) if service.audit_store else None),
            ledger=Ledger(service) if service.datasets else None,
            catalogue=read_catalogue(service),
            measure=Metrics(),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _OneRequestId(gateway(self._parts))


class _OneRequestId:
    """Leaves out the gateway's X-Request-ID where it is the request's own, which Serve's proxy puts on every answer."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = {pair for pair in scope.get("headers", ()) if pair[0] == REQUEST_ID}

        async def passed_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if (pair[0].lower(), pair[1]) not in given]
            await send(message)

        await self._application(scope, receive, passed_on)


def _running(engines: Any) -> bool:
    """Whether an engine is there whose weights are loaded and whose first image is made, as Serve's controller says.

    Not asked of the engines, which would be late to answer when they are busy.
    """
    application = serve.status().applications.get(engines.app_name)
    deployment = application.deployments.get(engines.name) if application else None
    states = deployment.replica_states if deployment else {}
    return any(state == "RUNNING" and count > 0 for state, count in states.items())


def _of_engines(replicas: Replicas) -> dict[str, Any]:
    """Options of the engines' deployment."""
    return {
        "autoscaling_config": {
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            # A guided image takes two slots.
            "target_ongoing_requests": max(1.0, replicas.slots / 2),
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
        },
        "max_ongoing_requests": replicas.requests + SPARE_REQUESTS,
        "max_queued_requests": replicas.queued,
        "graceful_shutdown_timeout_s": replicas.drain_s + 10.0,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "resources": dict(replicas.resources),
            "runtime_env": AT_ONCE,
        },
    }


def _of_gateway(service: Service) -> dict[str, Any]:
    replicas = service.replicas
    for_images = replicas.most * (replicas.requests + SPARE_REQUESTS) + replicas.queued
    return {
        "num_replicas": service.gateways,
        "max_ongoing_requests": for_images + OTHER_REQUESTS,
        "max_queued_requests": OTHER_REQUESTS,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        "graceful_shutdown_timeout_s": replicas.drain_s + 10.0,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 5.0,
        "ray_actor_options": {"num_cpus": 1, "runtime_env": AT_ONCE},
    }


def _of_dispatcher() -> dict[str, Any]:
    return {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}, "health_check_period_s": 5.0}
