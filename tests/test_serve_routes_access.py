"""Every route of the service, tried without a key, with forged and misused ones, and for what is another tenant's.

The routes are those of the application itself, so that none can be forgotten: a new one fails here until its place in
the table says what it needs.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi.routing import APIRoute
from jwt.algorithms import RSAAlgorithm

from scanloom.api_key import new_key
from serve.config import Service
from serve.gateway import gateway
from tests.served_datasets import finish
from tests.served_images import KEYS, ORDER, Asked, bearer, blank, parts_of, problem, settings
from tests.tiny_generator import publish_generator

ISSUER, AUDIENCE = "https://login.example", "scanloom"
OURS = rsa.generate_private_key(65537, 2048)
STRANGER = rsa.generate_private_key(65537, 2048)
FILE = "images/shard-000000-0a1b2c3d4e5f.parquet"


@dataclass(frozen=True)
class Route:
    """What a route needs: one of these scopes (none: no key), and whether it is of one tenant's job."""

    scopes: frozenset[str]
    body: Any = None
    of_a_job: bool = False
    answer: int = 200


def needs(*scopes: str, **more: Any) -> Route:
    return Route(frozenset(scopes), **more)


ROUTES = {
    ("GET", "/healthz"): needs(),
    ("GET", "/readyz"): needs(),
    ("HEAD", "/healthz"): needs(),
    ("HEAD", "/readyz"): needs(),
    ("GET", "/openapi.json"): needs(),
    ("GET", "/metrics"): needs("admin"),
    ("GET", "/v1/generators"): needs("generate", "datasets"),
    ("GET", "/v1/generators/{name}"): needs("generate", "datasets"),
    ("POST", "/v1/images"): needs("generate", body={}),
    ("POST", "/v1/datasets"): needs("datasets", body=ORDER, answer=202),
    ("GET", "/v1/datasets"): needs("datasets"),
    ("GET", "/v1/datasets/{id}"): needs("datasets", of_a_job=True),
    ("GET", "/v1/datasets/{id}/result"): needs("datasets", of_a_job=True),
    ("GET", "/v1/datasets/{id}/files/{path:path}"): needs("datasets", of_a_job=True),
    # The job has finished, so that its own tenant is told of a conflict.
    ("POST", "/v1/datasets/{id}/cancel"): needs("datasets", of_a_job=True, answer=409),
}
KEYED = {place: route for place, route in ROUTES.items() if route.scopes}
OF_A_JOB = {place: route for place, route in ROUTES.items() if route.of_a_job}


def by_name(routes: dict[tuple[str, str], Route]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", routes, ids=lambda place: " ".join(place))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("service")
    keys = {"keys": [RSAAlgorithm.to_jwk(OURS.public_key(), as_dict=True) | {"kid": "ours"}]}
    (folder / "jwks.json").write_text(json.dumps(keys))
    made = settings(publish_generator(str(folder / "generator")).uri, str(folder / "datasets"))
    oidc = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(folder / "jwks.json")}
    return Service.model_validate(made.model_dump() | {"access": made.access.model_dump() | {"oidc": oidc}})


@pytest.fixture(scope="module")
def ask(service: Service) -> Iterator[Asked]:
    asked = Asked(gateway(parts_of(service, blank)), holder=None)
    yield asked
    asked.close()


@pytest.fixture(scope="module")
def job(ask: Asked, service: Service) -> str:
    """A finished dataset of the tenant clinic-a."""
    placed = ask("POST", "/v1/datasets", json=ORDER, headers=bearer("lab"))
    finish(service, "clinic-a", placed.json()["id"], {FILE: b"PAR1"})
    return str(placed.json()["id"])


def sent(ask: Asked, place: tuple[str, str], job: str, authorization: str | None) -> Any:
    method, template = place
    path = template.replace("{id}", job).replace("{path:path}", FILE).replace("{name}", "tiny")
    headers = {} if authorization is None else {"Authorization": authorization}
    return ask(method, path, json=ROUTES[place].body, headers=headers)


def token(key: Any = OURS, algorithm: str = "RS256", kid: str | None = "ours", **changes: Any) -> str:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 600, "tenant": "clinic-a"}
    claims |= {"scope": "generate datasets admin"} | changes
    told = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(told, key, algorithm, headers={"kid": kid} if kid else None)


def unsigned(algorithm: str) -> str:
    good = token()
    head = json.dumps({"alg": algorithm, "typ": "JWT", "kid": "ours"}).encode()
    return f"{base64.urlsafe_b64encode(head).rstrip(b'=').decode()}.{good.split('.')[1]}."


def signed_by_the_public_key() -> str:
    """As if the issuer's public key were a shared secret."""
    pem = OURS.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    good = token().split(".")
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT","kid":"ours"}').rstrip(b"=").decode()
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
        f"{head}.{good[1]}".encode(), pem
    )
    return f"{head}.{good[1]}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


