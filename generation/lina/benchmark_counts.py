"""What `benchmark lina` counts instead of timing: launches, bytes and multiply-adds of our modules and their rivals."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from generation.lina.attention import Attention
from generation.lina.benchmark_rivals import KERNEL_SIZE, attention_pair, block_pair, reference, softmax_attention
from generation.lina.token_denoiser import SamplingDenoiser, TokenDenoiser
from kernels.fused_layers import add_image_convolution

GIGA = 1e9


def gpu_convolution(width: int, heads: int, side: int, batch: int) -> Any:
    """Counts of the convolution where there is no native kernel: plain operations."""
    ours = attention_pair(width, heads, side)[1].bfloat16()
    tokens, x = (torch.randn(batch, side * side * 5 // 4, width, dtype=torch.bfloat16) for _ in range(2))
    options = {"grid": (side, side), "overwrite": True, "backend": "reference"}
    with torch.no_grad():
        return reference("operation_counter").count(
            lambda: add_image_convolution(tokens, x, ours.dw_conv.weight, ours.dw_conv.bias, **options)
        )


def launches_on_a_gpu(width: int, heads: int, side: int, batch: int) -> dict[str, int]:
    """Kernels behind our operators.

    Linear attention is accumulation and read-out; where the tokens are cut into ranges, two sums of the ranges' states
    lie between them (kernels/linear_attention/triton.py), so that four is the most. The convolution has no kernel of
    its own on a GPU, and is in none of attention's: its plain operations count.
    """
    attention, convolution = 4, gpu_convolution(width, heads, side, batch).operations
    launches = {
        "linear_attention": attention,
        "linear_attention_with_convolution": attention + convolution,
        "add_image_convolution": convolution,
        "add_image_convolution_": convolution,
    }
    return {f"gated_vision::{name}": number for name, number in launches.items()}


def count_block(width: int = 1536, heads: int = 16, side: int = 16, batch: int = 2) -> dict[str, int]:
    """Launches of one decoder block in bfloat16, without gradients."""
    count = reference("operation_counter").count
    eager, ours = (block.bfloat16() for block in block_pair(width, heads, side))
    softmax = reference("eager_lina_layers").Block(width, softmax_attention(width, heads)).bfloat16()
    x = torch.randn(batch, side * side * 5 // 4, width, dtype=torch.bfloat16)
    launches = launches_on_a_gpu(width, heads, side, batch)
    with torch.no_grad():
        return {
            "eager": count(lambda: eager(x)).operations,
            "ours": count(lambda: ours(x, (side, side)), launches).operations,
            "ours, on CPU": count(lambda: ours(x, (side, side))).operations,
            "softmax": count(lambda: softmax(x)).operations,
        }


def count_diffusion(width: int = 1536, depth: int = 6, tokens: int = 4, steps: int = 25) -> dict[str, float]:
    """Launches of a diffusion step with guidance in bfloat16, of one image; ours as the mean of all steps."""
    count, eager_lina = reference("operation_counter").count, reference("eager_lina")
    eager = eager_lina.EagerDenoiser(4, 2, width, width, depth).bfloat16()
    ours = SamplingDenoiser(TokenDenoiser(depth, width, width, 4, 2).bfloat16())
    config = eager_lina.EagerLinaConfig(64, 1, 1, 2, 64, 1, 4, (32, 32), 2, num_classes=1)
    whole = eager_lina.EagerLina(config)
    whole.image_decoder = eager
    sigmas = eager_lina.sample_sigmas(steps)
    noisy, z = torch.randn(1, 4, 32, 32).bfloat16(), torch.randn(2, 256, width).bfloat16()
    predicted = torch.arange(tokens).view(1, -1, 1).expand(2, -1, -1)
    # The official code keeps its table of frequencies after the first step.
    with torch.no_grad():
        step = (sigmas[0] * 1000, z, predicted, 5.0, sigmas[0], sigmas[1])
        whole.diffusion_step(noisy, *step)
        of_eager = count(lambda: whole.diffusion_step(noisy, *step)).operations
        noise, levels = torch.randn(1, tokens, 16).bfloat16(), tuple(sigmas.tolist())
        of_ours = count(lambda: ours(noise, z[:, :tokens], levels, 5.0)).operations
    return {"eager": of_eager, "ours": of_ours / steps}


def count_bytes(width: int, heads: int, side: int = 32) -> dict[str, float]:
    """Megabytes that a decoder attention module touches in bfloat16, of one image: of the eager form, ours, ours with
    the convolution's plain operations, and what two separate projections and one reading of their results must."""
    count = reference("operation_counter").count
    eager, ours = (module.bfloat16() for module in attention_pair(width, heads, side))
    tokens = side * side * 5 // 4
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    with torch.no_grad():
        of_eager, of_ours = count(lambda: eager(x)), count(lambda: ours(x, (side, side)))
    separate = count(lambda: ours(x, (side, side)))  # with gradients, attention and convolution are two, as on a GPU
    convolution = separate.by_operation["gated_vision::add_image_convolution"][1]
    on_gpu = separate.bytes - convolution + gpu_convolution(width, heads, side, 1).bytes
    least = 2 * (4 * width * width + 4 * width + tokens * width * (1 + 3 + 3 + 1 + 1 + 1))
    sizes = {"eager": of_eager.bytes, "ours": of_ours.bytes, "ours, on a GPU": on_gpu, "projections alone": least}
    return {name: size / 1e6 for name, size in sizes.items()}


def _attention_flops(query: tuple, key: tuple, value: tuple) -> int:
    """Of the state, its read-out and the denominators."""
    (batch, queries, heads, dim), keys, value_dim = query, key[1], value[3]
    return 2 * batch * heads * (keys * dim * value_dim + queries * dim * value_dim + queries * dim)


def _convolution_flops(x: tuple, weight: tuple, bias: Any, height: int, width: int) -> int:
    batch, _, channels = x
    return 2 * batch * height * width * channels * weight[2] * weight[3]


def _fused_flops(*arguments: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the arguments of the operator: query, key, value, two gates, then the convolution's."""
    return _attention_flops(*arguments[:3]) + _convolution_flops(*arguments[5:10])


def _softmax_flops(query: tuple, key: tuple, value: tuple, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of scores and weighted sums."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * (dim + value[3])


def attention_gmacs(width: int, heads: int, side: int) -> dict[str, float]:
    """Multiply-adds of a decoder attention module and of its softmax twin, counted where they run, on tensors without
    memory."""
    formulas = {
        torch.ops.gated_vision.linear_attention_with_convolution: _fused_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax_flops,
    }
    counts = {}
    with FakeTensorMode(), torch.no_grad():
        modules = {
            "linear": Attention(width, heads, gates="per_head", grid=(side, side), locality=KERNEL_SIZE),
            "softmax": Attention(width, heads, attention="softmax"),
        }
        x = torch.empty(1, side * side * 5 // 4, width)
        for name, module in modules.items():
            with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
                module(x, (side, side))
            counts[name] = counter.get_total_flops() / 2 / GIGA
    return counts
