from collections.abc import Sequence

from torch import Tensor

def compute_ssim_and_cs(
    y_pred: Tensor,
    y: Tensor,
    spatial_dims: int,
    kernel_size: Sequence[int],
    kernel_sigma: Sequence[float],
    data_range: float = ...,
) -> tuple[Tensor, Tensor]: ...
