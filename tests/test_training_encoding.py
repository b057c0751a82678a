"""training.encoding and its plan: what a worker of the encode job writes, without Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from scanloom.artefact import Artefact, FileEntry, open_artefact, publish
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models import autoencoder
from scanloom.models.autoencoder import build_autoencoder
from scanloom.models.text_condition import TextConditioner
from scanloom.recipe import Autoencoder, Recipe
from scanloom.recipe_train import Canaries
from scanloom.shards.commit import ShardCommit, begin, committed
from scanloom.shards.reader import read_parquet
from scanloom.shards.schemas import prompt_hash
from scanloom.store import Store
from scanloom.training import encoding
from scanloom.training.encoding import ShardEncoder
from scanloom.training.encoding_plan import EncodingJob, finished, plan_encoding, prompt_rows
from scanloom.training.latents import collect, read_prompts
from scanloom.training.prompt_encoding import PromptEncoder
from scanloom.training.views import times_trained
from tests.phantom_corpus import SCHEMA, SIZE, phantom_recipe, publish_corpus
from tests.tiny_families import write_base

SHAPE = (4, SIZE // 2, SIZE // 2)


def recipe(store: Path, encode: Mapping[str, Any] | None = None, denoiser: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of the phantom corpus."""
    return phantom_recipe(store, encode=encode or {}, **({"finetune": {"denoiser": denoiser}} if denoiser else {}))


