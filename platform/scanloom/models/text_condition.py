"""Prompts to conditions: the base model's own tokenizers and text encoders, never trained.

Legend of shape suffixes: N prompts, L tokens, D token width, P pooled width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from scanloom.errors import ArtefactError
from scanloom.models.base_weights import family_of
from scanloom.recipe_denoiser import Family

T5_TOKENS = 77
"""What SD3 was trained with (Esser et al. 2024, section 5.3.2); longer ones cost storage for every prompt."""


class TextConditioner:
    """The text encoders of a folder in diffusers layout: CLIP (sd), two CLIPs (sdxl), two and T5 if there (sd3).

    Raises ArtefactError where the folder is of no such family or a part cannot be read; `where` names it there.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu", where: str | None = None) -> None:
        self.device = torch.device(device)
        self.family, index = family_of(folder, where)
        # SDXL's base was trained with zeros where there was no text, and its pipeline says so.
        self._zeros_for_nothing = self.family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt"))
        has_t5 = bool(index.get("text_encoder_3", [None])[0])
        self._clips: list[_Encoder] = []
        self._t5: _Encoder | None = None
        self._joint_width = 0
        try:
            for suffix, model in _clips(self.family):
                self._clips.append(_Encoder(folder, suffix, model, self.device))
            if self.family == "sd3":
                self._joint_width = json.loads((folder / "transformer" / "config.json").read_bytes())[
                    "joint_attention_dim"
                ]
                self._t5 = _Encoder(folder, "_3", T5EncoderModel, self.device) if has_t5 else None
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split()).replace(str(folder), where or str(folder))
            raise ArtefactError(f"{where or folder}: a text encoder cannot be read: {reason[:200]}") from error

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`tokens` [N, L, D] and, for sdxl and sd3, `pooled` [N, P], float32, of the texts.

        The empty prompt's are the null condition.
        """
        if self.family == "sd":
            return {"tokens": self._clips[0].final(prompts)}
        tokens, pooled = zip(*(clip.penultimate(prompts) for clip in self._clips), strict=True)
        if self.family == "sd3":
            return {"tokens": self._joined(prompts, torch.cat(tokens, dim=-1)), "pooled": torch.cat(pooled, dim=-1)}
        # The first CLIP of sdxl has no projection; its pipeline takes the second's.
        made = {"tokens": torch.cat(tokens, dim=-1), "pooled": pooled[1]}
        if self._zeros_for_nothing:
            for row in (row for row, text in enumerate(prompts) if not text):
                made["tokens"][row], made["pooled"][row] = 0.0, 0.0
        return made

    def _joined(self, prompts: Sequence[str], clip_NLD: Tensor) -> Tensor:
        """CLIP's tokens, padded to the transformer's width, then T5's, or zeros in their place."""
        padded_NLD = nn.functional.pad(clip_NLD, (0, self._joint_width - clip_NLD.shape[-1]))
        if self._t5 is None:
            t5_NLD = clip_NLD.new_zeros(len(prompts), T5_TOKENS, self._joint_width)
        else:
            t5_NLD = self._t5.final(prompts, T5_TOKENS)
        return torch.cat([padded_NLD, t5_NLD], dim=1)


class _Encoder:
    """One tokenizer and its text encoder."""

    def __init__(self, folder: Path, suffix: str, model: Any, device: torch.device) -> None:
        # Neither a job's log nor its own progress bar is a place for them.
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}", local_files_only=True)
        encoder = model.from_pretrained(folder / f"text_encoder{suffix}", local_files_only=True, dtype=torch.float32)
        self._model: Any = encoder.eval().requires_grad_(False).to(device)
        self._device = device

    def final(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """The last layer's states [N, L, D]; `length` tokens, or as many as the tokenizer has room for."""
        states: Tensor = self._model(*self._tokens(prompts, length), return_dict=False)[0]
        return states.float()

    def penultimate(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The last layer's but one states [N, L, D], and the pooled text [N, P] where the encoder projects it."""
        out = self._model(*self._tokens(prompts, None), output_hidden_states=True)
        return out.hidden_states[-2].float(), out[0].float()

    def _tokens(self, prompts: Sequence[str], length: int | None) -> tuple[Tensor, Tensor | None]:
        read = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length or self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        masked = getattr(self._model.config, "use_attention_mask", False)
        return read.input_ids.to(self._device), read.attention_mask.to(self._device) if masked else None


def _clips(family: Family) -> tuple[tuple[str, Any], ...]:
    """Suffix of the folders, and class, of each CLIP."""
    first = CLIPTextModelWithProjection if family == "sd3" else CLIPTextModel
    second = (("_2", CLIPTextModelWithProjection),)
    return (("", first), *(second if family != "sd" else ()))
