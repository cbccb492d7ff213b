"""Gated-SwinRMT: its sizes, its windows, its flags, and what ties it to RMT."""

import pytest
import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from kernels.backend import use_backend
from kernels.window_retention import window_retention
from tests.vision.small_models import create, draw_unit_gain
from vision.gated_swin_rmt import GatedRetention, SwatRetention, checkpoint_filter_fn, swat_slopes
from vision.retention_layers import WindowRetention, adaptive_window, manhattan_log_decays, windows_and_shift
from vision.rmt import Retention

WHOLE_MAP = 1000  # a window size no map exceeds


@pytest.mark.parametrize(
    ("name", "classes", "arguments", "parameters"),
    [
        ("medium_retention", 100, {}, 77_396_564),
        ("medium_swat", 100, {}, 77_396_564),
        ("medium_retention", 10, {}, 77_304_314),
        ("medium_swat", 10, {}, 77_304_314),
        ("medium_retention", 100, {"depths": (4, 8, 25, 8)}, 79_049_684),
        ("medium_retention", 100, {"gate": "none"}, 70_855_892),
        ("medium_swat", 100, {"value_gate": False}, 70_855_892),
        ("base_retention", 100, {"layerscales": (False,) * 4}, 56_957_772),
        ("base_swat", 100, {}, 56_957_772 + 2 * (24 * 320 + 8 * 512)),
        ("small_swat", 100, {}, 28_417_156),
        ("tiny_retention", 100, {}, 14_504_708),
        ("nano_swat", 10, {}, 2_914_394),
        ("nano_retention", 10, {}, 2_914_394),
    ],
)
def test_parameters(name, classes, arguments, parameters):
    model = timm.create_model(f"gated_swin_rmt_{name}", num_classes=classes, device="meta", **arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", ["nano", "tiny", "small", "base", "medium"])
def test_docstrings_tell_the_parameters(size):
    for mixer in ("retention", "swat"):
        name = f"gated_swin_rmt_{size}_{mixer}"
        model = timm.create_model(name, num_classes=1000, device="meta")
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert f"{counted:,} parameters" in timm.model_entrypoint(name).__doc__


def test_headwise_gates_are_small():
    dims, depths, heads = (96, 192, 384, 576), (4, 8, 24, 8), (6, 6, 12, 18)
    model = timm.create_model("gated_swin_rmt_medium_retention", num_classes=100, gate="headwise", device="meta")
    gates = sum(depth * (dim + 1) * n for dim, depth, n in zip(dims, depths, heads, strict=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == 70_855_892 + gates


@pytest.mark.parametrize(
    ("length", "window"),
    [
        (1, 1), (7, 7), (8, 8), (10, 5), (12, 6), (13, 13), (14, 7), (16, 8), (17, 7), (20, 5), (24, 8), (28, 7),
        (32, 8), (48, 8), (56, 7), (64, 8), (96, 8), (112, 7),
    ],
)  # fmt: skip
def test_adaptive_window(length, window):
    assert adaptive_window(length) == window


@pytest.mark.parametrize(
    ("image", "windows", "shifts"),
    [
        ((32, 32), [(8, 8), (4, 4), (2, 2), (1, 1)], [(0, 0)] * 4),
        ((224, 224), [(7, 7), (7, 7), (7, 7), (7, 7)], [(3, 3), (3, 3), (3, 3), (0, 0)]),
        ((32, 224), [(8, 7), (4, 7), (2, 7), (1, 7)], [(0, 3), (0, 3), (0, 3), (0, 0)]),
    ],
    ids=["32-all-global", "224", "rectangular"],
)
def test_windows_of_an_image(image, windows, shifts):
    sizes = [tuple(-(-side // stride) for side in image) for stride in (4, 8, 16, 32)]
    assert [windows_and_shift(size, 7, True) for size in sizes] == list(zip(windows, shifts, strict=True))
    assert [windows_and_shift(size, 7, False)[1] for size in sizes] == [(0, 0)] * 4


def test_every_second_block_is_shifted():
    model = create("retention", depths=(4, 2, 1, 1))
    cores = [m for m in model.modules() if isinstance(m, WindowRetention)]
    assert [core.shifted for core in cores] == [False, True, False, True, False, True, False, False]
    assert not any(m.shifted for m in create("swat", shifted=False).modules() if isinstance(m, WindowRetention))


def mixer(kind: type[nn.Module], *arguments, dim: int = 24, heads: int = 3, window: int = 4, **flags) -> nn.Module:
    """A mixer in float64 with weights of unit gain."""
    torch.manual_seed(0)
    decays = manhattan_log_decays(heads, 2, 4)
    return draw_unit_gain(kind(dim, heads, decays, window, *(arguments or (True,)), **flags, dtype=torch.float64))


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


def decomposed_retention(query: Tensor, key: Tensor, value: Tensor, log_decay: tuple[float, ...]) -> Tensor:
    """RMT's decomposed form from its formulas, over whole rows and columns: (B, H, W, heads, D)."""
    height, width, head_dim = query.shape[1], query.shape[2], query.shape[-1]
    places = torch.arange(height * width, dtype=torch.float64).view(1, height, width, 1, 1)
    angle = places * 10000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    query, key = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (query, key)
    )
    decays = torch.tensor(log_decay, dtype=torch.float64)[:, None, None]
    for order in ("b h w n d -> b h n w d", "b h w n d -> b w n h d"):
        q, k, v = (rearrange(x, order) for x in (query, key, value))
        steps = torch.arange(q.shape[-2])
        scores = q @ k.transpose(-1, -2) * head_dim**-0.5 + decays * (steps[:, None] - steps).abs()
        value = rearrange(scores.softmax(-1) @ v, " -> ".join(reversed(order.split(" -> "))))
    return value


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_ungated_in_one_window_is_rmts_decomposed_retention(backend):
    retention = mixer(GatedRetention, window=WHOLE_MAP, gate="none")
    x, block_input = maps(2, 9, 11, 24)
    query, key, value = (layer(x) for layer in (retention.q_proj, retention.k_proj, retention.v_proj))
    heads = [t.unflatten(-1, (3, -1)) for t in (query, key, value)]
    mixed = decomposed_retention(*heads, retention.core.log_decay).flatten(-2)
    expected = retention.out_proj(retention.lepe(value, residual=mixed))
    with use_backend(backend):
        torch.testing.assert_close(retention(x, block_input), expected, atol=1e-12, rtol=0)


def test_a_large_window_changes_nothing_for_rmts_mixer():
    retention = mixer(GatedRetention, window=WHOLE_MAP, gate="none")
    rmt = Retention(24, 3, WindowRetention(retention.core.log_decay, None, False), dtype=torch.float64)
    rmt.load_state_dict(retention.state_dict())
    x, block_input = maps(2, 9, 11, 24)
    assert torch.equal(retention(x, block_input), rmt(x, block_input))


def test_fully_open_gate_is_no_gate():
    gated, ungated = mixer(GatedRetention), mixer(GatedRetention, gate="none")
    ungated.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("g_proj")})
    x, block_input = maps(1, 8, 8, 24)
    nn.init.zeros_(gated.g_proj.weight)
    differences = []
    for logit in (4.0, 20.0, 50.0):
        nn.init.constant_(gated.g_proj.bias, logit)
        differences.append((gated(x, block_input) - ungated(x, block_input)).abs().max().item())
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < 1e-13


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("source", ["normed", "residual"])
def test_gate_is_the_formula(gate, source):
    retention = mixer(GatedRetention, gate=gate, gate_source=source)
    x, block_input = maps(2, 8, 12, 24)
    query, key, value = retention.q_proj(x), retention.k_proj(x), retention.v_proj(x)
    mixed = retention.retain(query, key, value)
    gates = retention.g_proj(x if source == "normed" else block_input).sigmoid()
    if gate == "headwise":
        gates = gates.repeat_interleave(8, -1)
    torch.testing.assert_close(retention(x, block_input), retention.out_proj(gates * mixed))


def test_value_gate_is_the_formula():
    swat = mixer(SwatRetention)
    x, block_input = maps(2, 8, 12, 24)
    value = swat.v_proj(x) * nn.functional.silu(swat.g_proj(x))
    expected = swat.out_proj(swat.retain(swat.q_proj(x), swat.k_proj(x), value))
    torch.testing.assert_close(swat(x, block_input), expected)


def swat_weights(x: Tensor, swat: SwatRetention, alibi: str, post_decay: str, norm: str) -> Tensor:
    """The mixer of one window on one row, written out from the equations."""
    heads = [t.unflatten(-1, (3, -1))[0, 0].transpose(0, 1) for t in (swat.q_proj(x), swat.k_proj(x))]  # (n, N, D)
    value = (swat.v_proj(x) * nn.functional.silu(swat.g_proj(x))).unflatten(-1, (3, -1))[0, 0].transpose(0, 1)
    steps = torch.arange(x.shape[2], dtype=torch.float64)
    steps = steps[:, None] - steps
    slopes = torch.tensor(swat_slopes(3), dtype=torch.float64)[:, None, None]
    gamma = torch.tensor(manhattan_log_decays(3, 2, 4), dtype=torch.float64).exp()[:, None, None]
    logits = heads[0] @ heads[1].transpose(1, 2) * 8**-0.5
    if post_decay == "gamma" and alibi != "none":
        logits = logits + slopes * (steps if alibi == "signed" else steps.abs())
    weights = logits.sigmoid() * (
        gamma ** steps.abs() if post_decay == "gamma" else (-slopes.abs() * steps.abs()).exp()
    )
    if norm in ("clamp", "sum"):
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total.clamp(min=1) if norm == "clamp" else total)
    out = weights @ value
    # The height pass over a single row: each token meets itself alone.
    own = (heads[0] * heads[1]).sum(-1, keepdim=True) * 8**-0.5
    itself = own.sigmoid()
    out = out * {"sum": torch.ones_like(itself)}.get(norm, itself)
    if norm == "rmsnorm":
        out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return swat.out_proj(out.transpose(0, 1).flatten(1)[None, None] + swat.lepe(gated(x, swat), torch.zeros_like(x)))


def gated(x: Tensor, swat: SwatRetention) -> Tensor:
    return swat.v_proj(x) * nn.functional.silu(swat.g_proj(x))


@pytest.mark.parametrize("norm", ["clamp", "sum", "rmsnorm", "none"])
@pytest.mark.parametrize(
    ("alibi", "post_decay"), [("distance", "gamma"), ("signed", "gamma"), ("none", "gamma"), ("distance", "alibi")]
)
def test_swat_is_the_formula(alibi, post_decay, norm):
    flags = {"alibi": alibi, "post_decay": post_decay, "swat_norm": norm, "rope": False}
    swat = mixer(SwatRetention, window=WHOLE_MAP, **flags)
    x, block_input = maps(1, 1, 6, 24)
    torch.testing.assert_close(swat(x, block_input), swat_weights(x, swat, alibi, post_decay, norm))


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(1, [-0.5]), (2, [0.5, -0.5]), (4, [0.5, 0.25, -0.5, -0.25]), (5, [0.5, 0.25, -0.5, -0.25, -0.125])],
)
def test_slopes_are_balanced(heads, slopes):
    assert list(swat_slopes(heads)) == slopes


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_without_decay_rotation_and_slopes_no_position_is_left(activation):
    """Permuting the columns of every window permutes the outputs alike."""
    query, key, value = (torch.randn(1, 4, 8, 2, 6, dtype=torch.float64) for _ in range(3))
    order = torch.tensor([2, 0, 3, 1])
    order = torch.cat([order, 4 + order])
    settings = {"window": (4, 4), "activation": activation, "rotary": False}
    plain = window_retention(query, key, value, (0.0, 0.0), **settings)
    permuted = window_retention(*(x[:, :, order] for x in (query, key, value)), (0.0, 0.0), **settings)
    torch.testing.assert_close(permuted, plain[:, :, order], atol=1e-14, rtol=0)
    decayed = window_retention(query, key, value, (-0.1, -0.1), **settings)
    assert (decayed - plain).abs().max() > 1e-3


