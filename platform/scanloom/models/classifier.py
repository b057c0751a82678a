"""The classifier that tells what images are worth for training: MONAI's DenseNet, small, or a line on given vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

DEFAULT = "DenseNet of MONAI"
ON_VECTORS = "linear layer on"


def build_classifier(shape: Sequence[int], outputs: int) -> nn.Module:
    """A network that gives logits [B, outputs] of squares [B, 1, S, S] in [-1, 1] (`shape` is (S, S)), or of vectors.

    The DenseNet (Huang et al. 2017) has three blocks of growth 8, about 11,000 weights: it trains in seconds on one
    core. It is drawn from torch's generator.
    """
    if len(shape) == 1:
        # Vectors of a given network come in any scale.
        return nn.Sequential(nn.BatchNorm1d(shape[0], affine=False), nn.Linear(shape[0], outputs))
    # Takes seconds to import, which only who trains has to wait for.
    from monai.networks.nets.densenet import DenseNet

    network: nn.Module = DenseNet(
        spatial_dims=2, in_channels=1, out_channels=outputs, init_features=16, growth_rate=8, block_config=(2, 2, 2),
        bn_size=2,
    )  # fmt: skip
    return network


def takes(inputs_BX: Tensor) -> Tensor:
    """Inputs as the network takes them: vectors as they are, squares [B, S, S] in [0, 1] as [-1, 1]."""
    return inputs_BX if inputs_BX.ndim == 2 else inputs_BX[:, None] * 2.0 - 1.0
