"""Image sets: splits, order, distortion."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import affine

from vision.augmentation import RandomDistortion
from vision.image_data import Augmentation, Cifar, EpochSampler, ImageFolder
from vision.in_memory_images import Digits, Mnist5k, OpenMoji, TensorImages, stratified_split

STRONG = RandomDistortion(20, 0.3, 0.2, 15, 0.1, 0.03, True, 0.1, 0.3, 0.2, 0.5)


def prepared(data, processes=1, rank=0):
    data.trainer = SimpleNamespace(
        world_size=processes, global_rank=rank, global_step=0, num_training_batches=1, accumulate_grad_batches=1
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_split_is_stratified_and_keeps_groups_whole(fraction):
    labels = torch.arange(600) % 3
    groups = [int(label) * 1000 + index // 6 for index, label in enumerate(labels.tolist())]
    rest, part = stratified_split(labels, groups, fraction, seed=0)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(600))
    assert {groups[i] for i in rest} & {groups[i] for i in part} == set()
    assert (labels[part].bincount() - 200 * fraction).abs().max() <= 1
    again = stratified_split(labels, groups, fraction, seed=0)
    assert torch.equal(part, again[1])
    assert not torch.equal(part, stratified_split(labels, groups, fraction, seed=1)[1])


def test_mnist_split_is_400_and_100_of_each_class():
    data = prepared(Mnist5k(validation_fraction=0.05))
    assert data.test_set.labels.bincount().tolist() == [100] * 10
    assert data.train_set.labels.bincount().tolist() == [380] * 10
    assert data.validation_set.labels.bincount().tolist() == [20] * 10
    images = torch.cat([part.images for part in (data.train_set, data.validation_set, data.test_set)])
    assert len(images.flatten(1).unique(dim=0)) == 5000
    pixels, _ = data.train_set.__getitems__(list(range(3800)))
    assert pixels.mean().abs() < 0.02
    assert (pixels.std() - 1).abs() < 0.02


def test_runs_of_two_seeds_share_the_test_images():
    first, second = (prepared(Digits(seed=seed)) for seed in (0, 1))
    assert torch.equal(first.test_set.images, second.test_set.images)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_load_the_batches_of_one(processes):
    dataset = TensorImages(torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1), torch.arange(64), (0.0,), (1.0,))
    orders = []
    for rank in range(processes):
        sampler = EpochSampler(dataset, processes, rank, shuffle=True, seed=3, drop_last=True)
        sampler.set_epoch(2)
        orders.append(list(sampler))
    single = EpochSampler(dataset, 1, 0, shuffle=True, seed=3, drop_last=True)
    single.set_epoch(2)
    whole = list(single)
    share = 16 // processes
    for batch in range(4):
        together = {key for order in orders for key in order[batch * share : (batch + 1) * share]}
        assert together == set(whole[batch * 16 : (batch + 1) * 16])
    assert {epoch for _, epoch in whole} == {2}


def test_distortion_depends_on_seed_epoch_and_index_only():
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = TensorImages(images, torch.arange(12), (0.5,) * 3, (0.5,) * 3, STRONG, seed=5)
    batch, _ = dataset.__getitems__([(index, 1) for index in (7, 3, 9)])
    alone, label = dataset[(3, 1)]
    torch.testing.assert_close(batch[1], alone)
    assert label == 3
    later, _ = dataset[(3, 2)]
    assert not torch.allclose(alone, later, atol=0.1)


def test_no_distortion_changes_nothing():
    images = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    none = RandomDistortion()
    torch.testing.assert_close(none.apply(images, none.draw(4, 0, 0)), images, rtol=0, atol=1e-5)


def test_rotation_and_shift_agree_with_torchvision():
    images = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4)
    distortion = RandomDistortion(rotation=30, shift=0.25)
    draws = distortion.draw(1, seed=1, epoch=0)
    angle, shift_x, shift_y = draws[0, 0] * 30, draws[0, 4] * 0.25 * 32, draws[0, 5] * 0.25 * 32
    radians = torch.deg2rad(angle)
    # affine() rotates the picture and then shifts it; here the sampling grid is shifted after its rotation.
    back_x = -(radians.cos() * shift_x + radians.sin() * shift_y)
    back_y = -(-radians.sin() * shift_x + radians.cos() * shift_y)
    expected = affine(images, -float(angle), [float(back_x), float(back_y)], 1.0, [0.0], interpolation=torch_bilinear())
    result = distortion.apply(images, draws)
    inner = (slice(None), slice(None), slice(10, 22), slice(10, 22))
    torch.testing.assert_close(result[inner], expected[inner], rtol=0, atol=0.02)


def torch_bilinear():
    from torchvision.transforms import InterpolationMode

    return InterpolationMode.BILINEAR


@pytest.mark.parametrize("bad", [{"rotation": -1.0}, {"scale": float("nan")}, {"shear": 90.0}, {"erase": 1.5}], ids=str)
def test_impossible_distortion_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RandomDistortion(**bad)


@pytest.mark.parametrize(
    "bad",
    [{"batch_size": 0}, {"seed": -1}, {"validation_fraction": 1.0}, {"test_fraction": 0.0}, {"image_size": 0}],
    ids=str,
)
def test_impossible_data_setting_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Digits(**bad)


def test_batch_must_divide_by_the_processes():
    with pytest.raises(ValueError, match=r"batch_size is 63.*2 processes"):
        prepared(Digits(batch_size=63), processes=2).train_dataloader()


def test_openmoji_categories_and_families():
    from vision.openmoji import CATEGORIES, category_of, family_of

    known = {"😂": "Smileys", "👩‍🚀": "People", "🐈‍⬛": "Animals", "🍄‍🟫": "Food", "🍄": "Animals", "🚲": "Travel"}
    known |= {"⚽": "Activities", "🔑": "Objects", "♻️": "Symbols", "#️⃣": "Symbols", "🇫🇷": "Flags", "🏴‍☠️": "Flags"}
    assert {sequence: category_of(sequence).split()[0] for sequence in known} == known
    for name in ("vig_nano_patch4_28.openmoji", "gated_swin_rmt_nano_swat.openmoji"):
        assert timm.get_pretrained_cfg(name).label_names == tuple(CATEGORIES)
    assert family_of("👩🏽‍🚀") == family_of("👨‍🚀") == family_of("🧑🏿‍🚀")
    assert family_of("🏃‍♀️‍➡️") == family_of("🏃🏾")
    assert family_of("👩‍🚀") != family_of("👩‍🚒")


def test_openmoji_pictures():
    data = prepared(OpenMoji(image_size=16))
    parts = (data.train_set, data.validation_set, data.test_set)
    assert sum(map(len, parts)) == 1879
    assert data.test_set.labels.bincount(minlength=9).min() >= 15
    colours = torch.cat([part.images for part in parts]).float()
    assert (colours[:, :, 0, 0] > 200).float().mean() > 0.9  # white corners
    assert (colours.flatten(1).std(1) > 5).float().mean() > 0.99  # something is drawn


def image_folder(root, parts=("train", "val")):
    generator = np.random.default_rng(0)
    for part in parts:
        for name in ("bee", "ant"):
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (40, 30, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def test_image_folder_reads_classes_and_labels(tmp_path):
    data = prepared(ImageFolder(image_folder(tmp_path, ("train", "val", "test")), 32, batch_size=4))
    assert data.label_names == ["ant", "bee"]
    assert (len(data.train_set), len(data.validation_set), len(data.test_set)) == (8, 8, 8)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_photograph_augmentation_is_seeded_by_sample(workers, tmp_path):
    data = ImageFolder(image_folder(tmp_path), 16, Augmentation(), batch_size=4, num_workers=workers)
    prepared(data)
    (first, _), (second, _) = (next(iter(data.train_dataloader())) for _ in range(2))
    assert torch.equal(first, second)
    if not workers:  # the loader draws its workers' base seed from the global generator
        order = [key for key, _ in zip(data.train_dataloader().sampler, range(4), strict=False)]
        state = torch.get_rng_state()
        assert torch.equal(data.train_set[order[2]][0], first[2])
        assert torch.equal(torch.get_rng_state(), state)
        index, epoch = order[2]
        assert not torch.equal(data.train_set[(index, epoch + 1)][0], first[2])


CROPPED = Augmentation(crop_padding=4, auto_augment=None, color_jitter=0.0, erase_probability=0.0, horizontal_flip=0.0)


def test_padded_crop_shifts_the_image_and_leaves_it_its_size():
    """At the image's own size what comes out is the image, moved by up to 4 pixels over black."""
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8)
    data = Cifar("unused", augmentation=CROPPED)
    cropped = data.transformed([(Image.fromarray(pixels), 0)] * 8, training=True)
    padded = data.transformed([(Image.fromarray(np.pad(pixels, ((4, 4), (4, 4), (0, 0)))), 0)])
    padded.transform.transforms = padded.transform.transforms[2:]  # without resizing and the central crop
    windows = padded[0][0].unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
    offsets = set()
    for index in range(8):
        image, _ = cropped[(index, 0)]
        assert image.shape == (3, 32, 32)
        found = (windows == image[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        assert len(found) == 1
        offsets.add(tuple(found[0]))
    assert len(offsets) > 4
    assert torch.equal(cropped[(3, 1)][0], cropped[(3, 1)][0])
    assert not torch.equal(cropped[(3, 1)][0], cropped[(3, 2)][0])


@pytest.mark.parametrize("size", [(32, 32), (20, 20), (90, 50)], ids=str)
def test_padded_crop_fits_images_of_any_size(size):
    data = Cifar("unused", augmentation=CROPPED)
    image = Image.new("RGB", size, "white")
    dataset = data.transformed([(image, 0)], training=True)
    fitted, cropped = dataset.transform.transforms[:2]
    assert min(fitted(image).size) == 32
    assert (type(cropped).__name__, cropped.padding) == ("RandomCrop", 4)
    image, _ = dataset[(0, 0)]
    assert image.shape == (3, 32, 32)
    assert (image == image.amax((1, 2), keepdim=True)).float().mean() > 0.7


def test_without_crop_padding_the_crop_is_resized():
    dataset = Cifar("unused", augmentation=Augmentation()).transformed([], training=True)
    assert type(dataset.transform.transforms[0]).__name__ == "RandomResizedCropAndInterpolation"


def test_negative_crop_padding_is_refused():
    with pytest.raises(ValueError, match="crop_padding is -1"):
        Augmentation(crop_padding=-1)


def test_image_folder_without_test_has_no_test_loader(tmp_path):
    with pytest.raises(ValueError, match="no test set"):
        prepared(ImageFolder(image_folder(tmp_path), 16, batch_size=4)).test_dataloader()


def test_image_folder_refuses_bad_files(tmp_path):
    (image_folder(tmp_path) / "train/ant/9.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 9 (?s:.*)9\.jpg"):
        prepared(ImageFolder(tmp_path))


def test_file_that_breaks_after_the_check_stops_with_its_name(tmp_path):
    data = prepared(ImageFolder(image_folder(tmp_path), 16, check="header"))
    (tmp_path / "train/ant/0.png").write_bytes(b"overwritten")
    with pytest.raises(ValueError, match=r"ant/0\.png"):
        data.train_set[0]


def test_image_folder_names_a_class_without_training_images(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "val/wasp").mkdir()
    with pytest.raises(ValueError, match="wasp"):
        prepared(ImageFolder(tmp_path))


@pytest.mark.parametrize("make", [ImageFolder, Cifar], ids=lambda make: make.__name__)
def test_missing_set_says_what_is_expected(make, tmp_path):
    with pytest.raises(ValueError, match=r"expected .* in it"):
        make(str(tmp_path)).num_classes  # noqa: B018


def test_cifar_layout(tmp_path, monkeypatch):
    """Files of CIFAR-10's layout with two images each; only torchvision's checksums are skipped."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        content = {"data": np.zeros((2, 3072), np.uint8), "labels": [3, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    data = prepared(Cifar(str(tmp_path), batch_size=4))
    assert data.label_names == classes
    assert (len(data.train_set), len(data.test_set)) == (10, 2)
    image, label = data.train_set[(1, 0)]
    assert image.shape == (3, 32, 32)
    assert label == 9
