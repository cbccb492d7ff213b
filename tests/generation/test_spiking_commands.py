"""The commands of spiking diffusion on tiny models: what they write and print, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import kernels
from generation.__main__ import main
from generation.spiking_diffusion import evaluation, sample
from generation.spiking_diffusion.image_sets import LabelledImages
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline
from generation.spiking_diffusion.quality import Judge
from generation.spiking_diffusion.quantized_unet import QuantizedUNet2DModel
from generation.spiking_diffusion.unet import SpikingUNet2DModel

COMMANDS = ("sample-spiking", "evaluate-spiking", "sweep-threshold", "convert-spiking")
UNET = {"sample_size": 8, "in_channels": 1, "channels": 8, "channel_multipliers": (1,), "layers_per_block": 1}
UNET |= {"num_train_timesteps": 20, "num_class_embeds": 10}
MODELS = {
    "spiking": (SpikingUNet2DModel, {}),
    "twin": (SpikingUNet2DModel, {"neuron": "silu", "snn_timesteps": 1}),
    "no classes": (SpikingUNet2DModel, {"num_class_embeds": None}),
    "large": (SpikingUNet2DModel, {"sample_size": 12}),
    "colour": (SpikingUNet2DModel, {"in_channels": 3}),
    "quantized": (QuantizedUNet2DModel, {"norm": "batch"}),
    "converted": (QuantizedUNet2DModel, {"norm": "batch", "snn_timesteps": 3}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of pipelines whose every weight matters, with these names."""
    folder = tmp_path_factory.mktemp("models")
    for name, (network, options) in MODELS.items():
        torch.manual_seed(0)
        unet = network(**UNET | options).eval()
        for key, parameter in unet.named_parameters():
            if parameter.requires_grad and not key.endswith("clip"):
                torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.2)
        SpikingDiffusionPipeline(unet).save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _quick_judge(monkeypatch):
    monkeypatch.setattr(evaluation, "Judge", lambda data: Judge(data, steps=5))


def run(models: Path, command: str, model: str, *arguments: object) -> None:
    named = ["--model"] if command == "sample-spiking" else []
    few = [] if command == "convert-spiking" else ["--steps", "2"]
    main([command, *named, str(models / model), *few, *map(str, arguments)])


