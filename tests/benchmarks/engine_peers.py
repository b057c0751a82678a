"""What the engine is compared with, written by hand as one would without it: PyTorch, diffusers and pydicom alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor


@torch.inference_mode()
def bare_loop(
    unet: Any, vae: Any, schedule: dict[str, Any], noise: Tensor, told: Tensor, null: Tensor, scale: float,
    steps: int, batch: int,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Images of a whole batch at a time; `batch` counts rows, of which a guided image takes two."""
    scheduler = DPMSolverMultistepScheduler.from_config(schedule, timestep_spacing="trailing")
    images = batch if scale == 1.0 else batch // 2
    for start in range(0, len(noise), images):
        latents, condition = noise[start : start + images], told[start : start + images]
        scheduler.set_timesteps(steps)
        if scale != 1.0:
            condition = torch.cat([null.expand(len(condition), -1, -1), condition])
        for timestep in scheduler.timesteps:
            rows = latents if scale == 1.0 else torch.cat([latents, latents])
            output = unet(rows, timestep, condition, class_labels=condition.flatten(1), return_dict=False)[0]
            if scale != 1.0:
                blind, aware = output.chunk(2)
                output = blind + scale * (aware - blind)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        yield _decoded(vae, latents)


@torch.inference_mode()
def static_batches(
    unet: Any, vae: Any, schedule: dict[str, Any], noise: Tensor, told: Tensor, steps: Sequence[int], batch: int
) -> Iterator[np.ndarray]:
    """Each image with its own number of DDIM steps, without guidance: a batch ends with its longest image."""
    signal = DDIMScheduler.from_config(schedule).alphas_cumprod.double()
    for start in range(0, len(noise), batch):
        latents, condition = noise[start : start + batch].clone(), told[start : start + batch]
        rows = [_ddim_rows(signal, count) for count in steps[start : start + batch]]
        for step in range(max(len(row) for row in rows)):
            now = torch.stack([row[min(step, len(row) - 1)] for row in rows])
            output = unet(latents, now[:, 0].long(), condition, class_labels=condition.flatten(1), return_dict=False)[0]
            alpha, sigma, alpha_next, sigma_next = (now[:, n].float().reshape(-1, 1, 1, 1) for n in range(1, 5))
            data, epsilon = alpha * latents - sigma * output, alpha * output + sigma * latents
            going_on = torch.tensor([step < len(row) for row in rows]).reshape(-1, 1, 1, 1)
            latents = torch.where(going_on, alpha_next * data + sigma_next * epsilon, latents)
        yield _decoded(vae, latents)


def _ddim_rows(signal: Tensor, steps: int) -> Tensor:
    """[steps, 5]: timestep, and alpha and sigma now and next."""
    timesteps = np.round(len(signal) - np.arange(steps) * (len(signal) / steps)).astype(np.int64) - 1
    alpha = np.append(np.sqrt(signal.numpy()[timesteps]), 1.0)
    sigma = np.sqrt(1.0 - alpha**2)
    return torch.from_numpy(np.stack([timesteps, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]], axis=1))


def _decoded(vae: Any, latents: Tensor) -> np.ndarray:
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(latents).sample.mean(1) * 0.5 + 0.5).clamp(0.0, 1.0).numpy()


def open_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_script(pipeline: Any, to: Path, prompts: Sequence[str], steps: int, batch: int) -> None:
    """For every image of the pipeline a pydicom data set in a file, and a PNG beside it."""
    to.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        images = pipeline(
            texts, num_inference_steps=steps, guidance_scale=2.0, output_type="np",
            generator=[torch.Generator().manual_seed(start + n) for n in range(len(texts))],
        ).images  # fmt: skip
        for number, image in enumerate(images, start):
            save_one(image.mean(-1), to, number)


def save_one(image: np.ndarray, to: Path, number: int) -> None:
    """One image [H, W] in [0, 1] as DICOM and as PNG."""
    from PIL import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    pixels = np.rint(image * 255.0).astype(np.uint8)
    written = Dataset()
    written.file_meta = FileMetaDataset()
    written.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    written.file_meta.MediaStorageSOPClassUID = written.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    written.file_meta.MediaStorageSOPInstanceUID = written.SOPInstanceUID = generate_uid()
    written.StudyInstanceUID, written.SeriesInstanceUID = generate_uid(), generate_uid()
    written.PatientID, written.PatientName, written.Modality = f"synthetic-{number}", f"Synthetic^{number}", "DX"
    written.Rows, written.Columns = pixels.shape
    written.SamplesPerPixel, written.PhotometricInterpretation = 1, "MONOCHROME2"
    written.BitsAllocated, written.BitsStored, written.HighBit, written.PixelRepresentation = 8, 8, 7, 0
    written.PixelData = pixels.tobytes()
    written.save_as(to / f"{number:06d}.dcm", enforce_file_format=True)
    Image.fromarray(pixels).save(to / f"{number:06d}.png")
