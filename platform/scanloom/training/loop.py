"""The denoiser's training loop: what every Ray Train worker runs under DeepSpeed."""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from scanloom.artefact import RECORD, FileEntry, open_artefact
from scanloom.errors import RecipeError, StoreError
from scanloom.heap import keep_freed_memory
from scanloom.models.autoencoder import load_autoencoder
from scanloom.models.card import GeneratorCard
from scanloom.models.family import fetch_weights, initial_denoiser, save_generator, schedule_of
from scanloom.recipe import Finetune
from scanloom.store import Store
from scanloom.training import engine
from scanloom.training.batches import Ahead, Batch, Batches
from scanloom.training.checkpoint import SavedState, write_part
from scanloom.training.draws import positions
from scanloom.training.ema import Ema
from scanloom.training.evaluation import Evaluation, over_workers, row_errors
from scanloom.training.journal import Journal, read_history, read_samples
from scanloom.training.latents import read_latents
from scanloom.training.meter import Meter, peak_flops, train_flops
from scanloom.training.partition import Partition
from scanloom.training.report import training_report

JOURNAL = "journal"


class FinetuneJob(BaseModel):
    """What a worker is told; everything else it reads from the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Finetune
    seed: int
    card: GeneratorCard
    """The card of the generator to be made; `trained_steps` is the number of steps to reach."""
    autoencoder_uri: str
    latents_uri: str
    generator_uri: str

    @property
    def weights(self) -> str | None:
        """What training starts from: a generator, or the base model of a text family; None for nothing."""
        return self.recipe.start_from or getattr(self.recipe.denoiser, "weights", None)


def train_denoiser(config: dict[str, Any]) -> dict[str, Any]:
    """Train a denoiser to its last step and write the generator's folder into the store.

    `config` is a FinetuneJob as a dict. Metrics are reported every `log_every_steps`, checkpoints by all workers
    together. Returns the last metrics and, from worker 0, the written files as `files`; or why the recipe cannot be
    trained as `refused`, which another attempt would not change.
    """
    job = FinetuneJob.model_validate(config)
    torch.set_num_threads(job.recipe.cpus_per_worker)
    if not job.recipe.use_gpu:
        keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="scanloom-finetune-") as scratch:
        try:
            return Run(job, Path(scratch)).train()
        except RecipeError as error:
            return {"refused": str(error)}


class Run:
    """One worker's part of a run, from its start or its last checkpoint."""

    def __init__(self, job: FinetuneJob, scratch: Path) -> None:
        self.job, self.recipe, self.scratch = job, job.recipe, scratch
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.schedule = schedule_of(
            job.recipe.denoiser, job.recipe.objective, zero_terminal_snr=job.recipe.zero_terminal_snr
        )
        self.start = fetch_weights(job.weights, scratch / "start") if job.weights else None
        open_artefact(job.autoencoder_uri, "autoencoder").fetch(scratch / "autoencoder")
        self.vae: AutoencoderKL = load_autoencoder(scratch / "autoencoder" / "vae", job.autoencoder_uri)
        self.batches, self.held_out = self._batches("train"), self._batches("validation")
        denoiser = initial_denoiser(job.recipe.denoiser, job.card, job.seed, self.start)
        self.weights = sum(parameter.numel() for parameter in denoiser.parameters())
        self.trained = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)
        self.meter = self._meter(denoiser)
        with ExitStack() as stack:
            checkpoint = ray.train.get_checkpoint()
            saved = folder = None
            if checkpoint is not None:
                folder = Path(stack.enter_context(checkpoint.as_directory()))
                saved = SavedState(folder)
                saved.restore_weights(denoiser)
            self.model = engine.start(job.recipe, denoiser)
            self.partition = Partition.of(self.model.engine)
            self.ema = Ema([flat.values for flat in self.partition.owned], job.recipe.ema_decay)
            if saved is not None:
                saved.restore(self.partition, self.ema)
            self.metrics: dict[str, Any] = saved.metrics if saved is not None else {"step": 0}
            self.journal = self._journal(folder / JOURNAL if folder is not None else None)
        self.evaluation = Evaluation(
            self.model, self.batches, self.held_out, self.schedule, self.vae, job.seed, job.recipe.samples,
            self.rank, self.workers,
        )  # fmt: skip

    def train(self) -> dict[str, Any]:
        """Train to the last step and release the generator; the last metrics."""
        recipe = self.recipe
        step = since = int(self.metrics["step"])
        ahead = Ahead(self._step_batches, recipe.steps)
        summed = torch.zeros((), device=self.model.device)
        self.meter.begin()
        while step < recipe.steps:
            with self.meter.waiting():
                batches = ahead.at(step)
            summed += self._step(batches, step)
            step += 1
            saving = step % recipe.checkpoint_every_steps == 0 or step == recipe.steps
            if saving or step % recipe.log_every_steps == 0:
                self._note(step, summed / (step - since))
                since, summed = step, torch.zeros_like(summed)
                if saving:
                    self._evaluate(step)
                    self._report_checkpoint()
                    self.meter.begin()
                else:
                    self._report(None)
        # Also where a resumed run finds all its steps done: what it had written may be gone.
        return self.metrics | {"files": [entry.model_dump() for entry in self._release()]}

    def _step_batches(self, step: int) -> list[Batch]:
        where = positions(step, self.recipe.batch_size, self.rank, self.workers)
        share = len(where) // self.recipe.gradient_accumulation
        made = [self.batches.at(where[start : start + share]) for start in range(0, len(where), share)]
        return [batch.map(Tensor.pin_memory) for batch in made] if self.recipe.use_gpu else made

    def _step(self, batches: list[Batch], step: int) -> Tensor:
        under = self.model.engine
        for group in under.optimizer.param_groups:
            # Set at every step and not by a scheduler object, whose first step after a resume has the initial rate.
            group["lr"] = self.recipe.learning_rate * engine.learning_rate_factor(self.recipe, step)
        total = torch.zeros((), device=self.model.device)
        for batch in batches:
            weight_B = batch.weight_B.to(self.model.device, non_blocking=True)
            loss = (row_errors(self.model, batch) * weight_B).mean()
            self.model.learn(loss)
            total += loss.detach() / len(batches)
            self.meter.step(len(weight_B))
        self.ema.update()
        return total

    def _note(self, step: int, loss: Tensor) -> None:
        mean = float(over_workers(loss.clone())) / self.workers
        self._require_finite(mean, step)
        rate = self.recipe.learning_rate * engine.learning_rate_factor(self.recipe, step - 1)
        self.metrics = {"step": step, "loss": mean, "learning_rate": rate} | self.meter.window()

    def _evaluate(self, step: int) -> None:
        """Judge the averaged weights: those that are released."""
        unfit = [flat for flat in (*self.ema.shadow, *(f.values for f in self.partition.flats)) if not _finite(flat)]
        if over_workers(torch.tensor(len(unfit), device=self.model.device)):
            self._require_finite(math.nan, step, "a weight")
        self.model.engine.eval()
        with self.partition.showing(self.ema.shadow):
            self.metrics |= self.evaluation.losses()
            self._require_finite(self.metrics["held_out_loss"], step)
            if self.recipe.samples:
                figures, picture = self.evaluation.samples()
                self.metrics |= figures
                if self.journal is not None:
                    self.journal.picture(step, picture)
        self.model.engine.train()

    def _require_finite(self, value: float, step: int, what: str = "loss") -> None:
        """Raise RecipeError, on every worker at once, before anything is saved."""
        if not math.isfinite(value):
            rate = self.recipe.learning_rate
            raise RecipeError(f"{what} is {value} at step {step}; lower finetune.learning_rate (now {rate:g})")

    def _report_checkpoint(self) -> None:
        with tempfile.TemporaryDirectory(prefix="scanloom-checkpoint-") as folder:
            write_part(Path(folder), self.partition, self.ema, self.metrics, self.rank)
            self._report(Path(folder))

    def _report(self, folder: Path | None) -> None:
        if self.journal is not None:
            self.journal.write(self.metrics)
            if folder is not None:
                self.journal.save(folder / JOURNAL)
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        try:
            ray.train.report(self.metrics, checkpoint=checkpoint)
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise StoreError(
                f"the checkpoint of step {self.metrics['step']} cannot be written ({reason}); check the store's "
                "room and permissions and run again"
            ) from error

    def _release(self) -> list[FileEntry]:
        averaged = self.partition.gather(self.ema.shadow)
        if self.rank != 0:
            for _ in averaged:
                pass
            return []
        denoiser = initial_denoiser(self.recipe.denoiser, self.job.card, self.job.seed, self.start)
        parameters = dict(denoiser.named_parameters())
        with torch.no_grad():
            for name, value in averaged:
                parameters[name].copy_(value)
        folder = self.scratch / "generator"
        save_generator(folder, self.job.card, denoiser, self.vae, self.schedule, self.start)
        self._write_record(folder / RECORD)
        return [FileEntry.of(file) for file in Store(self.job.generator_uri).put_folder(folder)]

    def _write_record(self, folder: Path) -> None:
        assert self.journal is not None
        self.journal.close()
        self.journal.folder.rename(folder)
        recipe = self.recipe
        inputs = open_artefact(self.job.latents_uri, "latents").manifest.inputs
        corpora = [entry.digest[:12] for entry in inputs if entry.role == "corpus"]
        facts = {
            "Generator": f"{self.job.card.name} ({self.job.card.family})",
            "Trained weights": f"{self.trained / 1e6:.1f} of {self.weights / 1e6:.1f} million",
            "Corpus": ", ".join(corpora),
            "Training scans": str(len(self.batches.latents)),
            "Held-out scans": str(len(self.held_out.latents)),
            "Objective": recipe.objective,
            "Steps": f"{recipe.steps} of {recipe.batch_size} scans",
            "Workers": f"{self.workers}, ZeRO stage {recipe.zero_stage}, {recipe.precision}",
        }
        title = f"Training of {self.job.card.name}"
        text = training_report(read_history(folder), read_samples(folder), facts, title=title)
        (folder / "report.html").write_text(text, encoding="utf-8")

    def _batches(self, split: str) -> Batches:
        job = self.job
        latents = open_artefact(job.latents_uri, "latents")
        held = read_latents(latents, split, job.card.latent_shape, job.card.attributes)
        return Batches(job.recipe, job.seed, held, self.vae, self.schedule, len(job.card.attributes.declarations))

    def _meter(self, denoiser: nn.Module) -> Meter:
        device = ray.train.torch.get_device() if self.recipe.use_gpu else torch.device("cpu")
        peak = peak_flops(device, self.recipe.precision)
        flops = None
        if peak is not None:
            batch = self.batches.at([0])
            flops = train_flops(denoiser, batch.noisy_BCHW, batch.timesteps_B, batch.condition)
        return Meter(device, self.workers, flops_per_image=flops, peak_flops=peak)

    def _journal(self, saved: Path | None) -> Journal | None:
        if self.rank != 0:
            return None
        return Journal(self.scratch / JOURNAL, run=self.job.card.name, saved=saved, step=int(self.metrics["step"]))


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
