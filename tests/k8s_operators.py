"""Kinds of other operators in k8s/, whose published schemas are not at hand offline: what an API server would refuse.

Each model holds the fields that our manifests use and no others, by the published types: Gateway API v1
(kubernetes-sigs/gateway-api, apis/v1 at 0377516), External Secrets v1 (external-secrets/external-secrets,
apis/externalsecrets/v1 at 0126c16) and Kueue v1beta2 (kubernetes-sigs/kueue, apis/kueue/v1beta2 at 013c8f2). An unknown
key is an error: one that the types know and k8s/ did not use so far is to be looked up there and added here.
Prometheus Operator's kinds have models made of its definitions, in a package of their own.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Object = dict[str, Any]

Subdomain = Annotated[
    str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
]
Hostname = Annotated[
    str, Field(max_length=253, pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
]
Port = Annotated[int, Field(ge=1, le=65535)]
GatewayDuration = Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]
GoDuration = Annotated[str, Field(pattern=r"^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$")]
Quota = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?$")]
"""A quantity that is not negative."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Metadata(_Part):
    """What people set of an object's metadata."""

    name: Subdomain
    namespace: Subdomain = ""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class _Thing(_Part):
    apiVersion: str
    kind: str
    metadata: Metadata


# --- External Secrets -----------------------------------------------------------------------------------------


class RemoteRef(_Part):
    key: str
    property: str = ""


class SecretData(_Part):
    secretKey: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    remoteRef: RemoteRef


class SecretStoreRef(_Part):
    name: Subdomain
    kind: Literal["SecretStore", "ClusterSecretStore"] = "SecretStore"


class SecretTarget(_Part):
    name: Subdomain
    creationPolicy: Literal["Owner", "Orphan", "Merge", "None"] = "Owner"


class ExternalSecretSpec(_Part):
    refreshInterval: GoDuration = "1h"
    secretStoreRef: SecretStoreRef
    target: SecretTarget
    data: Annotated[list[SecretData], Field(min_length=1)]


class ExternalSecret(_Thing):
    spec: ExternalSecretSpec


# --- Gateway API ----------------------------------------------------------------------------------------------


class CertificateRef(_Part):
    kind: Literal["Secret"] = "Secret"
    name: Subdomain


