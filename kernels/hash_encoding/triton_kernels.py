"""The Triton kernels of hash encodings; `triton.py` launches them and explains the algorithm.

Legend: N is a block of points, F a level's features; a comment gives a tile's shape. A level's row of constants: its
multipliers, its size, whether it is hashed; unsigned integers that wrap are kept as int32. Without a mixture a row is
the same for a whole program, its constants scalars.
"""

import triton
import triton.language as tl


@triton.jit
def _row(expert, places, inside, level, levels, experts):
    """The row of constants: [N], or a scalar without experts. An expert that does not exist reads that of expert 0."""
    if expert is None:
        row = level
    else:
        chosen = tl.load(expert + places, mask=inside, other=0)
        chosen = tl.where((chosen >= 0) & (chosen < experts), chosen, 0)
        row = chosen.to(tl.int32) * levels + level
    return row


@triton.jit
def _exists(expert, places, inside, experts):
    """[N], 1, or NaN where there is no such expert."""
    if expert is None:
        factor = tl.where(inside, 1.0, 0.0)
    else:
        chosen = tl.load(expert + places, mask=inside, other=0)
        factor = tl.where((chosen >= 0) & (chosen < experts), 1.0, float("nan"))
    return factor


@triton.jit
def _axis(
    points, points_stride, axis_stride, places, inside, constants, scales, row, d: tl.constexpr,
    STAGGERED: tl.constexpr, INTERPOLATION: tl.constexpr,
):  # fmt: skip
    """Along one dimension: the lower corner's term, the step to the upper one's, its weight and the weight's slope."""
    x = tl.load(points + places * points_stride + d * axis_stride, mask=inside, other=0.0).to(tl.float32)  # [N]
    # What is not finite becomes NaN here: infinity times zero.
    position = tl.fma(x, x * 0.0 + tl.load(scales + row), x * 0.0 + (0.5 if STAGGERED else 0.0))
    kept = tl.where(position < -2147483648.0, -2147483648.0, tl.where(position > 2147483520.0, 2147483520.0, position))
    whole = tl.floor(kept)
    w = kept - whole
    slope = tl.where(position == kept, 1.0, 0.0)
    if not STAGGERED:
        slope = tl.where(w > 0, slope, 0.0)  # both corners are one
    if INTERPOLATION == "smoothstep":
        slope *= 6.0 * w * (1.0 - w)
        w = w * w * (3.0 - 2.0 * w)
    elif INTERPOLATION == "nearest":
        slope = w * 0.0
        w = w * 0.0
    cell = tl.where(whole == whole, whole, 0.0).to(tl.int32)
    multiplier = tl.load(constants + row * 8 + d)
    return cell * multiplier, x.to(tl.int32) * 0 + multiplier, w, slope


@triton.jit
def _locate(
    points, points_stride, axis_stride, places, inside, constants, scales, row, DIMS: tl.constexpr,
    STAGGERED: tl.constexpr, INTERPOLATION: tl.constexpr,
):  # fmt: skip
    """Terms, steps, weights and slopes along all four dimensions; of those that a point lacks they are not used."""
    t0, m0, w0, s0 = _axis(
        points, points_stride, axis_stride, places, inside, constants, scales, row, 0, STAGGERED, INTERPOLATION
    )
    t1, m1, w1, s1 = _axis(
        points, points_stride, axis_stride, places, inside, constants, scales, row, 1, STAGGERED, INTERPOLATION
    )
    t2, m2, w2, s2 = t0, m0, w0, s0
    t3, m3, w3, s3 = t0, m0, w0, s0
    if DIMS > 2:
        t2, m2, w2, s2 = _axis(
            points, points_stride, axis_stride, places, inside, constants, scales, row, 2, STAGGERED, INTERPOLATION
        )
    if DIMS > 3:
        t3, m3, w3, s3 = _axis(
            points, points_stride, axis_stride, places, inside, constants, scales, row, 3, STAGGERED, INTERPOLATION
        )
    return (t0, t1, t2, t3), (m0, m1, m2, m3), (w0, w1, w2, w3), (s0, s1, s2, s3)


