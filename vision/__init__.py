"""Gated vision backbones. `import vision` registers every model with timm."""

import kernels

if getattr(kernels, "SUITE", None) != "gated-vision-suite":
    raise ImportError(
        f"the package `kernels` at {kernels.__file__} is not the Gated Vision Suite's; "
        f"uninstall it (`pip uninstall kernels`), then reinstall gated-vision-suite"
    )

from vision import gated_swin_rmt, rmt, vig, vig_hierarchical

__all__ = ["gated_swin_rmt", "rmt", "vig", "vig_hierarchical"]
