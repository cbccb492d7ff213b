"""`python -m generation sample`: files, metadata, resuming, sharing among processes, errors."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from generation.__main__ import main
from generation.lina import sample
from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.pipeline import LinaPipeline
from generation.lina.text_encoder import WordTextEncoder
from generation.lina.transformer import LinaTransformer

FAST = ["--steps", "2", "--diffusion-steps", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    transformer = LinaTransformer(
        width=16,
        num_heads=2,
        context_depth=1,
        encoder_depth=1,
        decoder_depth=1,
        denoiser_depth=1,
        latent_channels=6,
        latent_size=(8, 8),
        patch_size=2,
        text_dim=16,
        text_length=12,
    )
    torch.nn.init.normal_(transformer.image_decoder.head.weight)
    folder = tmp_path_factory.mktemp("model")
    parts = TinyAutoencoder(width=8), FlowMatchEulerDiscreteScheduler(), WordTextEncoder(dim=16, num_heads=2)
    LinaPipeline(transformer, *parts).save_pretrained(folder)
    return str(folder)


def run(model: str, *arguments: str) -> None:
    main(["sample", *arguments, "--model", model, *FAST])


def test_one_picture_with_all_images_and_how_they_were_made(model, tmp_path):
    output = tmp_path / "new folder" / "out.png"
    run(model, "a red circle", "--output", str(output), "--seed", "7", "--images", "3", "--guidance", "2")
    with Image.open(output) as picture:
        assert picture.size == (3 * 256, 256)
        assert picture.text["prompt"] == "a red circle"
        assert json.loads(picture.text["seed"]) == [7, 8, 9]
        settings = json.loads(picture.text["settings"])
    assert settings["guidance_scale"] == 2
    assert settings["num_inference_steps"] == 2


def test_an_image_is_the_same_alone_and_among_others(model, tmp_path):
    run(model, "a red circle", "--output", str(tmp_path / "many"), "--seed", "7", "--images", "3", "--magnify", "1")
    run(model, "a red circle", "--output", str(tmp_path / "one"), "--seed", "8", "--magnify", "1")
    name = "00000-a-red-circle-8.png"
    many, one = (Image.open(tmp_path / folder / name) for folder in ("many", "one"))
    differences = torch.tensor(list(many.tobytes())).int() - torch.tensor(list(one.tobytes())).int()
    assert differences.abs().max() <= 1


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue square at the top left\na/../b?\n", encoding="utf-8")
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_many_prompts_and_what_is_there_already(model, prompts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    arguments = ["--prompts", str(prompts), "--output", str(folder), "--images", "2", "--batch", "2"]
    save, saved = sample.save, []

    def save_three(*given):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(save(*given))

    monkeypatch.setattr(sample, "save", save_three)
    with pytest.raises(KeyboardInterrupt):
        run(model, *arguments)
    assert len(files(folder)) == 3  # nothing half-written beside them
    times = {name: os.stat(folder / name).st_mtime_ns for name in files(folder)}
    monkeypatch.setattr(sample, "save", save)
    run(model, *arguments)
    assert "3 of 6 pictures are there already" in capsys.readouterr().out
    assert all(os.stat(folder / name).st_mtime_ns == time for name, time in times.items())
    assert files(folder) == [
        f"{number:05d}-{name}-{seed}.png"
        for number, name in enumerate(("a-red-circle", "a-blue-square-at-the-top-left", "a-b"))
        for seed in (0, 1)
    ]


def test_processes_of_torchrun_share_the_work(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        before = set(files(tmp_path / "pictures")) if rank else set()
        run(model, "--prompts", str(prompts), "--output", str(tmp_path / "pictures"))
        seen.append(set(files(tmp_path / "pictures")) - before)
    assert [len(names) for names in seen] == [2, 1]


def test_animation(model, tmp_path):
    run(model, "a red circle", "--output", str(tmp_path / "out.png"), "--animation", str(tmp_path / "steps.gif"))
    with Image.open(tmp_path / "steps.gif") as animation:
        assert animation.n_frames == 2
        assert animation.size == (256, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red", "--output", "out.png", "--images", "0"], "--images is 0"),
        (["red", "--output", "out.png", "--steps", "-1"], "--steps is -1"),
        (["red", "--output", "out.png", "--seed", "-1"], "--seed is -1"),
        (["--output", "out.png"], "prompt"),
        (["--prompts", "none.txt", "--output", "folder"], "none.txt"),
        (["red", "--output", "out.png", "--model", "nowhere"], "nowhere"),
        (["red", "--output", "out.png", "--height", "33"], "height is 33"),
        (["red", "--output", "out.png", "--guidance", "nan"], "guidance_scale is nan"),
        (["red", "--output", "out.png", "--steps", "1000000"], "num_inference_steps is 1000000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_said_before_anything_is_written(arguments, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if "--model" in arguments else [*arguments, "--model", model]
    with pytest.raises(SystemExit) as stop:
        main(["sample", *arguments])
    assert stop.value.code != 0
    assert message in f"{stop.value.code}{capsys.readouterr().err}"
    assert not list(tmp_path.rglob("*.png"))
