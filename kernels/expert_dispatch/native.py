"""Calls the CPU kernels of `native.cpp`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.native import NativeTensor, library, native_tensor, readable

NO_ORDER, NO_MEMORY = 1, 2  # outcomes


class Choice(ctypes.Structure):
    """`struct Choice` of native.cpp."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("choices", ctypes.c_int64),
        ("scores", NativeTensor),
        ("probabilities", NativeTensor),
        ("indices", ctypes.c_void_p),
    )


class PlacesProblem(ctypes.Structure):
    """`struct Places` of native.cpp."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("choices", ctypes.c_int64),
        ("limit", ctypes.c_int64),
        ("bounded_by_load", ctypes.c_int32),
        *(
            (name, ctypes.c_void_p)
            for name in ("indices", "turns", "locations", "positions", "order", "starts", "loads", "capacity")
        ),
    )


@cache
def _function(name: str, problem: type):
    function = getattr(library("expert_dispatch/native.cpp"), name)
    function.argtypes = (ctypes.POINTER(problem), ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def _run(name: str, problem: ctypes.Structure) -> None:
    outcome = _function(name, type(problem))(problem, torch.get_num_threads())
    if outcome == NO_ORDER:
        raise ValueError("scores have a row with a NaN, +inf or no finite number; such a row has no best expert")
    if outcome == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the counts of {problem.experts} experts")


def choose(scores: Tensor, choices: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.expert_dispatch.places.choose`."""
    tokens, experts = scores.shape
    probabilities = scores.new_empty((tokens, experts) if softmax else 0)
    indices = scores.new_empty(choices, tokens, dtype=torch.int64)
    if tokens:
        scores = readable(scores)
        problem = Choice(
            tokens=tokens,
            experts=experts,
            choices=choices,
            scores=native_tensor(scores),
            probabilities=native_tensor(probabilities if softmax else None),
            indices=indices.data_ptr(),
        )
        _run("expert_choice", problem)
    return probabilities, indices


def find_places(
    indices: Tensor, turns: Tensor | None, experts: int, limit: int, bounded_by_load: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.expert_dispatch.places.find_places`."""
    indices, turns = indices.contiguous(), None if turns is None else turns.contiguous()
    choices, tokens = indices.shape
    shapes = {
        "locations": (choices, tokens),
        "positions": (choices, tokens),
        "order": (choices * tokens,),
        "starts": (experts + 1,),
        "loads": (experts,),
        "capacity": (),
    }
    found = {name: indices.new_empty(shape) for name, shape in shapes.items()}
    problem = PlacesProblem(
        tokens=tokens,
        experts=experts,
        choices=choices,
        limit=limit,
        bounded_by_load=bounded_by_load,
        indices=indices.data_ptr(),
        turns=None if turns is None else turns.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in found.items()},
    )
    _run("expert_places", problem)
    return tuple(found.values())