def rmt_of_the_same_sizes() -> nn.Module:
    return draw_unit_gain(create("rmt", chunkwise_recurrents=(True,) * 4, num_classes=10)).eval()


def test_rmt_checkpoint_lacks_only_the_gates():
    rmt, model = rmt_of_the_same_sizes(), create("retention", num_classes=10)
    found = model.load_state_dict(checkpoint_filter_fn({"model": rmt.state_dict()}, model), strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys
    assert all(".retention.g_proj." in name for name in found.missing_keys)
    assert len(found.missing_keys) == 2 * sum((2, 2, 1, 1))


def test_open_gates_give_rmts_logits():
    rmt = rmt_of_the_same_sizes()
    images = torch.randn(8, 3, 32, 32)  # every window is global
    model = create("retention", num_classes=10, gate_init="open").eval()
    model.load_state_dict(checkpoint_filter_fn(rmt.state_dict(), model), strict=False)
    closed = create("retention", num_classes=10).eval()
    closed.load_state_dict(checkpoint_filter_fn(rmt.state_dict(), closed), strict=False)
    with torch.no_grad():
        expected = rmt(images)
        difference = (model(images) - expected).abs().max() / expected.abs().max()
        assert difference < 0.02
        assert (closed(images) - expected).abs().max() / expected.abs().max() > 2 * difference


@pytest.mark.parametrize("family", ["retention", "swat"])
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (36, 68), (224, 64)], ids=str)
def test_any_image_size(family, size):
    model = create(family).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, *size))
    assert features.shape[1:3] == tuple(-(-side // 32) for side in size)
    assert features.isfinite().all()


def test_input_size_and_window_size_can_be_set():
    model, images = create("retention").eval(), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        before = model(images)
        model.set_input_size(img_size=(96, 64), patch_size=4)
        assert torch.equal(model(images), before)
        model.set_input_size(window_size=12)
        assert not torch.allclose(model(images), before)
        model.set_input_size(window_size=7)
        assert torch.equal(model(images), before)
    for arguments in ({"img_size": 0}, {"patch_size": 16}, {"window_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
            model.set_input_size(**arguments)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("retention", {"gate": "headwise"}),
        ("retention", {"gate": "none"}),
        ("retention", {"gate_source": "residual"}),
        ("retention", {"rope": False}),
        ("retention", {"shifted": False}),
        ("retention", {"downsample": "merge"}),
        ("swat", {"value_gate": False}),
        ("swat", {"alibi": "signed"}),
        ("swat", {"alibi": "none"}),
        ("swat", {"post_decay": "alibi"}),
        ("swat", {"swat_norm": "sum"}),
        ("swat", {"swat_norm": "rmsnorm"}),
        ("swat", {"swat_norm": "none"}),
        ("swat", {"rope": False}),
    ],
    ids=str,
)
def test_every_flag_trains(family, flags):
    images = torch.randn(2, 3, 64, 64)
    plain, model = draw_unit_gain(create(family)).train(), create(family, **flags).train()
    own = model.state_dict()
    shared = {k: v for k, v in plain.state_dict().items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(shared, strict=False)
    output = model(images)
    if len(shared) == len(own):  # else new weights alone make a difference
        assert not torch.allclose(output, plain(images), atol=1e-4)
    output.square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
