"""training.given_weights: parts of a base model, from a folder or a bucket."""

from __future__ import annotations

from pathlib import Path

from scanloom.store import Store
from scanloom.training.given_weights import autoencoder_digest, fetch_text_encoders, text_digest
from tests.tiny_families import write_base


def test_text_encoders_in_a_bucket_are_those_of_the_folder_and_no_denoiser_is_fetched(
    store_uri: str, tmp_path: Path
) -> None:
    base = write_base("sd3", tmp_path / "base")
    Store(store_uri).put_folder(base)
    fetched = fetch_text_encoders(store_uri, tmp_path / "fetched")
    assert {path.name for path in fetched.iterdir()} == {
        "model_index.json", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3",
        "tokenizer", "tokenizer_2", "tokenizer_3",
    }  # fmt: skip
    assert not list((fetched / "transformer").glob("*.safetensors"))
    assert text_digest(store_uri) == text_digest(str(base))
    assert autoencoder_digest(store_uri) == autoencoder_digest(str(base))


def test_the_digest_of_text_encoders_changes_with_them_alone(tmp_path: Path) -> None:
    base = write_base("sd", tmp_path / "base")
    before = text_digest(str(base))
    for part in ("unet", "vae"):
        (base / part / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    assert text_digest(str(base)) == before
    (base / "text_encoder" / "model.safetensors").write_bytes(b"other")
    assert text_digest(str(base)) != before