@triton.jit
def _factor(w, upper: tl.constexpr):
    return w if upper else 1.0 - w


@triton.jit
def _slot(terms, steps, constants, offsets, row, corner: tl.constexpr, DIMS: tl.constexpr):
    """[N], the table's row of a corner, whose bit d is its step along dimension d."""
    index = terms[0] + steps[0] if corner & 1 else terms[0]
    mixed, summed = index, index
    for d in tl.static_range(1, DIMS):
        term = terms[d] + steps[d] if (corner >> d) & 1 else terms[d]
        mixed = mixed ^ term
        summed = summed + term
    size = tl.load(constants + row * 8 + 4)
    hashed = tl.load(constants + row * 8 + 5) != 0
    unsigned = summed.to(tl.uint32, bitcast=True)
    divisor = (summed * 0 + size).to(tl.uint32, bitcast=True)
    remainder = (unsigned % divisor).to(tl.int32, bitcast=True)
    # A level of 2^31 rows has the size -2^31 as an int32, and the right mask even so.
    index = tl.where(hashed, mixed & (size - 1), remainder)
    return index.to(tl.int64) + tl.load(offsets + row)


@triton.jit
def _factors(weights, corner: tl.constexpr, without: tl.constexpr, DIMS: tl.constexpr):
    """[N], the product of a corner's factors but that of dimension `without`."""
    product = weights[0] * 0.0 + 1.0
    for d in tl.static_range(DIMS):
        if d != without:
            product *= _factor(weights[d], (corner >> d) & 1)
    return product


@triton.jit
def _gate(gate, places, inside):
    if gate is None:
        factor = tl.where(inside, 1.0, 0.0)
    else:
        factor = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    return factor


@triton.jit
def hash_forward_kernel(
    table, points, points_stride, axis_stride, output, expert, gate, constants, scales, offsets, count, levels, experts,
    DIMS: tl.constexpr, FEATURES: tl.constexpr, STAGGERED: tl.constexpr, INTERPOLATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One level of a block of points; the programs of a level follow each other."""
    blocks = tl.cdiv(count, BLOCK)
    level = tl.program_id(0) // blocks
    places = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [N]
    inside = places < count
    f = tl.arange(0, FEATURES)
    row = _row(expert, places, inside, level, levels, experts)
    terms, steps, weights, _ = _locate(
        points, points_stride, axis_stride, places, inside, constants, scales, row, DIMS, STAGGERED, INTERPOLATION
    )
    features = tl.zeros([BLOCK, FEATURES], tl.float32)
    for corner in tl.static_range(1 if INTERPOLATION == "nearest" else 1 << DIMS):
        slot = _slot(terms, steps, constants, offsets, row, corner, DIMS)
        entry = tl.load(table + slot[:, None] * FEATURES + f[None, :], mask=inside[:, None], other=0.0)  # [N, F]
        features += _factors(weights, corner, -1, DIMS)[:, None] * entry.to(tl.float32)
    features *= (_gate(gate, places, inside) * _exists(expert, places, inside, experts))[:, None]
    into = output + (tl.cast(level, tl.int64) * FEATURES + f[None, :]) * count + places[:, None]
    tl.store(into, features.to(output.dtype.element_ty), mask=inside[:, None])


@triton.jit
def hash_table_gradient_kernel(
    gradients, points, points_stride, axis_stride, table_gradients, expert, gate, constants, scales, offsets, count,
    levels, experts,
    DIMS: tl.constexpr, FEATURES: tl.constexpr, STAGGERED: tl.constexpr, INTERPOLATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One level of a block of points: adds to the table's gradients atomically."""
    blocks = tl.cdiv(count, BLOCK)
    level = tl.program_id(0) // blocks
    places = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [N]
    inside = places < count
    f = tl.arange(0, FEATURES)
    row = _row(expert, places, inside, level, levels, experts)
    terms, steps, weights, _ = _locate(
        points, points_stride, axis_stride, places, inside, constants, scales, row, DIMS, STAGGERED, INTERPOLATION
    )
    source = gradients + (tl.cast(level, tl.int64) * FEATURES + f[None, :]) * count + places[:, None]
    gradient = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)  # [N, F]
    gradient *= _gate(gate, places, inside)[:, None]
    adds = inside & (_exists(expert, places, inside, experts) == 1.0)
    for corner in tl.static_range(1 if INTERPOLATION == "nearest" else 1 << DIMS):
        slot = _slot(terms, steps, constants, offsets, row, corner, DIMS)
        share = _factors(weights, corner, -1, DIMS)[:, None] * gradient
        into = table_gradients + slot[:, None] * FEATURES + f[None, :]
        tl.atomic_add(into, share, mask=adds[:, None], sem="relaxed")