FORGED: dict[str, Callable[[], str | None]] = {
    "no key": lambda: None,
    "an empty header": lambda: "",
    "no scheme": lambda: KEYS["admin"],
    "another scheme": lambda: f"Basic {base64.b64encode(KEYS['admin'].encode()).decode()}",
    "an unknown key": lambda: f"Bearer {new_key('lab')}",
    "a key with one letter more": lambda: f"Bearer {KEYS['admin']}x",
    "a key with one letter less": lambda: f"Bearer {KEYS['admin'][:-1]}",
    "a hash instead of its key": lambda: f"Bearer {'0' * 64}",
    "an expired key": lambda: f"Bearer {KEYS['expired']}",
    "an expired token": lambda: f"Bearer {token(exp=int(time.time()) - 3600)}",
    "a token of another audience": lambda: f"Bearer {token(aud='another')}",
    "a token without an audience": lambda: f"Bearer {token(aud=None)}",
    "a token of another issuer": lambda: f"Bearer {token(iss='https://evil.example')}",
    "a token that never expires": lambda: f"Bearer {token(exp=None)}",
    "a token that is not valid yet": lambda: f"Bearer {token(nbf=int(time.time()) + 3600)}",
    "a stranger's token": lambda: f"Bearer {token(STRANGER)}",
    "alg none": lambda: f"Bearer {unsigned('none')}",
    "alg None": lambda: f"Bearer {unsigned('None')}",
    "a token whose signature is cut off": lambda: f"Bearer {token().rpartition('.')[0]}.",
    "a token signed by the public key": lambda: f"Bearer {signed_by_the_public_key()}",
    "two keys": lambda: f"Bearer {KEYS['admin']} {KEYS['admin']}",
    "a header of a megabyte": lambda: f"Bearer {'x' * (1 << 20)}",
    "letters beyond ASCII": lambda: "Bearer \xff\xfe",
}


def test_the_table_names_every_route_of_the_application(ask: Asked) -> None:
    found = {(method, r.path) for r in ask.app.routes if isinstance(r, APIRoute) for method in r.methods or ()}
    assert found == ROUTES.keys()
    # Nothing else is mounted beside them.
    assert all(isinstance(route, APIRoute) for route in ask.app.routes)


@by_name(ROUTES)
def test_who_may_is_let_in(ask: Asked, job: str, place: tuple[str, str]) -> None:
    holders = ("lab", "admin") if ROUTES[place].of_a_job or "admin" not in ROUTES[place].scopes else ("admin",)
    for holder in holders:
        assert sent(ask, place, job, bearer(holder)["Authorization"]).status_code == ROUTES[place].answer
    assert sent(ask, place, job, f"Bearer {token()}").status_code == ROUTES[place].answer


