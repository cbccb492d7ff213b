"""Captioned shapes: what is drawn, what is held out, and batches that are the same again."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from generation.lina.captioned_shapes import (
    BACKGROUND,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    LEVELS,
    PLACES,
    RADIUS,
    RELATIONS,
    VOCABULARY,
    CaptionedShapes,
    Scene,
    Shape,
    TrainingBatches,
    all_descriptions,
    coverage,
    describe,
    draw,
    held_out_prompts,
    is_held_out,
    training_scenes,
)

MIX = {"single": 0.35, "pairs": 0.65}


@pytest.fixture(scope="module")
def scenes():
    return training_scenes(np.random.default_rng(0), 4000, MIX)


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_against_counted_points(kind):
    """The covered area is that of a picture drawn with 16 x 16 points a pixel, without anti-aliasing."""
    x, y, radius = (torch.tensor([value], dtype=torch.float64) for value in (15.3, 17.1, 5.7))
    fine = 16
    points = coverage(kind, fine * x, fine * y, fine * radius, fine * IMAGE_SIZE) > 0.5
    counted = points[0].double().view(IMAGE_SIZE, fine, IMAGE_SIZE, fine).mean((1, 3))
    drawn = coverage(kind, x, y, radius)[0]
    assert drawn.sum() == pytest.approx(counted.sum().item(), rel=0.03)
    difference = (drawn - counted).abs()
    assert difference.mean() < 0.01
    assert difference.max() < 0.5  # at the tips of the triangle


def test_picture_of_known_shapes():
    scene = Scene(
        "a red square above a blue circle", (Shape("red", "square", 16, 8, 5), Shape("blue", "circle", 16, 24, 5))
    )
    image = draw([scene])[0] / 2 + 0.5
    for (x, y), colour in (((16, 8), COLOURS["red"]), ((16, 24), COLOURS["blue"]), ((2, 2), BACKGROUND)):
        assert image[:, y, x].tolist() == pytest.approx(colour, abs=1e-6)


def test_later_shapes_cover_earlier_ones():
    shapes = (Shape("red", "square", 16, 16, 6), Shape("blue", "circle", 16, 16, 6))
    assert (draw([Scene("", shapes)])[0, :, 16, 16] / 2 + 0.5).tolist() == pytest.approx(COLOURS["blue"], abs=1e-6)


def test_no_scenes_make_an_empty_batch():
    assert draw([]).shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_objects_lie_inside_and_apart(scenes):
    """The area of a picture that is covered is the sum of the objects' areas, to within the anti-aliasing."""
    for kind in KINDS:
        alone = [shape for scene in scenes for shape in scene.shapes if shape.kind == kind]
        x, y, radius = torch.tensor([(shape.x, shape.y, shape.radius) for shape in alone]).T
        assert RADIUS[0] <= radius.min() < radius.max() <= RADIUS[1]
        covered = coverage(kind, x, y, radius)
        border = torch.cat((covered[:, [0, -1]].flatten(), covered[:, :, [0, -1]].flatten()))
        assert border.max() < 0.5
    pairs = [scene for scene in scenes if len(scene.shapes) == 2]
    halves = [
        torch.stack([coverage(s.kind, *(torch.tensor([v]) for v in (s.x, s.y, s.radius)))[0] for s in scene.shapes])
        for scene in pairs[:300]
    ]
    assert torch.stack(halves).amin(1).max() == 0


def test_captions_parse_back():
    for level in LEVELS:
        for description in all_descriptions(level):
            assert describe(description.caption) == description
            assert set(description.caption.split()) <= set(VOCABULARY)
    assert describe("  An  ORANGE circle. ") == describe("an orange circle")


@pytest.mark.parametrize(
    "caption", ["", "a pink circle", "a red circle above a red square", "a red circle at the left", "a orange circle"]
)
def test_other_captions_are_refused_by_name(caption):
    with pytest.raises(ValueError, match=f"caption is '{caption}'; valid are"):
        describe(caption)


@pytest.mark.parametrize(("level", "count"), [("single", 90), ("above", 540), ("pairs", 1080)])
def test_numbers_of_captions(level, count):
    descriptions = all_descriptions(level)
    assert len(set(descriptions)) == count
    share = sum(map(is_held_out, descriptions)) / count
    assert 0.12 < share < 0.18


def test_training_never_shows_what_is_held_out(scenes):
    seen = {describe(scene.caption) for scene in scenes}
    assert not any(map(is_held_out, seen))
    assert len(seen) > 800  # most of 18 + 76 + 918
    for scene in scenes:
        if len(scene.shapes) == 1:
            (shape,) = scene.shapes
            nearest = min(PLACES, key=lambda place: np.hypot(shape.x - PLACES[place][0], shape.y - PLACES[place][1]))
            assert not is_held_out(describe(f"{scene.caption.split(' at ')[0]} {nearest}"))


