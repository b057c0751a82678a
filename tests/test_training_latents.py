"""training.latents: what a training worker keeps in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from scanloom.artefact import Artefact, publish
from scanloom.errors import ArtefactError
from scanloom.shards.commit import ShardPart, begin, commit_shard
from scanloom.shards.reader import parquet_files
from scanloom.shards.schemas import latents_schema, prompt_hash, prompts_schema
from scanloom.shards.writer import parquet_bytes
from scanloom.store import Store
from scanloom.training.latents import AttributeConditions, Latents, TextConditions, collect, read_latents, read_prompts
from tests.phantom_corpus import SCHEMA

SHAPE = (2, 3, 3)
PROMPTS = ("chest radiograph, male", "", "chest radiograph, female")
NO_DROP = torch.zeros(2, dtype=torch.bool)


def rows(names: Sequence[str], *, texts: Sequence[str] | None = None) -> pa.Table:
    """A latents table whose values are the number in each row's id."""
    values = [[float(name)] * 18 for name in names]
    columns = {
        "id": list(names), "mean": np.array(values, np.float16).tolist(), "logvar": [[0.0] * 18 for _ in names],
        "sex": ["F" if int(name) % 2 else "M" for name in names], "age": [float(name) for name in names],
        "view": [None for _ in names], "findings": [[] for _ in names],
    }  # fmt: skip
    if texts is not None:
        columns["prompt"] = [prompt_hash(text) for text in texts]
    schema = latents_schema(SCHEMA, SHAPE, prompts=texts is not None)
    halves = {name: pa.array([np.array(row, np.float16) for row in columns[name]], schema.field(name).type)
              for name in ("mean", "logvar")}  # fmt: skip
    return pa.table(columns | halves, schema)


def artefact_of(uri: str, texts: Sequence[str], *, pooled: bool = True) -> Artefact:
    """A latents artefact that holds these prompts, tokens [2, 4] filled with their number."""
    store = Store(uri)
    begin(store, "latents", "a" * 64)
    schema = prompts_schema((2, 4), 3 if pooled else None)
    columns: dict[str, object] = {
        "hash": [prompt_hash(text) for text in texts],
        "text": list(texts),
        "tokens": pa.array([np.full(8, n, np.float16) for n in range(len(texts))], schema.field("tokens").type),
    }
    if pooled:
        columns["pooled"] = pa.array(
            [np.full(3, -n, np.float16) for n in range(len(texts))], schema.field("pooled").type
        )
    data = parquet_bytes(pa.table(columns, schema))
    commit = commit_shard(store, "a" * 64, 0, [ShardPart("prompts", "prompts", "parquet", data, 0)], 0, {})
    return publish(
        store, kind="latents", name="t", recipe={}, inputs=[], files=commit.files.values(), statistics={}
    )  # fmt: skip


@pytest.fixture
def texted(tmp_path: Path) -> Latents:
    """Two rows, each with a prompt of its own."""
    prompts = read_prompts(artefact_of(str(tmp_path), PROMPTS))
    return collect([rows(["1", "2"], texts=[PROMPTS[2], PROMPTS[0]])], SHAPE, SCHEMA, prompts)


