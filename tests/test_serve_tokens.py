"""Who is let in by a signed token: those of every kind that must be refused, and that the right ones are taken."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from scanloom.errors import RecipeError, ScanloomError
from serve.access import Caller, Forbidden, Gatekeeper, IssuerUnreachable, Unauthenticated
from serve.config import Access, Oidc
from serve.issuer_keys import AGAIN_S, FRESH_S, STALE_S
from tests.gatekeeping import KEY, Clock, admit, api_key

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
STRANGER = rsa.generate_private_key(65537, 2048)
SHORT = rsa.generate_private_key(65537, 1024)
PUBLIC_PEM = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
ISSUER, AUDIENCE = "https://login.example", "scanloom"


def public(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, kid: str, **more: Any) -> dict[str, Any]:
    algorithm: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    made: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    return made | {"kid": kid} | more


JWKS = {"keys": [public(RSA_KEY, "r1"), public(EC_KEY, "e1", use="sig", alg="ES256"), public(SHORT, "short")]}


class Issuer:
    """An issuer's web server; `answer` is what it sends, an int a bare status."""

    def __init__(self) -> None:
        self.answer: bytes | int = json.dumps(JWKS).encode()
        self.asked = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                body = issuer.answer if isinstance(issuer.answer, bytes) else b""
                self.send_response(200 if isinstance(issuer.answer, bytes) else issuer.answer)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/jwks"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    found = Issuer()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture
def jwks_file(tmp_path: Path) -> Path:
    place = tmp_path / "jwks.json"
    place.write_text(json.dumps(JWKS))
    return place


def oidc(jwks: object, **settings: Any) -> Access:
    return Access(oidc=Oidc(issuer=ISSUER, audience=AUDIENCE, jwks=str(jwks), **settings))


def claims(**changes: Any) -> dict[str, Any]:
    """Of a good token; a change to None leaves a claim out."""
    now = int(time.time())
    found = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 86_400, "iat": now, "tenant": "clinic-a"}
    merged = found | {"scope": "openid generate"} | changes
    return {name: value for name, value in merged.items() if value is not None}