def test_held_out_pictures_go_with_both_their_captions():
    for description in all_descriptions("pairs"):
        inverse = RELATIONS[RELATIONS.index(description.position) ^ 1]
        turned = type(description)(description.objects[::-1], inverse)
        assert turned.picture == description.picture
        assert is_held_out(turned) == is_held_out(description)


def test_every_word_and_every_two_of_them_are_trained():
    """Nothing held out asks for a colour, kind, place or relation, or a combination of two, that is not trained."""
    trained = [one for level in ("single", "pairs") for one in all_descriptions(level) if not is_held_out(one)]
    combinations = {(slot, thing, one.position) for one in trained for slot, thing in enumerate(one.objects)}
    assert {word for one in trained for word in one.caption.split()} == set(VOCABULARY)
    for colour in COLOURS:
        for position in (*PLACES, *RELATIONS):
            assert any(thing[0] == colour and where == position for _, thing, where in combinations)
        for kind in KINDS:
            for slot in (0, 1):
                assert any(s == slot and thing == (colour, kind) for s, thing, _ in combinations)
    for kind in KINDS:
        for position in (*PLACES, *RELATIONS):
            assert any(thing[1] == kind and where == position for _, thing, where in combinations)


@pytest.mark.parametrize("level", LEVELS)
def test_held_out_prompts(level):
    scenes = held_out_prompts(level, 500, seed=3)
    assert scenes == held_out_prompts(level, 500, seed=3)
    assert scenes != held_out_prompts(level, 500, seed=4)
    captions = [scene.caption for scene in scenes]
    assert all(is_held_out(describe(caption)) and describe(caption).position for caption in captions)
    counts = [captions.count(caption) for caption in set(captions)]
    assert len(scenes) == 500
    assert max(counts) - min(counts) <= 1
    assert len(counts) == sum(map(is_held_out, all_descriptions(level)))
    assert held_out_prompts(level, 0) == []


@pytest.mark.parametrize("mix", [{}, {"single": 0.0}, {"single": -1.0, "pairs": 2.0}, {"triples": 1.0}])
def test_level_mix_is_checked(mix):
    with pytest.raises(ValueError, match="level_mix"):
        training_scenes(np.random.default_rng(0), 1, mix)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("level", "triples"), ("single_fraction", 1.5), ("batch_size", 0), ("images_per_epoch", 10), ("seed", -1)],
)
def test_settings_are_checked(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}"):
        CaptionedShapes(**{setting: value})


class Recorder(pl.LightningModule):
    """Notes the captions of every training step; has one weight, so that there is something to save."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append((batch["caption"], batch["image"].sum().item()))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def record(max_steps, checkpoint=None, resume=None, **settings):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder()
    data = CaptionedShapes(**{"batch_size": 4, "images_per_epoch": 12, "single_images": 8, **settings})
    trainer.fit(recorder, data, ckpt_path=resume, weights_only=False)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return recorder.seen


def test_a_run_resumed_in_mid_epoch_sees_what_an_unbroken_one_sees(tmp_path):
    unbroken = record(8)
    assert len({str(captions) for captions, _ in unbroken}) == 8  # every epoch is new
    assert record(4, tmp_path / "mid.ckpt") + record(8, resume=tmp_path / "mid.ckpt") == unbroken
    assert all(
        "above" not in caption and "to the" not in caption for captions, _ in unbroken[:2] for caption in captions
    )
    assert record(4, seed=1) != unbroken[:4]


def test_workers_change_nothing():
    assert record(4, num_workers=1) == record(4)


def test_processes_share_a_batch():
    whole = TrainingBatches(1, 8, lambda number: MIX, seed=0)[5]
    shares = [TrainingBatches(1, 8, lambda number: MIX, seed=0, share=(rank, 2))[5] for rank in range(2)]
    assert [*shares[0]["caption"], *shares[1]["caption"]] == [*whole["caption"][::2], *whole["caption"][1::2]]
    assert torch.equal(
        torch.cat([share["image"] for share in shares]), torch.cat((whole["image"][::2], whole["image"][1::2]))
    )


def test_evaluation_batches_are_held_out():
    data = CaptionedShapes("above", evaluation_images=50, evaluation_batch_size=20)
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    batches = [list(loader) for loader in (data.val_dataloader(), data.test_dataloader())]
    for batch in batches[0]:
        assert batch["image"].dtype == torch.float32
        assert batch["image"].shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE)
        assert -1 <= batch["image"].min() < batch["image"].max() <= 1
        assert all(is_held_out(describe(caption)) for caption in batch["caption"])
    assert [len(batch["caption"]) for batch in batches[0]] == [20, 20, 10]
    assert batches[0][0]["caption"] != batches[1][0]["caption"]
