"""`vision.model_insight` and `python -m vision explain`: decays, gates, receptive fields, the picture, the refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kernels.gated_scan import bidirectional_gated_scan
from kernels.window_retention import window_retention
from vision.__main__ import main
from vision.explain import coordinates_seen, explain
from vision.explanation_pictures import draw_insight
from vision.gated_swin_rmt import GatedSwinRMT
from vision.model_files import save_model
from vision.model_insight import area_holding, default_stage, look_inside, manhattan_decay, scan_decay
from vision.predict import Classifier
from vision.rmt import RMT
from vision.vig import ViG
from vision.vig_hierarchical import HierarchicalViG

ROOT = Path(__file__).parents[2]
LOG_DECAY = (math.log(0.75), math.log(0.97))
TWO_STAGES = {"embed_dims": (8, 16), "num_heads": (2, 4), "depths": (1, 2), "projection": 8, "num_classes": 5}
RETENTION = TWO_STAGES | {"init_values": (2, 2), "heads_ranges": (4, 4), "mlp_ratios": (2, 2)}
RETENTION |= {"layerscales": (False, False)}
SWIN = RETENTION | {"window_size": 4}


def vig(**arguments):
    return ViG(**{"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, **arguments})


def hierarchical_vig():
    return HierarchicalViG(dims=(8, 16), depths=(1, 2), num_heads=(2, 4), num_classes=5)


def rmt():
    return RMT(**RETENTION, chunkwise_recurrents=(True, False))


def gated(mixer="retention", **arguments):
    return GatedSwinRMT(mixer, **{**SWIN, **arguments})


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def attended(size, token, core):
    """What `core` (query, key, value -> mixed values) takes from every token of a map to `token`: (heads, H, W)."""
    tokens = size[0] * size[1]
    still = torch.zeros(1, *size, len(LOG_DECAY), 2, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64).reshape(1, *size, 1, tokens).expand(-1, -1, -1, len(LOG_DECAY), -1)
    return core(still, still, value)[0, token[0], token[1]].unflatten(-1, size)


MAPS = [
    pytest.param((5, 6), None, (0, 0), (2, 3), id="whole map"),
    pytest.param((8, 12), (4, 4), (0, 0), (5, 2), id="windows"),
    pytest.param((8, 8), (4, 4), (2, 2), (3, 5), id="shifted, interior"),
    pytest.param((8, 8), (4, 4), (2, 2), (0, 7), id="shifted, at the seam of both axes"),
    pytest.param((9, 6), (4, 6), (2, 0), (8, 1), id="shifted and padded down, global along"),
    pytest.param((1, 1), (1, 1), (0, 0), (0, 0), id="one token"),
]


@pytest.mark.parametrize(("size", "window", "shift", "token"), MAPS)
def test_manhattan_decay_is_what_both_passes_let_through(size, window, shift, token):
    def core(query, key, value):
        # Scores of zero, so every weight is half of its decay in each of the two passes.
        options = {"activation": "sigmoid", "normalization": "none", "backend": "reference"}
        return 4 * window_retention(query, key, value, LOG_DECAY, window=window or size, shift=shift, **options)

    decay = manhattan_decay(LOG_DECAY, size, token, window, shift)
    assert decay[:, token[0], token[1]].tolist() == [1, 1]
    torch.testing.assert_close(decay.double(), attended(size, token, core), rtol=1e-6, atol=1e-7)


def test_manhattan_decay_is_symmetric_and_ends_at_the_seam():
    size, window, shift = (8, 8), (4, 4), (2, 2)
    all_tokens = [(row, column) for row in range(8) for column in range(8)]
    matrix = torch.stack([manhattan_decay(LOG_DECAY, size, token, window, shift) for token in all_tokens])
    matrix = matrix.flatten(2).transpose(0, 1)  # (heads, to, from)
    assert torch.equal(matrix, matrix.mT)
    corner = manhattan_decay(LOG_DECAY, size, (0, 0), window, shift)
    assert torch.equal((corner > 0).nonzero().amax(0), torch.tensor([1, 1, 1])), "the window wraps round, nobody looks"


@pytest.mark.parametrize("token", [(0, 0), (1, 2), (2, 3)], ids=["first", "middle", "last"])
def test_scan_decay_is_what_the_scan_carries(token):
    rows, columns, heads, keys = 3, 4, 2, 5
    tokens = rows * columns
    log_decays = -torch.rand(2, 1, tokens, heads, keys, dtype=torch.float64)
    still = torch.ones(1, tokens, heads, keys, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64)[None, :, None].expand(-1, -1, heads, -1)
    place = token[0] * columns + token[1]
    carried = bidirectional_gated_scan(still, still, value, *log_decays, scale=1 / keys, backend="reference")[0, place]
    carried = 2 * carried  # each token but the chosen one comes in one direction only, and both are averaged
    carried[:, place] /= 2
    found = scan_decay(*(x[0].unflatten(0, (rows, columns)) for x in log_decays), token)
    torch.testing.assert_close(found.double(), carried.unflatten(-1, (rows, columns)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("side", [16, 24, 36], ids=["global", "divided", "padded"])
@pytest.mark.parametrize("block", [0, 1], ids=["plain", "shifted"])
@pytest.mark.parametrize("mixer", ["retention", "swat"])
def test_decay_reaches_as_far_as_the_retention_of_the_block(side, block, mixer):
    one_stage = {name: value[:1] for name, value in SWIN.items() if isinstance(value, tuple)} | {"depths": (2,)}
    model = gated(mixer, **one_stage)
    insight = look_inside(model, torch.randn(3, side, side), (side // 2, 3), 0, block)
    core = model.layers[0].blocks[block].retention.core
    assert insight.size == (side // 4, side // 4)
    assert insight.token == (side // 8, 0)
    assert torch.equal(insight.decay > 0, attended(insight.size, insight.token, core) > 0)


FAMILIES = [
    pytest.param(vig, (0, 2), (8, 10), [(2, "forward"), (2, "backward"), (1, "mix")], id="vig"),
    pytest.param(hierarchical_vig, (1, 1), (4, 5), [(4, "forward"), (4, "backward"), (1, "mix")], id="vig-h"),
    pytest.param(rmt, (1, 1), (4, 5), [], id="rmt"),
    pytest.param(gated, (1, 1), (4, 5), [(1, "sigmoid")], id="retention, elementwise"),
    pytest.param(lambda: gated(gate="headwise"), (1, 1), (4, 5), [(4, "sigmoid")], id="retention, headwise"),
    pytest.param(lambda: gated(gate="none"), (1, 1), (4, 5), [], id="retention, no gate"),
    pytest.param(lambda: gated(gate_source="residual"), (1, 1), (4, 5), [(1, "sigmoid")], id="retention, residual"),
    pytest.param(lambda: gated("swat"), (1, 1), (4, 5), [(1, "silu")], id="swat"),
    pytest.param(lambda: gated("swat", value_gate=False), (1, 1), (4, 5), [], id="swat, no gate"),
]


@pytest.mark.parametrize(("make", "place", "size", "gates"), FAMILIES)
def test_every_family_gives_maps_of_its_tokens(make, place, size, gates):
    model = make()
    insight = look_inside(model, torch.randn(3, 32, 40), (31, 39))
    assert (insight.stage, insight.block) == place
    assert insight.size == size
    assert insight.token == (size[0] - 1, size[1] - 1)
    assert len(insight.decay) == (2 if make is vig else 4)
    assert insight.decay.min() >= 0
    assert insight.decay.max() == 1
    assert insight.decay[:, -1, -1].tolist() == [1] * len(insight.decay)
    assert [len(gate.values) for gate in insight.gates] == [maps for maps, _ in gates]
    for gate, (maps, word) in zip(insight.gates, gates, strict=True):
        assert word in gate.name
        assert gate.values.shape == (maps, *size)
        assert gate.signed == (word == "silu")
        assert gate.values.min() > (-0.279 if gate.signed else 0)
        assert gate.signed or gate.values.max() < 1
        assert gate.values.std() > 0
    assert insight.receptive_field.shape == (32, 40)
    assert insight.receptive_field.min() >= 0
    assert insight.receptive_field.sum() > 0
    assert not any(module._forward_hooks for module in model.modules()), "hooks are left"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gates_of_the_scan_have_the_values_of_their_logits():
    model = vig()
    mixer = model.blocks[1].attn
    with torch.no_grad():
        mixer.gk_proj[1].weight.zero_()
        mixer.gk_proj[1].bias[:8], mixer.gk_proj[1].bias[8:] = 1.0, -2.0
        mixer.g_proj.weight.zero_()
        mixer.g_proj.bias.fill_(0.5)
    insight = look_inside(model, torch.randn(3, 32, 32), (9, 9), block=1)
    expected = [sigmoid(1.0) ** (1 / 16), sigmoid(-2.0) ** (1 / 16), sigmoid(0.5)]
    for gate, value in zip(insight.gates, expected, strict=True):
        torch.testing.assert_close(gate.values, torch.full_like(gate.values, value))
    steps = 8 * torch.arange(8)[:, None] + torch.arange(8) - 18  # tokens between each one and that at (2, 2)
    decay = torch.where(steps < 0, expected[0] ** -steps, expected[1] ** steps)
    torch.testing.assert_close(insight.decay, decay.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("make", "bias", "expected"),
    [
        (lambda: gated(gate_init="open"), None, sigmoid(4.0)),
        (lambda: gated(gate="headwise"), -1.0, sigmoid(-1.0)),
        (lambda: gated("swat"), -1.0, -sigmoid(-1.0)),
    ],
    ids=["open", "headwise", "swat"],
)
def test_gates_of_retention_have_the_values_of_their_logits(make, bias, expected):
    model = make()
    projection = model.layers[1].blocks[1].retention.g_proj
    if bias is not None:
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.constant_(projection.bias, bias)
    (gate,) = look_inside(model, torch.randn(3, 32, 32)).gates
    torch.testing.assert_close(gate.values, torch.full_like(gate.values, expected))


@pytest.mark.parametrize(("pixel", "window"), [((3, 20), (0, 1)), ((40, 35), (2, 2))], ids=["border", "interior"])
def test_receptive_field_ends_where_the_window_does(pixel, window):
    """One plain block whose local convolutions are zero: the window, and what the stem sees around it."""
    one_stage = {name: value[:1] for name, value in SWIN.items() if isinstance(value, tuple)}
    model = gated(**one_stage)
    block = model.layers[0].blocks[0]
    with torch.no_grad():
        for convolution in (block.pos, block.retention.lepe, block.ffn.dwconv):
            convolution.conv.weight.zero_()
    field = look_inside(model, torch.randn(3, 64, 48), pixel).receptive_field
    rows, columns = (field.sum(axis).nonzero().flatten() for axis in (1, 0))
    for pixels, index, length in ((rows, window[0], 64), (columns, window[1], 48)):
        # Windows of 4 tokens, tokens every 4 pixels; the stem's convolutions reach 1 + 2 + 2 + 4 pixels around one.
        first, last = 16 * index - 9, 16 * index + 12 + 9
        assert (int(pixels[0]), int(pixels[-1])) == (max(first, 0), min(last, length - 1))


def test_receptive_field_is_the_gradient_in_inference_mode_too():
    model, image = rmt().eval(), torch.randn(3, 32, 32)
    leaf = image[None].clone().requires_grad_()
    (features,) = model.forward_intermediates(leaf, [0], intermediates_only=True, output_fmt="NHWC")
    features[0, 4, 4].sum().backward()
    with torch.inference_mode():
        found = look_inside(model, image.clone(), stage=0).receptive_field
    torch.testing.assert_close(found, leaf.grad[0].abs().sum(0))


@pytest.mark.parametrize(
    ("field", "share", "expected"),
    [
        ([[0, 0], [5, 0]], 0.95, 0.25),
        ([[1, 1], [1, 1]], 0.5, 0.5),
        ([[1, 1], [1, 1]], 1.0, 1.0),
        ([[6, 3], [1, 0]], 0.9, 0.5),
        ([[6, 3], [1, 0]], 0.95, 0.75),
        ([[0, 0], [0, 0]], 0.5, 0.0),
    ],
)
def test_area_that_holds_a_share(field, share, expected):
    assert area_holding(torch.tensor(field, dtype=torch.float32), share) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(56, 56), (28, 28), (14, 14), (7, 7)], 3),
        ([(8, 8), (4, 4), (2, 2), (1, 1)], 1),
        ([(3, 9), (2, 5)], 0),
        ([(7, 7)], 0),
    ],
    ids=str,
)
def test_default_stage(sizes, expected):
    assert default_stage(sizes) == expected


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (vig, {"pixel": (32, 0)}, r"pixel\[0\] is 32; valid are 0 .. 31"),
        (vig, {"pixel": (0, -1)}, r"pixel\[1\] is -1"),
        (vig, {"stage": 1}, "stage is 1; valid are 0 .. 0"),
        (vig, {"block": 3}, "block is 3; valid are 0 .. 2"),
        (rmt, {"stage": 0, "block": 1}, "block is 1; valid are 0 .. 0"),
        (rmt, {"image": torch.zeros(1, 3, 32, 32)}, r"image has shape \(1, 3, 32, 32\)"),
        (lambda: vig().fuse(), {}, "fused for inference"),
        (lambda: rmt().fuse(), {}, "fused for inference"),
        (lambda: timm.create_model("test_resnet"), {}, "model is a ResNet; valid are ViG, HierarchicalViG, RMT"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_looking_inside_refuses(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        look_inside(**{"model": make(), "image": torch.zeros(3, 32, 32), **arguments})


def test_area_refuses_a_share_of_nothing():
    with pytest.raises(ValueError, match="share is 0"):
        area_holding(torch.ones(2, 2), 0)


@pytest.mark.parametrize(
    ("height", "width", "image_size"), [(90, 60, 28), (64, 200, 32), (20, 20, 40)], ids=["down", "wide", "up"]
)
def test_coordinates_seen_find_a_spot_of_the_image(height, width, image_size):
    transform = timm.data.create_transform((3, image_size, image_size), interpolation="bicubic", crop_pct=0.875)
    rows, columns = coordinates_seen(transform, height, width)
    assert (len(rows), len(columns)) == (image_size, image_size)
    for row, column in ((height // 2, width // 2), (height // 3, width // 2 + height // 4)):
        levels = np.zeros((height, width), dtype=np.uint8)
        levels[row, column] = 255
        seen = transform(Image.fromarray(levels).convert("RGB"))[0]
        brightest = divmod(int(seen.argmax()), image_size)
        assert brightest == (int((rows - row).abs().argmin()), int((columns - column).abs().argmin()))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return str(path)


SAVED = {
    "vig_nano_patch4_28": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "vig_h_tiny": {"dims": (8, 16), "depths": (1, 1), "num_heads": (2, 2)},
    "rmt_tiny": {name: value for name, value in RETENTION.items() if name != "num_classes"}
    | {"chunkwise_recurrents": (True, False)},
}


@pytest.mark.parametrize("name", [*SAVED, "gated_swin_rmt_nano_retention", "gated_swin_rmt_nano_swat"])
def test_command_draws_one_picture(name, photo, tmp_path, capsys):
    model = name
    if name in SAVED:
        built = timm.create_model(name, in_chans=3, num_classes=5, **SAVED[name])
        built.pretrained_cfg = {**built.pretrained_cfg, "input_size": (3, 32, 32), "label_names": list("abcde")}
        model = str(save_model(built, tmp_path / "model", SAVED[name]))
    output = tmp_path / "inside.png"
    main(["explain", photo, "--model", model, "--output", str(output), "--image_size", "32", "--row", "3"])
    with Image.open(output) as picture:
        assert picture.width == 1300
        assert np.asarray(picture.convert("L")).std() > 20, "an empty picture"
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == f"{output} written"
    shares = [float(line.split("%")[0]) for line in lines[1:6]]
    assert shares == sorted(shares, reverse=True)
    assert lines[6].startswith("stage ")
    assert ("no gates" in printed.out) == name.startswith("rmt")
    assert lines[-1].startswith("receptive field: 50 % of it in ")
    trained = name in SAVED or timm.models.is_model_pretrained(name)
    assert ("random weights" in printed.err) == (not trained)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["inside.png"]


def test_command_names_the_classes_that_predict_does(tmp_path, capsys):
    image = str(ROOT / "docs/seven.png")
    explain(image, "vig_nano_patch4_28.mnist5k", str(tmp_path / "seven.png"))
    lines = capsys.readouterr().out.splitlines()
    main_class = lines[1].split("%")[1].strip()
    classifier = Classifier(timm.create_model("vig_nano_patch4_28.mnist5k", pretrained=True))
    probabilities = classifier.probabilities(classifier.read(image)[None])[0]
    assert main_class == classifier.labels[int(probabilities.argmax())] == "7"
    assert float(lines[1].split("%")[0]) == pytest.approx(100 * float(probabilities.max()), abs=0.005)


def test_picture_shows_every_head_and_gate():
    insight = look_inside(gated(gate="headwise"), torch.randn(3, 32, 64))
    figure = draw_insight(insight, np.zeros((32, 64, 3)), "a title")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles.count("head 3") == 2, "decay and gate"
    assert "head 4" not in titles
    names = [part.get_suptitle() for row in figure.subfigs for part in (row, *row.subfigs)]
    assert any(name.startswith("decay towards") for name in names)
    assert any(name.startswith("output gate sigmoid") for name in names)


RANDOM = {"model": "gated_swin_rmt_nano_retention", "image_size": "32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "nowhere.png"}, "nowhere.png: FileNotFoundError"),
        ({"image": "README.md"}, "README.md: UnidentifiedImageError"),
        ({"model": "nowhere"}, "model is 'nowhere'; valid are files, folders, .*vig_h_tiny"),
        ({"model": "resnet18"}, "model is 'resnet18'; valid are"),
        ({"model": "vig_nano_patch4_28.nope"}, "model is 'vig_nano_patch4_28.nope'"),
        ({"model": "tests"}, "checkpoint is 'tests'; expected a folder with"),
        ({"model": "tests", "untrained": "true"}, "model is 'tests', a file or folder"),
        ({"row": "40"}, "row is 40; valid are 0 .. 39"),
        ({"column": "-1"}, "column is -1"),
        ({"column": "2"}, "column is 2; the model's centre crop leaves"),
        ({"stage": "4"}, "stage is 4; valid are 0 .. 3"),
        ({"block": "2"}, "block is 2; valid are 0 .. 1"),
        ({"image_size": "0"}, "image_size is 0"),
        ({"output": "nowhere/a.png"}, "output is 'nowhere/a.png'; its folder"),
        ({"output": "a.jpg"}, "output is 'a.jpg'; its name must end in .png"),
    ],
    ids=lambda value: "-".join(f"{name}={value[name]}" for name in value) if isinstance(value, dict) else "",
)
def test_command_refuses(settings, message, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"image": photo, "output": str(tmp_path / "a.png"), **RANDOM, **settings}
    image = settings.pop("image")
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit, match=f"error: .*{message}") as stop:
        main(["explain", image, *flags])
    assert isinstance(stop.value.code, str), "a message is status 1"
    assert not list(tmp_path.iterdir())