def stopped(capsys, *arguments: object) -> str:
    """What the command says before it stops."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code not in (0, None)
    errors = capsys.readouterr().err
    said = stop.value.code if isinstance(stop.value.code, str) else errors.splitlines()[-1]
    assert "\n" not in said
    return said


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def draw(models: Path, output: Path, *arguments: object, model: str = "spiking") -> torch.Tensor:
    run(models, "sample-spiking", model, "--output", output, "--magnify", 1, *arguments)
    return pixels(output).int()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_torch(command):
    code = (
        "import sys; from generation.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit: print({'torch', 'diffusers', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stdout.startswith(f"usage: python -m generation {command}")


def test_one_picture_of_all_images_and_how_it_was_made(models, tmp_path, capsys):
    output = tmp_path / "new folder/grid.png"
    run(models, "sample-spiking", "spiking", "--output", output, "--images", 6, "--seed", 3, "--label", 7)
    assert f"written to {output}" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.size == (4 * (3 * 9 + 1), 4 * (2 * 9 + 1))
        settings = json.loads(picture.text["settings"])
        assert picture.text["software"] == f"gated-vision-suite {kernels.__version__}"
    assert settings == {
        "model": str(models / "spiking"),
        "label": 7,
        "seed": 3,
        "images": 6,
        "num_inference_steps": 2,
        "threshold": None,
        "snn_timesteps": None,
        "guidance_scale": 1.0,
    }
    assert [path.name for path in output.parent.iterdir()] == ["grid.png"]


def test_columns_and_colours(models, tmp_path):
    drawn = draw(models, tmp_path / "out.png", "--images", 3, "--columns", 3, model="colour")
    assert drawn.shape == (10, 28, 3)
    assert (drawn[1:9, 1:9, 0] != drawn[1:9, 1:9, 1]).any()


def test_an_image_depends_on_its_seed_and_label_alone(models, tmp_path, monkeypatch):
    many = draw(models, tmp_path / "many.png", "--images", 4, "--columns", 4, "--seed", 5)
    one = draw(models, tmp_path / "one.png", "--images", 1, "--seed", 7, "--label", 2)
    assert (many[1:9, 19:27] - one).abs().max() <= 1  # one image has no border
    other = draw(models, tmp_path / "other.png", "--images", 1, "--seed", 7, "--label", 3)
    assert (other - one).abs().max() > 1
    monkeypatch.setattr(sample, "MOST_AT_ONCE", 3)
    assert (draw(models, tmp_path / "many.png", "--images", 4, "--columns", 4, "--seed", 5) - many).abs().max() <= 1


@pytest.mark.parametrize(
    "change", [["--threshold", "0.7"], ["--snn-timesteps", "2"], ["--guidance", "3"]], ids=" ".join
)
def test_options_change_the_picture(change, models, tmp_path):
    plain = draw(models, tmp_path / "plain.png", "--images", 2)
    assert (draw(models, tmp_path / "changed.png", "--images", 2, *change) - plain).abs().max() > 1


@pytest.mark.parametrize("model", ["spiking", "twin"])
def test_energy_is_printed(model, models, tmp_path, capsys):
    plain = draw(models, tmp_path / "plain.png", "--images", 2, model=model)
    capsys.readouterr()
    assert torch.equal(draw(models, tmp_path / "energy.png", "--images", 2, "--energy", model=model), plain)
    said = capsys.readouterr().out
    assert "| energy, uJ | this network | ANN twin | of the twin's |" in said
    assert "S-ACE: multiply-adds of a step times the Bit Budget" in said
    assert "A generated image takes 2 calls." in said


SAMPLE_ERRORS = [
    (["--images", "0"], "--images is 0; it must be from 1 to 4096"),
    (["--steps", "0"], "--steps is 0"),
    (["--steps", "21"], "error: --steps is 21; it must be a whole number from 1 to 20"),
    (["--seed", "-1"], "--seed is -1"),
    *(
        (["--label", label], f"error: --label is {label}; it must be a whole number from 0 to 9")
        for label in ("-1", "10")
    ),
    *(
        (["--threshold", value], f"error: --threshold is {float(value)}; it must be a finite number above 0")
        for value in ("0", "-1", "nan", "inf")
    ),
    (["--snn-timesteps", "0"], "--snn-timesteps is 0"),
    (["--guidance", "nan"], "--guidance is nan"),
    (["--guidance", "-1"], "--guidance is -1.0"),
    (["--columns", "0"], "--columns is 0"),
    (["--magnify", "0"], "--magnify is 0"),
    (["--images", "many"], "invalid int value: 'many'"),
    (["--output", "out.jpg"], "--output is out.jpg; it must end in .png"),
    (["--output", "taken/out.png"], "error: --output is 'taken/out.png'"),
    (["--model", "nowhere"], "error: model is 'nowhere'"),
]


@pytest.mark.parametrize(("arguments", "message"), SAMPLE_ERRORS, ids=[" ".join(given) for given, _ in SAMPLE_ERRORS])
def test_errors_of_sampling(arguments, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    given = ["--model", models / "spiking", "--output", "out.png", "--images", "2", "--steps", "2", *arguments]
    assert message in stopped(capsys, "sample-spiking", *given)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("twin", ["--threshold", "0.9"], "error: --threshold is 0.9; this model, a SpikingUNet2DModel, has no neurons"),
        ("twin", ["--snn-timesteps", "8"], "error: --snn-timesteps is 8; the twin has no time steps"),
        ("converted", ["--snn-timesteps", "2"], "error: --snn-timesteps is 2; of a QuantizedUNet2DModel they cannot"),
        ("no classes", ["--label", "1"], "error: --label is 1; this model knows no classes"),
        ("no classes", ["--guidance", "2"], "error: --guidance is 2.0; this model knows no classes, so it must be 1"),
    ],
)
def test_options_that_a_model_does_not_know(model, arguments, message, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_pipeline", lambda _: pytest.fail("it began"))
    given = ["--model", models / model, "--output", tmp_path / "out.png", "--images", "1", "--steps", "2", *arguments]
    assert message in stopped(capsys, "sample-spiking", *given)


def test_qualities_are_printed_and_written(models, tmp_path, capsys):
    names = [str(models / name) for name in ("spiking", "twin", "no classes")]
    few = ["--images", "20", "--seeds", "0", "1", "--steps", "1", "2", "--output", str(tmp_path / "scores")]
    main(["evaluate-spiking", *names, *few])
    report = json.loads((tmp_path / "scores/scores.json").read_text())
    assert [(row["images"], row["steps"]) for row in report["rows"]] == [
        ("a fifth of the real images", ""),
        *((name, steps) for name in names for steps in (1, 2)),
        ("uniform noise", ""),
    ]
    assert 0 <= report["classifier_accuracy"] <= 1
    assert (report["data"], report["images"]) == ("digits", 20)
    for row in report["rows"]:
        assert row["distance"] == pytest.approx(sum(row["distances"]) / len(row["distances"]))
        assert (row["accuracy"] is None) == (row["images"] == names[2])
    assert [len(row["distances"]) for row in report["rows"]] == [1, *6 * [2], 1]
    assert all(len(set(row["distances"])) == len(row["distances"]) for row in report["rows"])  # seeds differ
    assert pixels(tmp_path / "scores/images.png").shape == (6 * (3 * 9 + 1), 6 * (20 * 9 + 1), 3)
    said = capsys.readouterr().out
    assert "real images" in said
    assert "no FID; written to" in said


def test_the_threshold_is_swept(models, tmp_path, capsys):
    few = ["--images", 20, "--seeds", 0, 1, "--thresholds", 0.9, 1.2, 0.9, "--output", tmp_path]
    run(models, "sweep-threshold", "spiking", *few)
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["threshold"] for row in report["rows"]] == [0.9, 1.0, 1.2]
    best = min(report["rows"], key=lambda row: row["distance"])["threshold"]
    held_out = report["held_out"]
    assert (held_out["trained"]["threshold"], held_out["picked"]["threshold"]) == (1.0, best)
    assert all(len(row["distances"]) == 1 for row in held_out.values())
    assert held_out["trained"]["distances"][0] not in report["rows"][1]["distances"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("  picked") == 1
    assert f"held-out seed, picked threshold {best:g}" in said


def test_seeds_share_no_images():
    assert evaluation.SEED_STRIDE > 100_000  # --images at most


ERRORS = [
    ("evaluate-spiking", "spiking", ["--images", "19"], "--images is 19; it must be from 20"),
    ("evaluate-spiking", "spiking", ["--steps", "5", "0"], "--steps is 0"),
    ("evaluate-spiking", "spiking", ["--seeds", "-1"], "--seeds is -1"),
    ("evaluate-spiking", "spiking", ["--seeds", str(2**60)], f"--seeds is {2**60}; it must be from 0"),
    ("evaluate-spiking", "spiking", ["--data", "letters"], "error: source is 'letters'; expected digits"),
    ("evaluate-spiking", "spiking", ["--output", "taken"], "error: --output is 'taken'"),
    ("evaluate-spiking", "colour", [], "error: data is 'digits', 1 channels and 10 classes; the model has 3 and 10"),
    ("evaluate-spiking", "nowhere", [], "nowhere'; expected"),
    ("sweep-threshold", "spiking", ["--thresholds", "1", "0"], "--thresholds holds 0; they must be above 0"),
    ("sweep-threshold", "spiking", ["--thresholds", "-1"], "--thresholds is -1.0"),
    ("sweep-threshold", "spiking", ["--thresholds", "nan"], "--thresholds is nan"),
    ("sweep-threshold", "spiking", ["--seeds", "3", "--held-out-seed", "3"], "--held-out-seed is 3; it must not be"),
    ("sweep-threshold", "spiking", ["--held-out-seed", str(2**60)], f"--held-out-seed is {2**60}"),
    ("sweep-threshold", "twin", [], "twin', which has no spiking neurons"),
    ("sweep-threshold", "quantized", [], "quantized', which has no spiking neurons"),
    ("sweep-threshold", "converted", [], "converted', which has no spiking neurons"),
    ("convert-spiking", "spiking", ["--output", "new"], "a SpikingUNet2DModel; a QuantizedUNet2DModel can be"),
    ("convert-spiking", "converted", ["--output", "new"], "error: ann spikes for 3 steps already"),
    ("convert-spiking", "quantized", ["--output", "new", "--tune", "-1"], "--tune is -1"),
    ("convert-spiking", "quantized", ["--output", "new", "--learning-rate", "2"], "--learning-rate is 2.0"),
    ("convert-spiking", "quantized", ["--output", "full"], "--output is full, a folder of other files"),
]


@pytest.mark.parametrize(
    ("command", "model", "arguments", "message"),
    ERRORS,
    ids=[" ".join([command, model, *given]) for command, model, given, _ in ERRORS],
)
def test_errors_of_the_other_commands(command, model, arguments, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("kept")
    assert message in stopped(capsys, command, models / model, *arguments)
    assert (tmp_path / "full/mine.txt").read_text() == "kept"


def test_models_of_different_sizes_are_not_compared(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "Judge", lambda data: pytest.fail("trained"))
    said = stopped(capsys, "evaluate-spiking", models / "spiking", models / "large", "--output", tmp_path)
    assert f"model is '{models / 'large'}', of images of side 12" in said


@pytest.mark.parametrize("options", [[], ["--tune", "2"], ["--tune", "2", "--signed"]], ids=" ".join)
def test_a_quantized_model_becomes_a_spiking_one(options, models, tmp_path, monkeypatch, capsys):
    images = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8)
    few = LabelledImages(images, torch.arange(30) % 10, tuple("0123456789"))
    monkeypatch.setattr(evaluation, "load", lambda *_: few)
    output = tmp_path / "converted"
    for _ in range(2):  # a pipeline that is there is replaced
        run(models, "convert-spiking", "quantized", "--output", output, *options)
    said = capsys.readouterr().out
    assert said.count("converted: relative squared error of the prediction") == 2
    assert ("tuned: relative squared error" in said) == bool(options)
    assert ("read_out" in said) == bool(options)
    unet = SpikingDiffusionPipeline.from_pretrained(output).unet
    assert (unet.config.snn_timesteps, unet.config.signed) == (3, "--signed" in options)
    saved = QuantizedUNet2DModel.from_pretrained(models / "quantized/unet", low_cpu_mem_usage=False)
    same = torch.equal(unet.mid_blocks[0].conv1.weight, saved.mid_blocks[0].conv1.weight)
    assert same == (not options)


def test_a_converted_model_draws(models, tmp_path):
    drawn = draw(models, tmp_path / "out.png", "--images", 2, model="converted")
    assert drawn.shape == (10, 19, 3)