@pytest.mark.parametrize("forged", FORGED)
@by_name(KEYED)
def test_who_is_not_known_is_refused(ask: Asked, job: str, place: tuple[str, str], forged: str) -> None:
    authorization = FORGED[forged]()
    value: Any = authorization.encode("latin-1") if authorization else authorization
    answer = sent(ask, place, job, value)
    problem(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not any(key in answer.text for key in KEYS.values())


@by_name(KEYED)
def test_several_headers_of_which_one_is_good_are_refused(ask: Asked, job: str, place: tuple[str, str]) -> None:
    method, template = place
    path = template.replace("{id}", job).replace("{path:path}", FILE).replace("{name}", "tiny")
    headers = [("Authorization", f"Bearer {new_key('lab')}"), ("Authorization", bearer("admin")["Authorization"])]
    problem(ask(method, path, json=ROUTES[place].body, headers=headers), 400, "bad-request")


@pytest.mark.parametrize("holder, scope", [("viewer", "generate"), ("orderer", "datasets")])
@by_name(KEYED)
def test_who_lacks_the_scope_is_refused(ask: Asked, job: str, place: tuple[str, str], holder: str, scope: str) -> None:
    answer = sent(ask, place, job, bearer(holder)["Authorization"])
    if scope in ROUTES[place].scopes:
        assert answer.status_code == ROUTES[place].answer
    else:
        problem(answer, 403, "forbidden")


@pytest.mark.parametrize("scope", ["", "openid profile", "generatee", "GENERATE"])
@by_name(KEYED)
def test_a_token_without_our_scopes_is_refused(ask: Asked, job: str, place: tuple[str, str], scope: str) -> None:
    problem(sent(ask, place, job, f"Bearer {token(scope=scope)}"), 403, "forbidden")


@pytest.mark.parametrize("tenant", [None, "", "../clinic-a", "clinic-a/", "a" * 65, "clinic a", 7, ["clinic-a"]])
@by_name(KEYED)
def test_a_token_whose_tenant_is_no_name_is_refused(ask: Asked, job: str, place: tuple[str, str], tenant: Any) -> None:
    problem(sent(ask, place, job, f"Bearer {token(tenant=tenant)}"), 403, "forbidden")


@by_name(OF_A_JOB)
def test_another_tenants_job_is_as_if_it_were_not_there(ask: Asked, job: str, place: tuple[str, str]) -> None:
    missing = "0" * len(job)
    for authorization in (bearer("rival")["Authorization"], f"Bearer {token(tenant='clinic-b', scope='datasets')}"):
        theirs, none = sent(ask, place, job, authorization), sent(ask, place, missing, authorization)
        told, other = problem(theirs, 404, "not-found"), problem(none, 404, "not-found")
        assert told.detail.replace(job, "ID") == other.detail.replace(missing, "ID")
        # Not even what the dataset comes to may be learned.
        assert FILE not in theirs.text


def test_a_list_holds_the_tenants_own_jobs_and_an_admins_all(ask: Asked, job: str) -> None:
    def ids(holder: str) -> set[str]:
        told = ask("GET", "/v1/datasets?limit=200", headers=bearer(holder)).json()
        return {dataset["id"] for dataset in told["datasets"]}

    theirs = ask("POST", "/v1/datasets", json=ORDER, headers=bearer("rival")).json()["id"]
    assert job in ids("lab") & ids("admin")
    assert theirs in ids("rival") & ids("admin")
    assert not ids("lab") & ids("rival")


def test_an_idempotency_key_of_another_tenant_is_of_no_use(ask: Asked) -> None:
    headers = {"Idempotency-Key": "shared"}
    mine = ask("POST", "/v1/datasets", json=ORDER, headers=bearer("lab") | headers)
    theirs = ask("POST", "/v1/datasets", json=ORDER, headers=bearer("rival") | headers)
    assert (mine.status_code, theirs.status_code) == (202, 202)
    assert mine.json()["id"] != theirs.json()["id"]


TRAVERSALS = (
    "..", "../..", "../../clinic-b", "%2e%2e", "%2e%2e%2f%2e%2e%2fclinic-b", "..%2f..%2fclinic-b", "..%5c..%5cclinic-b",
    "%252e%252e%252f", "%2e", "%00", "{id}%00", "{id}%2f..%2f{id}", "/etc/passwd", "%2fetc%2fpasswd", "clinic-b%2f{id}",
    "~root", "{id}%0d%0aX-Evil:1", "%c0%ae%c0%ae%2f", "a" * 5000, "s3:%2f%2fbucket%2fkey", "..;", "{id}.json", "{ID}",
)  # fmt: skip


@pytest.mark.parametrize("holder", ["lab", "admin"])
@pytest.mark.parametrize("wrong", TRAVERSALS)
@by_name(OF_A_JOB | {("GET", "/v1/generators/{name}"): ROUTES["GET", "/v1/generators/{name}"]})
def test_no_name_leads_out_of_its_place(ask: Asked, job: str, place: tuple[str, str], wrong: str, holder: str) -> None:
    # Encoded dots: plain ones a client resolves by itself.
    method, template = place
    name = wrong.replace("{id}", job).replace("{ID}", job.upper() if job.upper() != job else f"{job}0")
    path = template.replace("{id}", name).replace("{path:path}", FILE).replace("{name}", name)
    answer = ask(method, path, headers=bearer(holder))
    assert answer.status_code in (404, 405), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "X-Evil" not in answer.headers


@pytest.mark.parametrize("holder", ["lab", "admin"])
@pytest.mark.parametrize(
    "wrong",
    [
        "../manifest.json", "images/../../plan.json", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/recipe.json",
        "images%2f..%2f..%2forder.json", "/etc/passwd", "%2fetc%2fpasswd", "images//shard.parquet", "", "%2e", "%00",
        "images/%00", f"{FILE}%00", f"%2e/{FILE}", "..%5c..%5cmanifest.json", "commits/shard-000000.json", "plan.json",
        "progress.json", f"{FILE}/", "a" * 5000, "\u202e",
    ],
)  # fmt: skip
def test_no_path_of_a_file_leads_out_of_its_dataset(ask: Asked, job: str, wrong: str, holder: str) -> None:
    answer = ask("GET", f"/v1/datasets/{job}/files/{wrong}", headers=bearer(holder))
    assert answer.status_code == 404, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_an_address_that_there_is_not_needs_a_key_too(ask: Asked) -> None:
    for path in ("/", "/docs", "/redoc", "/v1", "/v1/nothing", "/healthz/", "//healthz", "/healthz/../v1/images"):
        problem(ask("GET", path), 401, "unauthenticated")
