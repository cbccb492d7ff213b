"""What a run of a radiance field says and keeps: its scene, rates, scores at its end, and checkpoints of other runs."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from generation.radiance_field.comparison import Judged, judge
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_rays import SceneRays
from generation.radiance_field.training import RadianceFieldTraining
from tests.generation import test_radiance_field_training as small
from tests.generation.test_radiance_field_training import cache  # noqa: F401 - a fixture of the module
from tests.generation.written_scenes import WRITERS, photograph

ALTITUDES = (0.1, 2.2)  # metres downward, of the roofs and the ground of the city as `write_mega_nerf` has it


@pytest.fixture(scope="module")
def taken():
    return photograph()


def trainer_of(folder: Path, steps: int = 2, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **options}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, max_steps=steps, **options)


def single(appearances: int = 0, **options) -> RadianceFieldTraining:
    return small.training("single_grid", {"appearances": appearances}, **options)


def mega_nerf(taken, folder: Path, **options) -> SceneRays:
    WRITERS["mega-nerf"](taken, folder / "scene")
    data = {"source": str(folder / "scene"), "options": {"altitude_range": ALTITUDES}, "validated": 100}
    return SceneRays(**data | {"batch_size": 64, "rays_per_epoch": 640} | options)


def blender(taken, folder: Path, **options) -> SceneRays:
    """With alpha, on white; what is transparent is black in the files."""
    WRITERS["blender"](taken, folder / "scene")
    data = {"source": str(folder / "scene"), "options": {"alpha": True}, "validated": 100}
    return SceneRays(**data | {"batch_size": 64, "rays_per_epoch": 640} | options)


def rates_of(folder: Path, steps: int, **options) -> tuple[list[dict[str, float]], list[dict]]:
    """Rates of the steps by the group's first parameter, and the optimiser's groups."""
    module = small.training(**options)
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            groups = trainer.optimizers[0].param_groups
            seen.append({named[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]})

    trainer = trainer_of(folder, steps, callbacks=[Rates()], limit_val_batches=0)
    trainer.fit(module, small.rays(batch_size=64, rays_per_epoch=64 * 20))
    decays = {
        named[id(parameter)]: group["weight_decay"]
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    return seen, decays


def test_rates_rise_and_fall(tmp_path):
    """A line over 4 steps, then half a cosine over the 10, to a tenth; the numbers are worked out by hand."""
    seen, _ = rates_of(tmp_path, 10, warmup_steps=4, last_rate=0.1, grid_learning_rate=1.0)
    factors = [rates["renderer.field.experts.table"] for rates in seen]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    cosines = {4: 0.30901699, 5: 0.0, 6: -0.30901699, 7: -0.58778525, 8: -0.80901699, 9: -0.95105652}
    assert factors[4:] == pytest.approx([0.1 + 0.45 * (1 + value) for value in cosines.values()], abs=1e-6)


def test_each_part_has_its_rate_and_heads_alone_decay(tmp_path):
    own = {"grid_learning_rate": 0.04, "head_learning_rate": 0.02, "gate_learning_rate": 0.01}
    seen, decays = rates_of(tmp_path, 1, warmup_steps=0, weight_decay=0.3, **own)
    parts = {"renderer.field.experts": 0.04, "renderer.field.gate": 0.01}
    for name, rate in seen[0].items():
        of_part = next((value for part, value in parts.items() if name.startswith(part)), 0.02)
        assert rate == pytest.approx(of_part), name
        assert decays[name] == (0.3 if of_part == 0.02 else 0), name
    assert {0.04, 0.02, 0.01} == {round(rate, 6) for rate in seen[0].values()}


def psnr_by_hand(drawn: Tensor, scene: Scene, frame: int, behind: float) -> float:
    """Of the pixels that count, with what is transparent over its background."""
    wanted = scene.images[frame].double() / 255
    if wanted.shape[-1] == 4:
        wanted = wanted[..., :3] * wanted[..., 3:] + behind * (1 - wanted[..., 3:])
    squared = (drawn.double() - wanted).square()
    counts = torch.ones(squared.shape[:2], dtype=torch.bool) if scene.masks is None else scene.masks[frame]
    return -10 * math.log10(squared[counts].mean())


@pytest.mark.parametrize("make", [mega_nerf, blender], ids=["halves", "alpha"])
def test_validation_and_comparison_score_alike(make, taken, tmp_path):
    """By masks, background and alpha."""
    data, module = make(taken, tmp_path), single()
    trainer = trainer_of(tmp_path)
    trainer.fit(module, data)
    validated = trainer.validate(module, data, verbose=False)[0]
    judged = judge(module)
    scene, held_out = data.scene, data.scene.splits["test"].tolist()
    assert data.scene.splits["val"].numel() > 0
    by_hand = [psnr_by_hand(module.draw(frame).colour, scene, frame, 1.0) for frame in held_out]
    assert judged["psnr"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-3)
    validation = [psnr_by_hand(module.draw(frame).colour, scene, frame, 1.0) for frame in scene.splits["val"].tolist()]
    assert validated["val/psnr"] == pytest.approx(sum(validation) / len(validation), abs=1e-3)


def test_held_out_halves_have_the_appearance_that_the_others_train(taken, tmp_path):
    """Frames 3 and 7 of Mega-NeRF's scene; of a city's held-out picture no appearance is known, and the mean counts."""
    data, module = mega_nerf(taken, tmp_path), single(appearances=10)
    trainer_of(tmp_path, limit_val_batches=0).fit(module, data)
    torch.nn.init.normal_(module.renderer.field.appearance.weight)
    assert [data.scene.training_appearance(frame) for frame in (0, 9, 10, 11)] == [0, 9, 3, 7]
    for frame, appearance in ((10, 3), (11, 7)):
        drawn = module.draw(frame).colour
        assert torch.equal(drawn, module.renderer.draw_image(data.scene.cameras, frame, appearance).colour)
        assert not torch.equal(drawn, module.renderer.draw_image(data.scene.cameras, frame).colour)
    trainer = trainer_of(tmp_path)
    scores = trainer.validate(module, data, verbose=False)[0]
    wanted = [psnr_by_hand(module.draw(frame).colour, data.scene, frame, 1.0) for frame in (10, 11)]
    assert scores["val/psnr"] == pytest.approx(sum(wanted) / 2, abs=1e-3)
    assert small.city().training_appearance(5) is None


def test_nothing_is_judged_without_held_out_pictures(tmp_path):
    module = single()
    trainer_of(tmp_path, 1).fit(module, small.rays(city=small.CITY | {"test_views": 0}))
    words = "scene 'city' holds out no picture to judge by"
    with pytest.raises(ValueError, match=words):
        judge(module)
    watch = small.Watch()
    trainer = trainer_of(tmp_path, 1, callbacks=[Judged(1, 1e9), watch])
    with pytest.raises(ValueError, match=words):
        trainer.fit(single(), small.rays(city=small.CITY | {"test_views": 0}))
    assert watch.logged == []  # not a step is done before


@pytest.mark.parametrize(("steps", "validations"), [(3, 1), (20, 1), (23, 2)], ids=["short", "epoch", "longer"])
def test_a_run_ends_with_scores(steps, validations, tmp_path, capsys):
    """Of an epoch of 20 batches: at its end, and where training ends."""
    at = []

    class Validated(pl.Callback):
        def on_validation_end(self, trainer, module):
            at.append(trainer.global_step)

    module = single()
    trainer = trainer_of(tmp_path, steps, callbacks=[Validated()])
    trainer.fit(module, small.rays(batch_size=64, rays_per_epoch=64 * 20))
    assert at == ([steps] if validations == 1 else [20, steps])
    scores = trainer.validate(module, small.rays(), verbose=False)[0]
    assert f"held-out pictures: {scores['val/psnr']:.2f} dB, SSIM {scores['val/ssim']:.3f}" in capsys.readouterr().out


def test_without_validation_nothing_is_said_of_scores(tmp_path, capsys):
    trainer_of(tmp_path, 2, limit_val_batches=0).fit(single(), small.rays())
    assert "held-out pictures" not in capsys.readouterr().out


def test_a_run_says_what_its_scene_is(taken, tmp_path, capsys):
    WRITERS["nerfstudio"](taken, tmp_path / "garden")
    data = SceneRays(str(tmp_path / "garden"), batch_size=64, rays_per_epoch=640)
    trainer_of(tmp_path, 1, limit_val_batches=0).fit(single(step=0.01), data)
    said = capsys.readouterr().out
    scale = torch.linalg.det(data.scene.transform[:, :3].double()) ** (1 / 3)
    assert "scene 'garden': 9 pictures to train on, 1 held out (images/008.png)" in said
    assert "box [-1, -1, -1] to [1, 1, 1], rays from 0.05 to 1000" in said
    assert f"one unit is {1 / scale:.4g} of the source's" in said
    assert "step 0.01: 346 samples along the box's diagonal" in said


def test_a_scene_without_held_out_pictures_is_said(taken, tmp_path, capsys):
    WRITERS["blender"](taken, tmp_path / "toy", [("train", 6)])
    trainer_of(tmp_path, 1).fit(single(), SceneRays(str(tmp_path / "toy"), batch_size=64, rays_per_epoch=640))
    said = capsys.readouterr().out
    assert "scene 'toy': 6 pictures to train on, none held out: nothing is validated" in said
    assert "of the source's" not in said


def checkpoint(folder: Path, steps: int = 3, **options) -> Path:
    trainer = trainer_of(folder, steps, limit_val_batches=0)
    trainer.fit(single(**options), small.rays())
    trainer.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


def resume(folder: Path, path: Path, module: RadianceFieldTraining, data: SceneRays, steps: int = 5) -> pl.Trainer:
    trainer = trainer_of(folder, steps, limit_val_batches=0)
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return trainer


def test_a_checkpoint_of_another_scene_is_refused(taken, tmp_path):
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is of scene 'city' with 4 training pictures, and this is 'scene' with 6"):
        resume(tmp_path, path, single(), blender(taken, tmp_path))
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="is of scene 'city'"):
        trainer.validate(single(), blender(taken, tmp_path), ckpt_path=path, weights_only=True)


def test_a_checkpoint_of_other_poses_is_refused(tmp_path):
    path = checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    state["scene"]["poses"][2, 0, 3] += 0.01
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"is of scene 'city' .* whose cameras stand elsewhere"):
        resume(tmp_path, path, single(), small.rays())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"kind": "hash_experts"}, "kind is 'single_grid' there and 'hash_experts' here"),
        ({"field": {"resolutions": [8, 32]}}, r"field\.resolutions is \[8, 64\] there and \[8, 32\] here"),
        ({"field": {"hidden_width": 8}}, r"field\.hidden_width is 16 there and 8 here"),
        ({"field": {"colour_layers": 1}}, r"renderer\.field\.colour\.1\.weight is \(16, 16\) there and \(3, 16\) here"),
    ],
    ids=["kind", "resolutions", "width", "a default"],
)
def test_a_checkpoint_of_another_model_is_refused(made, words, tmp_path):
    path = checkpoint(tmp_path)
    module = small.training(**{"kind": "single_grid", **made})
    with pytest.raises(ValueError, match=words):
        resume(tmp_path, path, module, small.rays())


def test_a_checkpoint_of_no_radiance_field_is_refused(tmp_path):
    path = checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    del state["hyper_parameters"]["kind"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="the checkpoint is of no radiance field"):
        resume(tmp_path, path, single(), small.rays())


def test_a_resumed_run_may_have_other_rates_and_noise(tmp_path):
    path = checkpoint(tmp_path)
    assert resume(tmp_path, path, single(head_learning_rate=1e-3, beta=0.2), small.rays()).global_step == 5


def test_a_checkpoint_past_the_last_step_is_said(tmp_path, caplog):
    path = checkpoint(tmp_path)
    resume(tmp_path, path, single(), small.rays(), steps=5)
    assert "nothing is left" not in caplog.text
    for steps in (3, 2):
        caplog.clear()
        resume(tmp_path, path, single(), small.rays(), steps=steps)
        assert f"the checkpoint is of step 3 and max_steps is {steps}: nothing is left to train" in caplog.text


@pytest.mark.parametrize("bias", [60.0, 100.0, 1e4])
def test_steep_densities_do_not_end_a_run(bias, tmp_path):
    module = single()
    with torch.no_grad():
        module.renderer.field.base[1].bias[0] = bias
    trainer_of(tmp_path, 3, limit_val_batches=0).fit(module, small.rays())
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("source", [*WRITERS, "stereo_motorcycle"])
@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "lazy"])
def test_two_steps_a_validation_and_a_frame(source, lazy, taken, tmp_path):
    options = {}
    if source == "stereo_motorcycle":
        if lazy:
            pytest.skip("it is no folder")
        pytest.importorskip("skimage")
        path = source
    else:
        path = tmp_path / "scene"
        WRITERS[source](taken, path)
        options = {"lazy": lazy} | ({"altitude_range": ALTITUDES} if source == "mega-nerf" else {})
    data = SceneRays(str(path), options=options, batch_size=256, rays_per_epoch=2560, pictures_at_once=4)
    module, watch = single(step=0.02), small.Watch()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = trainer_of(tmp_path, 2, callbacks=[watch])
    trainer.fit(module, data)
    assert watch.logged[-1]["train/samples"] > 256
    assert len(small.differing(module.state_dict(), before)) > 5
    held_out = data.scene.splits["val"]
    assert ("val/psnr" in trainer.callback_metrics) == (len(held_out) > 0)
    frame = int(held_out[0]) if len(held_out) else 0
    cameras = data.scene.cameras.resized(*(torch.full((len(data.scene),), size) for size in (12, 9)))
    drawn = module.renderer.eval().draw_image(cameras, frame)
    assert drawn.colour.shape == (9, 12, 3)
    assert drawn.colour.isfinite().all()
    assert (drawn.opacity > 0).float().mean() > 0.3  # rays meet the box
