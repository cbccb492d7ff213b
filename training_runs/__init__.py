"""What the training and the saving of all systems share: run folders, checkpoints, files written whole or not."""

import kernels

if getattr(kernels, "SUITE", None) != "gated-vision-suite":
    raise ImportError(
        f"the package `kernels` at {kernels.__file__} is not the Gated Vision Suite's; "
        f"uninstall it (`pip uninstall kernels`), then reinstall gated-vision-suite"
    )
