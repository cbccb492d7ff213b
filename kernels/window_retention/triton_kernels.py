"""The Triton kernels of window retention; `triton.py` launches them and explains the algorithm.

Legend: T tokens of a window and its padding, ROWS x COLUMNS of them, row by row in the width pass and column by column
in the height pass. A pass cuts them into N blocks of L, each of whole lines. D and V are the tile of the head and of
the value dimension; a comment gives a tile's shape. A token's `place` is its batch element, head, row and column in the
map, whether it lies in the map, and its number in the window. Its `line` numbers what it may meet in a pass, itself
always among them.
"""

import triton
import triton.language as tl

from kernels.gpu.triton import log_sigmoid


@triton.jit
def _tokens(
    sizes, WINDOW_HEIGHT: tl.constexpr, WINDOW_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH_PASS: tl.constexpr,
):  # fmt: skip
    """Places of this program's tokens in the order of a pass, their lines [T] and their positions in them [T].

    Heads come first in the order of programs: they share cache lines of the map.
    """
    height, width, shift_down, shift_right, windows_down, windows_along, heads = sizes
    program = tl.program_id(0).to(tl.int64)
    window = program // heads
    tokens = tl.arange(0, ROWS * COLUMNS)
    row = tokens // COLUMNS if WIDTH_PASS else tokens % ROWS
    column = tokens % COLUMNS if WIDTH_PASS else tokens // ROWS
    real = (row < WINDOW_HEIGHT) & (column < WINDOW_WIDTH)
    rolled_row = (window // windows_along % windows_down).to(tl.int32) * WINDOW_HEIGHT + row
    rolled_column = (window % windows_along).to(tl.int32) * WINDOW_WIDTH + column
    inside = real & (rolled_row < height) & (rolled_column < width)
    map_row = _unrolled(rolled_row, height, shift_down)
    map_column = _unrolled(rolled_column, width, shift_right)
    batch = window // windows_along // windows_down
    place = (batch, program % heads, map_row, map_column, inside, row * WINDOW_WIDTH + column)
    if WIDTH_PASS:
        line, position, region = row, column, _region(rolled_column, width, shift_right)
    else:
        line, position, region = column, row, _region(rolled_row, height, shift_down)
    # Tokens of the padding are zeros: where they meet each other they add nothing.
    return place, line * 4 + tl.where(real, region, 3), position.to(tl.float32)


@triton.jit
def _unrolled(place, length, shift):
    """Where on the axis the place of the rolled axis lies; the places of the padding lie nowhere."""
    return tl.where(place < length - shift, place + shift, place + shift - length)


@triton.jit
def _region(place, length, shift):
    """Of a place of the rolled axis: 0, or 1 beyond the wrap-around, or 2 in the padding."""
    return (place >= length - shift).to(tl.int32) + (place >= length).to(tl.int32)


@triton.jit
def _pointers(tensor, strides, place, dims):
    """Addresses [T, dims] in a (B, H, W, heads, D) tensor of any strides."""
    batch, head, row, column, _, _ = place
    tokens = row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    channels = dims.to(tl.int64)[None, :] * strides[4]
    return tensor + (batch * strides[0] + head * strides[3]) + tokens[:, None] + channels


@triton.jit
def _load(tensor, strides, place, dims, dim_count):
    inside = place[4][:, None] & (dims < dim_count)[None, :]
    return tl.load(_pointers(tensor, strides, place, dims), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, strides, place, dims, dim_count, x):
    inside = place[4][:, None] & (dims < dim_count)[None, :]
    x = tl.reshape(x, inside.shape).to(tensor.dtype.element_ty)
    tl.store(_pointers(tensor, strides, place, dims), x, mask=inside)


@triton.jit
def _blocks(x, L: tl.constexpr):
    """[T, D] to [N, L, D]."""
    return tl.reshape(x, [x.shape[0] // L, L, x.shape[1]])


@triton.jit
def _turned(x, LINES: tl.constexpr, LENGTH: tl.constexpr, L: tl.constexpr):
    """Tokens in LINES lines of LENGTH each, [T, D] or in blocks, to blocks [N, L, D] of the lines across them."""
    D: tl.constexpr = x.shape[len(x.shape) - 1]
    lines = tl.permute(tl.reshape(x, [LINES, LENGTH, D]), (1, 0, 2))
    return tl.reshape(lines, [LINES * LENGTH // L, L, D])


@triton.jit
def _transposed(x):
    return tl.permute(x, (0, 2, 1))


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """Products [N, I, J] of a [N, I, K] and b [N, K, J]; N of them keep N warps busy, but one keeps all warps busy."""
    if a.shape[0] == 1:
        product = tl.dot(tl.reshape(a, a.shape[1:]), tl.reshape(b, b.shape[1:]), input_precision=PRECISION)[None, :, :]
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def _rotated(x, cosines, sines, place, first, inverse, HEAD_DIM: tl.constexpr):
    """Turn the channel pairs of x [T, D], channels `first` and on, by the tables (tokens of a window, HEAD_DIM / 2)."""
    T: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    pairs = first // 2 + tl.arange(0, D // 2)[None, :]
    inside = place[4][:, None] & (pairs < HEAD_DIM // 2)
    offsets = place[5][:, None] * (HEAD_DIM // 2) + pairs
    cosine = tl.load(cosines + offsets, mask=inside, other=0.0)
    sine = tl.load(sines + offsets, mask=inside, other=0.0)
    if inverse:
        sine = -sine
    even, odd = tl.split(tl.reshape(x, [T, D // 2, 2]))
    return tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), [T, D])


@triton.jit
def _operand(
    tensor, strides, cosines, sines, place, first,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rotated queries or keys [T, D], the channels from `first` on."""
    x = _load(tensor, strides, place, first + tl.arange(0, BLOCK_D), HEAD_DIM)
    if ROTARY:
        x = _rotated(x, cosines, sines, place, first, False, HEAD_DIM)
    return x.to(DOT)


@triton.jit
def _scores(
    query, query_strides, key, key_strides, cosines, sines, place, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr, HEIGHT_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [N, L, L] of the width pass and of the height pass."""
    T: tl.constexpr = ROWS * COLUMNS
    width_scores = tl.zeros([T // WIDTH_BLOCK, WIDTH_BLOCK, WIDTH_BLOCK], tl.float32)
    height_scores = tl.zeros([T // HEIGHT_BLOCK, HEIGHT_BLOCK, HEIGHT_BLOCK], tl.float32)
    for first in range(0, HEAD_DIM, BLOCK_D):
        q = _operand(query, query_strides, cosines, sines, place, first, HEAD_DIM, BLOCK_D, ROTARY, DOT)
        k = _operand(key, key_strides, cosines, sines, place, first, HEAD_DIM, BLOCK_D, ROTARY, DOT)
        width_scores += _product(_blocks(q, WIDTH_BLOCK), _transposed(_blocks(k, WIDTH_BLOCK)), PRECISION)
        q, k = _turned(q, ROWS, COLUMNS, HEIGHT_BLOCK), _turned(k, ROWS, COLUMNS, HEIGHT_BLOCK)
        height_scores += _product(q, _transposed(k), PRECISION)
    return width_scores * scale, height_scores * scale


@triton.jit
def _operand_gradient(
    gradient, gradient_strides, other, other_strides, cosines, sines, place, first, scale, d_width, d_height,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROTARY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of queries, given keys as `other` and the gradients [N, L, L] of both passes' logits.

    The gradient of keys takes queries and the transposed gradients.
    """
    x = _operand(other, other_strides, cosines, sines, place, first, HEAD_DIM, BLOCK_D, ROTARY, DOT)
    dx = _product(d_height, _turned(x, ROWS, COLUMNS, d_height.shape[1]), PRECISION)  # [N, L, D]
    dx = _turned(dx, COLUMNS, ROWS, d_width.shape[1])
    dx += _product(d_width, _blocks(x, d_width.shape[1]), PRECISION)
    dx = tl.reshape(dx, x.shape) * scale
    if ROTARY:
        dx = _rotated(dx, cosines, sines, place, first, True, HEAD_DIM)
    _store(gradient, gradient_strides, place, first + tl.arange(0, BLOCK_D), HEAD_DIM, dx)


@triton.jit
def _pairs(x, L: tl.constexpr):
    """x [T] of the queries [N, L, 1] and of the keys [N, 1, L] of each block."""
    x = tl.reshape(x, [x.shape[0] // L, L])
    return x[:, :, None], x[:, None, :]


@triton.jit
def _weights(
    scores, line, position, log_decays, slopes, head,
    SIGMOID: tl.constexpr, NORMALIZATION: tl.constexpr, SLOPES: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """A pass's weights A and its logits [N, L, L], and the sums [N, L] of the weights' rows before normalisation."""
    query_line, key_line = _pairs(line, scores.shape[1])
    query_position, key_position = _pairs(position, scores.shape[1])
    steps = query_position - key_position
    log_decay = tl.abs(steps) * tl.load(log_decays + head)
    logits = scores
    if SLOPES:
        logits += (steps if SIGNED else tl.abs(steps)) * tl.load(slopes + head)
    if SIGMOID and NORMALIZATION != "sum":
        weights = tl.where(query_line == key_line, tl.sigmoid(logits) * tl.exp(log_decay), 0.0)
        total = tl.sum(weights, 2)
        if NORMALIZATION == "clamp":
            weights /= tl.maximum(total, 1.0)[:, :, None]
    else:
        # Dividing sigmoids by their sum is a softmax of their logarithms, and never divides by zero.
        exponents = (log_sigmoid(logits) if SIGMOID else logits) + log_decay
        exponents = tl.where(query_line == key_line, exponents, float("-inf"))
        weights = tl.exp(exponents - tl.max(exponents, 2)[:, :, None])
        total = tl.sum(weights, 2)
        weights /= total[:, :, None]
    return weights, logits, total


@triton.jit
def _logit_gradient(weights, weight_gradient, logits, total, SIGMOID: tl.constexpr, NORMALIZATION: tl.constexpr):
    """Gradient [N, L, L] of a pass's logits from that of its weights; zero where tokens do not meet."""
    gradient = weights * weight_gradient
    if not SIGMOID or NORMALIZATION != "none":
        through_total = tl.sum(gradient, 2)
        if SIGMOID and NORMALIZATION == "clamp":
            through_total = tl.where(total >= 1.0, through_total, 0.0)
        gradient -= weights * through_total[:, :, None]
    if SIGMOID:
        gradient *= tl.sigmoid(-logits)
    return gradient


@triton.jit
def retention_outputs_kernel(
    query, query_strides, key, key_strides, value, value_strides, output, output_strides,
    cosines, sines, log_decays, slopes, sizes, scale,
    WINDOW_HEIGHT: tl.constexpr, WINDOW_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HEIGHT_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROTARY: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZATION: tl.constexpr,
    SLOPES: tl.constexpr, SIGNED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output = A_height (A_width value) of one head in one window."""
    by_row, row_line, column = _tokens(sizes, WINDOW_HEIGHT, WINDOW_WIDTH, ROWS, COLUMNS, True)
    by_column, column_line, row = _tokens(sizes, WINDOW_HEIGHT, WINDOW_WIDTH, ROWS, COLUMNS, False)
    head = by_row[1]
    width_scores, height_scores = _scores(
        query, query_strides, key, key_strides, cosines, sines, by_row, scale,
        HEAD_DIM, BLOCK_D, ROWS, COLUMNS, WIDTH_BLOCK, HEIGHT_BLOCK,
        ROTARY, DOT, PRECISION,
    )  # fmt: skip
    along_width, _, _ = _weights(
        width_scores, row_line, column, log_decays, slopes, head, SIGMOID, NORMALIZATION, SLOPES, SIGNED
    )
    along_height, _, _ = _weights(
        height_scores, column_line, row, log_decays, slopes, head, SIGMOID, NORMALIZATION, SLOPES, SIGNED
    )
    along_width, along_height = along_width.to(DOT), along_height.to(DOT)
    for first in range(0, VALUE_DIM, BLOCK_V):
        dims = first + tl.arange(0, BLOCK_V)
        v = _blocks(_load(value, value_strides, by_row, dims, VALUE_DIM).to(DOT), WIDTH_BLOCK)  # [N, L, V]
        between = _product(along_width, v, PRECISION).to(DOT)  # [N, L, V]
        between = _turned(between, ROWS, COLUMNS, HEIGHT_BLOCK)
        out = _product(along_height, between, PRECISION)  # [N, L, V]
        _store(output, output_strides, by_column, dims, VALUE_DIM, out)


@triton.jit
def retention_gradients_kernel(
    query, query_strides, key, key_strides, value, value_strides, output_gradient, output_gradient_strides,
    query_gradient, query_gradient_strides, key_gradient, key_gradient_strides,
    value_gradient, value_gradient_strides,
    cosines, sines, log_decays, slopes, sizes, scale,
    WINDOW_HEIGHT: tl.constexpr, WINDOW_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HEIGHT_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROTARY: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZATION: tl.constexpr,
    SLOPES: tl.constexpr, SIGNED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values of one head in one window."""
    by_row, row_line, column = _tokens(sizes, WINDOW_HEIGHT, WINDOW_WIDTH, ROWS, COLUMNS, True)
    by_column, column_line, row = _tokens(sizes, WINDOW_HEIGHT, WINDOW_WIDTH, ROWS, COLUMNS, False)
    head = by_row[1]
    width_scores, height_scores = _scores(
        query, query_strides, key, key_strides, cosines, sines, by_row, scale,
        HEAD_DIM, BLOCK_D, ROWS, COLUMNS, WIDTH_BLOCK, HEIGHT_BLOCK, ROTARY, DOT, PRECISION,
    )  # fmt: skip
    width_weights, width_logits, width_total = _weights(
        width_scores, row_line, column, log_decays, slopes, head, SIGMOID, NORMALIZATION, SLOPES, SIGNED
    )
    height_weights, height_logits, height_total = _weights(
        height_scores, column_line, row, log_decays, slopes, head, SIGMOID, NORMALIZATION, SLOPES, SIGNED
    )
    along_width, along_height = width_weights.to(DOT), height_weights.to(DOT)
    d_width = tl.zeros(width_weights.shape, tl.float32)  # of the width pass's weights, then logits [N, L, L]
    d_height = tl.zeros(height_weights.shape, tl.float32)
    for first in range(0, VALUE_DIM, BLOCK_V):
        dims = first + tl.arange(0, BLOCK_V)
        v = _blocks(_load(value, value_strides, by_row, dims, VALUE_DIM).to(DOT), WIDTH_BLOCK)  # [N, L, V]
        d_out = _load(output_gradient, output_gradient_strides, by_column, dims, VALUE_DIM)
        d_out = _blocks(d_out.to(DOT), HEIGHT_BLOCK)  # [N, L, V]
        between = _product(along_width, v, PRECISION).to(DOT)  # [N, L, V]
        between = _turned(between, ROWS, COLUMNS, HEIGHT_BLOCK)
        d_height += _product(d_out, _transposed(between), PRECISION)
        d_between = _product(_transposed(along_height), d_out, PRECISION).to(DOT)  # [N, L, V]
        d_between = _turned(d_between, COLUMNS, ROWS, WIDTH_BLOCK)
        d_width += _product(d_between, _transposed(v), PRECISION)
        dv = _product(_transposed(along_width), d_between, PRECISION)  # [N, L, V]
        _store(value_gradient, value_gradient_strides, by_row, dims, VALUE_DIM, dv)

    d_width = _logit_gradient(width_weights, d_width, width_logits, width_total, SIGMOID, NORMALIZATION).to(DOT)
    d_height = _logit_gradient(height_weights, d_height, height_logits, height_total, SIGMOID, NORMALIZATION).to(DOT)
    for first in range(0, HEAD_DIM, BLOCK_D):
        _operand_gradient(
            query_gradient, query_gradient_strides, key, key_strides, cosines, sines, by_row, first, scale,
            d_width, d_height, HEAD_DIM, BLOCK_D, ROWS, COLUMNS, ROTARY, DOT, PRECISION,
        )  # fmt: skip
        _operand_gradient(
            key_gradient, key_gradient_strides, query, query_strides, cosines, sines, by_row, first, scale,
            _transposed(d_width), _transposed(d_height), HEAD_DIM, BLOCK_D, ROWS, COLUMNS, ROTARY, DOT, PRECISION,
        )  # fmt: skip
