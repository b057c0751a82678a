from typing import Any

from torch import Tensor, nn

class PatchDiscriminator(nn.Module):
    def __init__(self, spatial_dims: int, channels: int, in_channels: int, num_layers_d: int, norm: Any) -> None: ...
    def forward(self, x: Tensor) -> list[Tensor]: ...
