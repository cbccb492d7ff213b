"""Ctrl-C while training: the step ends, a checkpoint is left, and the run goes on from there."""

import os
import signal

import pytest
import torch

from generation.__main__ import main
from generation.spiking_diffusion.training import SpikingDiffusionTraining

SMALL = """
model:
  class_path: generation.spiking_diffusion.training.SpikingDiffusionTraining
  init_args:
    unet: {sample_size: 8, in_channels: 1, channels: 4, channel_multipliers: [1], layers_per_block: 1,
           snn_timesteps: 2, num_class_embeds: 10}
    warmup_steps: 2
data:
  class_path: generation.spiking_diffusion.image_sets.ImageSet
  init_args: {source: digits, batch_size: 4, images_per_epoch: 16}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 6
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_interrupted_run_is_kept_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    fit = ["fit", "--config", str(config), "--runs"]
    main([*fit, str(tmp_path / "whole")])

    step = SpikingDiffusionTraining.training_step

    def interrupted(self, batch, batch_index):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_index)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(SpikingDiffusionTraining, "training_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([*fit, str(tmp_path / "stopped")])
    assert stop.value.code == 130
    assert "step 3 is kept: go on with --ckpt_path last" in capsys.readouterr().err
    signal.signal(signal.SIGINT, before)  # Lightning ignores further ones

    main([*fit, str(tmp_path / "stopped"), "--ckpt_path", "last"])
    whole, resumed = (
        weights(tmp_path / name / "small" / str(number) / "checkpoints" / "last.ckpt")
        for name, number in (("whole", 0), ("stopped", 1))
    )
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_bad_data_is_one_line(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(SMALL.replace("source: digits", "source: digitz"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--runs", str(tmp_path)])
    assert str(stop.value.code).startswith("error: source is 'digitz'; expected digits, ")
