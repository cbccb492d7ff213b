"""Training of LINA: it learns, it can be resumed exactly, and it says what is wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.captioned_shapes import CaptionedShapes, draw, held_out_prompts
from generation.lina.pipeline import LinaPipeline
from generation.lina.shape_scores import ShapeReport, word_sensitivity
from generation.lina.token_denoiser import FlowSchedule
from generation.lina.training import LinaTraining
from generation.lina.transformer import LinaTransformer

TRANSFORMER = {
    "width": 16,
    "num_heads": 2,
    "context_depth": 1,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "denoiser_width": 24,
    "denoiser_depth": 1,
    "latent_channels": 6,
    "latent_size": (8, 8),
    "patch_size": 2,
    "text_dim": 16,
    "text_length": 12,
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    network = TinyAutoencoder(width=8, encoder_blocks=0, decoder_blocks=0)
    network.whiten(draw(held_out_prompts("single", 32)))
    network.save_pretrained(folder)
    return str(folder)


def training(autoencoder: str, **options) -> LinaTraining:
    torch.manual_seed(0)
    text_encoder = {"dim": 16, "num_heads": 2}
    return LinaTraining(TRANSFORMER, autoencoder, text_encoder, **{"warmup_steps": 2, **options})


def trainer(folder: Path, steps: int, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


def weights(module: LinaTraining) -> dict[str, Tensor]:
    averages = {f"average.{i}": tensor for i, tensor in enumerate(module.average.shadow_params)}
    return {**{name: p.detach().clone() for name, p in module.named_parameters()}, **averages}


def test_one_batch_is_learned_by_heart(autoencoder):
    module = training(autoencoder, learning_rate=3e-3, loss_repeat=4, prompt_dropout=0.0)
    batch = CaptionedShapes("single", batch_size=4)
    batch.trainer = trainer(Path(), 1)
    images = next(iter(batch.train_dataloader()))
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = module.loss(images, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 1.5
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:5]) / 5


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_resumed_from_a_periodic_checkpoint_ends_with_the_same_weights(autoencoder, tmp_path, accumulated):
    def data() -> CaptionedShapes:
        return CaptionedShapes("single", batch_size=4, images_per_epoch=32)

    def run(module: LinaTraining, **options) -> LinaTraining:
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"callbacks": [keep], "enable_checkpointing": True, "accumulate_grad_batches": accumulated}
        trainer(tmp_path, 7, **options).fit(module, data(), **resume, weights_only=True)
        return module

    resume: dict = {}
    pl.seed_everything(1, verbose=False)
    straight = run(training(autoencoder))
    resume = {"ckpt_path": tmp_path / "step=3.ckpt"}
    resumed = training(autoencoder)
    torch.manual_seed(99)
    run(resumed)
    assert straight.average.optimization_step == resumed.average.optimization_step == 7
    expected, actual = weights(straight), weights(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_accumulated_batches_have_noise_of_their_own(autoencoder, tmp_path, monkeypatch):
    seeds = []
    module = training(autoencoder)
    loss = module.loss

    def watched(batch, dropout, generator):
        seeds.append(torch.rand((), generator=generator.clone_state()).item())
        return loss(batch, dropout, generator)

    monkeypatch.setattr(module, "loss", watched)
    data = CaptionedShapes("single", batch_size=4, images_per_epoch=16)
    trainer(tmp_path, 2, accumulate_grad_batches=2).fit(module, data)
    assert len(set(seeds)) == len(seeds) == 4


def test_all_captions_dropped_leave_every_parameter_its_gradient(autoencoder):
    """Processes of a distributed run wait for the gradients of all parameters."""
    module = training(autoencoder)
    module.loss({"image": torch.rand(2, 3, 32, 32), "caption": ["a red circle"] * 2}, dropout=1.0).backward()
    assert all(parameter.grad is not None for parameter in module.text_encoder.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("flat", 1.0),
        ("ema_decay", 2.0),
        ("loss_repeat", 0),
        ("least_masked", 1.5),
        ("prompt_dropout", 2.0),
        ("shift", 0.0),
        ("learning_rate", math.nan),
    ],
)
def test_settings_out_of_range(autoencoder, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        training(autoencoder, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm is 'value'"),
        ({"precision": "16-mixed"}, "precision is '16-mixed'"),
    ],
    ids=["by value", "float16"],
)
def test_gradients_that_cannot_be_clipped(autoencoder, options, message):
    module = training(autoencoder)
    module._trainer = SimpleNamespace(precision=options.get("precision", "32-true"))
    with pytest.raises(ValueError, match=message):
        module.configure_gradient_clipping(None, 1.0, options.get("gradient_clip_algorithm"))


@pytest.mark.slow
def test_two_processes_train_to_one_model(autoencoder, tmp_path):
    code = (
        "import sys, torch, lightning.pytorch as pl\n"
        "from generation.lina.captioned_shapes import CaptionedShapes\n"
        "from generation.lina.training import LinaTraining\n"
        "from tests.generation.test_lina_training import TRANSFORMER\n"
        "pl.seed_everything(1)\n"
        "module = LinaTraining(TRANSFORMER, sys.argv[1], {'dim': 16, 'num_heads': 2}, warmup_steps=2)\n"
        "trainer = pl.Trainer(accelerator='cpu', devices=2, strategy='ddp', max_steps=3, logger=False,\n"
        "    limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,\n"
        "    default_root_dir=sys.argv[2],\n"
        "    gradient_clip_val=1.0)\n"
        "trainer.fit(module, CaptionedShapes('single', batch_size=4, images_per_epoch=16))\n"
        "torch.save(module._trained(), f'{sys.argv[2]}/{trainer.global_rank}.pt')\n"
    )
    script = tmp_path / "train.py"
    script.write_text(code)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), autoencoder, str(tmp_path)], check=True, env=environment, timeout=300)
    with torch.serialization.safe_globals([torch.nn.Parameter]):
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_moving_average_starts_fast_and_is_given_back(autoencoder, tmp_path):
    module = training(autoencoder, ema_decay=0.99)
    trainer(tmp_path, 3).fit(module, CaptionedShapes("single", batch_size=4, images_per_epoch=16))
    before = weights(module)
    with module.averaged():
        assert not module.transformer.training
        inside = [p.detach().clone() for p in module._trained()]
    assert all(torch.equal(a, b) for a, b in zip(inside, module.average.shadow_params, strict=True))
    assert any(not torch.equal(a, p) for a, p in zip(inside, module._trained(), strict=True))
    after = weights(module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert module.transformer.training


def test_loss_that_is_not_finite_stops_the_run(autoencoder, tmp_path):
    module = training(autoencoder)
    torch.nn.init.constant_(module.transformer.mask_embed.mask_token, math.nan)
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        trainer(tmp_path, 3).fit(module, CaptionedShapes("single", batch_size=4, images_per_epoch=16))


def test_norms_are_not_decayed_and_frozen_parameters_not_trained(autoencoder):
    module = training(autoencoder)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10)
    groups = module.configure_optimizers()["optimizer"].param_groups
    norms = [p for m in module.transformer.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()]
    trained_norms = {id(p) for p in norms if p.requires_grad}
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert trained_norms <= undecayed
    everything = {id(p) for group in groups for p in group["params"]}
    frozen = [module.transformer.video_pos_embed, module.transformer.video_encoder.patch_embed, module.autoencoder]
    assert not everything & {id(p) for network in frozen for p in network.parameters()}


def test_unconditional_captions_are_dropped_prompts(autoencoder):
    module = training(autoencoder).eval()
    batch = {"image": torch.rand(3, 3, 32, 32), "caption": ["a red circle", "a blue square", "a green triangle"]}
    nothing = batch | {"caption": ["", "", ""]}
    dropped, empty = (
        module.loss(b, dropout, torch.Generator().manual_seed(3)) for b, dropout in ((batch, 1.0), (nothing, 0.0))
    )
    torch.testing.assert_close(dropped, empty)


def test_share_of_masked_tokens_follows_the_recipe():
    model = LinaTransformer(**TRANSFORMER)
    tokens, schedule, generator = torch.zeros(2, 16, 24), FlowSchedule(), torch.Generator().manual_seed(0)
    draws = [model.draw(tokens, schedule, 1, 0.7, generator) for _ in range(400)]
    known = torch.tensor([draw.known.shape[1] for draw in draws])
    assert known.max() <= 5
    # The mean of a normal distribution with mean 1 and deviation 0.25 cut to [0.7, 1] is 0.868.
    assert abs((1 - known.float().mean() / 16).item() - 0.868) < 0.02
    assert all(len(set(row.tolist())) == len(row) for draw in draws[:20] for row in draw.known)
    levels = torch.cat([draw.level.flatten() for draw in draws])
    assert levels.min() >= 0
    assert levels.max() <= 999
    assert abs(levels.float().mean() - 500) < 15


def test_report_scores_the_average_and_changes_nothing(autoencoder, tmp_path):
    settings = {"every_n_steps": 2, "prompts": 4, "num_inference_steps": 2, "num_diffusion_steps": 1}
    report = ShapeReport(levels=("single",), **settings)
    plain, reported = training(autoencoder), training(autoencoder)
    for module, callbacks in ((plain, []), (reported, [report])):
        pl.seed_everything(1, verbose=False)
        runner = trainer(tmp_path, 4, callbacks=callbacks, enable_checkpointing=bool(callbacks))
        runner.fit(module, CaptionedShapes("single", batch_size=4, images_per_epoch=16))
    expected, actual = weights(plain), weights(reported)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert (tmp_path / "single.png").is_file()
    pipeline = LinaPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    averages = dict(zip((id(p) for p in reported._trained()), reported.average.shadow_params, strict=True))
    name = "image_encoder.norm.weight"
    saved = pipeline.transformer.get_parameter(name)
    assert torch.equal(saved, averages[id(reported.transformer.get_parameter(name))])


def test_validation_is_the_same_every_time(autoencoder, tmp_path):
    module = training(autoencoder)
    data = CaptionedShapes("single", evaluation_batch_size=4, evaluation_images=8)
    runner = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    first, second = (runner.validate(module, data, verbose=False)[0] for _ in range(2))
    assert first == second
    assert first["val/loss"] == pytest.approx(first["val/loss_of_average"], rel=1e-6)  # before any step


def test_sensitivity_to_words(autoencoder):
    module = training(autoencoder).eval()
    assert all(value > 0 for value in word_sensitivity(module).values())


def test_command_line_trains_and_resumes(autoencoder, tmp_path, monkeypatch):
    from generation.training import main

    settings = {
        "model": {
            "class_path": "generation.lina.training.LinaTraining",
            "init_args": {
                "autoencoder": autoencoder,
                "transformer": {**TRANSFORMER, "latent_size": [8, 8]},
                "text_encoder": {"dim": 16, "num_heads": 2},
            },
        },
        "data": {
            "class_path": "generation.lina.captioned_shapes.CaptionedShapes",
            "init_args": {"level": "single", "batch_size": 4, "images_per_epoch": 8},
        },
        "trainer": {"max_steps": 2, "limit_val_batches": 0, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "small.yaml"])
    assert (tmp_path / "runs/small/0/checkpoints/last.ckpt").is_file()
    main(["fit", "--config", "small.yaml", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    resumed = torch.load(tmp_path / "runs/small/1/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 4
    for path, message in (
        ("last", "error: ckpt_path is 'last', but no run in runs/other has a checkpoint"),
        (
            "missing.ckpt",
            "error: ckpt_path is 'missing.ckpt'; there is no such file; valid are a checkpoint, the folder of a run "
            "that has checkpoints/last.ckpt, and 'last'",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "small.yaml", "--experiment", "other", "--ckpt_path", path])
        assert stop.value.code == message
    assert not Path("runs/other").exists()


def test_ablation_skips_what_is_done(autoencoder, tmp_path, capsys, monkeypatch):
    from generation.lina import ablation

    monkeypatch.setattr(ablation, "TIMED_STEPS", 1)
    monkeypatch.setattr(ablation, "WARM_UP_STEPS", 1)
    settings = {
        "model": {
            "autoencoder": autoencoder,
            "transformer": {**TRANSFORMER, "latent_size": [8, 8]},
            "text_encoder": {"dim": 16, "num_heads": 2},
        },
        "data": {"level": "single", "batch_size": 4},
        "variants": {"division": {}, "value_bank": {"value_bank": 4}},
        "seeds": [0],
        "cpu_seconds": 0.01,
        "prompts": 4,
        "output": str(tmp_path / "results"),
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings))
    ablation.main(["--config", str(file)])
    first = capsys.readouterr().out
    assert "value_bank, seed 0: 1 steps" in first
    rows = json.loads((tmp_path / "results/ablation.json").read_text())
    assert [row["variant"] for row in rows] == ["division", "value_bank"]
    ablation.main(["--config", str(file)])
    again = capsys.readouterr().out
    assert "seed 0: 1 steps" not in again
    assert [line for line in first.splitlines() if line.startswith("|")] == [
        line for line in again.splitlines() if line.startswith("|")
    ]
    for name in ("ablation.png", "ablation.json", "division-0.json"):
        assert (tmp_path / "results" / name).stat().st_mode & 0o777 == 0o644
    assert "| CPU seconds |" in first
    for changed, name in (
        ({"cpu_seconds": 0.02}, "cpu_seconds"),
        ({"data": {"level": "single", "batch_size": 5}}, "data.batch_size"),
        ({"variants": {"division": {"context_depth": 2}}}, "model.transformer.context_depth"),
    ):
        file.write_text(yaml.safe_dump(settings | changed))
        with pytest.raises(SystemExit, match=rf"division-0.json is of .* other settings: {name} differ; use another"):
            ablation.main(["--config", str(file)])
    kept = tmp_path / "results/division-0.json"
    kept.write_text(json.dumps({"variant": "division"}))
    with pytest.raises(ValueError, match="does not hold the result of a run with its settings"):
        ablation.finished(kept, {})
