"""What timm asserts of every backbone (its tests/test_models.py), and what its tools use, on small instances of each.

`test_registered` builds the registered sizes; everything else runs on small instances of the same classes.
"""

import math

import pytest
import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.vision.small_models import LAYER_SCALED, SMALL, create

SIZES = {
    "vig*": (
        "h_base",
        "h_small",
        "h_tiny",
        "base_patch16_224",
        "nano_patch4_28",
        "small_patch16_224",
        "tiny_patch16_224",
    ),
    "rmt*": ("base", "large", "small", "tiny"),
    "gated_swin_rmt*": [
        f"{size}_{mixer}" for size in ("base", "medium", "nano", "small", "tiny") for mixer in ("retention", "swat")
    ],
}
NAMES = [f"{prefix.removesuffix('*')}_{size}" for prefix, sizes in SIZES.items() for size in sizes]


@pytest.fixture(params=SMALL)
def family(request) -> str:
    return request.param


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    assert timm.is_model(name)
    model = timm.create_model(name, device="meta").eval()
    cfg, state_dict = model.default_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert cfg["classifier"] + ".weight" in state_dict
    assert cfg["first_conv"] + ".weight" in state_dict
    assert model.num_classes == cfg["num_classes"]
    batch = torch.zeros(1, *cfg["input_size"], device="meta")
    features = model.forward_features(batch)
    rows, columns = get_spatial_dim(model.output_fmt)
    assert (features.shape[rows], features.shape[columns]) == cfg["pool_size"]
    assert features.shape[get_channel_dim(model.output_fmt)] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model(batch).shape == (1, model.num_classes)
    assert len(model.feature_info) >= 3


@pytest.mark.parametrize("pattern", SIZES)
def test_all_sizes_are_listed(pattern):
    assert len(timm.list_models(pattern)) == len(SIZES[pattern])


def test_hierarchical_size_is_only_checked():
    model = timm.create_model("vig_h_tiny", img_size=96, dims=(16, 32), depths=(1, 1), num_heads=(1, 1))
    model.set_input_size((64, 80))
    assert model.eval()(images(1, 3, 64, 80)).shape == (1, 1000)
    with pytest.raises(ValueError, match="patch_size is 16"):
        model.set_input_size(patch_size=16)


def test_nano_is_small():
    model = timm.create_model("vig_nano_patch4_28")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model(images(2, 1, 28, 28)).shape == (2, 10)


def test_gradient_checkpointing_changes_nothing(family):
    model = create(family).eval()
    batch = images(1, 3, 64, 64)
    output, (final, _) = model(batch), model.forward_intermediates(batch)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(batch), output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_intermediates(batch)[0], final, rtol=1e-4, atol=1e-5)
    batch.requires_grad_()
    model(batch).sum().backward()
    checkpointed, batch.grad = batch.grad, None
    model.set_grad_checkpointing(False)
    model(batch).sum().backward()
    torch.testing.assert_close(checkpointed, batch.grad, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(family):
    model = create(family, num_classes=42, **LAYER_SCALED[family]).train()
    output = model(images(2, 3, 64, 64))
    assert output.shape == (2, 42)
    output.mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_drop_path_is_active_in_training_only(family):
    model = create(family, drop_path_rate=0.9)
    batch = images(4, 3, 64, 64)
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


def test_head_and_pooling(family):
    model = create(family, num_classes=7).eval()
    batch = images(2, 3, 64, 64)
    features = model.forward_features(batch)
    pooled = model.forward_head(features, pre_logits=True)
    assert isinstance(model.get_classifier(), nn.Linear)
    torch.testing.assert_close(model.get_classifier()(pooled), model(batch))

    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(batch), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(batch), features)
    model.reset_classifier(3, "avg")
    assert model(batch).shape == (2, 3)
    unpooled = create(family, num_classes=0, global_pool="").eval()
    assert unpooled(batch).shape == features.shape


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax"])
def test_pooling_kinds(family, global_pool):
    model = create(family, num_classes=5, global_pool=global_pool).eval()
    batch = images(2, 3, 64, 64)
    assert model(batch).shape == (2, 5)
    pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)


