"""The Triton kernels of volume rendering; `triton.py` launches them and explains the algorithm.

Legend: N is a block of samples of one ray, C a tile of channels; a comment gives a tile's shape. Offsets are kept
within the samples, so that wrong ones touch nothing else. Colours have strides; all other tensors are contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def _bounds(offsets, ray, samples):
    """Of the samples of a ray, the first and the one after the last."""
    first = tl.minimum(tl.maximum(tl.load(offsets + ray), 0), samples)
    last = tl.minimum(tl.maximum(tl.load(offsets + ray + 1), 0), samples)
    return first, last


@triton.jit
def _load(tensor, places, inside):
    return tl.load(tensor + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _optical_depth(density, start, end, places, inside):
    """[N] of each sample; 0 outside."""
    return _load(density, places, inside) * (_load(end, places, inside) - _load(start, places, inside))


@triton.jit
def _opacity_of(x):
    """1 - exp(-x), of small x by its series: the difference would have none of its digits."""
    small = tl.minimum(x, 0.35)
    series = 1.0 - small * 0.125
    series = 1.0 - small * (1.0 / 7.0) * series
    series = 1.0 - small * (1.0 / 6.0) * series
    series = 1.0 - small * 0.2 * series
    series = 1.0 - small * 0.25 * series
    series = 1.0 - small * (1.0 / 3.0) * series
    series = 1.0 - small * 0.5 * series
    return tl.where(tl.abs(x) < 0.35, small * series, 1.0 - tl.exp(-x))


@triton.jit
def rendering_forward_kernel(
    density, colour, sample_stride, channel_stride, start, end, offsets, weights, ray_colour, opacity, depth, samples,
    channels, tiles,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One ray and one tile of channels."""
    ray, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    first, last = _bounds(offsets, ray, samples)
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)  # [C]
    colours = tl.zeros([CHANNELS], tl.float32)
    opacities = tl.zeros([BLOCK], tl.float32)
    depths = tl.zeros([BLOCK], tl.float32)
    before = 0.0
    for block in range(first, last, BLOCK):
        places = block + tl.arange(0, BLOCK)  # [N]
        inside = places < last
        own = _optical_depth(density, start, end, places, inside)
        # Read again one sample earlier, not subtracted from the sum: of a large one nothing would be left.
        earlier = _optical_depth(density, start, end, places - 1, (places > first) & (places <= last))
        w = tl.exp(-(before + tl.cumsum(earlier, 0))) * _opacity_of(own)  # [N]
        before += tl.sum(earlier, 0)
        at = colour + places[:, None] * sample_stride + channel[None, :].to(tl.int64) * channel_stride
        c = tl.load(at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)  # [N, C]
        colours += tl.sum(w[:, None] * c, 0)
        opacities += w
        depths += w * 0.5 * (_load(start, places, inside) + _load(end, places, inside))
        if tile == 0:
            tl.store(weights + places, w, mask=inside)
    tl.store(ray_colour + ray * channels + channel, colours, mask=channel < channels)
    if tile == 0:
        tl.store(opacity + ray, tl.sum(opacities, 0))
        tl.store(depth + ray, tl.sum(depths, 0))


@triton.jit
def rendering_backward_kernel(
    density, colour, sample_stride, channel_stride, start, end, offsets, weights, ray_colour_gradient,
    opacity_gradient, depth_gradient, weights_gradient, density_gradient, colour_gradient, samples, channels,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One ray, twice: forward for the light left behind each sample, which lies where its gradient will, and back."""
    ray = tl.program_id(0).to(tl.int64)
    first, last = _bounds(offsets, ray, samples)
    before = 0.0
    for block in range(first, last, BLOCK):
        places = block + tl.arange(0, BLOCK)  # [N]
        inside = places < last
        own = _optical_depth(density, start, end, places, inside)
        tl.store(density_gradient + places, tl.exp(-(before + tl.cumsum(own, 0))), mask=inside)
        before += tl.sum(own, 0)
    tl.debug_barrier()  # a thread may read back what another wrote
    of_opacity, of_depth = 0.0, 0.0
    if opacity_gradient is not None:
        of_opacity = tl.load(opacity_gradient + ray).to(tl.float32)
    if depth_gradient is not None:
        of_depth = tl.load(depth_gradient + ray).to(tl.float32)
    behind = 0.0
    blocks = (last - first + BLOCK - 1) // BLOCK
    for back in range(0, blocks):
        places = first + (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)  # [N]
        inside = places < last
        t0, t1 = _load(start, places, inside), _load(end, places, inside)
        w = _load(weights, places, inside)
        gradient = of_opacity + of_depth * 0.5 * (t0 + t1)  # [N], of the weights
        if weights_gradient is not None:
            gradient += _load(weights_gradient, places, inside)
        for tile in range(0, channels, CHANNELS):
            channel = tile + tl.arange(0, CHANNELS)  # [C]
            valid = inside[:, None] & (channel < channels)[None, :]
            to = colour_gradient + places[:, None] * channels + channel[None, :]
            if ray_colour_gradient is not None:
                of_colour = _load(ray_colour_gradient + ray * channels, channel, channel < channels)
                at = colour + places[:, None] * sample_stride + channel[None, :].to(tl.int64) * channel_stride
                c = tl.load(at, mask=valid, other=0.0).to(tl.float32)  # [N, C]
                gradient += tl.sum(of_colour[None, :] * c, 1)
                of_sample = w[:, None] * of_colour[None, :]
            else:
                of_sample = tl.zeros([BLOCK, CHANNELS], tl.float32)
            tl.store(to, of_sample.to(colour_gradient.dtype.element_ty), mask=valid)
        share = tl.where(inside, w * gradient, 0.0)
        later = behind + (tl.cumsum(share, 0, reverse=True) - share)  # [N]
        left = _load(density_gradient, places, inside)
        tl.store(density_gradient + places, (t1 - t0) * (left * gradient - later), mask=inside)
        behind += tl.sum(share, 0)
