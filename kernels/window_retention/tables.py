"""The constants of a window retention by size: runs of neighbours, masks, distances, rotations. Each is built once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LARGEST_TILE = 64  # tokens of a window that the Triton kernel holds at once
_KEPT_BYTES = 64 << 20  # of constants in all; what is larger alone is built anew each time
_kept: OrderedDict[Hashable, Tensor] = OrderedDict()  # the least recently used first
_lock = Lock()


def constant(key: tuple[Hashable, ...], build: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The tensor that `build` makes, on the device and in the dtype of `like`; kept by `key`.

    A traced program must hold its own constants, and a fake tensor has no values: neither keeps or takes any.
    """
    if torch.compiler.is_compiling() or isinstance(like, FakeTensor):
        return build().to(like)
    key = (*key, like.device, like.dtype)
    with _lock:
        if (tensor := _kept.get(key)) is not None:
            _kept.move_to_end(key)
            return tensor
    with torch.inference_mode(False), torch.no_grad():
        tensor = build().to(like)
    if tensor.nbytes > _KEPT_BYTES:
        return tensor
    with _lock:
        _kept[key] = tensor
        while sum(other.nbytes for other in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
    return tensor


def angles(head_dim: int) -> Tensor:
    """Radians that each channel pair turns from one token to the next, (head_dim / 2,), in float64."""
    return 10000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)


def rotary_table(height: int, width: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height, width, head_dim / 2) of the rotation of each token of a window, in `like`'s dtype."""

    def build() -> Tensor:
        places = torch.arange(height * width, dtype=torch.float64)[:, None] * angles(head_dim)
        return torch.stack((places.cos(), places.sin())).view(2, height, width, -1)

    return constant(("rotary", height, width, head_dim), build, like).unbind()


def distances(length: int) -> Tensor:
    """Query place minus key place, (length, length), in float64."""
    places = torch.arange(length, dtype=torch.float64)
    return places[:, None] - places


def by_head(values: tuple[float, ...], dimensions: int) -> Tensor:
    """`values` of the heads as the first of so many dimensions, in float64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, *[1] * (dimensions - 1))


def numbers(values: tuple[float, ...], like: Tensor) -> Tensor:
    """`values` as a tensor of `like`'s dtype and device."""
    return constant(("numbers", values), lambda: by_head(values, 1), like)


def padded(length: int, window: int) -> int:
    """`length` rounded up to whole windows."""
    return -(-length // window) * window


def _regions(length: int, window: int, shift: int) -> list[int]:
    """Of every place of the rolled, padded axis: 0, or 1 beyond the wrap-around, or 2 in the padding."""
    return [0 if place < length - shift else 1 if place < length else 2 for place in range(padded(length, window))]


def has_mask(length: int, window: int, shift: int) -> bool:
    """Whether some window of this axis holds tokens that may not meet."""
    return shift > 0 or length % window > 0


def allowed(length: int, window: int, shift: int) -> Tensor:
    """Which tokens of each window may meet: (windows, window, window) booleans."""
    region = torch.tensor(_regions(length, window, shift)).view(-1, window)
    return region[:, :, None] == region[:, None, :]


@lru_cache(1024)
def runs(length: int, window: int, shift: int) -> tuple[tuple[int, int], ...]:
    """The runs (start, stop) of neighbours that may meet, in order: they cover the axis once."""
    members: dict[tuple[int, int], list[int]] = {}
    for place, region in enumerate(_regions(length, window, shift)[:length]):
        members.setdefault((place // window, region), []).append((place + shift) % length)
    return tuple(sorted((min(places), max(places) + 1) for places in members.values()))
