"""Probes against closed forms (Gaussian data has an exact denoiser) and against planted copies."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from scanloom.errors import RecipeError
from scanloom.models.noise_schedule import NoiseSchedule, PredictionType, noise_schedule
from scanloom.training import probes
from scanloom.training.probes import (
    BUCKETS,
    Conditions,
    bucket_names,
    copy_rate,
    draw_samples,
    held_out_by_timestep,
    reference_rows,
    sample_grid,
)

SHAPE = (2, 4, 4)
SPREAD = 0.5


def _exact(schedule: NoiseSchedule, latents: Tensor, timesteps: Tensor, told: Conditions) -> Tensor:
    """What a perfect denoiser predicts of data with mean `told["mean"]` and standard deviation SPREAD."""
    alpha, sigma = (table[timesteps].float().view(-1, 1, 1, 1) for table in (schedule.alphas_T, schedule.sigmas_T))
    mean = told["mean"].view(-1, 1, 1, 1)
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    data = mean + gain * (latents - alpha * mean)
    noise = (latents - alpha * data) / sigma
    return {"v_prediction": alpha * noise - sigma * data, "epsilon": noise, "flow": noise - data}[
        schedule.prediction_type
    ]


def _draw(schedule: NoiseSchedule, numbers: range, **options: object) -> Tensor:
    told = {"mean": torch.tensor([2.0 if number % 2 else -1.0 for number in numbers])}
    return draw_samples(
        lambda latents, at, condition: _exact(schedule, latents, at, condition),
        schedule,
        told,
        numbers,
        SHAPE,
        seed=7,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "flow"])
def test_samples_of_a_perfect_denoiser_have_the_datas_mean_and_spread(kind: PredictionType) -> None:
    samples = _draw(noise_schedule(kind), range(256))
    for start, mean in ((0, -1.0), (1, 2.0)):
        values = samples[start::2]
        assert float(values.mean()) == pytest.approx(mean, abs=0.06)
        assert float(values.std()) == pytest.approx(SPREAD, rel=0.1)


def test_an_image_is_the_same_whoever_draws_it_and_in_whatever_batch() -> None:
    schedule = noise_schedule("v_prediction")
    together = _draw(schedule, range(6))
    apart = torch.cat([_draw(schedule, range(2)), _draw(schedule, range(2, 6), batch_size=3)])
    torch.testing.assert_close(together, apart)
    assert float((together[0] - together[2]).abs().max()) > 0.1


def test_guidance_moves_samples_away_from_the_null_condition_and_asks_twice() -> None:
    schedule, calls = noise_schedule("v_prediction"), []

    def denoise(latents: Tensor, timesteps: Tensor, told: Conditions) -> Tensor:
        calls.append(float(told["mean"][0]))
        return _exact(schedule, latents, timesteps, told)

    told, null = {"mean": torch.ones(8)}, {"mean": torch.zeros(8)}
    plain = draw_samples(denoise, schedule, told, range(8), SHAPE, seed=1, steps=5, null=null)
    assert calls == [1.0] * 5
    calls.clear()
    guided = draw_samples(denoise, schedule, told, range(8), SHAPE, seed=1, steps=5, guidance=3.0, null=null)
    assert sorted(calls) == [0.0] * 5 + [1.0] * 5
    assert float((guided - plain).mean()) > 1.0


def test_guidance_without_a_null_condition_is_refused() -> None:
    with pytest.raises(RecipeError, match="null condition"):
        _draw(noise_schedule("v_prediction"), range(2), guidance=2.0)


def test_each_loss_counts_in_the_bucket_of_its_timestep() -> None:
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0])
    buckets = held_out_by_timestep(losses, torch.tensor([0, 99, 100, 999]))
    assert buckets == [2.0, 5.0, *[None] * 7, 7.0]
    assert bucket_names(BUCKETS)[0] == "t000-099"
    assert bucket_names(BUCKETS)[-1] == "t900-999"


def _pixels(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_the_grid_shows_each_image_where_its_number_says_above_its_caption() -> None:
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.1])
    grid = _pixels(sample_grid(levels.view(-1, 1, 1, 1).expand(-1, 1, 16, 16), ["a"] * 5, columns=3))
    corners = [np.argwhere(grid == round(float(level) * 255)) for level in levels]
    assert all(len(found) >= 128 * 128 for found in corners)
    rows, columns = zip(*(found.min(axis=0) for found in corners), strict=True)
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4]
    assert columns[0] == columns[3] < columns[1] == columns[4] < columns[2]


def test_a_long_caption_is_shown_whole_and_a_wide_image_keeps_its_shape() -> None:
    image = torch.full((1, 1, 8, 16), 0.5)
    short, long = (_pixels(sample_grid(image, [text])) for text in ("a", "Cardiomegaly of a patient of 63 years, PA"))
    assert long.shape[0] > short.shape[0]
    assert int((short == 128).sum()) == pytest.approx(128 * 64, rel=0.02)


def test_a_word_wider_than_its_image_is_broken_and_leaves_the_next_caption_alone() -> None:
    image = torch.full((2, 1, 16, 16), 0.5)
    grid = _pixels(sample_grid(image, ["Cardiomegaly+Effusion+Nodule+Pneumothorax", ""]))
    written = np.argwhere(grid[8 + 128 :] < 100)
    assert len(written) > 100
    assert written[:, 1].max() < 8 + 128 + 4


def test_the_same_images_make_the_same_bytes() -> None:
    image = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert sample_grid(image, ["a", "b", "c"]) == sample_grid(image, ["a", "b", "c"])
    assert sample_grid(image, ["a", "b", "c"]) != sample_grid(image, ["a", "b", "d"])


def _sets(seed: int, *sizes: int, values: int = 256) -> list[Tensor]:
    """Independent draws of one distribution, whose latents have very unequal norms: some are near to everything."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(sum(sizes), values, generator=generator)
    scale = torch.exp(0.3 * torch.randn(sum(sizes), 1, generator=generator))
    return list((made * scale).view(-1, 4, 8, values // 32).split(list(sizes)))


def test_fresh_draws_are_no_nearer_to_training_and_the_interval_says_so_as_often_as_it_claims() -> None:
    rates = [copy_rate(*_sets(seed, 64, 150, 150)) for seed in range(120)]
    assert np.mean([found.rate for found in rates]) == pytest.approx(0.5, abs=0.06)
    covered = np.mean([found.low <= 0.5 <= found.high for found in rates])
    assert covered > 0.9
    assert np.median([found.distance_ratio for found in rates]) == pytest.approx(1.0, abs=0.03)


def test_copies_with_noise_are_found_and_the_more_there_are_the_higher_the_rate() -> None:
    fresh, train, held_out = _sets(0, 128, 300, 300)
    noise = 0.2 * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for copies in (0, 64, 128):
        samples = torch.cat([train[:copies] + noise[:copies], fresh[copies:]])
        found.append(copy_rate(samples, train, held_out))
    assert found[0].rate < found[1].rate < found[2].rate
    assert found[0].low <= 0.5 <= found[0].high
    assert found[2].rate > 0.99
    assert found[2].low > 0.9
    assert found[2].distance_ratio < 0.5


def test_copies_of_held_out_latents_lower_the_rate() -> None:
    _, train, held_out = _sets(0, 1, 100, 100)
    found = copy_rate(held_out + 0.01, train, held_out)
    assert found.rate == 0.0
    assert found.high < 0.5
    assert found.distance_ratio > 2


def test_a_larger_training_set_has_no_more_chances() -> None:
    rates = [copy_rate(*_sets(seed, 64, 900, 90)) for seed in range(40)]
    assert {found.references for found in rates} == {90}
    assert np.mean([found.rate for found in rates]) == pytest.approx(0.5, abs=0.1)


def test_references_that_were_cut_before_are_the_ones_compared_with() -> None:
    samples, train, held_out = _sets(0, 64, 300, 90)
    train_rows, held_out_rows = reference_rows(300, 90, seed=5)
    assert held_out_rows.tolist() == list(range(90))
    assert len(set(train_rows.tolist())) == 90
    assert train_rows.tolist() != list(range(90))
    cut = copy_rate(samples, train[train_rows], held_out[held_out_rows], seed=5)
    assert cut == copy_rate(samples, train, held_out, seed=5)


def test_many_samples_of_one_copied_latent_are_one_observation() -> None:
    _, train, held_out = _sets(0, 1, 100, 100)
    once = copy_rate(train[:1].expand(64, -1, -1, -1), train, held_out)
    assert once.rate == 1.0
    assert once.low < 0.5
    assert once.distance_ratio < 1e-6


def test_an_exact_copy_in_both_sets_counts_half() -> None:
    _, train, held_out = _sets(0, 1, 50, 50)
    both = copy_rate(train[:10], train, torch.cat([train[:10], held_out[10:]]))
    assert both.rate == 0.5
    assert both.distance_ratio == 1.0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = _sets(3, 64, 100, 100)
    whole = copy_rate(*sets)
    monkeypatch.setattr(probes, "_BLOCK_VALUES", 256 * 7)
    parts = copy_rate(*sets)
    assert (parts.rate, parts.references) == (whole.rate, whole.references)
    assert parts.distance_ratio == pytest.approx(whole.distance_ratio)


def test_a_close_copy_far_from_the_origin_has_the_distance_that_it_has() -> None:
    _, train, held_out = _sets(0, 1, 20, 20)
    samples = train + 1000.0 + 1e-2 / math.sqrt(train[0].numel())
    found = copy_rate(samples, train + 1000.0, held_out + 1000.0)
    assert found.rate == 1.0
    assert found.distance_ratio < 0.01


def test_nothing_to_compare_is_refused() -> None:
    samples, train, held_out = _sets(0, 4, 4, 4)
    for sets in ((samples[:0], train, held_out), (samples, train[:0], held_out), (samples, train, held_out[:0])):
        with pytest.raises(RecipeError, match="at least one"):
            copy_rate(*sets)
