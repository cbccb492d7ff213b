"""Every YAML of the suite is a valid configuration of its command line, and its header says how to run it."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
VISION = sorted((CONFIGS / "vision").glob("*.yaml"))
SIZES = ("tiny_patch16_224", "small_patch16_224", "base_patch16_224", "h_tiny", "h_small", "h_base")


def printed_configuration(path, capsys):
    """The whole configuration as `--print_config` shows it: parsed, typed and with every default."""
    from vision.training import main

    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def test_no_yaml_is_left_out():
    assert {*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.yml")} == {*VISION}


@pytest.mark.parametrize("path", VISION, ids=lambda path: path.stem)
def test_vision_yaml_is_a_valid_configuration(path, capsys):
    settings = printed_configuration(path, capsys)
    written = yaml.safe_load(path.read_text())
    assert settings["model"].items() >= written["model"].items()
    assert settings["trainer"]["max_epochs"] == written["trainer"]["max_epochs"]
    assert settings["data"]["class_path"] == written["data"]["class_path"]


@pytest.mark.parametrize("path", VISION, ids=lambda path: path.stem)
def test_header_holds_the_command_and_a_percentage(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python -m vision fit --config configs/vision/{path.name}" in header
    assert "%" in header


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_its_recipe(size):
    settings = yaml.safe_load((CONFIGS / "vision" / f"vig_{size}_imagenet.yaml").read_text())
    assert settings["model"]["model"] == f"vig_{size}"
    assert settings["data"]["init_args"]["batch_size"] == 1024
    assert settings["trainer"]["precision"] == ("16-mixed" if size.startswith("h_") else "32-true")


def test_unknown_key_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text((CONFIGS / "vision" / "vig_nano_digits.yaml").read_text().replace("weight_decay", "weigth_decay"))
    from vision.training import main

    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(broken), "--print_config"])
    assert stop.value.code != 0
    assert "weigth_decay" in capsys.readouterr().err
