"""The authors' training records, which are pickles, as samples.

Unpickling can run any code, so only numpy arrays, numbers and plain containers are read; whatever else a file names is
refused before anything of it runs.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.argument_checks import check_choice
from multimodal.q_zoom.routing_labels import MATCHES, Match, MultiResolutionAnswer, routing_labels
from multimodal.q_zoom.training.gate_labels import LabelledSamples
from multimodal.q_zoom.training.region_labels import SHORT_ANSWER
from multimodal.q_zoom.training.samples import ZoomSample

JSON_REQUEST = "Output grounding bounding box related to the question in JSON."


def latin1(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as pickles of old protocols spell them."""
    if encoding != "latin1":
        raise ValueError(f"bytes are spelt in {encoding!r}; pickles spell them in 'latin1'")
    return text.encode("latin1")


_ARRAY = np.zeros(0, dtype=np.float32)
_NUMPY = {
    "_reconstruct": _ARRAY.__reduce__()[0],
    "_frombuffer": _ARRAY.__reduce_ex__(5)[0],
    "scalar": np.float32(0).__reduce__()[0],
}
_READABLE = {
    **{
        (f"numpy.{core}.{module}", name): _NUMPY[name]  # numpy 1 and numpy 2
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): latin1,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, tuple, set, frozenset, bytearray, complex, float, int, str, bytes, bool)
    },
}


class PlainUnpickler(pickle.Unpickler):
    """Reads arrays of numpy, numbers, texts and containers.

    Raises:
        ValueError: the pickle names anything else; the message says what.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _READABLE[module, name]
        except KeyError:
            raise ValueError(
                f"it names {module}.{name}, which could run code; only arrays of numpy, numbers, texts and containers "
                f"are read"
            ) from None


def read_records(path: str | Path) -> list[Mapping[str, Any]]:
    """The records of a pickle: a list, or a dictionary by identifiers.

    Raises:
        ValueError: it cannot be read, or names anything but arrays, numbers, texts and containers.
    """
    try:
        with open(path, "rb") as file:
            records = PlainUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, ArithmeticError, LookupError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as a pickle: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not read: {error}") from error
    records = list(records.values()) if isinstance(records, dict) else records
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must hold records, as a list or by identifiers; it holds a {type(records).__name__}")
    return records


def region_samples(path: str | Path, images: str | Path) -> list[ZoomSample]:
    """Samples of stage 1: with the backbone's answers and attention.

    As published, images with square maps are shown in a grey square, and where the prompt asks for boxes in JSON the
    question asks for a short answer.

    Args:
        path: the pickle.
        images: folder the records' paths of images are relative to.

    Raises:
        ValueError: as `read_records`, or a record is not as it must be.
    """
    samples = []
    for index, record in enumerate(read_records(path)):
        needed = ("image", "prompt", "text", "grounding_attn_o2i")
        checked(record, needed, path, index)
        grounding = as_map(record["grounding_attn_o2i"], path, index, "grounding_attn_o2i")
        sink = record.get("sink_attn")
        samples.append(
            ZoomSample(
                Path(images) / record["image"],
                record["prompt"].replace(JSON_REQUEST, SHORT_ANSWER),
                record["text"],
                tokens=grounding.numel(),
                square=grounding.shape[0] == grounding.shape[1],
                grounding=grounding,
                sink=None if sink is None else as_map(sink, path, index, "sink_attn"),
            )
        )
    return samples


def gate_samples(path: str | Path, images: str | Path, *, match: Match = "exact", seed: int = 0) -> LabelledSamples:
    """Samples of stage 3, labelled by the backbone's answers at several resolutions (see `routing_labels`).

    Args:
        path: the pickle.
        images: folder the records' paths of images are relative to.
        match: "exact", or "substring" as published.
        seed: of the resolutions drawn.

    Raises:
        ValueError: as `read_records`, or a record is not as it must be.
    """
    check_choice("match", match, MATCHES)
    records = read_records(path)
    for index, record in enumerate(records):
        checked(record, ("image", "prompt", "text", "res", "ms_answers"), path, index)
    asked = [
        MultiResolutionAnswer([int(tokens) for tokens in record["res"]], list(record["ms_answers"]), record["text"])
        for record in records
    ]
    made = routing_labels(asked, match=match, seed=seed)
    samples = [
        ZoomSample(
            Path(images) / records[one.index]["image"],
            records[one.index]["prompt"].replace(JSON_REQUEST, SHORT_ANSWER),
            records[one.index]["text"],
            tokens=one.resolution,
            zoom=one.label,
        )
        for one in made.labels
    ]
    return LabelledSamples(samples, made.kinds)


def checked(record: Mapping[str, Any], needed: Sequence[str], path: str | Path, index: int) -> None:
    """Raise a `ValueError` if a record lacks a field or holds no text where there must be one."""
    missing = [name for name in needed if name not in record]
    if missing:
        raise ValueError(f"record {index} of {path} has no {', '.join(missing)}; it has {', '.join(map(str, record))}")
    for name in ("image", "prompt", "text"):
        if not isinstance(record[name], str):
            raise ValueError(f"record {index} of {path} has {record[name]!r} as {name}; it must be a text")


def as_map(attention: Any, path: str | Path, index: int, name: str) -> Tensor:
    """Attention `[rows, columns]` in float32."""
    try:
        cells = torch.from_numpy(np.array(attention, dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} of record {index} of {path} is no array of numbers: {error}") from None
    if cells.dim() != 2:
        raise ValueError(f"{name} of record {index} of {path} has the shape {tuple(cells.shape)}; it must be 2-D")
    return cells
