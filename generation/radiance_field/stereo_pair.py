"""A photograph of a motorcycle and its right neighbour: the calibrated stereo pair that comes inside scikit-image.

Middlebury 2014, quarter size, 741 x 500 pixels; focal length, baseline and disparities as scikit-image documents them.
"""

import torch

from generation.radiance_field.cameras import Cameras
from generation.radiance_field.image_files import along_rays
from generation.radiance_field.scene import Scene

FOCAL_LENGTH = 994.978  # pixels
PRINCIPAL_POINT = (311.193, 254.877)  # of the left picture, in pixels
PRINCIPAL_SHIFT = 31.086  # of the right picture's principal point, in pixels to the right
BASELINE = 0.193001  # metres


def load_stereo_pair() -> Scene:
    """Two training frames in metres, the left camera in the origin; the left one's depth is known, by its disparity.

    Depth is focal length x baseline / (disparity + shift of the principal point). Nothing is held out.

    Raises:
        ValueError: scikit-image, or its data, is missing.
    """
    try:
        from skimage.data import stereo_motorcycle

        left, right, disparity = stereo_motorcycle()
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the stereo pair needs scikit-image and its data; pip install 'gated-vision-suite[data]': {error}"
        ) from error
    images = torch.stack([torch.from_numpy(left), torch.from_numpy(right)])
    height, width = images.shape[1:3]
    c2w = torch.eye(3, 4).repeat(2, 1, 1)
    c2w[1, 0, 3] = BASELINE
    centre_x, centre_y = PRINCIPAL_POINT
    intrinsics = torch.tensor(
        [[FOCAL_LENGTH, FOCAL_LENGTH, centre_x + shift, centre_y] for shift in (0, PRINCIPAL_SHIFT)]
    )
    cameras = Cameras(c2w, intrinsics, torch.full((2,), width), torch.full((2,), height))
    depth = FOCAL_LENGTH * BASELINE / (torch.from_numpy(disparity).double() + PRINCIPAL_SHIFT)
    depth = depth.where(torch.from_numpy(disparity).isfinite(), torch.nan)
    depths = torch.stack([along_rays(depth.float(), cameras, 0), torch.full((height, width), torch.nan)])
    known = depths[0][depths[0].isfinite()]
    across = width / FOCAL_LENGTH * known.max().item()
    far = known.max().item()
    none = torch.arange(0)
    return Scene(
        name="stereo_motorcycle",
        images=images,
        cameras=cameras,
        names=("left", "right"),
        splits={"train": torch.arange(2), "val": none, "test": none},
        box=torch.tensor([[-across / 2, -across / 2, -far], [across / 2, across / 2, 0.0]]),
        near=known.min().item() / 2,
        far=far * 1.5,
        depths=depths,
    )
