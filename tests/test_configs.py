"""Every YAML of the suite is a valid configuration of its command line, and its header says how to run it."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import timm
import yaml

import vision  # noqa: F401  registers the models

CONFIGS = Path(__file__).parents[1] / "configs"
COMPARISONS = sorted((CONFIGS / "vision").glob("compare_*.yaml"))
VISION = sorted({*(CONFIGS / "vision").glob("*.yaml")} - {*COMPARISONS})  # one training each
ABLATIONS = sorted((CONFIGS / "generation").glob("*_ablation.yaml"))
FIELDS = [
    CONFIGS / "generation" / name
    for name in (f"city_{about}.yaml" for about in ("comparison", "experts", "switch_nerf"))
]
GENERATION = sorted({*(CONFIGS / "generation").glob("*.yaml")} - {*ABLATIONS, *FIELDS})
MULTIMODAL = sorted((CONFIGS / "multimodal").glob("*.yaml"))
SIZES = ("tiny_patch16_224", "small_patch16_224", "base_patch16_224", "h_tiny", "h_small", "h_base")
# The models that the paper of Gated-SwinRMT compares, by their parameters with 100 and with 10 classes.
RETENTION = {
    "gated_swin_rmt_medium_swat": (77_396_564, 77_304_314),
    "gated_swin_rmt_medium_retention": (77_396_564, 77_304_314),
    "rmt_base": (77_125_076, 77_032_826),
}
# Data sets: module of the data, side of the images, batch.
RETENTION_DATA = {"mini_imagenet": ("ClassFolders", 224, 128), "cifar10": ("Cifar", 32, 512)}


def printed_configuration(path, capsys):
    """The whole configuration as `--print_config` shows it: parsed, typed and with every default."""
    main = import_module(f"{path.parent.name}.training").main
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def contains(whole, part):
    """Whether all of `part` is in `whole`, which may say more at every level."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part


def test_no_yaml_is_left_out():
    found = {*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.yml")}
    assert found == {*VISION, *COMPARISONS, *GENERATION, *ABLATIONS, *FIELDS, *MULTIMODAL}


@pytest.mark.parametrize("path", VISION, ids=lambda path: path.stem)
def test_vision_yaml_is_a_valid_configuration(path, capsys):
    settings = printed_configuration(path, capsys)
    written = yaml.safe_load(path.read_text())
    assert settings["model"].items() >= written["model"].items()
    assert settings["trainer"]["max_epochs"] == written["trainer"]["max_epochs"]
    assert settings["data"]["class_path"] == written["data"]["class_path"]


@pytest.mark.parametrize("path", GENERATION, ids=lambda path: path.stem)
def test_generation_yaml_is_a_valid_configuration(path, capsys):
    """Parsed whole, and model, data and callbacks are built of it."""
    settings = printed_configuration(path, capsys)
    written = yaml.safe_load(path.read_text())
    for part in (written["model"], written["data"], *written["trainer"].get("callbacks", [])):
        module, _, name = part["class_path"].rpartition(".")
        getattr(import_module(module), name)(**part["init_args"])
    assert settings["trainer"]["max_steps"] == written["trainer"]["max_steps"]
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python -m generation fit --config configs/generation/{path.name}" in header


@pytest.mark.parametrize("path", MULTIMODAL, ids=lambda path: path.stem)
def test_multimodal_yaml_is_a_valid_configuration(path, capsys):
    """Parsed whole; models are not built, for they start from what the run before left."""
    settings = printed_configuration(path, capsys)
    written = yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        assert settings[part]["class_path"] == written[part]["class_path"]
        assert contains(settings[part]["init_args"], written[part]["init_args"])
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python -m multimodal fit --config configs/multimodal/{path.name}" in header


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_yaml_builds_every_variant(path):
    from generation.lina.ablation import Ablation, build

    ablation = Ablation(**yaml.safe_load(path.read_text()))
    parameters = {}
    for variant in ablation.variants:
        module, _ = build(ablation, variant, seed=0)
        parameters[variant] = sum(parameter.numel() for parameter in module.transformer.parameters())
    assert len(set(parameters.values())) > 3
    assert f"python -m generation ablation --config configs/generation/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: path.stem)
def test_comparison_of_fields_builds_every_variant(path):
    from generation.radiance_field.comparison import Comparison
    from generation.radiance_field.training import RadianceFieldTraining

    comparison = Comparison(**yaml.safe_load(path.read_text()))
    for variant in comparison.variants.values():
        RadianceFieldTraining(**comparison.model | variant)
    assert f"python -m generation compare-fields --config configs/generation/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", [*VISION, *COMPARISONS], ids=lambda path: path.stem)
