"""What may leave leaves signed and whole; what may not is refused with gate, value and limit; every byte counts."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydicom import dcmread
from typer.testing import CliRunner

from scanloom.artefact import MANIFEST, Artefact, FileEntry, Manifest, open_artefact, publish, verify
from scanloom.audit.bundle import SIGNATURE, SUMS, Command, KeyFile, check, fingerprint, read_public_key, seal
from scanloom.audit.policy import read_policy
from scanloom.audit.release import CARD, ORIGINAL, STATEMENT, TERMS, Request, release
from scanloom.audit.report import PRIVATE, REPORT, read_report
from scanloom.cli import app
from scanloom.errors import ArtefactError, RecipeError, ReleaseRefused
from scanloom.store import Store, sha256_of
from tests.released import POLICY, Chain, audit, copies, corpus, dataset, report

KEY = KeyFile(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PEM = KEY.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PUBLIC_PEM = KEY.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain.made(tmp_path)


def released(
    chain: Chain, policy: str = POLICY, *, of: Artefact | None = None, audited: Artefact | str | None = None
) -> Artefact:
    where = audited or chain.audit
    text = policy.encode()
    request = Request(
        of or chain.dataset, where if isinstance(where, str) else where.uri, read_policy(text, "p.yaml"), text,
        Store(str(chain.folder / "bundle")),
    )  # fmt: skip
    return release(request, KEY)


def rewritten(artefact: Artefact, path: str, data: bytes) -> Artefact:
    """The artefact with another file, and a manifest that says so."""
    artefact.store.write(path, data)
    entry = FileEntry.of(artefact.store.digest(path))
    files = tuple(entry if file.path == path else file for file in artefact.manifest.files)
    manifest = artefact.manifest.model_copy(update={"files": files})
    artefact.store.write(MANIFEST, manifest.model_dump_json(indent=1).encode())
    return open_artefact(artefact.uri)


# --- what leaves ----------------------------------------------------------------------------------------------


def test_a_bundle_holds_the_dataset_the_audit_and_who_signed_it(chain: Chain) -> None:
    made = released(chain)
    assert (made.manifest.kind, list(verify(made))[:0]) == ("release", [])
    inside = open_artefact(f"{made.uri}/dataset", "dataset")
    assert list(verify(inside)) == []
    original = next(entry for entry in inside.manifest.inputs if entry.role == ORIGINAL)
    assert original.digest == chain.dataset.digest
    assert read_report(made.store.read(f"audit/{REPORT}"), "r").subject.dataset == chain.dataset.digest
    found = check(made.store, KEY.public_key)
    assert (found.problems, found.signed_by, found.key) == ((), fingerprint(KEY.public_key), "given")
    assert check(made.store).key == "its own"
    card = made.store.read(CARD).decode()
    assert card.startswith("---\npretty_name: d\n")
    assert "No image of those looked at lies above the threshold" in card
    assert "100.0% of each kind were found" in card
    assert "| phantoms | CC0-1.0 | research, commercial |" in made.store.read(TERMS).decode()
    statement = made.store.read(STATEMENT).decode()
    assert '"passed": true' in statement
    assert '"passed": false' not in statement


def test_nothing_that_shows_a_training_scan_leaves(chain: Chain) -> None:
    made = released(chain)
    assert chain.audit.store.exists(f"{PRIVATE}/pairs.png")
    assert [found.key for found in made.store.list() if PRIVATE in found.key] == []


def test_nothing_else_leaves_with_it(chain: Chain) -> None:
    target = Store(str(chain.folder / "bundle"))
    target.write("private/scan.png", b"a real scan")
    with pytest.raises(ArtefactError, match=r"private/scan.png: is none of this release's files"):
        released(chain)
    assert not target.exists(SIGNATURE)
    target.delete(["private/scan.png"])
    assert check(released(chain).store).problems == ()


def test_no_place_of_the_site_is_named(chain: Chain) -> None:
    made = released(chain)
    told = [found.key for found in made.store.list() if str(chain.folder).encode() in made.store.read(found.key)]
    assert told == []
    assert open_artefact(f"{made.uri}/audit").digest == chain.audit.digest


def test_what_was_refused_while_images_were_made_stays(chain: Chain) -> None:
    images = chain.dataset
    images.store.write("rejects/shard-000000-0123456789ab.parquet", b"how alike each was to a training scan")
    entry = FileEntry.of(images.store.digest("rejects/shard-000000-0123456789ab.parquet"))
    told = images.manifest.model_copy(update={"files": (*images.manifest.files, entry)})
    images.store.write(MANIFEST, told.model_dump_json(indent=1).encode())
    images = open_artefact(images.uri, "dataset")
    made = released(chain, of=images, audited=audit(str(chain.folder / "again"), images, chain.corpus))
    assert [found.key for found in made.store.list() if "rejects" in found.key] == []
    assert list(verify(open_artefact(f"{made.uri}/dataset"))) == []


def test_the_list_is_one_that_sha256sum_reads(chain: Chain) -> None:
    made = released(chain)
    done = subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=made.uri, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_bundle_is_not_written_over(chain: Chain) -> None:
    released(chain)
    with pytest.raises(ArtefactError, match="holds a bundle already"):
        released(chain)


# --- what does not --------------------------------------------------------------------------------------------


def test_a_changed_file_of_the_dataset_is_refused(chain: Chain) -> None:
    path = next(file.path for file in chain.dataset.manifest.files if file.path.startswith("images/"))
    place = Path(chain.dataset.uri) / path
    data = bytearray(place.read_bytes())
    data[40] ^= 1
    place.write_bytes(data)
    with pytest.raises(ReleaseRefused, match=rf"{path}: checksum: changed \(SHA-256 .*\), the limit is none"):
        released(chain)


def test_a_file_that_is_not_marked_as_synthetic_is_refused(chain: Chain) -> None:
    path = next(file.path for file in chain.dataset.manifest.files if file.path.endswith(".tar"))
    old, new = io.BytesIO(chain.dataset.store.read(path)), io.BytesIO()
    with tarfile.open(fileobj=old) as source, tarfile.open(fileobj=new, mode="w") as target:
        for number, member in enumerate(source):
            opened = source.extractfile(member)
            assert opened is not None
            data = opened.read()
            if number == 1:
                file = dcmread(io.BytesIO(data))
                del file.SyntheticData
                edited = io.BytesIO()
                file.save_as(edited)
                data = edited.getvalue()
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    images = rewritten(chain.dataset, path, new.getvalue())
    again = audit(str(chain.folder / "again"), images, chain.corpus)
    with pytest.raises(ReleaseRefused, match=r"synthetic marker: .*Synthetic Data \(0008,001C\) is ''.*limit is none"):
        released(chain, of=images, audited=again)


def test_a_dataset_without_an_audit_is_refused(chain: Chain) -> None:
    with pytest.raises(ReleaseRefused, match=r"audit: there is none at .*nowhere.*scanloom audit"):
        released(chain, audited=str(chain.folder / "nowhere"))


def test_an_edited_report_is_refused(chain: Chain) -> None:
    text = chain.audit.store.read(REPORT).replace(b'"synthetic_copies":0', b'"synthetic_copies":1')
    chain.audit.store.write(REPORT, text)
    with pytest.raises(ReleaseRefused, match=rf"{REPORT}: audit: changed since it was made"):
        released(chain)


def test_the_audit_of_another_dataset_is_refused(chain: Chain) -> None:
    other = dataset(str(chain.folder / "other"), chain.generator, images=5)
    theirs = audit(str(chain.folder / "theirs"), other, chain.corpus)
    wanted = chain.dataset.digest[:12]
    with pytest.raises(
        ReleaseRefused, match=rf"audit of another dataset: .*{other.digest[:12]}, the limit is {wanted}"
    ):
        released(chain, audited=theirs)
    # Nor one whose manifest alone was made to fit.
    mixed = audit(str(chain.folder / "mixed"), chain.dataset, chain.corpus, report(other, chain.corpus))
    with pytest.raises(ReleaseRefused, match="audit of another dataset: its report says"):
        released(chain, audited=mixed)


def test_an_audit_against_another_corpus_is_refused(chain: Chain) -> None:
    other = corpus(str(chain.folder / "others"), b"other scans")
    theirs = audit(str(chain.folder / "theirs"), chain.dataset, other)
    with pytest.raises(ReleaseRefused, match=f"audit of another corpus: {other.digest[:12]}, the limit is"):
        released(chain, audited=theirs)


def test_an_audit_of_a_part_of_what_the_generator_learned_from_is_refused(chain: Chain) -> None:
    store = Store(str(chain.folder / "continued"))
    earlier = "a" * 64
    of = publish(
        store, kind="generator", name="tiny", recipe={}, inputs=[chain.corpus], files=chain.generator.manifest.files,
        statistics={"corpora": [chain.corpus.digest, earlier]},
    )  # fmt: skip
    images = dataset(str(chain.folder / "theirs"), of)
    theirs = audit(str(chain.folder / "their-audit"), images, chain.corpus)
    with pytest.raises(ReleaseRefused, match=f"audit of another corpus: .* learned from: .*{earlier[:12]}"):
        released(chain, of=images, audited=theirs)


def test_a_lineage_that_cannot_be_followed_is_refused(chain: Chain) -> None:
    (Path(chain.generator.uri) / MANIFEST).unlink()
    with pytest.raises(ReleaseRefused, match="lineage: its generator cannot be looked at"):
        released(chain)


@pytest.mark.parametrize(
    "policy, reason",
    [
        (POLICY.replace("research\nlicences", "commercial\nlicences").replace("research, commercial", "research"),
         "licence of phantoms: CC0-1.0 allows research, the policy's limit is commercial"),
        (POLICY.replace("phantoms", "others"), "licence of phantoms: none stated, the policy's limit is research"),
        (POLICY + "fidelity: {least_recall: 0.3}\n", "fidelity: not measured, the policy's limit is measured"),
        (POLICY + "least_images: 11\n", "dataset.images: 10, the policy's limit is 11"),
    ],
)  # fmt: skip
def test_what_the_policy_does_not_allow_is_refused(chain: Chain, policy: str, reason: str) -> None:
    with pytest.raises(ReleaseRefused, match=reason):
        released(chain, policy)
    assert not (chain.folder / "bundle" / SIGNATURE).exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"synthetic_rate": {"value": 0.3, "low": 0.2, "high": 0.4}, "excess": True, "synthetic_copies": 3},
         r"copies.rate \(upper end\): 0.4, the policy's limit is 0.01; copies.more than among held-out patients: yes"),
        ({"promised": 0.25}, "copies.promised false positives: 0.25, the policy's limit is 0.05"),
        ({"power": []}, "copies.recall of planted copies: 0, the policy's limit is 0.95"),
    ],
)  # fmt: skip
def test_a_memorising_generator_and_an_audit_without_power_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    chain = Chain.made(tmp_path, partial(report, copies=copies(**changes)))
    with pytest.raises(ReleaseRefused, match=reason):
        released(chain)


# --- what the receiver checks ---------------------------------------------------------------------------------


def test_one_flipped_bit_anywhere_is_named(chain: Chain) -> None:
    made = released(chain)
    for place in sorted(Path(made.uri).rglob("*")):
        if not place.is_file():
            continue
        name, whole = place.relative_to(made.uri).as_posix(), place.read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 1}:
            place.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert [(p.path, p.fault) for p in check(made.store).problems] == [(name, "changed")]
        place.write_bytes(whole)
    assert check(made.store).problems == ()


def test_every_bit_of_the_signature_matters(chain: Chain) -> None:
    made = released(chain)
    whole = made.store.read(SIGNATURE)
    for position in range(len(whole)):
        made.store.write(SIGNATURE, whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert [p.path for p in check(made.store).problems] == [SIGNATURE]


def test_missing_and_added_files_are_named(chain: Chain) -> None:
    made = released(chain)
    (Path(made.uri) / TERMS).unlink()
    made.store.write("dataset/images/extra.parquet", b"more")
    found = [(p.path, p.fault) for p in check(made.store).problems]
    assert found == [(TERMS, "missing"), ("dataset/images/extra.parquet", "extra")]
    (Path(made.uri) / SUMS).unlink()
    assert [(p.path, p.fault) for p in check(made.store).problems] == [(SUMS, "missing")]


def test_a_bundle_that_another_signed_is_found_by_the_receivers_key(chain: Chain) -> None:
    made = released(chain)
    forger = KeyFile(Ed25519PrivateKey.generate())
    made.store.write(TERMS, b"do what you like")
    files = [FileEntry.of(made.store.digest(f.key)) for f in made.store.list() if f.key not in (SUMS, SIGNATURE)]
    seal(made.store, files, forger)
    assert check(made.store).problems == ()
    found = check(made.store, KEY.public_key)
    assert [p.path for p in found.problems] == [SIGNATURE]
    assert found.signed_by == ""


def test_keys_of_other_kinds_are_refused() -> None:
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for pem, reason in ((other, "of another algorithm"), (b"nothing", "no unencrypted PEM key")):
        with pytest.raises(RecipeError, match=reason):
            KeyFile.read(pem, "key.pem")
    with pytest.raises(RecipeError, match="no PEM public key"):
        read_public_key(PEM, "key.pem")
    assert read_public_key(PUBLIC_PEM, "key.pem") == KEY.public_key


def test_a_program_signs_in_place_of_a_file(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(PEM)
    made = released(chain)
    message = b"a message"
    good = KEY.sign(message)
    # What key services give: raw bytes, hex, base64, and Vault's transit with its prefix.
    wrap = "import base64,sys; from cryptography.hazmat.primitives.serialization import load_pem_private_key as load; "
    sign = f"s = load(open({str(tmp_path / 'key.pem')!r}, 'rb').read(), None).sign(sys.stdin.buffer.read()); "
    for spelled in ("s", "s.hex().encode()", "base64.b64encode(s)+b'\\n'", "b'vault:v1:'+base64.b64encode(s)+b'\\n'"):
        program = f"{wrap}{sign}sys.stdout.buffer.write({spelled})"
        told = Command(f"{sys.executable} -c {shlex.quote(program)}", KEY.public_key)
        assert told.sign(message) == good
    (Path(made.uri) / SIGNATURE).unlink()
    files = [FileEntry.of(made.store.digest(f.key)) for f in made.store.list() if f.key != SUMS]
    seal(made.store, files, told)
    assert check(made.store, KEY.public_key).problems == ()


@pytest.mark.parametrize(
    "command, reason",
    [
        ("no-such-program-here", "could not be run"),
        ("false", "ended with exit code 1: nothing"),
        ("sh -c 'echo no key >&2; exit 3'", "ended with exit code 3: no key"),
        ("cat", "gave 1 bytes that are no Ed25519 signature by the public key"),
        ("echo 'unbalanced", "could not be run"),
    ],
)
def test_a_program_that_does_not_sign_is_told_in_one_line(command: str, reason: str) -> None:
    with pytest.raises(ArtefactError, match=reason) as raised:
        Command(command, KEY.public_key).sign(b"m")
    assert "\n" not in str(raised.value)


def test_a_typo_in_a_policy_is_named() -> None:
    with pytest.raises(RecipeError, match=r"policy p.yaml: copies.*did you mean 'least_recall'"):
        read_policy((POLICY + "copies: {least_recal: 0.5}").encode(), "p.yaml")
    with pytest.raises(RecipeError, match=r"policy p.yaml: target"):
        read_policy(POLICY.replace("research\nlic", "anything\nlic").encode(), "p.yaml")


# --- the commands ---------------------------------------------------------------------------------------------


def test_the_commands_release_and_verify(chain: Chain) -> None:
    for name, data in (("policy.yaml", POLICY.encode()), ("key.pem", PEM), ("public.pem", PUBLIC_PEM)):
        (chain.folder / name).write_bytes(data)
    place, bundle = str(chain.folder), str(chain.folder / "out")
    arguments = ["release", chain.dataset.uri, "--policy", f"{place}/policy.yaml", "--key", f"{place}/key.pem"]
    done = CliRunner().invoke(app, [*arguments, "--audit", chain.audit.uri, "--to", bundle])
    assert done.exit_code == 0, done.output
    assert fingerprint(KEY.public_key) in done.output.replace("\n", "")
    assert CliRunner().invoke(app, ["verify", bundle, "--public-key", f"{place}/public.pem"]).exit_code == 0
    (chain.folder / "out" / TERMS).write_bytes(b"other")
    bad = CliRunner().invoke(app, ["verify", bundle])
    assert bad.exit_code == 1
    assert TERMS in bad.output


def test_a_receiver_needs_neither_torch_nor_ray(chain: Chain) -> None:
    made = released(chain)
    before = sha256_of(Path(made.uri) / SUMS)
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['ray'] = None\n"
        "from scanloom.cli import app\n"
        f"app(['verify', {made.uri!r}], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sha256_of(Path(made.uri) / SUMS) == before
    assert Manifest.model_validate_json(made.store.read(MANIFEST)).kind == "release"
