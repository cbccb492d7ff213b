"""Folders of classes that are divided here."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vision.class_folders import ClassFolders
from vision.image_data import Augmentation

COUNTS = (4, 2, 1)


def folders(root, images=7, names=("wasp", "bee", "ant")):
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir()
        for number in range(images):
            Image.fromarray(generator.integers(0, 256, (12, 10, 3), np.uint8)).save(root / name / f"{number}.png")
    return root


def prepared(path, **settings):
    data = ClassFolders(str(path), **{"counts": COUNTS, "image_size": 8, "batch_size": 4, **settings})
    data.trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=0, num_training_batches=1, accumulate_grad_batches=1
    )
    data.setup("fit")
    return data


def division(data):
    """Paths relative to the set's folder, by part."""
    parts = {"train": data.train_set, "validation": data.validation_set, "test": data.test_set}
    return {
        name: [path.relative_to(data.path).as_posix() for path, _ in part.images.samples]
        for name, part in parts.items()
    }


@pytest.fixture
def root(tmp_path):
    return folders(tmp_path)


def test_each_class_is_divided_by_the_counts(root):
    data = prepared(root)
    assert data.label_names == ["ant", "bee", "wasp"]
    for part, count in zip((data.train_set, data.validation_set, data.test_set), COUNTS, strict=True):
        labels = [label for _, label in part.images.samples]
        assert labels == [0] * count + [1] * count + [2] * count
        assert all(path.parent.name == data.label_names[label] for path, label in part.images.samples)
    parts = division(data)
    files = [path for part in parts.values() for path in part]
    assert len(files) == len(set(files)) == 21


def test_the_division_is_of_the_split_seed_and_the_names(root, tmp_path_factory):
    first = division(prepared(root))
    assert first["train"][:4] != [f"ant/{number}.png" for number in range(4)], "a shuffled division"
    assert division(prepared(root, seed=7)) == first, "the run's seed is another"
    assert division(prepared(root, split_seed=1)) != first
    copy = folders(tmp_path_factory.mktemp("copy"), names=("bee", "fly", "ant"))
    for path in copy.rglob("*.png"):
        Image.new("RGB", (9, 9)).save(path)  # other contents
    again = division(prepared(copy))
    for part, paths in first.items():
        assert [path for path in again[part] if "fly" not in path] == [path for path in paths if "wasp" not in path]


def test_training_is_augmented_and_all_parts_load(root):
    data = prepared(root, augmentation=Augmentation())
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    for loader, count in ((data.val_dataloader(), 6), (data.test_dataloader(), 3)):
        images, labels = next(iter(loader))
        assert images.shape == (count, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2]
    assert len(data.train_set.transform.transforms) > len(data.test_set.transform.transforms)


def test_a_class_of_too_few_files_is_named_with_its_count(root):
    (root / "bee/3.png").unlink()
    with pytest.raises(ValueError, match=r"class bee .*has 6 images.*\(4, 2, 1\), 7 in all"):
        prepared(root)


def test_files_beyond_the_counts_are_left_out_aloud(root):
    with pytest.warns(UserWarning, match="3 images .* left out"):
        data = prepared(root, counts=(3, 2, 1))
    assert sum(map(len, division(data).values())) == 18


def test_bad_file_is_refused_by_name(root):
    (root / "ant/2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 21 (?s:.*)ant.2\.png"):
        prepared(root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"counts": (4, 0, 1)}, r"counts is \(4, 0, 1\)"), ({"path": "nowhere"}, "expected <class>/<image> in it")],
    ids=["counts", "path"],
)
def test_impossible_setting_is_refused(settings, message, root):
    with pytest.raises(ValueError, match=message):
        prepared(**{"path": root, **settings})


def test_the_defaults_are_mini_imagenets():
    data = ClassFolders("unused")
    assert (data.counts, data.image_size) == ((480, 60, 60), 224)
