"""The Triton kernels of linear attention; `triton.py` launches them and explains the algorithm.

Legend: N is a block of tokens (of queries or keys), D the padded head dimension, V a tile of the value dimension; a
comment gives a tile's shape. `head` numbers a head of a batch element. Factors are (batch, heads, tokens) tensors of
any strides, or None for ones.
"""

import triton
import triton.language as tl


@triton.jit
def _pointers(tensor, strides, head, heads, tokens, dims):
    """Addresses [N, D or V] in a (B, tokens, heads, D or V) tensor of any strides."""
    first = tensor + head // heads * strides[0] + head % heads * strides[2]
    return first + tokens.to(tl.int64)[:, None] * strides[1] + dims.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _load(tensor, strides, head, heads, tokens, count, dims, dim_count):
    inside = (tokens < count)[:, None] & (dims < dim_count)[None, :]
    return tl.load(_pointers(tensor, strides, head, heads, tokens, dims), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, strides, head, heads, tokens, count, dims, dim_count, x):
    inside = (tokens < count)[:, None] & (dims < dim_count)[None, :]
    x = x.to(tensor.dtype.element_ty)
    tl.store(_pointers(tensor, strides, head, heads, tokens, dims), x, mask=inside)


@triton.jit
def _factors(tensor, strides, head, heads, tokens, count):
    """[N], zeros beyond the last token."""
    inside = tokens < count
    if tensor is None:
        factors = tl.where(inside, 1.0, 0.0)
    else:
        first = tensor + head // heads * strides[0] + head % heads * strides[1]
        factors = tl.load(first + tokens.to(tl.int64) * strides[2], mask=inside, other=0.0).to(tl.float32)
    return factors


@triton.jit
def _features(x, dims, dim_count, floor, RELU: tl.constexpr):
    """phi(x) [N, D]; the padding of the head dimension stays zero, and NaN stays NaN."""
    if RELU:
        x = tl.where(x < 0, 0.0, x) + floor
        x = tl.where((dims < dim_count)[None, :], x, 0.0)
    return x


@triton.jit
def _through_features(gradient, x, RELU: tl.constexpr):
    return tl.where(x <= 0, 0.0, gradient) if RELU else gradient


