"""A signed bundle of files: who made it, and whether a byte of it changed. Needs neither torch, Ray nor an account.

SHA256SUMS       a line a file, as `sha256sum --check` reads them; of all files but itself and the signature
signature.json   the SHA-256 of SHA256SUMS, signed by Ed25519 (RFC 8032), and the public key
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from scanloom.artefact import FileEntry, Problem
from scanloom.errors import ArtefactError, RecipeError
from scanloom.store import Store

SUMS, SIGNATURE = "SHA256SUMS", "signature.json"
_ALGORITHM = "Ed25519"
_PURPOSE = b"scanloom release bundle, SHA-256 of SHA256SUMS: "


class Signer(Protocol):
    """Signs with a key that it need not show: one from a file, or a key service's."""

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""
        ...

    def sign(self, message: bytes, /) -> bytes:
        """The Ed25519 signature of a message, 64 bytes."""
        ...


@dataclass(frozen=True)
class KeyFile:
    """A signer whose key was read from a file."""

    key: Ed25519PrivateKey

    @classmethod
    def read(cls, pem: bytes, where: str) -> KeyFile:
        """The key of an unencrypted PKCS #8 PEM file, as `openssl genpkey -algorithm ed25519` makes it.

        RecipeError for anything else.
        """
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise RecipeError(f"key {where}: is no unencrypted PEM key; make one: {_MAKE}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise RecipeError(f"key {where}: is of another algorithm than Ed25519; make one: {_MAKE}")
        return cls(key)

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def sign(self, message: bytes, /) -> bytes:
        return self.key.sign(message)


@dataclass(frozen=True)
class Command:
    """A signer that asks a program: whatever a key service, a token or an offline machine is reached by.

    The message is the program's standard input; its standard output is the signature, raw or in hex or base64.
    """

    command: str
    """Split as a shell would; no shell runs it."""
    public_key: bytes

    def sign(self, message: bytes, /) -> bytes:
        """The signature, checked against the public key. ArtefactError in one line where there is none."""
        where = f"signing by {self.command!r}"
        try:
            done = subprocess.run(
                shlex.split(self.command), input=message, capture_output=True, timeout=_SIGNING_S, check=False
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise ArtefactError(f"{where}: could not be run ({error}); run it by hand") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise ArtefactError(f"{where}: ended with exit code {done.returncode}: {said[0][:200]}; run it by hand")
        for signature in _spellings(done.stdout):
            with suppress(InvalidSignature):
                Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message)
                return signature
        raise ArtefactError(
            f"{where}: gave {len(done.stdout)} bytes that are no Ed25519 signature by the public key "
            f"{fingerprint(self.public_key)[:16]}; check that both are of one key"
        )


def _spellings(output: bytes) -> Iterator[bytes]:
    """What a program may mean: 64 bytes as they are, or the last word of a line in hex or base64 (`vault:v1:...`)."""
    yield output
    word = output.strip().rsplit(b":", 1)[-1]
    for decode in (bytes.fromhex, lambda text: base64.b64decode(text, validate=True)):
        with suppress(ValueError):
            yield decode(word.decode())


_SIGNING_S = 120.0
_MAKE = "openssl genpkey -algorithm ed25519 -out release-key.pem"


def read_public_key(pem: bytes, where: str) -> bytes:
    """The raw Ed25519 public key in a PEM file. RecipeError for anything else."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RecipeError(
            f"public key {where}: is no PEM public key; `openssl pkey -in KEY -pubout` gives it"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise RecipeError(f"public key {where}: is of another algorithm than Ed25519")
    return key.public_bytes_raw()


def public_key_at(file: Path) -> bytes:
    """The raw Ed25519 public key in a PEM file. RecipeError where it cannot be read."""
    return read_public_key(_bytes_of(file, "public key"), str(file))


def signer_of(key: Path | None, command: str | None, public_key: Path | None) -> Signer:
    """Who signs, by the options of a person: a key file, or a command and the key that it signs with.

    RecipeError for anything else.
    """
    if key is not None and command is None:
        return KeyFile.read(_bytes_of(key, "key"), str(key))
    if key is None and command is not None and public_key is not None:
        return Command(command, public_key_at(public_key))
    raise RecipeError("nobody signs; give --key FILE, or --sign-with COMMAND together with --public-key FILE")


def _bytes_of(file: Path, what: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{what} {file}: cannot be read ({error.strerror}); check the path") from error


def fingerprint(public_key: bytes) -> str:
    """What people compare: the SHA-256 of the raw key in hex."""
    return hashlib.sha256(public_key).hexdigest()


def seal(store: Store, files: Iterable[FileEntry], signer: Signer) -> None:
    """Write SHA256SUMS of these files and its signature, which makes the folder a bundle."""
    listed = sorted(files, key=lambda file: file.path)
    if bad := next((file.path for file in listed if "\n" in file.path or "\\" in file.path), None):
        raise ArtefactError(f"{store.uri}: the file name {bad!r} cannot be listed in {SUMS}; rename it")
    sums = "".join(f"{file.sha256}  {file.path}\n" for file in listed).encode()
    store.write(SUMS, sums)
    digest = hashlib.sha256(sums).hexdigest()
    store.write(SIGNATURE, _spelled(digest, signer.public_key, signer.sign(_PURPOSE + digest.encode())))


@dataclass(frozen=True)
class Checked:
    """What checking a bundle found."""

    problems: tuple[Problem, ...]
    """Empty: every byte is as it was signed."""
    signed_by: str
    """Fingerprint of the key; empty where the signature is no good."""
    key: Literal["given", "its own"]
    """Whether the key was the receiver's, or the one that the bundle brings: then anybody may have made it."""
    files: int


def check(store: Store, public_key: bytes | None = None, examined: Callable[[], object] = lambda: None) -> Checked:
    """Whether a bundle is whole and signed, by `public_key` where one is given; `examined` after each file.

    Raises ArtefactError where there is no bundle.
    """
    present = {found.key for found in store.list()}
    if not {SUMS, SIGNATURE} & present:
        raise ArtefactError(f"{store.uri}: is no release bundle ({SUMS} and {SIGNATURE} are missing); check the path")
    for needed in (SUMS, SIGNATURE):
        if needed not in present:
            return Checked(
                (Problem(needed, "missing", "so that nothing in the bundle can be trusted"),), "", "its own", 0
            )
    sums, signature = store.read(SUMS), store.read(SIGNATURE)
    key: Literal["given", "its own"] = "its own" if public_key is None else "given"
    told = _signature(signature)
    if told is None:
        return Checked((Problem(SIGNATURE, "changed", "is no valid signature"),), "", key, 0)
    digest, signer = told
    if public_key is not None and signer != public_key:
        detail = f"signed by the key {fingerprint(signer)[:16]}, expected {fingerprint(public_key)[:16]}"
        return Checked((Problem(SIGNATURE, "changed", detail),), "", key, 0)
    listed = _listed(sums)
    if hashlib.sha256(sums).hexdigest() != digest or listed is None:
        return Checked((Problem(SUMS, "changed", "is not the list that was signed"),), "", key, 0)
    problems = []
    for path, sha256 in listed.items():
        if path not in present:
            problems.append(Problem(path, "missing", f"in {SUMS}, not in the bundle"))
        elif (found := store.digest(path).sha256) != sha256:
            problems.append(Problem(path, "changed", f"SHA-256 {found[:12]}, {SUMS} says {sha256[:12]}"))
        examined()
    added = sorted(present - set(listed) - {SUMS, SIGNATURE})
    problems += [Problem(path, "extra", "was not signed") for path in added]
    return Checked(tuple(problems), fingerprint(signer), key, len(listed))


def _spelled(digest: str, public_key: bytes, signature: bytes) -> bytes:
    content = {
        "algorithm": _ALGORITHM, "public_key": public_key.hex(), "sums_sha256": digest, "signature": signature.hex(),
    }  # fmt: skip
    return json.dumps(content, indent=1).encode() + b"\n"


def _signature(data: bytes) -> tuple[str, bytes] | None:
    """The signed digest and the key, or None where the file is no signature, spelled as `seal` spells it."""
    try:
        told: Any = json.loads(data)
        key, signature = bytes.fromhex(told["public_key"]), bytes.fromhex(told["signature"])
        digest: str = told["sums_sha256"]
        if _spelled(digest, key, signature) != data:
            return None
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _PURPOSE + digest.encode())
    except (ValueError, TypeError, KeyError, InvalidSignature):
        return None
    return digest, key


def _listed(sums: bytes) -> dict[str, str] | None:
    try:
        lines = sums.decode().splitlines()
    except UnicodeDecodeError:
        return None
    parts = [line.partition("  ") for line in lines]
    return {path: digest for digest, _, path in parts}