def test_input_channels_and_factory_arguments(family):
    model = create(family, in_chans=1, dtype=torch.float64, drop_rate=0.5)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.reset_classifier(4)
    assert model.eval()(images(1, 1, 64, 64).double()).shape == (1, 4)


def test_features_only(family):
    model = create(family, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    outputs = model(images(1, 3, 96, 80))
    for channel, reduction, output in zip(channels, reductions, outputs, strict=True):
        assert output.shape == (1, channel, math.ceil(96 / reduction), math.ceil(80 / reduction))


def test_features_only_takes_out_indices(family):
    batch = images(1, 3, 64, 64)
    outputs = create(family, features_only=True, out_indices=(0, 2)).eval()(batch)
    expected = create(family).eval().forward_intermediates(batch, indices=[0, 2], intermediates_only=True)
    for output, target in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, target)


def test_forward_intermediates(family):
    model = create(family).eval()
    batch = images(1, 3, 96, 96)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    final, intermediates = model.forward_intermediates(batch, output_fmt="NCHW")
    assert torch.allclose(final, model.forward_features(batch))
    for channel, reduction, output in zip(info.channels(), info.reduction(), intermediates, strict=True):
        assert output.shape == (1, channel, 96 // reduction, 96 // reduction)

    last_two = model.forward_intermediates(batch, indices=2, output_fmt="NHWC", intermediates_only=True)
    assert [x.permute(0, 3, 1, 2).shape for x in last_two] == [x.shape for x in intermediates[-2:]]
    [early] = model.forward_intermediates(batch, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early, intermediates[1])
    [normed] = model.forward_intermediates(batch, indices=[-1], norm=True, output_fmt="NHWC", intermediates_only=True)
    if family.startswith("vig"):
        assert torch.equal(normed, final)
    else:  # whose only norm follows the projection
        assert torch.equal(normed.permute(0, 3, 1, 2), intermediates[-1])


def test_prune_intermediate_layers(family):
    batch = images(1, 3, 64, 64)
    expected = create(family).eval().forward_intermediates(batch, indices=[0, 1], intermediates_only=True)
    model = create(family).eval()
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert torch.equal(model(batch).permute(0, 3, 1, 2), expected[1])
    kept = model.forward_intermediates(batch, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    assert model.num_features == expected[1].shape[1]


@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_group_matcher_orders_layers_by_depth(family, coarse):
    model = create(family)
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse), reverse=True)
    layer_of = {name: int(layer) for name, layer in groups.items()}
    assert set(layer_of) == {name for name, _ in model.named_parameters()}
    assert layer_of[model.default_cfg["first_conv"] + ".weight"] == min(layer_of.values())
    assert layer_of[model.default_cfg["classifier"] + ".weight"] == max(layer_of.values())
    if family == "vig":
        order = [layer_of[f"blocks.{i}.attn.o_proj.weight"] for i in range(4)]
        assert order == [1, 2, 3, 4]
    elif not coarse:
        mixer, reduction = ("op.o_proj", "1") if family == "vig_h" else ("retention.out_proj", "reduction")
        first, down = f"layers.1.blocks.1.{mixer}.weight", f"layers.1.downsample.{reduction}.weight"
        assert layer_of[first] == layer_of[down] < layer_of[f"layers.2.blocks.0.{mixer}.weight"]


def test_layer_decay_groups(family):
    model = create(family)
    exempt = model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=exempt, layer_decay=0.5)
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters())
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim < 2 or name in exempt), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("registered", [False, True], ids=["bare-tracer", "timm-tracer"])
def test_symbolic_trace_gives_equal_numbers(family, registered, training):
    model = create(family, num_classes=6).train(training)
    batch = images(2, 3, 96, 64)
    kwargs = {}
    if registered:
        kwargs = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=kwargs, suppress_diff_warning=True)
    traced = create_feature_extractor(
        model,
        train_return_nodes=[train_nodes[-1]],
        eval_return_nodes=[eval_nodes[-1]],
        tracer_kwargs=kwargs,
        suppress_diff_warning=True,
    )
    [output] = traced.train(training)(batch).values()
    assert torch.equal(output, model(batch))
    assert torch.equal(
        traced(images(1, 3, 64, 112))[(train_nodes if training else eval_nodes)[-1]], model(images(1, 3, 64, 112))
    )
    output.mean().backward()
    assert not [name for name, parameter in traced.named_parameters() if parameter.grad is None]


