"""The engine: what it makes of an image never depends on who shares the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from scanloom.attributes import Attributes
from scanloom.errors import ArtefactError, RecipeError
from scanloom.sampling.engine import CPU_ROWS, Engine, FinishedImage, ImageRequest, is_batch_invariant
from scanloom.sampling.noise import gaussian_noise
from scanloom.sampling.solvers import trajectory
from tests.faulty_generator import cosine

MEAN, SPREAD = 0.5, 0.125


class GaussianGenerator:
    """Independent N(level, SPREAD**2) pixels with a perfect denoiser; `level` is the condition, MEAN when unknown."""

    latent_shape: tuple[int, ...] = (1, 4, 4)
    schedule = cosine()

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.decoded: list[int] = []

    def condition(self, attributes: Sequence[Attributes]) -> torch.Tensor:
        levels = [a.get("level", MEAN) for a in attributes]
        return torch.tensor(levels, dtype=torch.float32).reshape(-1, 1)

    def null_condition(self, batch: int) -> torch.Tensor:
        return self.condition([{}] * batch)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(latents))
        alpha = self.schedule.alphas_T[timesteps].float().reshape(-1, 1, 1, 1)
        sigma = self.schedule.sigmas_T[timesteps].float().reshape(-1, 1, 1, 1)
        level = condition.reshape(-1, 1, 1, 1)
        residue = (latents - alpha * level) / (alpha**2 * SPREAD**2 + sigma**2)
        return alpha * sigma * residue - sigma * (level + alpha * SPREAD**2 * residue)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.decoded.append(len(latents))
        return latents

    def require_shape(self, latent_shape: tuple[int, ...]) -> None:
        if latent_shape[0] != self.latent_shape[0]:
            raise RecipeError(f"no latents of {latent_shape}")


class UnetGenerator(GaussianGenerator):
    """A small real network with convolutions, attention and normalisation, and random weights."""

    latent_shape: tuple[int, ...] = (4, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ).eval()
        self.last = torch.nn.Conv2d(4, 1, 3, padding=1)

    def condition(self, attributes: Sequence[Attributes]) -> torch.Tensor:
        return super().condition(attributes)[:, :, None] * torch.ones(1, 3, 16)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(latents))
        predicted: torch.Tensor = self.unet(latents, timesteps, condition).sample
        return predicted

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.decoded.append(len(latents))
        return torch.sigmoid(self.last(latents))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def request(
    index: int, *, steps: int = 4, scale: float = 1.0, level: float = 0.5, shape: tuple[int, ...] | None = None
) -> ImageRequest:
    return ImageRequest(
        index=index, seed=9, attributes={"level": level}, steps=steps, guidance_scale=scale, latent_shape=shape
    )


def pixels(finished: Sequence[FinishedImage]) -> dict[int, np.ndarray]:
    return {f.request.index: f.image for f in finished}


MIXED = [
    request(0, steps=3, scale=2.0, level=0.1),
    request(1, steps=5, scale=1.0, level=0.9),
    request(2, steps=1, scale=4.5, level=0.3),
    request(3, steps=4, scale=1.0, level=0.5),
    request(4, steps=5, scale=2.0, level=0.7),
    request(5, steps=2, scale=3.0, level=0.2),
    request(6, steps=7, scale=1.0, level=0.6),
]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_bits_of_an_image_do_not_depend_on_companions_nor_on_the_number_of_slots(one_thread: None, rows: int) -> None:
    generator = UnetGenerator()
    alone = {r.index: pixels(list(Engine(generator, 2, rows=rows).run([r])))[r.index] for r in MIXED}
    for slots in (2, 3, 6, 16):
        for order in (range(7), range(6, -1, -1), (3, 0, 6, 2, 5, 1, 4)):
            together = pixels(list(Engine(generator, slots, rows=rows).run(MIXED[place] for place in order)))
            assert together.keys() == alone.keys()
            for index, image in alone.items():
                np.testing.assert_array_equal(together[index], image, err_msg=f"image {index}, {slots} slots")


def test_a_newcomer_does_not_disturb_those_under_way(one_thread: None) -> None:
    generator = UnetGenerator()
    engine, made = Engine(generator, 4), []
    engine.submit(MIXED[0])
    made += engine.step()
    engine.submit(MIXED[1])
    engine.submit(MIXED[3])
    made += engine.step()
    while engine.running:
        made += engine.step()
    for index, image in pixels(made).items():
        alone = pixels(list(Engine(generator, 4).run([MIXED[index]])))
        np.testing.assert_array_equal(image, alone[index])


def test_batch_shapes_stay_while_images_come_and_go() -> None:
    generator = UnetGenerator()
    list(Engine(generator, 5, rows=5, decode_rows=3).run(MIXED))
    assert set(generator.batches) == {5}
    assert set(generator.decoded) == {3}


def test_more_slots_than_rows_take_several_calls_and_idle_calls_are_none() -> None:
    generator = UnetGenerator()
    list(Engine(generator, 2 * CPU_ROWS).run(request(index, steps=3, scale=2.0) for index in range(CPU_ROWS // 2 + 1)))
    assert generator.batches == [CPU_ROWS] * 2 * 3
    generator.batches.clear()
    list(Engine(generator, 2 * CPU_ROWS).run(request(index, steps=3, scale=2.0) for index in range(CPU_ROWS // 2)))
    assert generator.batches == [CPU_ROWS] * 3


def test_decoding_waits_for_a_full_batch_until_no_other_image_of_the_size_is_to_come() -> None:
    generator = GaussianGenerator()
    engine = Engine(generator, 4, decode_rows=3)
    for index, steps in enumerate((1, 2, 3, 5)):
        engine.submit(request(index, steps=steps))
    made = [[f.request.index for f in engine.step()] for _ in range(5)]
    assert made == [[], [], [0, 1, 2], [], [3]]
    assert generator.decoded == [3, 3]


def test_few_images_are_decoded_at_once_where_that_is_asked_for() -> None:
    engine = Engine(GaussianGenerator(), 4, decode_rows=3, eager_below=2)
    for index, steps in enumerate((1, 2, 3, 5)):
        engine.submit(request(index, steps=steps))
    made = [[f.request.index for f in engine.step()] for _ in range(5)]
    # After the third step only image 3 is on its way: one fewer than two.
    assert made == [[], [], [0, 1, 2], [], [3]]
    engine.submit(request(4, steps=1))
    engine.submit(request(5, steps=2))
    assert [[f.request.index for f in engine.step()] for _ in range(2)] == [[4], [5]]


def test_an_image_that_is_being_decoded_keeps_the_engine_busy() -> None:
    engine = Engine(GaussianGenerator(), 2, decode_rows=2)
    engine.submit(request(0, steps=1))
    engine.submit(request(1, steps=3))
    assert engine.step() == []
    assert (engine.waiting, engine.running, engine.busy) == (0, 1, True)
    made = [f.request.index for _ in range(2) for f in engine.step()]
    assert made == [0, 1]
    assert not engine.busy
    assert engine.step() == []


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_cancelled_image_leaves_its_slots_and_disturbs_nobody(one_thread: None, steps_before: int) -> None:
    """Cancelled while it waits, while it runs, and while it waits for company in the decoder."""
    generator = UnetGenerator()
    engine = Engine(generator, 2, decode_rows=2)
    others = [request(0, steps=6), request(2, steps=6)]
    unwanted = request(1, steps=3)
    for each in (others[0], unwanted, others[1]):
        engine.submit(each)
    made = [finished for _ in range(steps_before) for finished in engine.step()]
    assert engine.cancel(unwanted)
    assert not engine.cancel(unwanted)
    while engine.busy:
        made += engine.step()
    assert sorted(pixels(made)) == [0, 2]
    for each in others:
        [alone] = Engine(generator, 2).run([each])
        np.testing.assert_array_equal(pixels(made)[each.index], alone.image)


def test_cancelling_frees_slots_at_once_and_an_equal_request_is_another() -> None:
    engine = Engine(GaussianGenerator(), 2)
    first, twin = request(0, scale=2.0), request(0, scale=2.0)
    engine.submit(first)
    engine.step()
    assert engine.free_slots() == 0
    assert not engine.cancel(twin)
    assert engine.cancel(first)
    assert engine.free_slots() == 2
    assert not engine.busy


def test_images_of_other_sizes_have_batches_of_their_own_that_take_turns(one_thread: None) -> None:
    generator = UnetGenerator()
    small, wide = (4, 8, 8), (4, 8, 16)
    wanted = [request(0, steps=4), request(1, steps=2, shape=wide), request(2, steps=4, shape=small), request(3)]
    engine = Engine(generator, 4, decode_rows=1)
    for each in wanted:
        engine.submit(each)
    assert engine.free_slots(wide) == 4
    finished = [[f.request.index for f in engine.step()] for _ in range(6)]
    assert finished == [[], [], [], [1], [], [0, 2, 3]]
    made = pixels(list(Engine(generator, 3).run(wanted)))
    assert made[1].shape == (1, 8, 16)
    assert made[2].shape == (1, 8, 8)
    [alone] = Engine(generator, 3).run([wanted[1]])
    np.testing.assert_array_equal(made[1], alone.image)


def test_decoding_never_mixes_sizes() -> None:
    generator = GaussianGenerator()
    shapes = [(1, 4, 4), (1, 8, 8)] * 4
    made = Engine(generator, 8, decode_rows=8).run(request(i, shape=shape) for i, shape in enumerate(shapes))
    assert {f.request.index: f.image.shape for f in made} == dict(enumerate(shapes))
    assert generator.decoded == [8, 8]


def test_a_size_that_the_generator_cannot_make_is_refused() -> None:
    engine = Engine(GaussianGenerator(), 4)
    with pytest.raises(RecipeError, match="no latents of"):
        engine.submit(request(0, shape=(3, 4, 4)))
    assert not engine.busy


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_engine_equals_a_plain_loop_over_one_image(solver: str, scale: float) -> None:
    generator = UnetGenerator()
    wanted = request(5, steps=6, scale=scale, level=0.8)
    plan = trajectory(solver, generator.schedule, 6)  # type: ignore[arg-type]
    latents = torch.from_numpy(gaussian_noise(9, 5, (1, 4, 8, 8)))
    previous = torch.zeros_like(latents)
    with torch.inference_mode():
        for timestep, (from_latent, from_output, keep, data, before) in zip(
            plan.timesteps, plan.coefficients, strict=True
        ):
            time = torch.tensor([timestep])
            output = generator.denoise(latents, time, generator.condition([wanted.attributes]))
            if scale != 1.0:
                blind = generator.denoise(latents, time, generator.null_condition(1))
                output = blind + scale * (output - blind)
            predicted = from_latent * latents + from_output * output
            latents, previous = keep * latents + data * predicted + before * previous, predicted
        expected = generator.decode(latents)[0].numpy()
    [made] = Engine(generator, 3, solver).run([wanted])  # type: ignore[arg-type]
    np.testing.assert_allclose(made.image, expected, atol=2e-5)


def test_guidance_of_one_is_the_conditional_model_alone() -> None:
    class Deaf(UnetGenerator):
        def null_condition(self, batch: int) -> torch.Tensor:
            return super().null_condition(batch) * torch.nan

    [made] = Engine(Deaf(), 2).run([request(0, scale=1.0)])
    [plain] = Engine(UnetGenerator(), 2).run([request(0, scale=1.0)])
    np.testing.assert_array_equal(made.image, plain.image)


def test_guidance_of_one_costs_half() -> None:
    def calls(scale: float) -> int:
        engine = Engine(GaussianGenerator(), 4)
        assert len(list(engine.run(request(i, steps=5, scale=scale) for i in range(8)))) == 8
        return engine.steps

    assert calls(1.0) == 10
    assert calls(2.0) == 20


def test_guidance_moves_images_away_from_the_unconditional_level() -> None:
    def brightness(scale: float) -> float:
        requests = (request(i, steps=20, scale=scale, level=0.6) for i in range(32))
        return float(np.mean([f.image for f in Engine(GaussianGenerator(), 16).run(requests)]))

    assert brightness(1.0) == pytest.approx(0.6, abs=0.02)
    assert brightness(2.0) == pytest.approx(0.7, abs=0.02)


def test_images_of_a_perfect_denoiser_are_distributed_as_its_data() -> None:
    made = np.stack([f.image for f in Engine(GaussianGenerator(), 64).run(request(i, steps=30) for i in range(256))])
    assert made.mean() == pytest.approx(MEAN, abs=4 * SPREAD / np.sqrt(made.size))
    assert made.std() == pytest.approx(SPREAD, rel=0.05)


def test_a_freed_slot_serves_the_next_image_at_the_next_step() -> None:
    engine = Engine(GaussianGenerator(), 2, decode_rows=1)
    for index, steps in ((0, 6), (1, 2), (2, 3)):
        engine.submit(request(index, steps=steps))
    finished = [[f.request.index for f in engine.step()] for _ in range(6)]
    assert finished == [[], [1], [], [], [2], [0]]


def test_requests_are_drawn_only_when_there_is_room_for_them() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[ImageRequest]:
        for index in range(1_000):
            drawn.append(index)
            yield request(index, steps=2)

    run = Engine(GaussianGenerator(), 4).run(endless())
    for _ in range(4):
        next(run)
    assert len(drawn) <= 12


def test_steps_outside_the_schedule_are_refused() -> None:
    with pytest.raises(RecipeError, match="1 to 1000"):
        Engine(GaussianGenerator(), 4).submit(request(0, steps=1001))


def test_a_guided_image_on_a_single_slot_is_refused() -> None:
    with pytest.raises(RecipeError, match="set slots to 2"):
        Engine(GaussianGenerator(), 1).submit(request(0, scale=2.0))


def test_a_request_that_cannot_be_conditioned_keeps_no_slot() -> None:
    class Choosy(GaussianGenerator):
        def condition(self, attributes: Sequence[Attributes]) -> torch.Tensor:
            if attributes[0].get("level") == 9.0:
                raise RecipeError("no such level")
            return super().condition(attributes)

    engine = Engine(Choosy(), slots=2)
    for index in range(3):
        with pytest.raises(RecipeError, match="no such level"):
            list(engine.run([request(index, scale=2.0, level=9.0)]))
    assert len(list(engine.run([request(0, scale=2.0)]))) == 1


def test_pixels_that_are_not_numbers_are_refused() -> None:
    class Diverged(GaussianGenerator):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents * torch.nan

    with pytest.raises(ArtefactError, match="image 3 "):
        list(Engine(Diverged(), 2).run([request(3)]))


def test_pixels_that_are_not_numbers_cost_the_others_nothing() -> None:
    class Damaged(GaussianGenerator):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            self.decoded.append(len(latents))
            return torch.where(torch.arange(len(latents)).reshape(-1, 1, 1, 1) == 1, torch.nan, latents)

    engine = Engine(Damaged(), 3, decode_rows=3)
    for index in range(3):
        engine.submit(request(index, steps=1))
    assert [f.request.index for f in engine.step()] == [0]
    with pytest.raises(ArtefactError, match="image 1 "):
        engine.step()
    assert [f.request.index for f in engine.step()] == [2]


def test_a_network_that_mixes_rows_is_found(one_thread: None) -> None:
    class Mixing(UnetGenerator):
        def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            mixed = latents + 1e-6 * torch.cumsum(latents, dim=0)
            return super().denoise(mixed, timesteps, condition)

    class Averaging(UnetGenerator):
        """Whatever the order of the rows."""

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return super().decode(latents) + 1e-6 * latents.double().mean().round(decimals=9).float()

    assert is_batch_invariant(UnetGenerator(), 6, rows=6, decode_rows=4)
    assert not is_batch_invariant(Mixing(), 6, rows=6)
    assert not is_batch_invariant(Averaging(), 6, decode_rows=4)
