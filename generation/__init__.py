"""Generation of images: LINA (text to image), spiking diffusion, radiance fields."""

import kernels

if getattr(kernels, "SUITE", None) != "gated-vision-suite":
    raise ImportError(
        f"the package `kernels` at {kernels.__file__} is not the Gated Vision Suite's; "
        f"uninstall it (`pip uninstall kernels`), then reinstall gated-vision-suite"
    )
