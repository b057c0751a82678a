"""Radiomic features of images, by the extra `frd`: what radiologists' software measures, and no network learned."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom.artefact import plan_digest
from scanloom.errors import RecipeError
from scanloom.shards.writer import png_bytes

INSTALL = (
    "audit.fidelity.radiomics: the extra `frd` is not installed; "
    "pip install setuptools wheel numpy, then pip install --no-build-isolation 'scanloom[frd]'"
)


class Radiomics:
    """The features of the Fréchet Radiomic Distance, version 1 (Konz et al. 2026), about a second an image.

    First-order and texture features of the image and of its wavelet bands, as frd-score sets pyradiomics up.
    RecipeError where these are not installed.
    """

    def __init__(self, size_px: int) -> None:
        try:
            frd: Any = import_module("frd_score.frd")
            self._extractor: Any = frd.get_feature_extractor()
        except ImportError as error:
            raise RecipeError(INSTALL) from error
        self._features: Any = frd.process_image_mask_pair
        logging.getLogger("radiomics").setLevel(logging.ERROR)
        self.size_px = size_px
        self.name = f"radiomics (frd-score {version('frd-score')})"
        self.digest = plan_digest("radiomics", version("frd-score"), version("pyradiomics"), size_px)

    def __call__(self, squares_NSS: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [N, D], in no common unit, of squares in [0, 1]; see `scale`."""
        with tempfile.TemporaryDirectory(prefix="scanloom-radiomics-") as folder:
            found = [self._of(square, Path(folder) / "image.png") for square in squares_NSS]
        return np.array(found, dtype=np.float32)

    def _of(self, square_SS: NDArray[np.float32], file: Path) -> list[float]:
        file.write_bytes(png_bytes(np.round(square_SS * 255.0).astype(np.uint8)))
        values: list[float] = self._features((str(file), None), feature_extractor=self._extractor)[0]
        return values

    @staticmethod
    def scale(reference_MD: NDArray[Any]) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
        """A function that brings features to mean 0 and deviation 1 of the reference's, without those it has once."""
        reference = np.asarray(reference_MD, dtype=np.float64)
        mean, deviation = reference.mean(axis=0), reference.std(axis=0)
        kept = np.isfinite(mean) & (deviation > 1e-9 * np.abs(mean).clip(min=1e-9))
        return lambda values_ND: (np.asarray(values_ND, np.float64)[:, kept] - mean[kept]) / deviation[kept]
