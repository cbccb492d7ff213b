"""Linear attention on GPUs: keys and values to a state, the state to outputs; the gradient is the same backwards.

Forward, two kernels: `linear_states_kernel` adds outer products over ranges of the tokens, one program for each range
of each head and tile of values; the ranges' states, where there are several, are added in their order. Then
`linear_outputs_kernel` reads the state for each block of queries. Backward, three: `linear_query_gradients_kernel`
makes the gradients of queries and, for every query, 1 / denominator and p (see the package); with them
`linear_states_kernel`, given queries and output gradients in place of keys and values, adds up the gradients of S and
s; and `linear_key_gradients_kernel` makes those of keys, values and gates. Every sum has a fixed order and nothing is
accumulated by atomics, so that the bits are the same every time.

Precision: features, sums and denominators are float32; the tensor-core operands as `kernels.gpu.triton.dot_operands`
says. Outputs and the gradients of keys go by tiles of both dimensions, which they read again from the cache, so that a
head of 96 spills no register; where the head dimension must be whole it is padded to a power of two.

Floor, a prediction and not a measurement: nothing here has been timed or has run on a GPU. N tokens in all, C channels
of all heads together, heads of D channels, s bytes an element: 4 N C s bytes and 4 N C D FLOP forward; 9 N C s bytes
(queries and output gradients are read twice, the second time perhaps from the cache) and 8 N C D FLOP backward. 16 maps
of 1280 tokens, C = 768, D = 64, bfloat16: 126 and 283 MB, 42 and 94 us at the 3.0 TB/s of an H100; the 4.0 and 8.1
GFLOP of products take 5 and 10 us at 798 TFLOP/s.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gpu.triton import all_registers, are_narrow, dot_operands, launch, refuse_float64, tile_size, with_strides
from kernels.linear_attention.arguments import Settings
from kernels.linear_attention.triton_kernels import (
    linear_key_gradients_kernel,
    linear_outputs_kernel,
    linear_query_gradients_kernel,
    linear_states_kernel,
)

ENOUGH_PROGRAMS, TOKENS_OF_A_SPLIT = 512, 256


@dataclass(frozen=True)
class Tiles:
    """Blocks of tokens and tiles of the value dimension; a smaller dimension takes a smaller tile.

    Chosen ahead of time among those that spill no register on sm_80, sm_90 and gfx942, not by timing;
    tests/kernels/test_triton_compilation.py holds them to it.
    """

    tokens: int
    value: int
    warps: int

    def options(self, head_dim: int, value_dim: int, whole_head: bool) -> dict[str, int]:
        """Launch options; the head dimension is one tile, padded, or goes by tiles too."""
        largest = triton.next_power_of_2(head_dim) if whole_head else self.value
        return {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_N": self.tokens,
            "BLOCK_D": tile_size(head_dim, max(largest, 16)),
            "BLOCK_V": tile_size(value_dim, self.value),
            "num_warps": self.warps if head_dim <= 64 or not whole_head else 2 * self.warps,
            "num_stages": 1,
            **all_registers(),
        }


# By the width of the products' operands. Operands of three TF32 products take twice the registers of a float32 tile.
NARROW = Tiles(64, 32, 4)
WIDE = Tiles(32, 32, 4)


def forward(
    query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, state (B, heads, D, V) and sums (B, heads, D + V), of tensors that `check_arguments` has passed.

    Raises:
        ValueError: a tensor is float64.
    """
    refuse_float64(query=query, key=key, value=value, key_gate=key_gate, value_gate=value_gate)
    batch, queries, heads, _ = query.shape
    output = value.new_empty((batch, queries, heads, value.shape[3]))
    gates = [_of_each_batch(gate, key) for gate in (key_gate, value_gate)]
    state, sums = _states(key, value, *gates, gates[0], settings)
    if output.numel() == 0 or key.shape[1] == 0:
        return output.zero_(), state, sums
    tensors = (*with_strides(query), state, sums, *with_strides(output))
    _over_blocks(linear_outputs_kernel, query, key, value, tensors, settings)
    return output, state, sums


