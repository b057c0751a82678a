"""jobs.release on real Ray makes the bundle that the command makes, and refuses with the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.release import main
from scanloom.audit.bundle import SUMS, check
from scanloom.audit.policy import read_policy
from scanloom.audit.release import Request, release
from scanloom.store import Store
from tests.released import POLICY, Chain
from tests.test_release import KEY, PEM

pytestmark = pytest.mark.ray


@pytest.fixture
def chain(ray_cluster: None, tmp_path: Path) -> Chain:
    chain = Chain.made(tmp_path)
    tree = {
        "name": "tiny", "store": str(tmp_path), "generate": {"dataset": "dataset", "images": 10},
        "attributes": [{"name": "sex", "kind": "category", "values": ["F", "M"], "source": "PatientSex"}],
    }  # fmt: skip
    for name, data in (("recipe.yaml", yaml.safe_dump(tree).encode()), ("policy.yaml", POLICY.encode()), ("k", PEM)):
        (tmp_path / name).write_bytes(data)
    return chain


def run(chain: Chain, *more: str) -> int:
    place = chain.folder
    told = [f"{place}/recipe.yaml", "--policy", f"{place}/policy.yaml", "--audit", chain.audit.uri, *more]
    return main([*told, "--to", f"{place}/bundle"])


def test_a_bundle_made_on_a_cluster_is_the_one_made_here(chain: Chain) -> None:
    assert run(chain, "--key", f"{chain.folder}/k") == 0
    made = Store(f"{chain.folder}/bundle")
    assert check(made, KEY.public_key).problems == ()
    text = POLICY.encode()
    here = Store(f"{chain.folder}/here")
    release(Request(chain.dataset, chain.audit.uri, read_policy(text, "p"), text, here), KEY)
    unlike = set(here.read(SUMS).splitlines()) ^ set(made.read(SUMS).splitlines())
    # The manifest of the release alone notes the time.
    assert {line.split()[1] for line in unlike} <= {b"manifest.json"}
    # Once it is signed, it is not written over.
    assert run(chain, "--key", f"{chain.folder}/k") == 2


def test_a_refusal_is_one_line_and_nothing_is_signed(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(chain) == 2
    assert "nobody signs; give --key FILE" in capsys.readouterr().err
    place = Path(chain.dataset.uri) / chain.dataset.files("dicom")[0].path
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    assert run(chain, "--key", f"{chain.folder}/k") == 2
    told = capsys.readouterr().err
    assert "checksum: changed" in told
    assert "Traceback" not in told
    assert not Store(f"{chain.folder}/bundle").exists("signature.json")
