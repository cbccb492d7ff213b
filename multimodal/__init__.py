"""Question answering about images: Q-Zoom, a query-aware gate and region zoom around transformers models."""

import kernels

if getattr(kernels, "SUITE", None) != "gated-vision-suite":
    raise ImportError(
        f"the package `kernels` at {kernels.__file__} is not the Gated Vision Suite's; "
        f"uninstall it (`pip uninstall kernels`), then reinstall gated-vision-suite"
    )
