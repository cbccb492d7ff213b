"""Every command and Python block of README.md and docs/ runs; README's models are counted, its map is complete."""

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from packaging.requirements import Requirement
from PIL import Image

import vision  # noqa: F401  registers the models
from tests.generation.written_scenes import photograph, write_nerfstudio
from vision.flops import count_macs
from vision.gated_swin_rmt import GatedSwinRMT

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    language: [text for page in PAGES for name, text in FENCED.findall(page) if name == language]
    for language in ("bash", "python")
}


def commands_of(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


INSTALLATION = {"python -m venv .venv '&&' . .venv/bin/activate", "pip install -c constraints.txt -e '.[dev]'"}
AS_IT_STANDS = ""
HELP = "--help"  # a measurement: only its options are checked
DRY_RUN = "--dry-run"
SETTINGS = "--print_config"  # needs data that nobody has here
ONE_EPOCH = (
    "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.limit_test_batches 1 "
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.max_epochs "
)
MNIST = "python -m vision {} --config configs/vision/vig_nano_mnist5k.yaml"
SHIPPED = "python -m vision predict --checkpoint vig_nano_patch4_28.mnist5k docs/seven.png"
SHIPPED_MODEL = '"vig_nano_patch4_28.mnist5k", pretrained=True'
ONE_BLOCK = '"vig_nano_patch4_28", in_chans=1, depth=1'
DRAW = "python -m generation sample {} --output {}"
LINA = "python -m generation fit --config configs/generation/{}.yaml"
LINA_ONE_STEP = (
    "--trainer.max_steps {} --trainer.enable_progress_bar false --trainer.enable_model_summary false "
    "--data.init_args.batch_size 2"
)
CITY = (
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.limit_val_batches 0 "
    "--data.init_args.batch_size 64 --data.init_args.rays_per_epoch 256 --trainer.max_steps "
)
ASK = "python -m multimodal answer {}"
ZOOM_FIT = "python -m multimodal fit --config configs/multimodal/{}.yaml"
OWN_SCENE = " --data.init_args.source my_scene"
CONVERT = "python -m generation convert-spiking runs/spiking_digits_quantized/0 --output "
# Each command, and what is put behind it so that it ends within seconds.
COMMANDS = {
    "make train": DRY_RUN,
    "make test": DRY_RUN,
    "make bench": DRY_RUN,
    "make demo": DRY_RUN,
    MNIST.format("fit"): ONE_EPOCH + "1",
    MNIST.format("fit") + " --ckpt_path last --trainer.max_epochs 40": ONE_EPOCH + "2",
    MNIST.format("validate") + " --ckpt_path runs/vig_nano_mnist5k/0/checkpoints/last.ckpt": AS_IT_STANDS,
    "python -m vision predict --checkpoint runs/vig_nano_mnist5k/0 docs/seven.png": AS_IT_STANDS,
    SHIPPED: AS_IT_STANDS,
    f"{SHIPPED} --output predictions.csv": AS_IT_STANDS,
    "python -m vision fit --data Mnist5k --model.model gated_swin_rmt_nano_retention --trainer.max_epochs 8 "
    "--experiment retention": ONE_EPOCH + "1",
    "python -m vision fit --config configs/vision/gated_swin_rmt_medium_swat_mini_imagenet.yaml "
    "--data.init_args.path data/mini_imagenet --data.init_args.counts '[480, 60, 60]'": SETTINGS,
    "python -m vision compare --config configs/vision/compare_retention.yaml": SETTINGS,
    "python -m vision explain docs/seven.png --model vig_nano_patch4_28.mnist5k --output explain.png": AS_IT_STANDS,
    "python -m vision fit --data ImageFolder --data.path pictures --data.image_size 56 "
    "--model.model_args.img_size 56 --trainer.max_epochs 30 --experiment pictures": "--data.batch_size 2 "
    + ONE_EPOCH
    + "1",
    "python -m vision fit --data Cifar --data.path data/cifar --data.classes 10 --model.model_args.img_size 32 "
    "--trainer.max_epochs 100 --experiment cifar10": SETTINGS,
    "python -m vision fit --config configs/vision/vig_tiny_patch16_224_imagenet.yaml "
    "--data.init_args.path data/imagenet --trainer.devices 8 --trainer.strategy ddp": SETTINGS,
    shlex.join(
        [
            "python",
            "-c",
            "import vision, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
            *["pytorch-image-models/validate.py", "--model", "vig_tiny_patch16_224", "--data-dir", "data/imagenet"],
        ]
    ): AS_IT_STANDS,
    DRAW.format("'a red circle above a blue square'", "out.png --seed 7 --images 4"): AS_IT_STANDS,
    DRAW.format("'a green triangle at the top left'", "out.png --animation steps.gif"): AS_IT_STANDS,
    DRAW.format("--prompts captions.txt", "drawn --images 2"): AS_IT_STANDS,
    "torchrun --nproc-per-node 2 -m generation sample --prompts captions.txt --output drawn": AS_IT_STANDS,
    DRAW.format("'red apple'", "out.png --model openmoji"): AS_IT_STANDS,
    LINA.format("lina_openmoji"): LINA_ONE_STEP.format(1) + " --trainer.limit_val_batches 0",
    "python -m generation evaluate-openmoji openmoji": HELP,
    LINA.format("lina_shapes_smoke"): LINA_ONE_STEP.format(1),
    LINA.format("lina_shapes"): LINA_ONE_STEP.format(1),
    LINA.format("lina_shapes") + " --ckpt_path last": LINA_ONE_STEP.format(2),
    "python -m generation evaluate shapes --prompts 500 --guidance 1 3 --steps 16 8 4": HELP,
    "python -m generation ablation --config configs/generation/lina_ablation.yaml": HELP,
    "python -m generation.lina.autoencoder_training --output runs/lina_autoencoder": HELP,
    "python -m generation sample-spiking --label 7 --images 64 --output grid.png": "--images 4 --steps 3",
    "python -m generation sample-spiking --images 20 --threshold 1.03 --energy --output grid.png": "--steps 3",
    LINA.format("spiking_digits"): LINA_ONE_STEP.format(1),
    LINA.format("spiking_digits") + " --ckpt_path last": LINA_ONE_STEP.format(2),
    LINA.format("spiking_digits_ann"): LINA_ONE_STEP.format(1),
    LINA.format("spiking_digits_tsm"): LINA_ONE_STEP.format(1),
    LINA.format("spiking_digits_quantized"): LINA_ONE_STEP.format(1),
    LINA.format("spiking_openmoji"): LINA_ONE_STEP.format(1),
    "python -m generation evaluate-spiking digits runs/spiking_digits_tsm/0": HELP,
    LINA.format("spiking_openmoji_ann"): LINA_ONE_STEP.format(1),
    "python -m generation evaluate-spiking runs/spiking_openmoji/0 runs/spiking_openmoji_ann/0 --data openmoji "
    "--steps 10 25": HELP,
    LINA.format("spiking_digits") + " --data.init_args.source pictures/train --data.init_args.image_size 16 "
    "--model.init_args.unet.sample_size 16 --model.init_args.unet.in_channels 3 "
    "--model.init_args.unet.num_class_embeds 2": LINA_ONE_STEP.format(1),
    CONVERT + "runs/converted": AS_IT_STANDS,
    CONVERT.replace("--output", "--tune 300 --output") + "runs/tuned": "--tune 1",
    "python -m generation evaluate-spiking runs/spiking_digits_quantized/0 runs/converted runs/tuned --seeds 0": HELP,
    "python -m generation evaluate-spiking digits digits-ann --steps 10 25 50": HELP,
    "python -m generation sweep-threshold digits": HELP,
    "python -m generation energy digits --twin digits-ann": "--images 1 --steps 2",
    "python -m generation benchmark spiking": HELP,
    "python -m generation render city --path orbit --output fly.mp4": "--frames 2 --size 32x32",
    LINA.format("city_hmohe"): CITY + "1",
    LINA.format("city_hmohe") + " --ckpt_path last": CITY + "2",
    LINA.format("city_single_grid"): CITY + "1",
    LINA.format("city_proposal"): CITY + "1",
    ASK.format("scene:7 'What is the code at red?' --show zoom.png"): AS_IT_STANDS,
    ASK.format("photo.jpg 'What does the sign say?' --model Qwen/Qwen2.5-VL-7B-Instruct --heads my_heads"): HELP,
    "python -m multimodal evaluate": "--scenes 5",
    "python -m multimodal benchmark": HELP,
    **{ZOOM_FIT.format(f"tiny_{name}"): SETTINGS for name in ("vision", "where", "reader", "stage1", "stage3")},
    LINA.format("own_scene") + OWN_SCENE: CITY + "1",
    LINA.format("own_scene").replace(" fit ", " validate ") + OWN_SCENE + " --ckpt_path last": (
        "--data.init_args.validated 1 --trainer.enable_progress_bar false"
    ),
    "python -m generation render runs/own_scene/0 --path views --output mine.mp4": "--frames 2 --size 32x24",
    "python -m generation render runs/city_hmohe/0 --path spiral --size 160x120 --frames 12 --output spiral.mp4": (
        "--frames 2 --size 32x24"
    ),
    "torchrun --nproc-per-node 2 -m generation render city --frames 8 --size 64x64 --output shared.mp4": AS_IT_STANDS,
    "python -m generation compare-fields --config configs/generation/city_comparison.yaml": HELP,
    "python -m generation compare-fields --config configs/generation/city_experts.yaml": HELP,
    "python -m generation compare-fields --config configs/generation/city_switch_nerf.yaml": HELP,
    "python -m generation benchmark radiance-field": HELP,
    "python -m kernels.benchmark --threads 1 2": HELP,
    "python -m vision benchmark --only models": HELP,
    "python -m vision benchmark --only inference training memory --largest 1024": HELP,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the commands find around them: the repository's configurations and pictures, and a user's own files."""
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for part, name in ((part, name) for part in ("train", "val") for name in ("cats", "dogs")):
        (tmp_path / "pictures" / part / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (60, 70), (i * 90, len(name) * 20, 120)).save(tmp_path / f"pictures/{part}/{name}/{i}.png")
    # timm's scripts are not in its package; what they do first is to look the model up.
    (tmp_path / "pytorch-image-models").mkdir()
    (tmp_path / "pytorch-image-models" / "validate.py").write_text(
        "import argparse, timm\n"
        "parser = argparse.ArgumentParser()\n"
        "for flag in ('--model', '--data-dir'):\n"
        "    parser.add_argument(flag, required=True)\n"
        "assert __name__ == '__main__'\n"
        "timm.create_model(parser.parse_args().model)\n"
    )
    write_nerfstudio(photograph(count=4), tmp_path / "my_scene")
    (tmp_path / "captions.txt").write_text("a red circle\na blue square at the center\n")
    authors = timm.create_model("vig_tiny_patch16_224")
    torch.save({"model": authors.state_dict()}, tmp_path / "vig_t_77p2acc.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch) -> None:
    """Run a command of the README; python ones in this process, whose imports are done."""
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run([program, "-C", ROOT, *arguments], check=True, stdout=subprocess.DEVNULL)
        return
    if program == "torchrun":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], check=True, env=environment)
        return
    assert program == "python"
    kind, what, *arguments = arguments
    monkeypatch.setattr(sys, "argv", [kind, *arguments])
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "README.md", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{command} ended with {end.code}") from end


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize("block", BLOCKS["bash"], ids=lambda block: commands_of(block)[0])
def test_shell_block(block, folder, monkeypatch, capfd):
    for command in commands_of(block):
        if command in INSTALLATION:
            continue
        assert command in COMMANDS, "say in COMMANDS how this new command of the README is tested"
        appended = COMMANDS[command]
        run(f"{command} {appended}", monkeypatch)
        printed = capfd.readouterr().out
        if appended == HELP:
            assert set(re.findall(r"--[\w-]+", command)) <= set(re.findall(r"--[\w-]+", printed))
        elif command == SHIPPED:
            assert re.search(r"seven\.png\n\s+[\d.]+%  7\n", printed)


def test_every_listed_command_stands_in_the_readme():
    found = {command for block in BLOCKS["bash"] for command in commands_of(block)}
    assert found == COMMANDS.keys() | INSTALLATION


def test_installation_names_what_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "dev" in project["optional-dependencies"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {Requirement(line).name for line in lines}
    wanted = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    direct = {requirement.name for requirement in wanted if not requirement.extras}
    assert len(pinned & direct) > 10


def test_make_train_runs_the_command_beside_it():
    dry = subprocess.run(["make", "-C", ROOT, "--dry-run", "train"], check=True, capture_output=True, text=True).stdout
    assert MNIST.format("fit").removeprefix("python ") in dry


@pytest.mark.parametrize("block", BLOCKS["python"], ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_block(block, folder):
    if "torch.onnx.export" in block:
        assert SHIPPED_MODEL in block
        block = block.replace(SHIPPED_MODEL, ONE_BLOCK)  # a graph of five blocks takes half a minute to write
    exec(compile(block, "page", "exec"), {"__name__": "__main__"})


def between(marker: str) -> str:
    return README.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0]


def rows_of(table: str) -> list[list[str]]:
    lines = between(table).strip().splitlines()[2:]
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]


ROWS = rows_of("models")
RETENTION_ROWS = [
    [row[0].replace("*", mixer), *row[1:]]
    for row in rows_of("retention models")
    for mixer in (("retention", "swat") if "*" in row[0] else ("",))
]


@pytest.mark.parametrize("row", [*ROWS, *RETENTION_ROWS], ids=lambda row: row[0])
def test_row_of_a_table_of_models(row):
    name, parameters, dense, total, _ = row
    model = timm.create_model(name, num_classes=1000, device="meta")
    macs = count_macs(model, (3, 224, 224))
    assert parameters == f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    assert (dense, total) == (f"{macs.dense / 1e9:.2f}", f"{macs.total / 1e9:.2f}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_accuracy_is_that_of_the_published_file(row):
    published = timm.get_pretrained_cfg(row[0]).url  # the authors' file names say their accuracy
    assert row[-1].removesuffix(" %").replace(".", "p") in published


def test_tables_hold_every_size():
    assert {row[0] for row in ROWS} == {name.split(".")[0] for name in timm.list_pretrained("vig_*.in1k")}
    assert {row[0] for row in RETENTION_ROWS} == set(timm.list_models(["rmt_*", "gated_swin_rmt_*"]))


def test_every_flag_of_gated_swin_rmt_is_told():
    table = README.split("re-implemented from the abstract")[1].split("\n\n")[1]
    told = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    flags = {*inspect.signature(GatedSwinRMT).parameters, "layerscales", "downsample"}
    assert told == flags - {"mixer", "embed_dims", "num_heads", "device", "dtype", "backbone"}


def test_size_of_the_nano_model():
    [stated] = re.findall(r"`vig_nano_patch4_28`.*?: ([\d,]+) parameters with one channel and ten classes", README)
    model = timm.create_model("vig_nano_patch4_28", in_chans=1, num_classes=10)
    assert stated == f"{sum(parameter.numel() for parameter in model.parameters()):,}"


def mapped_files() -> set[str]:
    """Paths that the README's tree names; a line names one file or several, indented under its folder."""
    paths, folders = set(), [""]
    for line in between("map").strip().strip("`").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*(\S+(?:  ?[\w.]+\.(?:py|cpp|h)\b)*)", line)
        if not names:
            continue
        for name in names[1].split():
            path = "".join(folders[: depth + 1]) + name
            if name.endswith("/"):
                folders[depth + 1 :] = [name]
            paths.add(path)
    return paths


def test_map_names_every_file_and_nothing_else():
    mapped = mapped_files()
    assert [path for path in mapped if not (ROOT / path).exists()] == []
    rooms = ("kernels", "training_runs", "vision", "generation", "multimodal", "demos")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    missing = {str(path.relative_to(ROOT)) for path in sources if path.name != "__init__.py"} - mapped
    assert missing == set()


def test_links_to_files_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page.parent / link) for page in pages for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    assert [link for link in links if "http" not in str(link) and not link.exists()] == []
