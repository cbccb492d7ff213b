"""Which implementation of an operation runs.

Order of decision: the `backend=` argument of the call, then `use_backend(...)`, then the environment variable
`GATED_VISION_BACKEND`, then the device: `native` on CPU, `triton` on CUDA and ROCm, `torch` elsewhere. A backend asked
for by name either runs or raises; only the last step falls back, and it says once, on the `kernels` logger, what runs.
While a graph is exported (`torch.export`, ONNX) the default is `torch`, so that the graph holds plain ATen operations.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType

import torch

BACKENDS = ("reference", "torch", "native", "triton")
ENVIRONMENT_VARIABLE = "GATED_VISION_BACKEND"

logger = logging.getLogger("kernels")
_chosen: ContextVar[str | None] = ContextVar("kernels_backend", default=None)


def check_backend_name(name: str, source: str) -> str:
    """Return `name`, or raise `ValueError` naming where it came from."""
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; valid backends are {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation in the block on the backend `name` (one of `BACKENDS`).

    Raises:
        ValueError: the name is unknown.
    """
    token = _chosen.set(check_backend_name(name, "use_backend(name)"))
    try:
        yield
    finally:
        _chosen.reset(token)


@torch.compiler.assume_constant_result  # it compiles libraries and looks at files, which dynamo cannot trace
def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on tensors of `device_type`, or None when it can."""
    return _unavailable_reason(name, device_type)


@cache
def _unavailable_reason(name: str, device_type: str) -> str | None:
    if name in ("reference", "torch"):
        return None
    if name == "native":
        if device_type != "cpu":
            return f"the native kernels run on CPU tensors, not on {device_type}"
        from kernels.native import load_error

        return load_error()
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (interpreted and device_type == "cpu"):
        return f"Triton kernels run on GPU tensors (or in the interpreter, TRITON_INTERPRET=1), not on {device_type}"
    return None


def resolve_backend(
    operation: str,
    device: torch.device,
    requested: str | None = None,
    refusals: Mapping[str, str | None] = MappingProxyType({}),
) -> str:
    """Return the backend that runs `operation` on `device`.

    Args:
        operation: the operation's public name, for messages.
        device: where its tensors lie.
        requested: the call's own `backend=` argument.
        refusals: why a backend cannot run this very call, by its name; None where it can.

    Raises:
        ValueError: a backend was asked for by a name that does not exist.
        RuntimeError: a backend was asked for by name that cannot run here.
    """
    if requested is not None:
        named, source = requested, "backend"
    elif (chosen := _chosen.get()) is not None:
        named, source = chosen, "use_backend"
    elif (from_environment := os.environ.get(ENVIRONMENT_VARIABLE)) not in (None, ""):
        named, source = from_environment, ENVIRONMENT_VARIABLE
    else:
        return _default_backend(operation, device.type, refusals)
    check_backend_name(named, source)
    if reason := unavailable_reason(named, device.type) or refusals.get(named):
        raise RuntimeError(f"{operation}: backend {named!r} (from {source}) cannot run here: {reason}")
    return named


def _default_backend(operation: str, device_type: str, refusals: Mapping[str, str | None]) -> str:
    if torch.compiler.is_exporting():
        return "torch"
    preferred = {"cpu": "native", "cuda": "triton"}.get(device_type, "torch")
    reason = unavailable_reason(preferred, device_type) or refusals.get(preferred)
    backend = "torch" if reason else preferred
    _announce(operation, device_type, backend, reason)
    return backend


@torch.compiler.assume_constant_result
def _announce(operation: str, device_type: str, backend: str, reason: str | None) -> None:
    _announce_once(operation, device_type, backend, reason)


@cache
def _announce_once(operation: str, device_type: str, backend: str, reason: str | None) -> None:
    because = f"{reason}" if reason else f"the default on {device_type}"
    logger.info("%s on %s runs the %s backend (%s)", operation, device_type, backend, because)