def test_rows_are_in_the_order_of_their_ids_however_they_were_read() -> None:
    one_way = collect([rows(["3", "1"]), rows(["2"])], SHAPE, SCHEMA)
    other_way = collect([rows(["2"]), rows([]), rows(["1", "3"])], SHAPE, SCHEMA)
    assert one_way.mean_NCHW[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(one_way.mean_NCHW, other_way.mean_NCHW)
    told = [latents.conditions.batch(torch.arange(3), torch.zeros(3).bool()) for latents in (one_way, other_way)]
    assert torch.equal(told[0]["features"], told[1]["features"])
    assert one_way.mean_NCHW.dtype == one_way.logvar_NCHW.dtype == torch.float16


def test_attributes_are_dropped_one_by_one_or_all_of_a_row() -> None:
    latents = collect([rows(["1", "2", "3"])], SHAPE, SCHEMA)
    single = torch.tensor([[False, True, False, False], [False, False, False, False]])
    batch = latents.conditions.batch(torch.tensor([2, 0]), torch.tensor([False, True]), single)
    assert isinstance(latents.conditions, AttributeConditions)
    assert torch.equal(batch["features"], latents.conditions.features_NF[[2, 0]])
    assert batch["drop"].tolist() == [[False, True, False, False], [True] * 4]
    assert latents.conditions.batch(torch.tensor([0, 1]), NO_DROP)["drop"].tolist() == [[False] * 4] * 2


def test_a_dropped_row_gets_the_embedding_of_the_empty_prompt(texted: Latents) -> None:
    batch = texted.conditions.batch(torch.tensor([1, 0]), torch.tensor([False, True]))
    assert batch["tokens"].shape == (2, 2, 4)
    assert batch["tokens"].dtype == torch.float32
    assert batch["tokens"][:, 0, 0].tolist() == [PROMPTS.index("chest radiograph, male"), PROMPTS.index("")]
    assert batch["pooled"].tolist() == [[0.0] * 3, [-1.0] * 3]


def test_equal_prompts_are_held_once(tmp_path: Path) -> None:
    prompts = read_prompts(artefact_of(str(tmp_path), PROMPTS, pooled=False))
    latents = collect([rows(["1", "2", "3"], texts=[PROMPTS[2]] * 3)], SHAPE, SCHEMA, prompts)
    assert isinstance(latents.conditions, TextConditions)
    assert len(latents.conditions.prompts.tokens_ULD) == 3
    assert latents.conditions.index_N.tolist() == [2, 2, 2]
    assert set(latents.conditions.batch(torch.tensor([0, 1]), NO_DROP)) == {"tokens"}


def split_artefact(uri: str, *shards: Sequence[str]) -> Artefact:
    """A latents artefact whose train split has these ids by shard, and whose validation has one row."""
    store = Store(uri)
    begin(store, "latents", "b" * 64)
    split = [("train", ids) for ids in shards] + [("validation", ["9"])]
    files = [
        file
        for number, (name, ids) in enumerate(split)
        for file in commit_shard(
            store, "b" * 64, number, [ShardPart(name, name, "parquet", parquet_bytes(rows(ids)), len(ids))], 0, {}
        ).files.values()
    ]
    return publish(store, kind="latents", name="t", recipe={}, inputs=[], files=files, statistics={})


def test_a_split_is_read_from_all_its_shards_and_no_others(tmp_path: Path) -> None:
    artefact = split_artefact(str(tmp_path), ["5", "1"], ["4"], ["3", "2"])
    latents = read_latents(artefact, "train", SHAPE, SCHEMA)
    assert latents.mean_NCHW[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert isinstance(latents.conditions, AttributeConditions)
    assert len(read_latents(artefact, "validation", SHAPE, SCHEMA)) == 1
    with pytest.raises(ArtefactError, match="no rows of a split"):
        read_latents(artefact, "holdout", SHAPE, SCHEMA)


def test_a_shard_that_changed_since_it_was_written_is_not_trained_on(tmp_path: Path) -> None:
    artefact = split_artefact(str(tmp_path), ["1"], ["2"])
    changed = tmp_path / parquet_files(artefact, "train")[1].path
    changed.write_bytes(parquet_bytes(rows(["3"])))
    with pytest.raises(ArtefactError, match="changed since it was written"):
        read_latents(artefact, "train", SHAPE, SCHEMA)


def test_latents_of_a_family_without_text_have_no_prompts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert read_prompts(publish(store, kind="latents", name="t", recipe={}, inputs=[], files=[], statistics={})) is None


@pytest.mark.parametrize("texts", [("a", "b"), ("", "a", "a")])
def test_prompts_without_the_empty_one_or_twice_are_refused(tmp_path: Path, texts: tuple[str, ...]) -> None:
    with pytest.raises(ArtefactError, match="encode again"):
        read_prompts(artefact_of(str(tmp_path), texts))


def test_rows_that_name_a_prompt_without_an_embedding_are_refused(tmp_path: Path) -> None:
    prompts = read_prompts(artefact_of(str(tmp_path), PROMPTS))
    with pytest.raises(ArtefactError, match="1 prompts without an embedding"):
        collect([rows(["1", "2"], texts=["", "another"])], SHAPE, SCHEMA, prompts)
    with pytest.raises(ArtefactError, match="name no prompts"):
        collect([rows(["1", "2"])], SHAPE, SCHEMA, prompts)


@pytest.mark.parametrize(
    ("table", "shape", "said"),
    [
        (rows(["1"]).drop_columns(["age", "view"]), SHAPE, "no attribute age, view"),
        (rows([]), SHAPE, "no rows of a split"),
        (rows(["1"]), (4, 3, 3), r"'mean' does not have the expected shape \(4, 3, 3\)"),
    ],
)
def test_missing_attributes_no_rows_and_another_shape_are_refused_in_one_line(
    table: pa.Table, shape: tuple[int, int, int], said: str
) -> None:
    with pytest.raises(ArtefactError, match=said) as caught:
        collect([table], shape, SCHEMA)
    assert "\n" not in str(caught.value)