def publish_autoencoder(uri: str, channels: tuple[int, ...] = (8, 8), *, broken: bool = False) -> Artefact:
    """An untrained autoencoder."""
    vae = build_autoencoder(Autoencoder(channels=channels), SIZE, 0)
    if broken:
        torch.nn.init.constant_(vae.get_parameter("encoder.conv_in.weight"), 1e30)
    vae.save_pretrained(Path(uri) / "vae")
    files = [
        FileEntry.of(Store(uri).digest(f"vae/{name}"))
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    ]
    return publish(
        Store(uri), kind="autoencoder", name="t", recipe={}, inputs=[], files=files, statistics={}
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 16 rows that are 6 different phantoms, in two shards, an autoencoder, and base weights."""
    store = tmp_path_factory.mktemp("made")
    publish_corpus(f"{store}/corpus", scans=16, distinct=6)
    publish_autoencoder(f"{store}/autoencoder")
    write_base("sdxl", store / "base")
    return store


def planned(made: Path, to: Path, **sections: Mapping[str, Any]) -> EncodingJob:
    """A job that encodes what was made into another folder."""
    corpus, vae = (open_artefact(f"{made}/{name}") for name in ("corpus", "autoencoder"))
    return plan_encoding(recipe(to, **sections), corpus, vae)


def encoded(job: EncodingJob, shards: Sequence[int] = (0, 1)) -> dict[int, ShardCommit]:
    """What a worker commits of these shards."""
    begin(Store(job.latents_uri), "latents", job.plan)
    ShardEncoder(job)({"shard": np.array(shards)})
    return committed(Store(job.latents_uri), job.plan)


def rows(job: EncodingJob, split: str) -> pa.Table:
    """The committed rows of a split."""
    commits = committed(Store(job.latents_uri), job.plan)
    tables = [
        read_parquet(Store(job.latents_uri), c.files[split]) for _, c in sorted(commits.items()) if split in c.files
    ]
    return pa.concat_tables(tables)


def test_latents_of_two_runs_are_equal_to_the_byte(made: Path, tmp_path: Path) -> None:
    how = {"crops": 1, "batch_size": 3}
    first, second = (encoded(planned(made, tmp_path / name, encode=how)) for name in ("a", "b"))
    assert {n: c.files for n, c in first.items()} == {n: c.files for n, c in second.items()}
    assert set(first[0].files) == {"train", "validation"}


def test_equal_images_pass_the_autoencoder_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = autoencoder.moments

    def counting(vae: Any, pixels: torch.Tensor) -> Any:
        seen.append(len(pixels))
        return real(vae, pixels)

    monkeypatch.setattr(encoding, "moments", counting)
    job = planned(made, tmp_path, encode={"crops": 2})
    commit = encoded(job, [0])[0]
    # Of 8 scans 6 train, members 0, 1, 2, 4, 5 and 6, of which the last is the first once more.
    assert sum(seen) == commit.statistics["encoded"] == 5 * 3 + 2
    table = {row["id"]: row for row in rows(job, "train").to_pylist()}
    assert len(table) == 6 * 3
    for view in ("", "-1", "-2"):
        same, other = table[f"{0:016x}{view}"], table[f"{6:016x}{view}"]
        assert same["mean"] == other["mean"]
        assert table[f"{1:016x}{view}"]["mean"] != other["mean"]


def test_every_view_is_a_row_of_its_own_and_validation_has_the_plain_one(made: Path, tmp_path: Path) -> None:
    job = planned(made, tmp_path, encode={"crops": 1, "flips": True, "laterality_matters": False})
    plain = planned(made, tmp_path / "plain")
    assert sum(commit.rows for commit in encoded(job).values()) == 12 * 4 + 4
    encoded(plain)
    train, unchanged = rows(job, "train"), rows(plain, "train").to_pylist()
    assert train.num_rows == len(set(train["id"].to_pylist())) == 12 * 4
    by_id = {row["id"]: row for row in train.to_pylist()}
    for row in unchanged:
        assert by_id[row["id"]]["sex"] == by_id[f"{row['id']}-3"]["sex"] == row["sex"]
        np.testing.assert_allclose(np.array(by_id[row["id"]]["mean"]), np.array(row["mean"]), atol=2e-3)
        assert by_id[f"{row['id']}-1"]["mean"] != row["mean"]
    assert rows(job, "validation")["id"].to_pylist() == rows(plain, "validation")["id"].to_pylist()


def test_canaries_are_rows_several_times_and_change_the_plan(made: Path, tmp_path: Path) -> None:
    canaries = {"share": 0.5, "times": [3, 5]}
    job, plain = planned(made, tmp_path, encode={"canaries": canaries}), planned(made, tmp_path / "plain")
    assert job.plan != plain.plan
    encoded(job)
    encoded(plain)
    names = rows(plain, "train")["id"].to_pylist()
    times = {name: times_trained(Canaries.model_validate(canaries), name) for name in names}
    assert set(times.values()) == {1, 3, 5}
    table = rows(job, "train")
    assert Counter(name.split("x")[0] for name in table["id"].to_pylist()) == times
    assert table.num_rows == len(set(table["id"].to_pylist()))
    assert rows(job, "validation")["id"].to_pylist() == rows(plain, "validation")["id"].to_pylist()


def test_half_precision_gives_about_the_same_latents(made: Path, tmp_path: Path) -> None:
    half, full = planned(made, tmp_path / "half", encode={"precision": "bf16"}), planned(made, tmp_path / "full")
    for job in (half, full):
        encoded(job, [0])
    got, expected = (np.stack(rows(job, "train")["mean"].to_numpy()).astype(np.float32) for job in (half, full))
    assert not np.array_equal(got, expected)
    assert np.abs(got - expected).mean() < 0.02 * np.abs(expected).max()


def test_an_autoencoder_that_gives_no_numbers_commits_nothing(made: Path, tmp_path: Path) -> None:
    broken = publish_autoencoder(f"{tmp_path}/broken", broken=True)
    job = plan_encoding(recipe(tmp_path), open_artefact(f"{made}/corpus"), broken)
    with pytest.raises(ArtefactError, match="no numbers in half precision"):
        encoded(job, [0])
    assert not committed(Store(job.latents_uri), job.plan)


def test_an_autoencoder_that_does_not_divide_the_scans_is_refused(made: Path, tmp_path: Path) -> None:
    deep = publish_autoencoder(f"{tmp_path}/deep", channels=(8,) * 7)
    with pytest.raises(RecipeError, match=f"size_px {SIZE} is not a multiple of 64"):
        plan_encoding(recipe(tmp_path), open_artefact(f"{made}/corpus"), deep)


def test_the_plan_covers_what_changes_latents_and_nothing_else(made: Path, tmp_path: Path) -> None:
    sd = {"family": "sdxl", "weights": str(made / "base")}
    other = write_base("sdxl", tmp_path / "other", seed=1)
    plans = [
        planned(made, tmp_path, **sections).plan
        for sections in (
            {}, {"encode": {"precision": "bf16"}},
            {"encode": {"crops": 1}}, {"encode": {"crops": 1, "crop_share": 0.8}},
            {"encode": {"flips": True, "laterality_matters": False}}, {"denoiser": sd},
            {"denoiser": sd | {"weights": str(other)}}, {"denoiser": sd | {"prompt": {"words": {"F": "female"}}}},
        )
    ]  # fmt: skip
    assert len(set(plans)) == len(plans)
    elsewhere = write_base("sdxl", tmp_path / "moved")
    assert planned(made, tmp_path, denoiser=sd | {"weights": str(elsewhere)}).plan == plans[5]
    assert planned(made, tmp_path, encode={"workers": 5, "batch_size": 2, "prompt_batch_size": 1}).plan == plans[0]


def test_a_prompt_that_words_what_the_corpus_does_not_have_is_refused(made: Path, tmp_path: Path) -> None:
    denoiser = {"family": "sdxl", "weights": str(made / "base"), "prompt": {"words": {"Femal": "female"}}}
    with pytest.raises(RecipeError, match="'Femal' is not in the schema"):
        planned(made, tmp_path, denoiser=denoiser)


def test_prompts_are_cut_in_shards_that_do_not_depend_on_how_they_were_found() -> None:
    texts = [f"age {number}" for number in range(300)]
    one_way, other_way = prompt_rows(texts, first=5), prompt_rows(reversed([*texts, *texts]), first=5)
    assert one_way == other_way
    assert [row["shard"] for row in one_way] == [5, 6, 7]
    parts = [json.loads(row["texts"]) for row in one_way]
    assert sorted({"", *texts}) == [text for part in parts for text in part]


def test_each_distinct_prompt_is_embedded_once_the_empty_one_among_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    real = TextConditioner.encode

    def counting(self: TextConditioner, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        embedded.extend(prompts)
        return real(self, prompts)

    monkeypatch.setattr(TextConditioner, "encode", counting)
    job = planned(
        made, tmp_path, encode={"prompt_batch_size": 2}, denoiser={"family": "sdxl", "weights": str(made / "base")}
    )
    commits = encoded(job)
    corpus = open_artefact(f"{made}/corpus")
    scans = pa.concat_tables(
        read_parquet(corpus.store, file) for s in ("train", "validation") for file in corpus.files(s)
    )
    work = prompt_rows(job.prompts(scans), first=2)
    worker = PromptEncoder(job)
    worker({"shard": np.array([row["shard"] for row in work]), "texts": np.array([row["texts"] for row in work])})
    commits = committed(Store(job.latents_uri), job.plan)
    assert len(embedded) == len(set(embedded)) == 7
    assert "" in embedded
    published = finished(commits.values(), corpus)
    assert published["statistics"]["rows"] == 16
    assert published["statistics"]["prompts"] == 7
    latents = publish(
        Store(job.latents_uri), kind="latents", name="t", recipe={}, inputs=[corpus], **published
    )  # fmt: skip
    prompts = read_prompts(latents)
    assert prompts is not None
    assert prompts.tokens_ULD.dtype == torch.float16
    assert latents.files("prompts")
    held = collect([rows(job, "validation")], SHAPE, SCHEMA, prompts)
    expected = real(TextConditioner(made / "base"), [job.prompts(rows(job, "validation").sort_by("id"))[0], ""])
    batch = held.conditions.batch(torch.tensor([0, 0]), torch.tensor([False, True]))
    for name in ("tokens", "pooled"):
        torch.testing.assert_close(batch[name], expected[name], atol=5e-3, rtol=2e-3)
    assert prompt_hash("") in prompts.number