@triton.jit
def _load_state(state, head, dims, values, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr):
    """The tile [D, V] of a head's contiguous (D, V) matrix."""
    inside = (dims < HEAD_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    offsets = head * HEAD_DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + values[None, :]
    return tl.load(state + offsets, mask=inside, other=0.0)


@triton.jit
def _load_sums(sums, head, first, dims, dim_count, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr):
    """[D], or with `first` HEAD_DIM [V], of a head's sums."""
    return tl.load(sums + head * (HEAD_DIM + VALUE_DIM) + first + dims, mask=dims < dim_count, other=0.0)


@triton.jit
def linear_states_kernel(
    x, x_strides, y, y_strides, x_factors, x_factor_strides, y_factors, y_factor_strides, weights, weight_strides,
    states, sums, heads, all_heads, count, tokens_of_split, splits, floor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, RELU: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over the tokens of a split, one tile [D, V] of the sum of (x_factor phi(x)) (y_factor y)^T.

    Sums of weight phi(x) and of y_factor y go beside it. States are (splits, heads, D, V), sums (splits, heads, D + V).
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(VALUE_DIM, BLOCK_V)
    tile, split, head = program % tiles, program // tiles % splits, program // tiles // splits
    dims = tl.arange(0, BLOCK_D)
    values = tile.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    x_sum = tl.zeros([BLOCK_D], tl.float32)
    y_sum = tl.zeros([BLOCK_V], tl.float32)
    start = split.to(tl.int32) * tokens_of_split
    for first in range(start, tl.minimum(start + tokens_of_split, count), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        phi = _features(_load(x, x_strides, head, heads, tokens, count, dims, HEAD_DIM), dims, HEAD_DIM, floor, RELU)
        scaled_x = phi * _factors(x_factors, x_factor_strides, head, heads, tokens, count)[:, None]
        scaled_y = _load(y, y_strides, head, heads, tokens, count, values, VALUE_DIM)
        scaled_y *= _factors(y_factors, y_factor_strides, head, heads, tokens, count)[:, None]
        state += tl.dot(tl.trans(scaled_x.to(DOT)), scaled_y.to(DOT), input_precision=PRECISION)
        x_sum += tl.sum(phi * _factors(weights, weight_strides, head, heads, tokens, count)[:, None], 0)
        y_sum += tl.sum(scaled_y, 0)
    place = split * all_heads + head
    inside = (dims < HEAD_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    offsets = place * HEAD_DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + values[None, :]
    tl.store(states + offsets, state, mask=inside)
    own_sums = sums + place * (HEAD_DIM + VALUE_DIM)
    tl.store(own_sums + dims, x_sum, mask=(dims < HEAD_DIM) & (tile == 0))
    tl.store(own_sums + HEAD_DIM + values, y_sum, mask=values < VALUE_DIM)


@triton.jit
def linear_outputs_kernel(
    query, query_strides, state, sums, output, output_strides, heads, count, keys, floor, eps, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, RELU: tl.constexpr, DIVIDES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of queries reads of the state. D is a tile of the head dimension here."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(count, BLOCK_N)
    head = program // blocks
    tokens = (program % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first_dim in range(0, HEAD_DIM, BLOCK_D):
        dims = first_dim + tl.arange(0, BLOCK_D)
        phi = _load(query, query_strides, head, heads, tokens, count, dims, HEAD_DIM)
        phi = _features(phi, dims, HEAD_DIM, floor, RELU)
        total += tl.sum(phi * _load_sums(sums, head, 0, dims, HEAD_DIM, HEAD_DIM, VALUE_DIM)[None, :], 1)
    for first in range(0, VALUE_DIM, BLOCK_V):
        values = first + tl.arange(0, BLOCK_V)
        read = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for first_dim in range(0, HEAD_DIM, BLOCK_D):
            dims = first_dim + tl.arange(0, BLOCK_D)
            phi = _load(query, query_strides, head, heads, tokens, count, dims, HEAD_DIM)
            phi = _features(phi, dims, HEAD_DIM, floor, RELU).to(DOT)
            tile = _load_state(state, head, dims, values, HEAD_DIM, VALUE_DIM).to(DOT)  # [D, V]
            read += tl.dot(phi, tile, input_precision=PRECISION)
        if DIVIDES:
            read /= (total + keys * eps)[:, None]
        else:
            value_sum = _load_sums(sums, head, HEAD_DIM, values, VALUE_DIM, HEAD_DIM, VALUE_DIM)
            read = read * scale + (1.0 - scale * total)[:, None] * (value_sum / keys)[None, :]
        _store(output, output_strides, head, heads, tokens, count, values, VALUE_DIM, read)


@triton.jit
def linear_query_gradients_kernel(
    query, query_strides, output_gradient, output_gradient_strides, state, sums, query_gradient, query_gradient_strides,
    factors, weights, heads, count, keys, floor, eps, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, RELU: tl.constexpr, DIVIDES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries; of each, what makes g of the output's gradient, and -p: (heads, count) both."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(count, BLOCK_N)
    head = program // blocks
    tokens = (program % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    through = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # S d
    of_mean = tl.zeros([BLOCK_N], tl.float32)  # t . d / N
    for first in range(0, VALUE_DIM, BLOCK_V):
        values = first + tl.arange(0, BLOCK_V)
        d = _load(output_gradient, output_gradient_strides, head, heads, tokens, count, values, VALUE_DIM)  # [N, V]
        tile = _load_state(state, head, dims, values, HEAD_DIM, VALUE_DIM)  # [D, V]
        through += tl.dot(d.to(DOT), tl.trans(tile.to(DOT)), input_precision=PRECISION)
        if not DIVIDES:
            value_sum = _load_sums(sums, head, HEAD_DIM, values, VALUE_DIM, HEAD_DIM, VALUE_DIM)
            of_mean += tl.sum(d * value_sum[None, :], 1) / keys
    x = _load(query, query_strides, head, heads, tokens, count, dims, HEAD_DIM)
    phi = _features(x, dims, HEAD_DIM, floor, RELU)
    key_sum = _load_sums(sums, head, 0, dims, HEAD_DIM, HEAD_DIM, VALUE_DIM)
    if DIVIDES:
        factor = 1.0 / (tl.sum(phi * key_sum[None, :], 1) + keys * eps)
        p = tl.sum(phi * through, 1) * factor * factor
    else:
        factor = tl.zeros([BLOCK_N], tl.float32) + scale
        p = scale * of_mean
    gradient = _through_features(through * factor[:, None] - key_sum[None, :] * p[:, None], x, RELU)
    _store(query_gradient, query_gradient_strides, head, heads, tokens, count, dims, HEAD_DIM, gradient)
    tl.store(factors + head * count + tokens, factor, mask=tokens < count)
    tl.store(weights + head * count + tokens, -p, mask=tokens < count)


@triton.jit
def linear_key_gradients_kernel(
    key, key_strides, value, value_strides, key_gate, key_gate_strides, value_gate, value_gate_strides,
    state_gradient, sum_gradients, key_gradient, key_gradient_strides, value_gradient, value_gradient_strides,
    key_gate_gradient, value_gate_gradient, heads, count, floor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, RELU: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys, values and gates, (batch, heads, keys) each, from those of the state and sums.

    D is a tile of the head dimension here.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(count, BLOCK_N)
    head = program // blocks
    tokens = (program % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_factor = _factors(key_gate, key_gate_strides, head, heads, tokens, count)[:, None]
    value_factor = _factors(value_gate, value_gate_strides, head, heads, tokens, count)[:, None]

    of_gate = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, VALUE_DIM, BLOCK_V):
        values = first + tl.arange(0, BLOCK_V)
        d = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for first_dim in range(0, HEAD_DIM, BLOCK_D):
            dims = first_dim + tl.arange(0, BLOCK_D)
            phi = _load(key, key_strides, head, heads, tokens, count, dims, HEAD_DIM)
            gated = (_features(phi, dims, HEAD_DIM, floor, RELU) * key_factor).to(DOT)  # [N, D]
            tile = _load_state(state_gradient, head, dims, values, HEAD_DIM, VALUE_DIM).to(DOT)  # [D, V]
            d += tl.dot(gated, tile, input_precision=PRECISION)
        d += _load_sums(sum_gradients, head, HEAD_DIM, values, VALUE_DIM, HEAD_DIM, VALUE_DIM)[None, :]
        if value_gate_gradient is not None:
            of_gate += tl.sum(d * _load(value, value_strides, head, heads, tokens, count, values, VALUE_DIM), 1)
        _store(value_gradient, value_gradient_strides, head, heads, tokens, count, values, VALUE_DIM, d * value_factor)
    if value_gate_gradient is not None:
        tl.store(value_gate_gradient + head * count + tokens, of_gate, mask=tokens < count)

    of_gate = tl.zeros([BLOCK_N], tl.float32)
    for first_dim in range(0, HEAD_DIM, BLOCK_D):
        dims = first_dim + tl.arange(0, BLOCK_D)
        d = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(0, VALUE_DIM, BLOCK_V):
            values = first + tl.arange(0, BLOCK_V)
            v = _load(value, value_strides, head, heads, tokens, count, values, VALUE_DIM)
            gated = (v * value_factor).to(DOT)  # [N, V]
            tile = _load_state(state_gradient, head, dims, values, HEAD_DIM, VALUE_DIM).to(DOT)  # [D, V]
            d += tl.dot(gated, tl.trans(tile), input_precision=PRECISION)
        d += _load_sums(sum_gradients, head, 0, dims, HEAD_DIM, HEAD_DIM, VALUE_DIM)[None, :]
        x = _load(key, key_strides, head, heads, tokens, count, dims, HEAD_DIM)
        if key_gate_gradient is not None:
            of_gate += tl.sum(d * _features(x, dims, HEAD_DIM, floor, RELU), 1)
        d = _through_features(d * key_factor, x, RELU)
        _store(key_gradient, key_gradient_strides, head, heads, tokens, count, dims, HEAD_DIM, d)
    if key_gate_gradient is not None:
        tl.store(key_gate_gradient + head * count + tokens, of_gate, mask=tokens < count)
