"""What a renderer makes of cone angle, levels of its occupancy grid, and contraction of its field."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from generation.radiance_field.renderer import Renderer
from generation.radiance_field.saved_renderer import load, save
from generation.radiance_field.single_grid import SingleGridField
from tests.generation import test_radiance_field_training as small
from tests.generation.test_radiance_field_renderer import scene
from tests.generation.test_radiance_field_training import cache  # noqa: F401 - a fixture of the module

BOX = torch.tensor([[-1.0, -2, 0], [3, 2, 1]])
CENTRE, HALF = torch.tensor([1.0, 0, 0.5]), torch.tensor([2.0, 2, 0.5])
FIELD = small.FIELDS["single_grid"] | {"table_bound": 1.0}


def renderer(contraction: str = "none", levels: int = 1, cone_angle: float = 0.0) -> Renderer:
    """Everything counts as occupied."""
    torch.manual_seed(0)
    occupancy = {"resolution": [8, 8, 4], "levels": levels}
    made = Renderer("single_grid", FIELD | {"contraction": contraction}, occupancy, 0.1, cone_angle).eval()
    made.place(scene(box=BOX, near=0.2, far=60.0))
    return made


def across(length: float) -> tuple[Tensor, Tensor]:
    """A ray from far away through the box's centre, along x."""
    return torch.tensor([[CENTRE[0] - length, CENTRE[1], CENTRE[2]]]), torch.tensor([[1.0, 0, 0]])


@pytest.mark.parametrize("cone_angle", [0.0, 0.02, 0.05])
def test_samples_grow_with_distance(cone_angle, tmp_path):
    made = renderer(levels=4, cone_angle=cone_angle)
    samples = made.march(*across(12.0))
    grown = (samples.end - samples.start)[:-1]
    assert len(grown) > 20
    torch.testing.assert_close(grown, (samples.start[:-1] * cone_angle).clamp(min=0.1), atol=1e-3, rtol=0.02)
    assert (grown.max() > 0.2) == (cone_angle > 0)
    save(made, tmp_path, scene())
    again = load(tmp_path)[0].march(*across(12.0))
    assert torch.equal(again.start, samples.start)


@pytest.mark.parametrize(("levels", "widest"), [(1, 1), (2, 2), (3, 4)])
def test_levels_widen_where_rays_have_samples(levels, widest):
    samples = renderer(levels=levels).march(*across(20.0))
    assert samples.start[0].item() == pytest.approx(20 - 2 * widest, abs=0.11)
    assert samples.end[-1].item() == pytest.approx(20 + 2 * widest, abs=0.11)


def contracted(points: Tensor, norm: str) -> Tensor:
    """By mip-NeRF 360: the box is the unit, everything beyond lies within 2; then from [-2, 2] to the unit cube."""
    unit = (points - CENTRE) / HALF.max()
    length = unit.norm(dim=-1, keepdim=True) if norm == "l2" else unit.abs().amax(-1, keepdim=True)
    return (torch.where(length <= 1, unit, (2 - 1 / length) * unit / length) + 2) / 4


@pytest.mark.parametrize("norm", ["l2", "l_inf"])
def test_samples_far_outside_are_asked_in_contracted_space(norm):
    made = renderer(norm, levels=4, cone_angle=0.02)
    plain = SingleGridField(**FIELD).eval()
    plain.load_state_dict({name: value for name, value in made.field.state_dict().items() if "box" not in name}, False)
    origins, directions = across(14.0)
    samples = made.march(origins, directions)
    middle = ((samples.start + samples.end) / 2)[:, None]
    points = origins + middle * directions
    assert (points[:, 0] > BOX[1, 0] + 5).any()
    said = made.ask(origins, directions, samples)
    wanted = plain(contracted(points, norm), directions.expand(len(points), 3))
    torch.testing.assert_close(said.density, wanted.density, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.colour, wanted.colour, atol=1e-4, rtol=1e-4)
    assert said.density.std() > 0.01


def test_what_lies_beyond_the_box_is_drawn():
    """Of rays that pass the box by, in the outer levels alone."""
    origins = torch.tensor([[-12.0, 5.0, 0.5]])
    directions = normalize(torch.tensor([[1.0, 0.01, 0.0]]), dim=-1)
    assert renderer("l_inf").draw(origins, directions).opacity == 0
    assert renderer("l_inf", levels=3).draw(origins, directions).opacity > 0.5


def test_they_train_together(tmp_path):
    torch.manual_seed(0)
    field = small.FIELDS["single_grid"] | {"contraction": "l_inf"}
    module = small.RadianceFieldTraining(
        "single_grid", field, small.OCCUPANCY | {"levels": 3}, **small.OPTIONS | {"cone_angle": 0.01}
    )
    watch = small.Watch()
    small.fit(module, tmp_path, 40, callbacks=[watch])
    assert watch.mean("train/psnr", slice(-5, None)) > watch.mean("train/psnr", slice(0, 3)) + 3
    assert module.renderer.occupancy.occupied.float().mean((1, 2, 3)).min() < 0.9
