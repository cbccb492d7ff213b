"""`python -m generation sample`: files, metadata, resuming, sharing among processes, errors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import kernels
from generation import __main__ as command_line
from generation.__main__ import HOME_OF, main
from generation.lina import sample
from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.pipeline import MOST_IMAGES, LinaPipeline
from generation.lina.sampling_settings import MOST_STEPS, SamplingSettings
from generation.lina.shipped_models import SHIPPED, models_there
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
        assert picture.text["version"] == kernels.__version__
    used = SamplingSettings(num_inference_steps=2, num_diffusion_steps=1, guidance_scale=2)
    size = {"height": 32, "width": 32, "magnify": 8}
    assert settings == asdict(used) | size | {"fast": False, "negative": None}
    assert not [path for path in output.parent.iterdir() if path != output]


def test_defaults_and_fast_settings_are_noted_as_they_were_used(model, tmp_path, monkeypatch):
    seen, call = [], LinaPipeline.__call__
    quick = {"num_inference_steps": 1, "num_diffusion_steps": 1}
    monkeypatch.setattr(LinaPipeline, "__call__", lambda *a, **k: seen.append(k) or call(*a, **(k | quick)))
    for flags, used in (([], SamplingSettings()), (["--fast"], SamplingSettings().faster())):
        main(["sample", "a red circle", "--output", str(tmp_path / "out.png"), "--model", model, *flags])
        with Image.open(tmp_path / "out.png") as picture:
            noted = json.loads(picture.text["settings"])
        assert noted.items() >= asdict(used).items() | {("fast", bool(flags))}
        assert seen.pop().items() >= asdict(used).items()


def test_what_the_parser_knows_is_what_the_pipeline_does(capsys):
    settings = SamplingSettings()
    assert settings.num_inference_steps == sample.DEFAULT_STEPS
    assert settings.num_diffusion_steps == sample.DEFAULT_DIFFUSION_STEPS
    assert settings.guidance_scale == sample.DEFAULT_GUIDANCE
    assert sample.LIMITS["steps"] == sample.LIMITS["diffusion_steps"] == (1, MOST_STEPS)
    assert sample.LIMITS["batch"] == (1, MOST_IMAGES)
    assert f"{models_there()[0]}, " in said(capsys, "--help")
    for words in ("(default: 64)", "(default: 25)", "(default: 5.0)", "beyond the number of tokens are skipped"):
        assert words in said(capsys, "--help")


def said(capsys, *arguments: str) -> str:
    """What the command says before it stops, without line breaks."""
    with pytest.raises(SystemExit) as stop:
        main(["sample", *arguments])
    captured = capsys.readouterr()
    code = stop.value.code if isinstance(stop.value.code, str) else ""
    return " ".join(f"{captured.out} {captured.err} {code}".split())


def test_only_models_with_an_index_are_offered(tmp_path, monkeypatch, capsys):
    from generation import model_folders
    from generation.lina import shipped_models

    monkeypatch.setattr(model_folders, "CHECKPOINTS", tmp_path)
    for folder in SHIPPED.values():
        (tmp_path / folder).mkdir()
    (tmp_path / SHIPPED["shapes"] / "model_index.json").write_text("{}")
    assert "--model MODEL shapes, or the folder of a model" in said(capsys, "--help")
    with pytest.raises(ValueError, match="model is 'openmoji'; expected shapes or a folder with"):
        shipped_models.load_pipeline("openmoji")


def test_a_run_folder_stands_for_its_pipeline(model, tmp_path, monkeypatch, capsys):
    run_folder = tmp_path / "runs/shapes/0"
    run_folder.mkdir(parents=True)
    message = said(capsys, "red", "--output", str(tmp_path / "out.png"), "--model", str(run_folder))
    assert f"model is '{run_folder}'; expected shapes" in message
    assert (
        f"neither {run_folder / 'model_index.json'} nor {run_folder / 'pipeline/model_index.json'} is there" in message
    )
    shutil.copytree(model, run_folder / "pipeline")
    run(str(run_folder), "red", "--output", str(tmp_path / "out.png"))
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.text["model"] == str(run_folder)


@pytest.mark.parametrize("command", HOME_OF)
@pytest.mark.parametrize("way", ["plain", "by Lightning"])
def test_an_interrupted_command_says_so_in_one_line(command, way, monkeypatch, capsys):
    def interrupted(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if way == "plain":
                raise
            sys.exit(1)

    monkeypatch.setattr(command_line, "OPTIONS_OF", {})
    function = HOME_OF[command].partition(":")[2] or "main"
    monkeypatch.setattr(command_line, "import_module", lambda _: SimpleNamespace(**{function: interrupted}))
    with pytest.raises(SystemExit) as stop:
        main([command])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("command", ["sample", "evaluate", "evaluate-openmoji"])
def test_help_does_not_wait_for_torch(command):
    code = (
        "import sys; from generation.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit: print({'torch', 'diffusers', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


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
    with pytest.raises(SystemExit) as stop:
        run(model, *arguments)
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; 3 pictures are finished"
    assert len(files(folder)) == 3  # nothing half-written beside them
    times = {name: os.stat(folder / name).st_mtime_ns for name in files(folder)}
    monkeypatch.setattr(sample, "save", save)
    run(model, *arguments)
    said = capsys.readouterr().out
    assert "3 of 6 pictures are there already" in said
    assert f"wrote 3 pictures into {folder}" in said
    assert all(os.stat(folder / name).st_mtime_ns == time for name, time in times.items())
    assert files(folder) == [
        f"{number:05d}-{name}-{seed}.png"
        for number, name in enumerate(("a-red-circle", "a-blue-square-at-the-top-left", "a-b"))
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("other", [["--guidance", "2"], ["--fast"], ["--negative", "blue"]], ids=" ".join)
def test_pictures_of_other_settings_are_not_taken_for_these(model, prompts, tmp_path, other):
    arguments = ["--prompts", str(prompts), "--output", str(tmp_path / "pictures")]
    run(model, *arguments)
    with pytest.raises(SystemExit) as stop:
        run(model, *arguments, *other)
    assert "00000-a-red-circle-0.png, drawn with" in str(stop.value.code)


def test_a_picture_of_another_prompt_with_the_same_name_is_not_taken(model, prompts, tmp_path):
    arguments = ["--prompts", str(prompts), "--output", str(tmp_path / "pictures")]
    run(model, *arguments)
    prompts.write_text("a red, circle!")
    with pytest.raises(SystemExit) as stop:
        run(model, *arguments)
    assert "00000-a-red-circle-0.png, drawn with {'prompt': 'a red circle'}" in str(stop.value.code)


def test_reordered_prompts_are_drawn_under_their_new_numbers(model, prompts, tmp_path, capsys):
    arguments = ["--prompts", str(prompts), "--output", str(tmp_path / "pictures")]
    run(model, *arguments)
    lines = ["a green triangle", "a red circle", "a/../b?"]
    prompts.write_text("\n".join(lines))
    capsys.readouterr()
    run(model, *arguments)
    assert "1 of 3 pictures are there already" in capsys.readouterr().out
    for name, line in zip(("00000-a-green-triangle-0", "00001-a-red-circle-0", "00002-a-b-0"), lines, strict=True):
        with Image.open(tmp_path / f"pictures/{name}.png") as picture:
            assert picture.text["prompt"] == line


def test_damaged_pictures_are_drawn_again(model, prompts, tmp_path, capsys):
    arguments = ["--prompts", str(prompts), "--output", str(tmp_path / "pictures")]
    run(model, *arguments)
    damaged = tmp_path / "pictures" / "00000-a-red-circle-0.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    run(model, *arguments)
    assert damaged.read_bytes() == whole
    assert "2 of 3 pictures are there already" in capsys.readouterr().out


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


def test_animation_is_of_the_first_image_or_none(model, prompts, tmp_path, monkeypatch, capsys):
    animation = tmp_path / "steps.gif"
    arguments = ["--prompts", str(prompts), "--output", str(tmp_path / "pictures"), "--animation", str(animation)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(model, *arguments)
    assert not animation.exists()
    assert "no animation" not in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    run(model, *arguments)
    assert animation.is_file()
    animation.unlink()
    (tmp_path / "pictures/00002-a-b-0.png").unlink()
    capsys.readouterr()
    run(model, *arguments)
    assert not animation.exists()
    assert "no animation was written" in capsys.readouterr().out


def test_an_animation_that_fails_leaves_the_old_one(model, tmp_path, monkeypatch):
    from generation.lina.pipeline import save_animation

    path = tmp_path / "steps.gif"
    path.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_animation([Image.new("RGB", (4, 4))], path)
    assert files(tmp_path) == ["steps.gif"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda folder: (folder / "x.png").mkdir(), "x.png"),
        (lambda folder: (folder / "file").write_text(""), "file"),
        (lambda folder: (folder / "file").write_text(""), "file/pictures"),
        (lambda folder: (folder / "file").write_text(""), "file/x.png"),
    ],
    ids=["folder as picture", "file as folder", "folder in a file", "picture in a file"],
)
def test_an_output_that_cannot_be_written_is_said_before_loading(make, output, tmp_path, monkeypatch, capsys):
    make(tmp_path)
    monkeypatch.setattr(sample, "load_pipeline", lambda _: pytest.fail("loaded"))
    message = said(capsys, "red", "--output", str(tmp_path / output)).strip()
    assert message.startswith(f"error: --output is '{tmp_path / output}'; ")


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
        (["red", "--output", "out.png", "--guidance", "nan"], "--guidance is nan"),
        (["red", "--output", "out.png", "--guidance", "-1"], "--guidance is -1.0"),
        (["red", "--output", "out.png", "--steps", "0"], "--steps is 0"),
        (["red", "--output", "out.jpg"], "must end in .png"),
        (["red", "--output", "out.TIFF"], "must end in .png"),
        (["red", "--output", "out.png", "--animation", "steps.mp4"], "it must end in .gif or .webp"),
        (["red", "--output", "out.png", "--steps", "1000000"], "--steps is 1000000"),
        (["red", "--output", "out.png", "--device", "gpu"], "error: --device is 'gpu'; valid here are cpu"),
        (["red", "--output", "out.png", "--device", ""], "error: --device is ''; valid here are cpu"),
        (["red", "--output", "out.png", "--device", "meta"], "error: --device is 'meta'; valid here are cpu"),
        (["red", "--output", "out.png", "--device", "cuda:99"], "error: --device is 'cuda:99'; valid here are cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_said_before_anything_is_written(arguments, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if "--model" in arguments else [*arguments, "--model", model]
    with pytest.raises(SystemExit) as stop:
        main(["sample", *arguments])
    assert stop.value.code != 0
    errors = f"{stop.value.code}{capsys.readouterr().err}"
    assert message in errors
    assert "image/s" not in errors  # no progress bar had begun
    assert not list(tmp_path.rglob("*.png"))