def backward(
    grad_output: Tensor,
    state: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    value_gate: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and both gates in their dtypes; an empty one of a gate that is None."""
    gates = (key_gate, value_gate)
    batch, keys, heads, _ = key.shape
    gradients = [x.new_empty(x.shape) for x in (query, key, value)]
    of_gates = [None if gate is None else state.new_empty((batch, heads, keys)) for gate in gates]
    if grad_output.numel() == 0 or keys == 0:
        for gradient in (*gradients, *of_gates):
            if gradient is not None:
                gradient.zero_()
    else:
        factors, weights = (state.new_empty((batch, heads, query.shape[1])) for _ in range(2))
        tensors = (*with_strides(query, grad_output), state, sums, *with_strides(gradients[0]), factors, weights)
        _over_blocks(linear_query_gradients_kernel, query, key, value, tensors, settings)
        of_state, of_sums = _states(query, grad_output, None, factors, weights, settings)
        _finish_value_sums(of_sums, of_state, sums, keys, settings)
        tensors = (
            *with_strides(key, value),
            *_with_strides(*(_of_each_batch(gate, key) for gate in gates)),
            of_state,
            of_sums,
            *with_strides(*gradients[1:]),
            *of_gates,
        )
        _over_blocks(linear_key_gradients_kernel, key, key, value, tensors, settings)
    return *gradients, *(
        state.new_empty(0) if gate is None else gradient.sum(0).sum_to_size(gate.shape).to(gate.dtype)
        for gate, gradient in zip(gates, of_gates, strict=True)
    )


def _finish_value_sums(of_sums: Tensor, of_state: Tensor, sums: Tensor, keys: int, settings: Settings) -> None:
    """Turn the sums of g into the gradient of t: zero under division."""
    head_dim = of_state.shape[2]
    of_values = of_sums[..., head_dim:]
    if settings.divides:
        of_values.zero_()
    else:
        through = (sums[..., :head_dim, None] * of_state).sum(2)
        of_values.div_(_scale(head_dim, keys)).sub_(through).div_(keys)


def _scale(head_dim: int, keys: int) -> float:
    return max(head_dim, 1) ** -0.5 / keys


def _of_each_batch(gate: Tensor | None, key: Tensor) -> Tensor | None:
    """A view (B, heads, keys) of a gate."""
    batch, keys, heads, _ = key.shape
    return None if gate is None else gate.expand(batch, heads, keys)


def _with_strides(*factors: Tensor | None) -> list:
    return [item for x in factors for item in (x, (0, 0, 0) if x is None else x.stride())]


def _states(
    x: Tensor,
    y: Tensor,
    x_factors: Tensor | None,
    y_factors: Tensor | None,
    weights: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """State and sums of `linear_states_kernel` over all tokens of x and y."""
    (batch, count, heads, head_dim), value_dim = x.shape, y.shape[3]
    options, products = _options(x, y, whole_head=True)
    tiles = triton.cdiv(value_dim, options["BLOCK_V"])
    blocks = triton.cdiv(count, options["BLOCK_N"])
    splits = min(triton.cdiv(count, TOKENS_OF_A_SPLIT), ENOUGH_PROGRAMS // max(batch * heads * tiles, 1))
    splits = max(splits, 1)
    states = torch.empty((splits, batch, heads, head_dim, value_dim), dtype=torch.float32, device=x.device)
    sums = states.new_empty((splits, batch, heads, head_dim + value_dim))
    if 0 in (batch, count, heads, value_dim):
        return states.zero_()[0], sums.zero_()[0]
    launch(
        x,
        linear_states_kernel,
        batch * heads * splits * tiles,
        *with_strides(x, y),
        *_with_strides(x_factors, y_factors, weights),
        states,
        sums,
        heads,
        batch * heads,
        count,
        triton.cdiv(blocks, splits) * options["BLOCK_N"],
        splits,
        settings.floor,
        **options,
        RELU=settings.feature_map == "relu",
        **products,
    )
    return (states[0], sums[0]) if splits == 1 else (states.sum(0), sums.sum(0))


def _options(keyed: Tensor, valued: Tensor, whole_head: bool) -> tuple[dict, dict]:
    """Launch options for a tensor of each width, and the operands of their products."""
    dot, precision = dot_operands(keyed.dtype, valued.dtype)
    tiles = NARROW if are_narrow(keyed.dtype, valued.dtype) else WIDE
    options = tiles.options(keyed.shape[3], valued.shape[3], whole_head)
    return options, {"DOT": dot, "PRECISION": precision}


def _over_blocks(
    kernel: triton.JITFunction, blocked: Tensor, key: Tensor, value: Tensor, tensors: tuple, settings: Settings
) -> None:
    """Run one program of `kernel` for each block of the tokens of `blocked`, queries or keys."""
    batch, count, heads, head_dim = blocked.shape
    options, products = _options(blocked, value, whole_head=kernel is linear_query_gradients_kernel)
    numbers = (heads, count)
    if kernel is not linear_key_gradients_kernel:
        keys = key.shape[1]
        numbers += (keys, settings.floor, settings.eps, _scale(head_dim, keys))
        products["DIVIDES"] = settings.divides
    else:
        numbers += (settings.floor,)
    blocks = triton.cdiv(count, options["BLOCK_N"])
    relu = settings.feature_map == "relu"
    launch(blocked, kernel, batch * heads * blocks, *tensors, *numbers, **options, RELU=relu, **products)
