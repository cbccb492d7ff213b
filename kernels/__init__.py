"""The suite's kernels: mathematics that knows no model.

Importing this package is cheap and cannot fail: the operations are imported on first use, because transformers and
diffusers probe for a distribution that shares the name `kernels`. An operation named like its folder is imported from
there (`from kernels.gated_scan import gated_scan`): as an attribute of this package the name is the folder's.
"""

from importlib import import_module

__version__ = "0.1.0"
SUITE = "gated-vision-suite"

_HOME_OF = {
    "bidirectional_gated_scan": "kernels.gated_scan",
    "depthwise_convolution": "kernels.fused_layers",
    "gated_norm_mix": "kernels.fused_layers",
    "gated_product": "kernels.fused_layers",
    "gelu_depthwise_residual": "kernels.fused_layers",
    "rms_norm": "kernels.fused_layers",
    "swiglu": "kernels.fused_layers",
    "use_backend": "kernels.backend",
}

__all__ = [*_HOME_OF, "SUITE", "__version__"]


def __getattr__(name: str):
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
