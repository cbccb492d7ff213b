"""Training of spiking diffusion: the average, exact resuming, what a run begins with and leaves, and errors."""

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from generation.spiking_diffusion.conversion import convert
from generation.spiking_diffusion.image_sets import ImageSet
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline
from generation.spiking_diffusion.quantized_unet import QuantizedUNet2DModel
from generation.spiking_diffusion.training import SpikingDiffusionTraining
from generation.spiking_diffusion.unet import SpikingUNet2DModel

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "channels": 8,
    "channel_multipliers": (1,),
    "layers_per_block": 1,
    "num_train_timesteps": 20,
}
QUANTIZED = UNET | {"norm": "batch"}


def training(unet: dict | None = None, **options) -> SpikingDiffusionTraining:
    torch.manual_seed(0)
    return SpikingDiffusionTraining(UNET | (unet or {}), **{"warmup_steps": 2, **options})


def fit(
    module: SpikingDiffusionTraining, folder: Path, steps: int, resume: Path | None = None, **options
) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    options = {"enable_checkpointing": False, **options}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_steps=steps, **quiet, **options)
    trainer.fit(module, ImageSet(batch_size=8, images_per_epoch=32), ckpt_path=resume, weights_only=True)
    return trainer


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.parametrize(
    ("network", "unet"),
    [("spiking", {}), ("spiking", {"num_class_embeds": 10, "tsm": True}), ("quantized", QUANTIZED)],
    ids=["spiking", "tsm and classes", "quantized"],
)
def test_a_run_leaves_a_pipeline_of_the_average(network, unet, tmp_path, capsys):
    module = training(unet, network=network)
    trainer = fit(module, tmp_path, 3, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert f"sample-spiking --model {tmp_path / 'pipeline'}" in capsys.readouterr().out
    loaded = SpikingDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert differing(loaded.unet.state_dict(), module.average.module.state_dict()) == []
    assert "stem_conv.weight" in differing(loaded.unet.state_dict(), module.unet.state_dict())
    loaded.set_progress_bar_config(disable=True)
    assert loaded(2, num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 8)
    if network == "quantized":
        spiking = convert(loaded.unet)
        assert spiking(torch.randn(2, 1, 8, 8), 5).sample.isfinite().all()
        assert spiking.neurons()


def test_without_checkpoints_a_run_leaves_nothing(tmp_path):
    fit(training(), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"sample_size": 16}, "sample_size is 16; of these data it must be 8"),
        ({"in_channels": 3}, "in_channels is 3; of these data it must be 1"),
        ({"num_class_embeds": 4}, "num_class_embeds is 4; of these data it must be 10"),
    ],
    ids=["size", "channels", "classes"],
)
def test_a_network_for_other_data_is_refused(unet, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(training(unet), tmp_path, 1)


class Watch(pl.Callback):
    """The network after each step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append({name: value.clone() for name, value in module.unet.state_dict().items()})


@pytest.mark.parametrize("ema_decay", [0.998, 0.15, 0.0])
def test_the_average_follows_its_formula_and_covers_batch_norms(ema_decay, tmp_path):
    module, watch = training(ema_decay=ema_decay), Watch()
    fit(module, tmp_path, 4, callbacks=[watch])
    expected = {name: value.double() for name, value in watch.states[0].items()}
    for update, state in enumerate(watch.states[1:], 1):
        decay = min(ema_decay, (1 + update) / (10 + update))
        expected = {name: decay * mean + (1 - decay) * state[name] for name, mean in expected.items()}
    actual = module.average.module.state_dict()
    for name, value in expected.items():
        wanted = watch.states[-1][name] if name.endswith("num_batches_tracked") else value.float()
        torch.testing.assert_close(actual[name], wanted, atol=1e-6, rtol=1e-5)
    running = "stem_norm.running_mean"
    assert actual[running].any()
    assert torch.equal(actual[running], module.unet.state_dict()[running]) == (ema_decay == 0)
    assert int(actual["stem_norm.num_batches_tracked"]) == 4


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_resumed_in_mid_epoch_ends_with_the_same_weights(accumulated, tmp_path):
    def run(folder: str, **options) -> SpikingDiffusionTraining:
        module = training({"num_class_embeds": 10}, label_dropout=0.5)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        options |= {"callbacks": [keep], "enable_checkpointing": True, "accumulate_grad_batches": accumulated}
        torch.manual_seed(len(options))
        fit(module, tmp_path / folder, 5, gradient_clip_val=1.0, **options)
        return module

    straight = run("straight")
    resumed = run("resumed", resume=tmp_path / "straight/step=3.ckpt")
    assert differing(straight.state_dict(), resumed.state_dict()) == []
    assert int(straight.average.n_averaged) == 5


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory) -> Path:
    """A pipeline, a network and a run whose every weight matters."""
    folder = tmp_path_factory.mktemp("stage one")
    torch.manual_seed(0)
    unet = SpikingUNet2DModel(**UNET).eval()
    for parameter in unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.2)
    SpikingDiffusionPipeline(unet).save_pretrained(folder / "pipeline")
    QuantizedUNet2DModel(**QUANTIZED | {"channels": 32}).save_pretrained(folder / "quantized")
    SpikingUNet2DModel(**UNET | {"channels": 32}).save_pretrained(folder / "wide")
    return folder


@pytest.mark.parametrize("tsm", [False, True], ids=["the same", "with temporal-wise scales"])
@pytest.mark.parametrize("folder", ["", "pipeline", "pipeline/unet"], ids=["run", "pipeline", "unet"])
def test_a_run_begins_with_a_saved_model(folder, tsm, stage_one):
    module = training({"tsm": tsm}, init_from=str(stage_one / folder))
    first = SpikingUNet2DModel.from_pretrained(stage_one / "pipeline/unet", low_cpu_mem_usage=False).eval()
    arguments = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    with torch.no_grad():
        wanted = first(*arguments).sample
        assert wanted.std() > 0.01
        for unet in (module.unet.eval(), module.average.module.eval()):
            torch.testing.assert_close(unet(*arguments).sample, wanted, atol=1e-5, rtol=1e-5)
    scales = [value for name, value in module.unet.state_dict().items() if name.endswith("step_scale")]
    assert bool(scales) == tsm
    assert all((scale == 1).all() for scale in scales)


@pytest.mark.parametrize(
    ("folder", "unet", "network", "message"),
    [
        ("nowhere", {}, "spiking", "init_from is '.*nowhere'; expected the folder of a saved model, pipeline or run"),
        ("quantized", {"channels": 32}, "spiking", "a QuantizedUNet2DModel; a SpikingUNet2DModel is needed"),
        ("wide", QUANTIZED | {"channels": 32}, "quantized", "a SpikingUNet2DModel; a QuantizedUNet2DModel is needed"),
        ("wide", {}, "spiking", "it differs from the model: time_embedding.table"),
        ("pipeline", {"num_class_embeds": 3}, "spiking", "it differs from the model: class_embedding.weight"),
        ("pipeline", {"layers_per_block": 2}, "spiking", "it differs from the model: down_blocks.1"),
    ],
    ids=["missing", "quantized for spiking", "spiking for quantized", "wider", "no classes", "shallower"],
)
def test_models_that_a_run_cannot_begin_with(folder, unet, network, message, stage_one):
    with pytest.raises(ValueError, match=message):
        training(unet, network=network, init_from=str(stage_one / folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("label_dropout", 1.5),
        ("network", "relu"),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        training(**{name: value})


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = training()
    torch.nn.init.constant_(module.unet.out_conv.bias, math.nan)
    with pytest.raises(RuntimeError, match="the loss is nan at step 0: lower the learning rate"):
        fit(module, tmp_path, 2)


def test_gradients_are_clipped(tmp_path):
    class Norms(pl.Callback):
        found = ()

        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradients = [p.grad for p in module.unet.parameters() if p.grad is not None]
            self.found = (*self.found, torch.stack([g.norm() for g in gradients]).norm().item())

        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = [p.grad for p in module.unet.parameters() if p.grad is not None]
            if gradients:
                self.clipped = torch.stack([g.norm() for g in gradients]).norm().item()

    norms = Norms()
    fit(training(), tmp_path, 2, callbacks=[norms], gradient_clip_val=1e-3)
    assert min(norms.found) > 1e-2
    assert norms.clipped == pytest.approx(1e-3, rel=1e-2)


def test_validation_is_the_same_every_time(tmp_path):
    module, data = training(), ImageSet(evaluation_batch_size=900)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    first, second = (trainer.validate(module, data, verbose=False)[0] for _ in range(2))
    assert first == second
    assert 0.9 < first["val/loss_of_average"] < 1.1  # nothing is predicted yet


def test_a_short_run_learns_something(tmp_path):
    """A network that has learned nothing predicts no noise, and its loss is 1."""
    module = training({"channels": 16, "num_train_timesteps": 200}, learning_rate=4e-3, ema_decay=0.9)
    fit(module, tmp_path, 100)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    scores = trainer.validate(module, ImageSet(evaluation_batch_size=900), verbose=False)[0]
    assert scores["val/loss_of_average"] < 0.6


def test_labels_that_are_dropped_are_those_of_any_class():
    module = training({"num_class_embeds": 10})
    torch.nn.init.normal_(module.unet.out_conv.weight)
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4)}
    anything = batch | {"label": torch.full((4,), 10)}
    losses = [
        module.loss(module.unet.eval(), given, dropout, torch.Generator().manual_seed(1)).item()
        for given, dropout in ((batch, 1.0), (anything, 0.0), (batch, 0.0))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_saved_hyperparameters_make_the_same_module(tmp_path):
    module = training()
    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "last.ckpt")
    loaded = SpikingDiffusionTraining.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert differing(loaded.state_dict(), module.state_dict()) == []
    assert json.loads(json.dumps(dict(loaded.hparams)))["warmup_steps"] == 2
