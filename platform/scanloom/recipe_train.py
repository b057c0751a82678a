"""What a recipe says of training: the autoencoder, the latents, and the denoiser's run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from scanloom.recipe_denoiser import AttributeUnet, Denoiser
from scanloom.section import Count, DataParallel, Fraction, Positive, Section


class Autoencoder(DataParallel):
    """AutoencoderKL: taken as it is, trained on from given weights, or trained on the corpus from nothing.

    Weights are given as a diffusers folder, local or in a store, that holds them itself or in `vae/`, so that a base
    model and a generator will do. A text family without `path` or `start_from` takes the one of its base weights.
    """

    path: str | None = None
    """Taken as it is."""
    start_from: str | None = None
    """Trained on from here; its own size counts, not `channels`, `layers_per_block` and `latent_channels`."""
    decoder_only: bool = False
    """Of `start_from`, leave the encoder alone, so that latents stay those that a pretrained denoiser knows."""
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

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path and self.start_from:
            raise ValueError("path takes an autoencoder as it is, start_from trains it on; give one of them")
        if self.decoder_only and not self.start_from:
            raise ValueError("decoder_only needs start_from: an encoder that nobody trained encodes nothing")
        return self


class Canaries(Section):
    """Scans that a trial training sees several times as often: an audit then says how often it takes to be copied.

    For a trial: what is seen often is learned by heart, and such a generator should not be released.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Of the train split's scans, chosen by their ids."""
    times: Annotated[tuple[Count, ...], Field(min_length=1)] = (4, 16, 64)
    """How often each of them is there, in turn."""


class Encode(Section):
    """Scans and prompts to latents. Each view of a scan is a row of its own; validation has the plain view alone."""

    batch_size: Count = 64
    """Views that pass the autoencoder together."""
    prompt_batch_size: Count = 32
    """Prompts that pass the text encoders together."""
    workers: Count = 2
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the autoencoder's weights and activations; latents are stored as fp16."""
    crops: Annotated[int, Field(ge=0, le=64)] = 0
    """Views beside the plain one, each a square cut at a place drawn from the seed and resized to the scan's size."""
    crop_share: Annotated[float, Field(ge=0.5, le=1.0)] = 0.9
    """The least share of the side that a crop keeps."""
    flips: bool = False
    """Add the mirror image, left to right, of every view."""
    laterality_matters: bool = True
    """Organs lie on one side: only `false` allows flips."""
    canaries: Canaries | None = None

    @model_validator(mode="after")
    def _one_sided(self) -> Self:
        if self.flips and self.laterality_matters:
            raise ValueError(
                "flips puts a heart on the right; leave it out, or say laterality_matters: false where sides are alike"
            )
        return self


class Finetune(Section):
    denoiser: Denoiser = AttributeUnet()
    start_from: str | None = None
    """URI of a generator whose weights to start from; its attribute schema must equal the corpus's."""
    objective: Literal["v_prediction", "epsilon", "flow"] = "v_prediction"
    zero_terminal_snr: bool = False
    """The last timestep is pure noise (Lin et al. 2024); flow is so by itself, epsilon cannot be."""
    timestep_density: Literal["uniform", "logit-normal"] = "uniform"
    min_snr_gamma: Positive | None = 5.0
    condition_dropout: Fraction = 0.1
    attribute_dropout: Fraction = 0.05
    steps: Count = 1500
    batch_size: Count = 64
    """Images per optimizer step, over all workers."""
    gradient_accumulation: Count = 1
    learning_rate: Positive = 5e-4
    learning_rate_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up; cosine and linear end at a tenth."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    """Keep the optimizer's state and its work on the CPU; from ZeRO stage 1 on."""
    offload_parameters: bool = False
    """Keep the weights on the CPU, but for the layer at work; ZeRO stage 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    workers: Count | tuple[Count, Count] = 2
    """[least, most]: as many as the cluster has room for, more or fewer as it grows and shrinks."""
    cpus_per_worker: Count = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 3
    checkpoint_every_steps: Count = 250
    keep_checkpoints: Count = 2
    log_every_steps: Count = 25
    samples: Annotated[int, Field(ge=0)] = 16
    """Images drawn at every checkpoint, for the sample grid and the copy rate."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        least, most = self.worker_range
        if least > most:
            raise ValueError(f"workers [{least}, {most}]: the least comes first")
        for workers in range(least, most + 1):
            if self.batch_size % (workers * self.gradient_accumulation):
                raise ValueError(
                    f"batch_size {self.batch_size} is not a multiple of workers {workers} "
                    f"x gradient_accumulation {self.gradient_accumulation}"
                )
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.zero_terminal_snr and self.objective == "epsilon":
            raise ValueError(
                "zero_terminal_snr: epsilon says nothing of the image where all is noise; set objective: v_prediction"
            )
        if self.timestep_density == "logit-normal" and self.objective != "flow":
            raise ValueError("timestep_density: logit-normal is for objective: flow")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        return self