class Tls(_Part):
    mode: Literal["Terminate", "Passthrough"] = "Terminate"
    certificateRefs: Annotated[list[CertificateRef], Field(max_length=64)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _terminates_with_a_certificate(self) -> Self:
        if self.mode == "Terminate" and not self.certificateRefs:
            raise ValueError("certificateRefs must be specified when mode is Terminate")
        return self


class FromNamespaces(_Part):
    from_: Annotated[Literal["All", "Same", "None"], Field(alias="from")] = "Same"


class AllowedRoutes(_Part):
    namespaces: FromNamespaces


class Listener(_Part):
    name: Subdomain
    protocol: Literal["HTTP", "HTTPS", "TLS", "TCP", "UDP"]
    port: Port
    hostname: Hostname = ""
    tls: Tls | None = None
    allowedRoutes: AllowedRoutes

    @model_validator(mode="after")
    def _tls_fits_the_protocol(self) -> Self:
        if self.protocol in ("HTTP", "TCP", "UDP") and self.tls:
            raise ValueError(f"tls must not be specified for protocol {self.protocol}")
        if self.protocol in ("TCP", "UDP") and self.hostname:
            raise ValueError(f"hostname must not be specified for protocol {self.protocol}")
        if self.protocol in ("HTTPS", "TLS") and not self.tls:
            raise ValueError(f"tls is required for protocol {self.protocol}")
        if self.protocol == "HTTPS" and self.tls and self.tls.mode != "Terminate":
            raise ValueError("tls mode must be Terminate for protocol HTTPS")
        return self


class GatewaySpec(_Part):
    gatewayClassName: Subdomain
    listeners: Annotated[list[Listener], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _listeners_differ(self) -> Self:
        places = {(listener.port, listener.protocol, listener.hostname) for listener in self.listeners}
        if len({listener.name for listener in self.listeners}) < len(self.listeners) or len(places) < len(
            self.listeners
        ):
            raise ValueError("names of listeners, and port, protocol and hostname together, must be unique")
        return self


class Gateway(_Thing):
    spec: GatewaySpec


class ParentRef(_Part):
    name: Subdomain


class PathMatch(_Part):
    type: Literal["Exact", "PathPrefix"] = "PathPrefix"
    value: Annotated[str, Field(max_length=1024, pattern=r"^/([-A-Za-z0-9_~]+(\.[-A-Za-z0-9_~]+)*/?)*$")]


class RouteMatch(_Part):
    path: PathMatch


class Timeouts(_Part):
    request: GatewayDuration
    backendRequest: GatewayDuration

    @model_validator(mode="after")
    def _the_whole_is_longer_than_its_part(self) -> Self:
        if 0 < seconds(self.request) < seconds(self.backendRequest):
            raise ValueError("backendRequest timeout cannot be longer than request timeout")
        return self


class BackendRef(_Part):
    """A Service, which needs a port."""

    name: Subdomain
    port: Port


class RouteRule(_Part):
    matches: Annotated[list[RouteMatch], Field(min_length=1, max_length=64)]
    timeouts: Timeouts
    backendRefs: Annotated[list[BackendRef], Field(min_length=1, max_length=16)]


class HTTPRouteSpec(_Part):
    parentRefs: Annotated[list[ParentRef], Field(min_length=1, max_length=32)]
    hostnames: Annotated[list[Hostname], Field(min_length=1, max_length=16)]
    rules: Annotated[list[RouteRule], Field(min_length=1, max_length=16)]


class HTTPRoute(_Thing):
    spec: HTTPRouteSpec


def seconds(duration: str) -> float:
    """Of a duration of Gateway API such as 1h30m or 500ms."""
    total, digits, rest = 0.0, "", duration
    while rest:
        if rest[0].isdigit():
            digits, rest = digits + rest[0], rest[1:]
            continue
        unit = next(unit for unit in ("ms", "h", "m", "s") if rest.startswith(unit))
        total += int(digits) * {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}[unit]
        digits, rest = "", rest[len(unit) :]
    return total


# --- Kueue ----------------------------------------------------------------------------------------------------


class ResourceFlavor(_Thing):
    pass


class FlavorResource(_Part):
    name: str
    nominalQuota: Quota


class Flavor(_Part):
    name: Subdomain
    resources: Annotated[list[FlavorResource], Field(min_length=1, max_length=64)]


class ResourceGroup(_Part):
    coveredResources: Annotated[list[str], Field(min_length=1, max_length=64)]
    flavors: Annotated[list[Flavor], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _flavors_list_what_is_covered(self) -> Self:
        # The definition compares numbers alone; that the order is the same, Kueue's webhook sees to.
        if any([resource.name for resource in flavor.resources] != self.coveredResources for flavor in self.flavors):
            raise ValueError("each flavor must list all of coveredResources, in their order")
        return self


class NamespaceSelector(_Part):
    matchLabels: dict[str, str]


class Preemption(_Part):
    withinClusterQueue: Literal["Never", "LowerPriority", "LowerOrNewerEqualPriority"] = "Never"


class ClusterQueueSpec(_Part):
    namespaceSelector: NamespaceSelector
    queueingStrategy: Literal["StrictFIFO", "BestEffortFIFO"] = "BestEffortFIFO"
    preemption: Preemption
    resourceGroups: Annotated[list[ResourceGroup], Field(min_length=1, max_length=16)]


class ClusterQueue(_Thing):
    spec: ClusterQueueSpec


class LocalQueueSpec(_Part):
    clusterQueue: Subdomain


class LocalQueue(_Thing):
    spec: LocalQueueSpec


# --- all of them ----------------------------------------------------------------------------------------------

_WRITTEN: dict[tuple[str, str], type[BaseModel]] = {
    ("external-secrets.io/v1", "ExternalSecret"): ExternalSecret,
    ("gateway.networking.k8s.io/v1", "Gateway"): Gateway,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTPRoute,
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): ResourceFlavor,
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): ClusterQueue,
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): LocalQueue,
}
_PROMETHEUS = "monitoring.coreos.com/v1", ("PodMonitor", "PrometheusRule")
KINDS = {*_WRITTEN, *((_PROMETHEUS[0], kind) for kind in _PROMETHEUS[1])}
"""apiVersion and kind of what this module knows."""
HAS_PROMETHEUS = importlib.util.find_spec("cloudcoil") is not None
"""Whether the package of Prometheus Operator's models is installed: where not, its kinds are not looked at."""


def operator_faults(thing: Object) -> list[str]:
    """What speaks against an object of one of KINDS."""
    model = _model(thing["apiVersion"], thing["kind"])
    if model is None:
        return []
    try:
        read = model.model_validate(thing)
    except ValidationError as error:
        return [f"{'.'.join(map(str, told['loc'])) or 'top level'}: {told['msg']}" for told in error.errors()]
    # Prometheus Operator's models leave out what they do not know; ours refuse it.
    kept = read.model_dump(by_alias=True, exclude_unset=True, mode="json")
    return [] if kept == thing else [f"unknown keys: {', '.join(sorted(_left_out(thing, kept)))}"]


@cache
def _model(api: str, kind: str) -> type[BaseModel] | None:
    if (api, kind) in _WRITTEN:
        return _WRITTEN[api, kind]
    if not HAS_PROMETHEUS:
        return None
    # Only where it is used: it is 100,000 lines of models, two seconds of importing.
    from cloudcoil.models.prometheus_operator import v1

    model: type[BaseModel] = getattr(v1, kind)
    return model


def _left_out(given: object, kept: object, at: str = "") -> list[str]:
    """Places of what stands in one and not, or not so, in the other."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            place
            for key, value in given.items()
            for place in _left_out(value, kept.get(key), f"{at}.{key}".lstrip("."))
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            place for n, pair in enumerate(zip(given, kept, strict=True)) for place in _left_out(*pair, f"{at}.{n}")
        ]
    return [] if given == kept else [at]