def test_bfloat16_autocast(family):
    model = create(family).eval()
    batch = images(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
        output.float().square().mean().backward()
    exact = model(batch)
    assert output.dtype == torch.bfloat16
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert (output.float() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(
    ("family", "kwargs", "message"),
    [
        ("vig", {"num_heads": 5}, "num_heads 5"),
        ("vig", {"patch_size": 7}, "patch_size is 7"),
        ("vig", {"img_size": 3}, "img_size is 3"),
        ("vig", {"img_size": (1, 2, 3)}, "img_size is"),
        ("vig", {"global_pool": "token"}, "global_pool is 'token'"),
        ("vig_h", {"depths": (1, 1)}, "depths"),
        ("vig_h", {"num_heads": (1, 1, 2, 5)}, "num_heads 5"),
        ("vig_h", {"global_pool": "map"}, "global_pool is 'map'"),
        ("rmt", {"depths": (1, 1)}, r"depths \(1, 1\)"),
        ("rmt", {"chunkwise_recurrents": (True,)}, r"chunkwise_recurrents \(True,\)"),
        ("rmt", {"num_heads": (1, 3, 2, 4)}, "num_heads 3; the heads must divide"),
        ("rmt", {"embed_dims": (16, 32, 32, 60)}, "num_heads 4: heads of 15 channels"),
        ("rmt", {"init_values": (0, 2, 2, 2)}, "init_values holds 0"),
        ("rmt", {"gate": "none"}, "gate is no argument of RMT; valid are chunkwise_recurrents, depths"),
        ("rmt", {"depths": (2, 0, 1, 1)}, "depths is or holds 0"),
        ("rmt", {"projection": 0}, "projection is or holds 0"),
        ("rmt", {"drop_path_rate": 1.5}, "drop_path_rate is or holds 1.5; valid are 0 to 1"),
        ("rmt", {"layerscales": True}, "layerscales is True; it must be a list"),
        ("swat", {"windows": 7}, "windows is no argument of GatedSwinRMT"),
        ("rmt", {"downsample": "pool"}, "downsample is 'pool'; valid are 'conv', 'merge'"),
        ("retention", {"gate": "scalar"}, "gate is 'scalar'; valid are 'elementwise', 'headwise', 'none'"),
        ("retention", {"gate_source": "value"}, "gate_source is 'value'; valid are 'normed', 'residual'"),
        ("retention", {"gate_init": "closed"}, "gate_init is 'closed'; valid are 'default', 'open'"),
        (
            "retention",
            {"alibi": "none"},
            "alibi is no flag of the retention variant; valid are rope, gate, gate_source",
        ),
        ("retention", {"gate": "none", "gate_init": "open"}, "gate_init 'open', but gate is 'none'"),
        ("retention", {"window_size": 0}, "window_size is 0"),
        ("retention", {"window_size": 7.5}, "window_size is 7.5"),
        ("swat", {"shifted": "False"}, "shifted is 'False'; valid are True, False"),
        ("swat", {"rope": "no"}, "rope is 'no'; valid are True, False"),
        ("swat", {"alibi": "learned"}, "alibi is 'learned'; valid are 'distance', 'signed', 'none'"),
        ("swat", {"post_decay": "none"}, "post_decay is 'none'; valid are 'gamma', 'alibi'"),
        ("swat", {"swat_norm": "layer"}, "swat_norm is 'layer'; valid are 'clamp', 'sum', 'rmsnorm', 'none'"),
        ("swat", {"post_decay": "alibi", "alibi": "signed"}, "alibi is 'signed', but post_decay is 'alibi'"),
        ("swat", {"gate": "headwise"}, "gate is no flag of the swat variant; valid are rope, value_gate, alibi"),
    ],
)
def test_bad_arguments_are_named(family, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(family, **kwargs)


def test_bad_images_are_named(family):
    model = create(family)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 64, 64\)"):
        model(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\)"):
        model(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="output_fmt is 'NLC'"):
        model.forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC")
