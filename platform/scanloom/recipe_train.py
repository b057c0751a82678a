"""What a recipe says of training: the autoencoder, the latents, and the denoiser's run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from scanloom.recipe_denoiser import AttributeUnet, Denoiser
from scanloom.section import Count, Fraction, Positive, Section


class Autoencoder(Section):
    """AutoencoderKL: taken from `path` (a diffusers folder, local or in a store), or trained on the corpus."""

    path: str | None = None
    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 64, 64)
    layers_per_block: Count = 1
    latent_channels: Count = 4
    steps: Count = 600
    batch_size: Count = 32
    learning_rate: Positive = 1e-3
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    adversarial_weight: Annotated[float, Field(ge=0)] = 0.05
    adversarial_from_step: Annotated[int, Field(ge=0)] = 400
    precision: Literal["fp32", "bf16"] = "fp32"
    max_scans: Count = 20000
    """Scans of the train split that it is trained on; more teach an autoencoder little."""
    workers: Count = 2
    cpus_per_worker: Count = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 3
    checkpoint_every_steps: Count = 200

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of workers {self.workers}")
        return self


class Encode(Section):
    batch_size: Count = 64
    workers: Count = 2
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0


class Finetune(Section):
    denoiser: Denoiser = AttributeUnet()
    start_from: str | None = None
    """URI of a generator whose weights to start from; its attribute schema must equal the corpus's."""
    objective: Literal["v_prediction", "epsilon"] = "v_prediction"
    min_snr_gamma: Positive | None = 5.0
    condition_dropout: Fraction = 0.1
    attribute_dropout: Fraction = 0.05
    steps: Count = 1500
    batch_size: Count = 64
    """Images per optimizer step, over all workers."""
    gradient_accumulation: Count = 1
    learning_rate: Positive = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    zero_stage: Literal[0, 1, 2] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Count = 2
    cpus_per_worker: Count = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 3
    checkpoint_every_steps: Count = 250
    keep_checkpoints: Count = 2
    log_every_steps: Count = 25

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % (self.workers * self.gradient_accumulation):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of workers {self.workers} "
                f"x gradient_accumulation {self.gradient_accumulation}"
            )
        return self
