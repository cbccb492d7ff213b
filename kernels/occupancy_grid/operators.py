"""The native march as a PyTorch operator, with a fake kernel; it has no gradient."""

import torch
from torch import Tensor

from kernels.occupancy_grid import native


@torch.library.custom_op("gated_vision::occupancy_march", mutates_args=())
def occupancy_march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    jitter: Tensor,
    occupied: Tensor,
    box: Tensor,
    step: float,
    cone_angle: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.occupancy_grid.lattice.march`."""
    return native.march(origins, directions, near, far, jitter, occupied, box, step, cone_angle)


@occupancy_march.register_fake
def _(origins, *others):
    samples = torch.library.get_ctx().new_dynamic_size()
    start, end = (origins.new_empty(samples) for _ in range(2))
    return start, end, origins.new_empty(origins.shape[0] + 1, dtype=torch.int64)
