"""Window retention on GPUs: one program for each head of each window, from loading to storing, in both directions.

Rolling, padding and cutting are arithmetic on indices. The tokens of a window, its axes padded to powers of two, are
loaded row by row and turned column by column on the chip between the passes. In either order the lines of a
pass lie one behind the other, so that blocks of 16 tokens hold whole lines (two of an 8 x 8 window's), and a pass is a
batch of products of 16 x 16 matrices, one a block and warp. (All scores of a window in one 64 x 64 matrix, of which
each pass masks all but its lines, would be four times the products and exponentials, and more registers than the
backward pass has in float32. A longer line makes a longer block, where registers may spill; that costs time only.)

The backward pass stores nothing but its inputs and repeats the weights. With A and A' the width pass's and the height
pass's weights, u = A v and d the output's gradient, in this order:

    dA' = d u^T      du = A'^T d      dA = du v^T      dv = A^T du      dS_ij = A_ij (dA_ij - c_i sum_k A_ik dA_ik) g_ij
    dq = scale R^T (dS + dS') R k      dk = scale R^T (dS + dS')^T R q

R is the rotation; g = 1, or 1 - sigmoid(logit) of a sigmoid; c_i = 1 where row i is divided by its sum, 0 where it is
not ("none", or "clamp" and a sum below 1). A window's gradients are its own: every sum has a fixed order and nothing
is accumulated by atomics, so that the bits are the same every time.

Precision: sums, weights and rotations are float32; the tensor-core operands as `kernels.gpu.triton.dot_operands` says.

Floor, a prediction and not a measurement: nothing here has been timed or has run on a GPU. N tokens in all, C channels
of all heads together (as many of values), s bytes an element: 4 N C s bytes forward and 7 N C s backward. 64 maps of
56 x 56 tokens, C = 96, bfloat16: 154 and 270 MB, 51 and 90 us at the 3.0 TB/s of an H100. Beside it are, forward, 3.2
GFLOP on tensor cores (windows of 7 x 7 in 8 x 8, 6 heads) and the exponentials of 2 x 16 scores a token: 50 million,
14 us at 16 a clock of each of 132 processors at 1.7 GHz.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gpu.triton import all_registers, are_narrow, dot_operands, launch, refuse_float64, tile_size, with_strides
from kernels.window_retention import tables
from kernels.window_retention.arguments import Settings
from kernels.window_retention.triton_kernels import retention_gradients_kernel, retention_outputs_kernel

BLOCK = 16  # tokens of a block of whole lines: what tensor cores multiply at once


@dataclass(frozen=True)
class Tiles:
    """The largest tiles of the head and of the value dimension; a smaller dimension takes a smaller tile.

    Chosen ahead of time among those that spill no register on sm_80, sm_90 and gfx942, not by timing;
    tests/kernels/test_triton_compilation.py holds them to it.
    """

    head: int
    value: int

    def options(self, window: tuple[int, int], head_dim: int, value_dim: int) -> dict[str, int]:
        rows, columns = (triton.next_power_of_2(length) for length in window)
        rows = max(rows, BLOCK // columns)
        return {
            "ROWS": rows,
            "COLUMNS": columns,
            "WIDTH_BLOCK": max(BLOCK, columns),
            "HEIGHT_BLOCK": max(BLOCK, rows),
            "BLOCK_D": tile_size(head_dim, self.head),
            "BLOCK_V": tile_size(value_dim, self.value),
            "num_warps": max(2, rows * columns // BLOCK),
            "num_stages": 1,
            **all_registers(),
        }


# By the width of the products' operands. Operands of three TF32 products take twice the registers of a float32 tile.
NARROW = Tiles(32, 32)
WIDE = Tiles(16, 16)


def forward(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Output (B, H, W, heads, V) in the dtype of `value`, of tensors that `check_arguments` has passed.

    Raises:
        ValueError: a tensor is float64, or the windows have more than `tables.LARGEST_TILE` tokens.
    """
    output = value.new_empty(value.shape)
    _launch(retention_outputs_kernel, (query, key, value, output), settings)
    return output


def backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its tensor's dtype; errors as in `forward`."""
    gradients = tuple(x.new_empty(x.shape) for x in (query, key, value))
    if value.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    _launch(retention_gradients_kernel, (query, key, value, grad_output, *gradients), settings)
    return gradients


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], settings: Settings) -> None:
    """Run `kernel` on `tensors`, which begin with query, key and value."""
    query, key, value = tensors[:3]
    refuse_float64(query=query, key=key, value=value)
    (rows, columns), (batch, height, width, heads, head_dim) = settings.window, query.shape
    if rows * columns > tables.LARGEST_TILE:
        raise ValueError(
            f"window is {settings.window}, {rows * columns} tokens; the triton backend takes up to "
            f"{tables.LARGEST_TILE} tokens"
        )
    if value.numel() == 0:
        return
    windows = triton.cdiv(height, rows), triton.cdiv(width, columns)
    dtypes = (query.dtype, key.dtype, value.dtype)
    dot, precision = dot_operands(*dtypes)
    tiles = NARROW if are_narrow(*dtypes) else WIDE
    like = torch.empty(0, dtype=torch.float32, device=query.device)
    launch(
        query,
        kernel,
        batch * windows[0] * windows[1] * heads,
        *with_strides(*tensors),
        *(tables.rotary_table(rows, columns, head_dim, like) if settings.rotary else (None, None)),
        tables.numbers(settings.log_decay, like),
        tables.numbers(settings.slopes, like) if settings.slopes else None,
        (height, width, *settings.shift, *windows, heads),
        settings.scale,
        WINDOW_HEIGHT=rows,
        WINDOW_WIDTH=columns,
        HEAD_DIM=head_dim,
        VALUE_DIM=value.shape[4],
        **tiles.options(settings.window, head_dim, value.shape[4]),
        ROTARY=settings.rotary,
        SIGMOID=settings.activation == "sigmoid",
        NORMALIZATION=settings.normalization,
        SLOPES=bool(settings.slopes),
        SIGNED=settings.signed_slopes,
        DOT=dot,
        PRECISION=precision,
    )
