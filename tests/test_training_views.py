"""training.views: crops and mirror images of a scan."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from scanloom.errors import RecipeError
from scanloom.recipe import Encode, parse_recipe
from scanloom.recipe_train import Canaries
from scanloom.training.views import PLAIN, full_range, look, times_trained, views

RAMP = np.linspace(-1, 1, 32 * 32, dtype=np.float32).reshape(32, 32)


def test_flips_are_refused_where_nobody_said_that_sides_are_alike() -> None:
    tree = {
        "name": "t", "store": "/nowhere", "attributes": [{"name": "sex", "kind": "category", "values": ["F", "M"]}],
    }  # fmt: skip
    with pytest.raises(RecipeError, match="laterality_matters: false") as caught:
        parse_recipe(tree | {"encode": {"flips": True}}, "test")
    assert "\n" not in str(caught.value)
    assert parse_recipe(tree | {"encode": {"flips": True, "laterality_matters": False}}, "test").encode.flips


def test_only_training_gets_more_than_the_plain_view() -> None:
    recipe = Encode(crops=2, flips=True, laterality_matters=False)
    assert views(recipe, "validation") == (PLAIN,)
    train = views(recipe, "train")
    assert train[0] == PLAIN
    assert [(view.crop, view.mirrored) for view in train] == [(c, m) for c in (0, 1, 2) for m in (False, True)]
    assert [view.row_id("a1") for view in train] == ["a1", "a1-1", "a1-2", "a1-3", "a1-4", "a1-5"]
    assert views(Encode(), "train") == (PLAIN,)


def test_a_crop_keeps_its_share_of_the_scan_at_a_place_of_its_own() -> None:
    across = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), (64, 1))
    cuts = [look(across, view, (7, 9), 0.8) for view in views(Encode(crops=8), "train")[1:]]
    spans = [float(cut[32, -1] - cut[32, 0]) / 2 for cut in cuts]
    assert all(0.75 < span <= 1.0 for span in spans)
    assert len({cut.tobytes() for cut in cuts}) == 8
    assert all(cut.shape == across.shape and np.abs(cut).max() <= 1.0 for cut in cuts)


def test_the_same_crop_is_cut_again_from_the_same_seed_and_another_from_another() -> None:
    view = views(Encode(crops=1), "train")[1]
    assert np.array_equal(look(RAMP, view, (1, 2), 0.9), look(RAMP, view, (1, 2), 0.9))
    assert not np.array_equal(look(RAMP, view, (1, 2), 0.9), look(RAMP, view, (3, 2), 0.9))


def test_a_mirrored_crop_shows_what_the_crop_shows() -> None:
    _, _, crop, mirrored = views(Encode(crops=1, flips=True, laterality_matters=False), "train")
    assert np.array_equal(look(RAMP, mirrored, (1, 2), 0.9)[:, ::-1], look(RAMP, crop, (1, 2), 0.9))
    assert np.array_equal(look(RAMP, PLAIN, (1, 2), 0.9), RAMP)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_black_and_white_of_any_depth_are_the_ends_of_the_range(dtype: type[np.unsignedinteger]) -> None:
    scaled = full_range(np.array([[0, np.iinfo(dtype).max]], dtype))
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [[-1.0, 1.0]]


def test_canaries_are_chosen_by_their_ids_and_in_equal_parts() -> None:
    names, canaries = [f"scan-{number}" for number in range(4000)], Canaries(share=0.3, times=(4, 16, 64))
    found = Counter(times_trained(canaries, name) for name in names)
    assert found.keys() == {1, 4, 16, 64}
    assert found[1] == pytest.approx(2800, abs=120)
    assert all(found[times] == pytest.approx(400, abs=70) for times in (4, 16, 64))
    assert {times_trained(None, name) for name in names} == {1}
