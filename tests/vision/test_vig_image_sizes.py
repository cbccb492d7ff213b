"""One model, any image size: the position embedding's resampling, its cache, and `set_input_size`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vision.patch_embedding
from vision.vig import ViG
from vision.vig_hierarchical import HierarchicalViG


@pytest.fixture
def model() -> ViG:
    torch.manual_seed(0)
    return ViG(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()


@pytest.fixture
def resamplings(monkeypatch) -> list[tuple[int, int]]:
    """The grids that were resampled to, in order."""
    grids = []
    resize = vision.patch_embedding.resize_position_embedding

    def counting(position: Tensor, source_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        grids.append(grid)
        return resize(position, source_grid, grid)

    monkeypatch.setattr(vision.patch_embedding, "resize_position_embedding", counting)
    return grids


def uncached(model: ViG, images: Tensor) -> Tensor:
    """The output where a gradient is wanted, for which the cache is never used."""
    with torch.enable_grad():
        return model.requires_grad_(True)(images).detach()


@pytest.mark.parametrize(
    ("side", "tokens"), [(7, 1), (16, 1), (17, 1), (24, 2), (57, 4), (64, 4), (100, 6), (224, 14), (225, 14)]
)
def test_grid_of_odd_sizes(model, side, tokens):
    assert model.patch_embed.grid_size((side, 64)) == (tokens, 4)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, side, 64)).shape == (1, tokens, 4, 32)


def test_smaller_than_one_token_is_refused(model):
    with pytest.raises(ValueError, match=r"6x64.*smallest side possible is 7"):
        model(torch.zeros(1, 3, 6, 64))


@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (224, 32)])
def test_hierarchical_takes_any_size(shape):
    model = HierarchicalViG(dims=(16, 32, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), num_classes=5).eval()
    with torch.no_grad():
        height, width = model.forward_features(torch.randn(1, 3, *shape)).shape[1:3]
    assert (height, width) == tuple(-(-side // 32) for side in shape)


def test_resampled_once_a_size(model, resamplings):
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(1, 3, 96, 80))
            model(torch.randn(2, 3, 32, 112))
            model(torch.randn(2, 3, 64, 64))
    assert resamplings == [(6, 5), (2, 7)]
    assert set(model.state_dict()) == set(ViG(img_size=64, embed_dim=32, depth=2, num_heads=2).state_dict())


def write_in_place(model: ViG) -> None:
    with torch.no_grad():
        model.pos_embed.mul_(2)


def write_through_data(model: ViG) -> None:
    model.pos_embed.data.mul_(2)


def replace_data(model: ViG) -> None:
    model.pos_embed.data = model.pos_embed.data * 2


def replace_parameter(model: ViG) -> None:
    model.pos_embed = nn.Parameter(model.pos_embed.detach() * 2)


def load_weights(model: ViG) -> None:
    weights = copy.deepcopy(model.state_dict())
    weights["pos_embed"] *= 2
    model.load_state_dict(weights)


def optimiser_step(model: ViG) -> None:
    model(torch.randn(2, 3, 96, 80)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES = (write_in_place, write_through_data, replace_data, replace_parameter, load_weights, optimiser_step)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_cache_follows_the_parameter(model, change):
    images = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        before = model(images)
    change(model)
    with torch.no_grad():
        after = model(images)
    assert not torch.allclose(after, before)
    assert torch.equal(after, uncached(model, images))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_cached_value_serves_later_gradients(model, context):
    images = torch.randn(1, 3, 96, 80)
    with context():
        model(images)
    model.pos_embed.requires_grad_(False)
    images.requires_grad_()
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_gradient_reaches_the_native_grid(model):
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 80))
    model(torch.randn(1, 3, 96, 80)).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_copies_and_casts_do_not_share(model):
    images = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        model(images)
        twin = copy.deepcopy(model).double()
        assert twin(images.double()).dtype == torch.float64
        write_in_place(twin)
        assert torch.equal(twin(images.double()), uncached(twin, images.double()))
        assert torch.equal(model(images), uncached(model, images))


def test_number_of_cached_grids_is_bounded(model):
    with torch.no_grad():
        for height in range(1, 40):
            model.embed(torch.zeros(1, 3, 16 * height, 16))
    _, by_grid = vision.patch_embedding._resized_positions[model.pos_embed]
    assert len(by_grid) <= vision.patch_embedding._GRIDS_KEPT


def test_set_input_size_keeps_the_numbers(model):
    images = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        expected = model(images)
        model.set_input_size((96, 80))
        assert model.pos_embed.shape == (1, 6 * 5, 32)
        assert model.pos_embed.requires_grad
        assert torch.equal(model(images), expected)
        model.set_input_size(patch_size=16)
    with pytest.raises(ValueError, match="patch_size is 8"):
        model.set_input_size(96, patch_size=8)
    with pytest.raises(ValueError, match="img_size is 3"):
        model.set_input_size(3)


def test_native_size_need_not_be_square():
    model = ViG(img_size=(32, 64), embed_dim=32, depth=1, num_heads=2)
    assert (model.grid_size, model.pos_embed.shape[1]) == ((2, 4), 8)
    resized = vision.patch_embedding.resize_position_embedding(model.pos_embed, (2, 4), (3, 3))
    expected = F.interpolate(model.pos_embed.reshape(1, 2, 4, 32).permute(0, 3, 1, 2), (3, 3), mode="bicubic")
    torch.testing.assert_close(resized.reshape(3, 3, 32), expected[0].permute(1, 2, 0))
