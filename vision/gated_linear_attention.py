"""ViG's token mixer: bidirectional gated linear attention with a local branch, and the layers around it.

Everything runs on channels-last maps (B, H, W, C); tokens are their row-major view (B, N, C), so nothing is copied
between the convolution, the projections and the scan. With xs the depthwise convolution of the input:

    q, k, v = split(xs W_qkv);   log decay = logsigmoid(xs W_1 W_2 + b) / 16, one per direction, head and key channel
    o = bidirectional scan(q, k, v);   G = sigmoid(xs W_g + b_g)
    out = act(G * rms_norm(o) + (1 - G) * rms_norm(xs)) W_o

There is no feature map, no query/key normalisation and no softmax. Source: ViG, arXiv 2405.18425. Parameter names are
those of the published checkpoints.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.models import checkpoint, register_notrace_function
from torch import Tensor, nn

from kernels.fused_layers import depthwise_convolution, gated_norm_mix, rms_norm, swiglu
from kernels.gated_scan import bidirectional_gated_scan
from kernels.recomputation import can_recompute, linear_of
from vision.timm_contract import refuse_scripting

GATE_LOGIT_NORMALIZER = 16.0
GATE_RANK = 16
# Tokens from which training computes cheap values again in backward: 5 to 10 % more time, a fifth less memory, which
# matters where maps are large.
RECOMPUTE_FROM = 1024

# torch.fx keeps the kernels as single nodes: they look at shapes, which a symbolic trace does not have.
for _operation in (bidirectional_gated_scan, depthwise_convolution, gated_norm_mix, rms_norm, swiglu):
    register_notrace_function(_operation)
    torch.fx.wrap(_operation.__name__)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension; no bias."""

    def __init__(self, dim: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class ChannelsLastConv2d(nn.Conv2d):
    """`nn.Conv2d` from (B, H, W, C) to (B, H', W', C'): the permuted views are torch's channels_last layout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConvolution(nn.Module):
    """3x3 depthwise convolution of (B, H, W, C), zero padding, no bias, then the activation (None or "silu")."""

    def __init__(self, dim: int, activation: str | None = None, *, device=None, dtype=None):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_convolution(x, self.weight, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, activation={self.activation}"


class GatedMLP(nn.Sequential):
    """`(silu(x W_a) * (x W_b)) W_2` without biases; `names` are the state-dict names of the two projections."""

    def __init__(self, dim: int, hidden: int, names: tuple[str, str], *, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        expand, reduce = nn.Linear(dim, 2 * hidden, bias=False, **dd), nn.Linear(hidden, dim, bias=False, **dd)
        super().__init__(OrderedDict([(names[0], expand), (names[1], reduce)]))

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """The MLP of `norm(x)`; training on large maps keeps neither the normed nor the gated values."""
        expand, reduce = self
        if can_recompute() and x.shape[1] * x.shape[2] >= RECOMPUTE_FROM:
            return linear_of(swiglu, (linear_of(norm, (x,), expand),), reduce)
        return reduce(swiglu(expand(norm(x))))


class BidirectionalGatedScan(nn.Module):
    """The scan as a module of its own, so that forward hooks and FLOP counters can tell it from the projections."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
        """Gates are logits (B, N, H, K); the rest as in `kernels.bidirectional_gated_scan`."""
        return bidirectional_gated_scan(
            query, key, value, forward_gate, backward_gate, logit_normalizer=GATE_LOGIT_NORMALIZER
        )


class GatedLinearAttention(nn.Module):
    """The token mixer: (B, H, W, C) -> (B, H, W, C), any H and W.

    Args:
        dim: channels C; the value width of a head is C / num_heads, its key width half of that.
        num_heads: heads.
        convolution_activation: None or "silu", after the depthwise convolution.
        output_activation: None or "silu", after the mix of the two branches.

    Raises:
        ValueError: `dim` is not a multiple of `2 * num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        convolution_activation: str | None = None,
        output_activation: str | None = None,
        device=None,
        dtype=None,
    ):
        if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
            raise ValueError(
                f"dim is {dim} and num_heads {num_heads}; dim must be a positive multiple of 2 * num_heads"
            )
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.output_activation = output_activation
        self.in_proj = nn.Sequential(DepthwiseConvolution(dim, convolution_activation, **dd))
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.gk_proj = nn.Sequential(nn.Linear(dim, GATE_RANK, bias=False, **dd), nn.Linear(GATE_RANK, dim, **dd))
        self.scan = BidirectionalGatedScan()
        self.o_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.g_norm = RMSNorm(dim // num_heads, **dd)
        self.l_norm = RMSNorm(dim // num_heads, **dd)
        self.g_proj = nn.Linear(dim, dim, **dd)
        self.fused_proj: nn.Linear | None = None
        self.reset_projections()

    @torch.no_grad()
    def reset_projections(self) -> None:
        """Draw every projection from Xavier's uniform distribution at gain 2**-2.5, as the authors do."""
        projections = (self.in_proj[0], self.qkv_proj, *self.gk_proj, self.g_proj, self.o_proj)
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """The mixer of `norm(x)`; training on large maps keeps neither the normed nor the mixed values."""
        recompute = can_recompute() and x.shape[1] * x.shape[2] >= RECOMPUTE_FROM
        if recompute:
            local = checkpoint(self._local_branch, x, norm, preserve_rng_state=False)
        else:
            local = self._local_branch(x, norm)
        if self.fused_proj is None:
            query, key, value = self.qkv_proj(local).split((self.dim // 2, self.dim // 2, self.dim), dim=-1)
            low_rank, mix_logits = self.gk_proj[0](local), self.g_proj(local)
            gates = self.gk_proj[1](low_rank)
        else:
            sizes = (self.dim // 2, self.dim // 2, self.dim, GATE_RANK, self.dim)
            query, key, value, low_rank, mix_logits = self.fused_proj(local).split(sizes, dim=-1)
            gates = self.gk_proj(low_rank)
        forward_gate, backward_gate = gates.chunk(2, dim=-1)

        heads = (self.num_heads, -1)
        scanned = self.scan(
            query.unflatten(-1, heads),
            key.unflatten(-1, heads),
            value.unflatten(-1, heads),
            forward_gate.unflatten(-1, heads),
            backward_gate.unflatten(-1, heads),
        )  # (B, N, H, V)
        branches = (scanned, local, mix_logits, self.g_norm.weight, self.l_norm.weight)
        out = linear_of(self._mix, branches, self.o_proj) if recompute else self.o_proj(self._mix(*branches))
        return out.reshape(x.shape)

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_scripting()

    def _local_branch(self, x: Tensor, norm: nn.Module) -> Tensor:
        return self.in_proj(norm(x)).flatten(1, 2)  # (B, N, C)

    def _mix(self, scan: Tensor, local: Tensor, logits: Tensor, scan_weight: Tensor, local_weight: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        return gated_norm_mix(
            scan,
            local.unflatten(-1, heads),
            logits.unflatten(-1, heads),
            scan_weight,
            local_weight,
            self.g_norm.eps,
            activation=self.output_activation,
        ).flatten(2)

    @torch.no_grad()
    def fuse(self) -> None:
        """Compute queries, keys, values, the gates' first factor and the mix logits in one matrix product.

        The three projections are replaced, so that no second copy of their weights can go stale.
        """
        if self.fused_proj is not None:
            return
        parts = (self.qkv_proj.weight, self.gk_proj[0].weight, self.g_proj.weight)
        weight = torch.cat(parts)
        fused = nn.Linear(*weight.shape[::-1], device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight)
        fused.bias.copy_(F.pad(self.g_proj.bias, (weight.shape[0] - self.dim, 0)))
        self.fused_proj = fused
        self.gk_proj = self.gk_proj[1]
        del self.qkv_proj, self.g_proj