def token(key: Any = RSA_KEY, algorithm: str = "RS256", kid: str | None = "r1", **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": kid} if kid else None)


def by_hand(header: Mapping[str, Any], payload: Mapping[str, Any], secret: bytes | None = None) -> str:
    """A token that no library would make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, payload)]
    signature = hmac.digest(secret, b".".join(parts), hashlib.sha256) if secret else b""
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


# --- signed tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        lambda: token(),
        lambda: token(EC_KEY, "ES256", "e1"),
        lambda: token(RSA_KEY, "PS256"),
        lambda: token(aud=["other", AUDIENCE]),
        lambda: token(exp=int(time.time()) - 10),  # within the leeway
        lambda: token(nbf=int(time.time()) + 10),
    ],
)
def test_a_good_token_is_taken(jwks_file: Path, sent: Callable[[], str]) -> None:
    keeper = Gatekeeper(oidc(jwks_file, algorithms=("RS256", "ES256", "PS256")))
    assert admit(keeper, sent()) == Caller("clinic-a", "ann", frozenset({"generate"}))


@pytest.mark.parametrize(
    "claim, scopes",
    [
        ("generate datasets", {"generate", "datasets"}),
        (["generate", "admin", "mail"], {"generate", "admin"}),
        ("openid profile", set()),
        (["generate", 7, None], {"generate"}),
        ("", set()),
        (None, set()),
        (7, set()),
        ({"generate": True}, set()),
        ("GENERATE", set()),
        ("generate,admin", set()),
    ],
)
def test_scopes_are_words_or_a_list_and_others_mean_nothing(jwks_file: Path, claim: object, scopes: set[str]) -> None:
    assert admit(Gatekeeper(oidc(jwks_file)), token(scope=claim)).scopes == scopes


@pytest.mark.parametrize(
    "tenant", [None, "", ".", "..", "../x", "a/b", "a\\b", "a b", "a\n", "-a", "x" * 65, 7, ["a"], "tenänt", "a\x00"]
)
def test_a_tenant_that_is_no_name_is_refused_since_it_becomes_a_folder(jwks_file: Path, tenant: object) -> None:
    with pytest.raises(Forbidden, match="'tenant'"):
        admit(Gatekeeper(oidc(jwks_file)), token(tenant=tenant))


def test_the_claims_of_tenant_and_scope_are_the_settings(jwks_file: Path) -> None:
    keeper = Gatekeeper(oidc(jwks_file, tenant_claim="https://x/org", scope_claim="roles"))
    named: dict[str, Any] = {"https://x/org": "clinic-z", "roles": ["datasets"]}
    sent = token(**named)
    assert admit(keeper, sent) == Caller("clinic-z", "ann", frozenset({"datasets"}))


def _now(offset: int) -> int:
    return int(time.time()) + offset


GOOD = token()
BAD_TOKENS: Mapping[str, Callable[[], str]] = {
    "expired": lambda: token(exp=_now(-31)),
    "without an end": lambda: token(exp=None),
    "not valid yet": lambda: token(nbf=_now(60)),
    "issued in the future": lambda: token(iat=_now(60)),
    "for another audience": lambda: token(aud="other"),
    "for others": lambda: token(aud=["other", "another"]),
    "for no audience": lambda: token(aud=None),
    "for an audience that begins alike": lambda: token(aud=AUDIENCE + "x"),
    "of another issuer": lambda: token(iss="https://evil.example"),
    "of an issuer with a slash more": lambda: token(iss=ISSUER + "/"),
    "of no issuer": lambda: by_hand({"alg": "none", "kid": "r1"}, claims()),
    "without a subject": lambda: token(sub=None),
    "with an empty subject": lambda: token(sub=""),
    "with a subject of two lines": lambda: token(sub="ann\nroot"),
    "with a long subject": lambda: token(sub="a" * 256),
    "signed by a stranger": lambda: token(STRANGER),
    "signed by a stranger under an unknown id": lambda: token(STRANGER, kid="s1"),
    "signed by the other key": lambda: token(EC_KEY, "ES256", "r1"),
    "signed by a short key": lambda: token(SHORT, kid="short"),
    "without a key id": lambda: token(kid=None),
    "unsigned": lambda: by_hand({"alg": "none", "kid": "r1"}, claims()),
    "unsigned, written otherwise": lambda: by_hand({"alg": "nOnE", "kid": "r1"}, claims()),
    "signed with the public key as a secret": lambda: by_hand({"alg": "HS256", "kid": "r1"}, claims(), PUBLIC_PEM),
    "of an algorithm that is not taken": lambda: token(algorithm="RS512"),
    "of an algorithm that is no text": lambda: by_hand({"alg": ["RS256"], "kid": "r1"}, claims()),
    "with a key id that is no text": lambda: by_hand({"alg": "RS256", "kid": {"a": 1}}, claims()),
    "that brings its key": lambda: jwt.encode(
        claims(), STRANGER, "RS256", headers={"kid": "r1", "jwk": public(STRANGER, "r1")}
    ),
    "that names its key's place": lambda: jwt.encode(
        claims(), STRANGER, "RS256", headers={"kid": "s1", "jku": "http://127.0.0.1:1/"}
    ),
    "with a critical extension": lambda: jwt.encode(claims(), RSA_KEY, "RS256", headers={"kid": "r1", "crit": ["x"]}),
    "with its claims changed": lambda: ".".join(
        [GOOD.split(".")[0], token(tenant="clinic-z").split(".")[1], GOOD.split(".")[2]]
    ),
    "with its signature cut": lambda: GOOD[:-10],
    "without its signature": lambda: GOOD.rpartition(".")[0] + ".",
    "of empty parts": lambda: "..",
    "that is no JSON": lambda: "bm8.bm8.bm8",
    "with claims that are a list": lambda: by_hand({"alg": "RS256", "kid": "r1"}, [1]),  # type: ignore[arg-type]
    "with an end that is no number": lambda: token(exp="soon"),
    "with an end beyond numbers": lambda: by_hand({"alg": "RS256", "kid": "r1"}, claims(exp=float("inf"))),
    "nested without end": lambda: f"{base64.urlsafe_b64encode(b'[' * 9000).decode().rstrip('=')}.e30.e30",
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_a_bad_token_is_refused_and_nothing_of_it_repeated(
    jwks_file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    sent = BAD_TOKENS[kind]()
    with caplog.at_level(logging.DEBUG), pytest.raises(Unauthenticated) as refused:
        admit(Gatekeeper(oidc(jwks_file)), sent)
    for part in [sent, *sent.split(".")]:
        assert len(part) < 5 or part not in str(refused.value) + caplog.text
    for value in ("ann", "clinic-a", "evil.example"):
        assert value not in str(refused.value)


@pytest.mark.parametrize("algorithm", ["HS256", "none", "RS257", "ES256K"])
def test_algorithms_of_shared_secrets_cannot_be_set(jwks_file: Path, algorithm: str) -> None:
    with pytest.raises(RecipeError, match=f"{algorithm}.*no algorithm of public keys"):
        Gatekeeper(oidc(jwks_file, algorithms=("RS256", algorithm)))


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "oct", "k": base64.urlsafe_b64encode(b"s" * 32).decode(), "kid": "r1"},
        RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True) | {"kid": "r1", "key_ops": ["verify"]},
        public(RSA_KEY, "r1", use="enc"),
        public(RSA_KEY, "r1", key_ops=["encrypt"]),
        public(RSA_KEY, "r1", alg="RS512"),
        public(RSA_KEY, "r1", kty="EC"),
        public(RSA_KEY, "r1", n="!"),
        public(RSA_KEY, "r2"),
    ],
)
def test_a_listed_key_that_is_not_for_this_is_not_used(tmp_path: Path, key: Mapping[str, Any]) -> None:
    place = tmp_path / "jwks.json"
    place.write_text(json.dumps({"keys": [key, public(EC_KEY, "e1")]}))
    with pytest.raises(Unauthenticated):
        admit(Gatekeeper(oidc(place)), token())
    forged = by_hand({"alg": "HS256", "kid": "r1"}, claims(), b"s" * 32)
    with pytest.raises(Unauthenticated):
        admit(Gatekeeper(oidc(place)), forged)


def test_a_token_without_a_key_id_is_of_an_issuers_only_key(tmp_path: Path) -> None:
    place = tmp_path / "jwks.json"
    place.write_text(json.dumps({"keys": [public(RSA_KEY, "r1")]}))
    assert admit(Gatekeeper(oidc(place)), token(kid=None)).who == "ann"


@pytest.mark.parametrize(
    "place", ["http://login.example/jwks", "ftp://login.example/jwks", "/nowhere/jwks.json", "http://127.0.0.1.evil/"]
)
def test_keys_come_by_https_or_from_a_file(place: str) -> None:
    with pytest.raises(RecipeError, match="jwks"):
        Gatekeeper(oidc(place))


# --- the issuer's keys over the network -----------------------------------------------------------------------


def sign_in(keeper: Gatekeeper, clock: Clock, steps: list[tuple[float, str, type[ScanloomError] | None]]) -> None:
    """In one event loop: at each time, the token is taken (None) or refused by this error."""

    async def run() -> None:
        for at, sent, error in steps:
            clock.now = at
            if error is None:
                assert (await keeper.admit(f"Bearer {sent}")).tenant == "clinic-a"
            else:
                with pytest.raises(error):
                    await keeper.admit(f"Bearer {sent}")

    asyncio.run(run())


def test_keys_are_fetched_once_and_again_when_they_are_old(issuer: Issuer) -> None:
    clock = Clock()
    keeper = Gatekeeper(oidc(issuer.url), clock)
    sign_in(keeper, clock, [(1000.0, GOOD, None), (1000.0 + FRESH_S, GOOD, None)])
    assert issuer.asked == 1
    sign_in(keeper, clock, [(1001.0 + FRESH_S, GOOD, None)])
    assert issuer.asked == 2


def test_a_new_key_is_found_at_once_and_made_up_ids_make_no_load(issuer: Issuer) -> None:
    clock = Clock()
    keeper = Gatekeeper(oidc(issuer.url), clock)
    fresh = token(STRANGER, kid="new")
    sign_in(keeper, clock, [(1000.0, GOOD, None), (1000.0, fresh, Unauthenticated)])
    assert issuer.asked == 1
    issuer.answer = json.dumps({"keys": [public(STRANGER, "new")]}).encode()
    made_up = [(1000.0 + AGAIN_S, token(STRANGER, kid=f"x{n}"), Unauthenticated) for n in range(50)]
    sign_in(keeper, clock, [(1000.0 + AGAIN_S, fresh, None), *made_up])
    assert issuer.asked == 2
    # The issuer does not list the former key any more.
    sign_in(keeper, clock, [(1000.0 + AGAIN_S, GOOD, Unauthenticated)])


@pytest.mark.parametrize(
    "answer",
    [500, 404, 302, b"", b"<html>", b"[]", b'{"keys": {}}', b'{"keys": []}', b'{"keys": [7]}', b" " * (2 << 20)],
)
def test_an_issuer_that_does_not_answer_well_is_no_fault_of_the_caller(issuer: Issuer, answer: bytes | int) -> None:
    clock = Clock()
    keeper = Gatekeeper(oidc(issuer.url), clock)
    good, issuer.answer = issuer.answer, answer
    sign_in(keeper, clock, [(1000.0, GOOD, IssuerUnreachable), (1001.0, GOOD, IssuerUnreachable)])
    assert issuer.asked == 1
    clock.now = 1002.0
    with pytest.raises(IssuerUnreachable) as refused:
        admit(keeper, GOOD)
    assert refused.value.retry_after_s == pytest.approx(AGAIN_S - 2)
    issuer.answer = good
    sign_in(keeper, clock, [(1002.0 + refused.value.retry_after_s, GOOD, None)])


def test_during_an_outage_known_keys_are_used_on_for_an_hour_and_no_longer(issuer: Issuer) -> None:
    clock = Clock()
    keeper = Gatekeeper(oidc(issuer.url), clock)
    sign_in(keeper, clock, [(1000.0, GOOD, None)])
    issuer.answer = 503
    stranger = token(STRANGER, kid="new")
    sign_in(
        keeper,
        clock,
        [
            (2000.0, GOOD, None),
            (2000.0, stranger, IssuerUnreachable),  # it may be a key that we could not fetch
            (1000.0 + STALE_S, GOOD, None),
            (1001.0 + STALE_S, GOOD, IssuerUnreachable),
        ],
    )
    issuer.answer = json.dumps(JWKS).encode()
    sign_in(keeper, clock, [(1001.0 + STALE_S + AGAIN_S, GOOD, None)])


def test_an_unreachable_issuer_is_retryable_and_api_keys_work_on() -> None:
    access = oidc("http://127.0.0.1:9/jwks").model_copy(update={"keys": (api_key(),)})
    keeper = Gatekeeper(access)
    with pytest.raises(IssuerUnreachable) as refused:
        admit(keeper, GOOD)
    assert 0 < refused.value.retry_after_s <= AGAIN_S
    assert admit(keeper, KEY).who == "lab"


def test_a_caller_that_goes_away_does_not_stop_the_reading_for_others(issuer: Issuer) -> None:
    async def run() -> None:
        keeper = Gatekeeper(oidc(issuer.url), Clock())
        gone = asyncio.create_task(keeper.admit(f"Bearer {GOOD}"))
        await asyncio.sleep(0)
        gone.cancel()
        assert (await keeper.admit(f"Bearer {GOOD}")).who == "ann"
        assert gone.cancelled()

    asyncio.run(run())
    assert issuer.asked == 1
