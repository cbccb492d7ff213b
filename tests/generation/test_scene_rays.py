"""Batches of rays of scenes whose pictures and masks are read when asked for: which pictures, how often, how much."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from generation.radiance_field.image_files import ImageFiles, MaskFiles
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_data import load_scene
from generation.radiance_field.scene_rays import RayBatches, SceneRays
from tests.generation.written_scenes import HEIGHT, WIDTH, photograph, write_mega_nerf, write_nerfstudio

COUNT = 10  # frames, of whom 9 are for training, or all with Mega-NeRF's halves


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scene")
    write_nerfstudio(photograph(), path)
    return path


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """With masks, for the pictures of val/ count by half."""
    path = tmp_path_factory.mktemp("scenes") / "rubble"
    write_mega_nerf(photograph(), path)
    return path


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Numbers of the pictures that are decoded."""
    numbers = []

    def counted(files, i, get=ImageFiles.__getitem__):
        numbers.append(i)
        return get(files, i)

    monkeypatch.setattr(ImageFiles, "__getitem__", counted)
    return numbers


def of(scene: Scene, pictures: int, seed: int = 3, share: tuple[int, int] = (0, 1)) -> RayBatches:
    return RayBatches(scene, 100, 256, seed, share, pictures)


def frames_in(scene: Scene, batch: dict[str, Tensor]) -> set[int]:
    return set(torch.cdist(batch["origin"], scene.cameras.c2w[:COUNT, :, 3]).argmin(1).tolist())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.mark.parametrize("source", ["folder", "halves"])
def test_few_pictures_give_the_batches_they_give_in_memory(source, request):
    path = request.getfixturevalue(source)
    now, later = load_scene(path), load_scene(path, lazy=True)
    for number in (0, 7):
        assert same(of(later, COUNT)[number], of(now, 1)[number])


def test_a_batch_has_rays_of_few_pictures_and_reads_one_more(folder, read):
    scene = load_scene(folder, lazy=True)
    batches = of(scene, 3)
    assert read == []
    first = frames_in(scene, batches[0])
    assert first == set(read)
    assert len(read) == 3
    for number in range(1, 30):
        before = len(read)
        assert len(frames_in(scene, batches[number])) <= 3
        assert len(read) - before <= 1
    counts = [read.count(frame) for frame in scene.splits["train"].tolist()]
    assert max(counts) - min(counts) <= 2  # about 31 readings of 9 pictures, one pass after another


def test_batches_of_few_pictures_depend_on_seed_and_number_alone(folder):
    scene = load_scene(folder, lazy=True)
    one, other = of(scene, 3), of(scene, 3)
    in_order = [one[number] for number in range(12)]
    assert all(same(other[number], in_order[number]) for number in (11, 4, 0, 10))
    assert not same(of(scene, 3, seed=4)[11], in_order[11])
    shares = [of(scene, 3, share=(rank, 2))[5] for rank in range(2)]
    for name, value in in_order[5].items():
        assert torch.equal(torch.stack([share[name] for share in shares], 1).flatten(0, 1), value)


def test_pixels_of_few_pictures_are_those_that_masks_leave(halves):
    scene = load_scene(halves, lazy=True)
    batches = of(scene, 2)
    left = right = 0
    for number in range(20):
        batch = batches[number]
        frame = torch.cdist(batch["origin"], scene.cameras.c2w[:COUNT, :, 3]).argmin(1)
        x, y, _ = scene.cameras.project(frame, batch["origin"] + batch["direction"])
        for i in frame.unique().tolist():
            own = frame == i
            column, row = x[own].floor().long(), y[own].floor().long()
            assert scene.masks[i][row, column].all()
            assert torch.equal(batch["colour"][own], scene.images[i][row, column].float() / 255)
            left += int((column < WIDTH // 2).sum()) if i in (3, 7) else 0
            right += int((column >= WIDTH // 2).sum()) if i in (3, 7) else 0
    assert left > 100
    assert right == 0


def test_pictures_that_masks_leave_nothing_of_are_not_taken(folder, read):
    scene = load_scene(folder, lazy=True)
    masks = torch.zeros(COUNT, HEIGHT, WIDTH, dtype=torch.bool)
    masks[[1, 5], 2] = True
    scene = replace(scene, masks=masks)
    batches = of(scene, 1)
    pairs = [frames_in(scene, batches[number]) | frames_in(scene, batches[number + 1]) for number in (0, 2, 4)]
    assert pairs == [{1, 5}] * 3
    assert set(read) == {1, 5}


def test_masks_take_no_memory_for_each_pixel(folder):
    """240 GB they would be of Mega-NeRF's pictures, at 8 bytes a pixel."""
    scene = load_scene(folder, lazy=True)
    side = 500
    size = torch.full((COUNT,), side)
    cameras = replace(scene.cameras, width=size, height=size)
    masks = MaskFiles([None] * COUNT, size, size, ["left"] + [""] * (COUNT - 1))
    batches = of(replace(scene, cameras=cameras, masks=masks), 3)
    held = [value for value in vars(batches).values() if hasattr(value, "nbytes")]
    held += [value for several in vars(batches).values() if isinstance(several, list) for value in several]
    assert sum(value.nbytes for value in held) < side * side * COUNT / 8


def test_pictures_at_once_out_of_range():
    with pytest.raises(ValueError, match="pictures_at_once is 0; it must be at least 1"):
        SceneRays(pictures_at_once=0)