@triton.jit
def hash_point_gradient_kernel(
    gradients, points, points_stride, axis_stride, table, point_gradients, gate_gradients, expert, gate, constants,
    scales, offsets, count, levels, experts, active,
    DIMS: tl.constexpr, FEATURES: tl.constexpr, STAGGERED: tl.constexpr, INTERPOLATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All levels of a block of points: their gradients and those of their gates, either of which may be None."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [N]
    inside = places < count
    f = tl.arange(0, FEATURES)
    of_gate = tl.zeros([BLOCK], tl.float32)
    of_0, of_1, of_2, of_3 = of_gate, of_gate, of_gate, of_gate
    for level in range(0, active):
        row = _row(expert, places, inside, level, levels, experts)
        terms, steps, weights, slopes = _locate(
            points, points_stride, axis_stride, places, inside, constants, scales, row, DIMS, STAGGERED, INTERPOLATION
        )
        source = gradients + (tl.cast(level, tl.int64) * FEATURES + f[None, :]) * count + places[:, None]
        gradient = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)  # [N, F]
        scale = tl.load(scales + row)
        for corner in tl.static_range(1 if INTERPOLATION == "nearest" else 1 << DIMS):
            slot = _slot(terms, steps, constants, offsets, row, corner, DIMS)
            entry = tl.load(table + slot[:, None] * FEATURES + f[None, :], mask=inside[:, None], other=0.0)  # [N, F]
            product = tl.sum(entry.to(tl.float32) * gradient, 1)  # [N]
            of_gate += product * _factors(weights, corner, -1, DIMS)
            if point_gradients is not None:
                along = product * scale
                of_0 += (along if corner & 1 else -along) * slopes[0] * _factors(weights, corner, 0, DIMS)
                of_1 += (along if corner & 2 else -along) * slopes[1] * _factors(weights, corner, 1, DIMS)
                if DIMS > 2:
                    of_2 += (along if corner & 4 else -along) * slopes[2] * _factors(weights, corner, 2, DIMS)
                if DIMS > 3:
                    of_3 += (along if corner & 8 else -along) * slopes[3] * _factors(weights, corner, 3, DIMS)
    exists = _exists(expert, places, inside, experts)
    if gate_gradients is not None:
        tl.store(gate_gradients + places, of_gate * exists, mask=inside)
    if point_gradients is not None:
        factor = _gate(gate, places, inside) * exists
        tl.store(point_gradients + places * DIMS, of_0 * factor, mask=inside)
        tl.store(point_gradients + places * DIMS + 1, of_1 * factor, mask=inside)
        if DIMS > 2:
            tl.store(point_gradients + places * DIMS + 2, of_2 * factor, mask=inside)
        if DIMS > 3:
            tl.store(point_gradients + places * DIMS + 3, of_3 * factor, mask=inside)