def test_header_holds_the_command_and_a_percentage(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    command = "compare" if path in COMPARISONS else "fit"
    assert f"python -m vision {command} --config configs/vision/{path.name}" in header
    assert "%" in header


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_run_of_a_comparison_is_valid(path, tmp_path, monkeypatch):
    """All that each `fit` builds is built; no training begins."""
    from vision import compare

    class Checked(Exception):
        pass

    def first_training(run):
        raise Checked

    monkeypatch.setattr(compare, "train", first_training)
    with pytest.raises(Checked):
        compare.main(["--config", str(path), "--runs", str(tmp_path)])


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_header_of_a_comparison_holds_what_was_measured(path):
    """Of every model on every dataset the mean and the spread."""
    text = path.read_text()
    settings = yaml.safe_load(text)
    header = [line for line in text.splitlines() if line.startswith("#")]
    for model in settings["models"]:
        [row] = [line for line in header if re.match(rf"#   {model}\s", line)]
        assert len(re.findall(r"\d\d\.\d\d % \+- \d\.\d\d", row)) == len(settings["datasets"])


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_its_recipe(size):
    settings = yaml.safe_load((CONFIGS / "vision" / f"vig_{size}_imagenet.yaml").read_text())
    assert settings["model"]["model"] == f"vig_{size}"
    assert settings["data"]["init_args"]["batch_size"] == 1024
    assert settings["trainer"]["precision"] == ("16-mixed" if size.startswith("h_") else "32-true")


@pytest.mark.parametrize("data", RETENTION_DATA)
@pytest.mark.parametrize("model", RETENTION)
def test_retention_recipe(model, data):
    path = CONFIGS / "vision" / f"{model}_{data}.yaml"
    settings = yaml.safe_load(path.read_text())
    kind, image_size, batch_size = RETENTION_DATA[data]
    assert settings["model"].pop("model") == model
    assert settings["model"]["learning_rate"] == 5e-4 * batch_size / 512
    assert settings["data"]["class_path"].endswith(f".{kind}")
    given = settings["data"]["init_args"]
    assert (given["image_size"], given["batch_size"]) == (image_size, batch_size)
    assert ("crop_padding" in given["augmentation"]) == (image_size <= 32)
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Proposed protocol: the paper's is not public" in header
    assert "Not trained by this project" in header

    arguments = settings["model"].pop("model_args")
    classes = {"mini_imagenet": 100, "cifar10": 10}[data]
    network = timm.create_model(model, num_classes=classes, device="meta", **arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == RETENTION[model][classes == 10]
    assert f"{RETENTION[model][0] / 1e6:.1f} M parameters" in header
    other = yaml.safe_load((CONFIGS / "vision" / f"rmt_base_{data}.yaml").read_text())
    assert other["model"].pop("model_args")["drop_path_rate"] == arguments["drop_path_rate"]
    other["model"].pop("model")
    assert settings == other, "one protocol for all"


def test_unknown_key_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text((CONFIGS / "vision" / "vig_nano_digits.yaml").read_text().replace("weight_decay", "weigth_decay"))
    from vision.training import main

    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(broken), "--print_config"])
    assert stop.value.code != 0
    assert "weigth_decay" in capsys.readouterr().err
