"""`python -m generation render`: videos and pictures, going on, sharing among processes, errors."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from generation import model_folders
from generation.__main__ import main
from generation.radiance_field import render
from generation.radiance_field.camera_paths import camera_path
from generation.radiance_field.cameras import Cameras
from generation.radiance_field.pictures import colour_picture, depth_picture
from generation.radiance_field.renderer import Renderer
from generation.radiance_field.saved_renderer import load, save
from generation.radiance_field.shipped_fields import SHIPPED
from tests.generation.test_radiance_field_renderer import renderer, scene

FRAMES = 5
NAMES = ("colour", "depth", "expert")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save(renderer(), folder, scene())
    return str(folder)


def fly(model: str, output: Path, *arguments: str) -> None:
    main(["render", model, "--output", str(output), "--frames", str(FRAMES), "--size", "24x16", *arguments])


def video(path: Path) -> np.ndarray:
    """uint8 `[T, H, W, 3]`."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return np.stack(frames)


def said(capsys, *arguments: str) -> str:
    """What the command says before it stops, without line breaks."""
    with pytest.raises(SystemExit) as stop:
        main(["render", *arguments])
    captured = capsys.readouterr()
    code = stop.value.code if isinstance(stop.value.code, str) else ""
    return " ".join(f"{captured.out} {captured.err} {code}".split())


@pytest.mark.parametrize("path", ["orbit", "spiral", "views"])
def test_a_flight(path, model, tmp_path, capsys):
    output = tmp_path / "new" / "fly.mp4"
    fly(model, output, "--path", path, "--rate", "12", "--memory", "1")
    videos = {name: output if name == "colour" else output.with_stem(f"fly-{name}") for name in NAMES}
    assert f"written to {', '.join(map(str, videos.values()))}; pictures: {tmp_path / 'new' / 'fly'}" in (
        capsys.readouterr().out
    )
    assert {entry.name for entry in output.parent.iterdir()} == {"fly", *(path.name for path in videos.values())}
    pictures = {path.name for path in (tmp_path / "new" / "fly").iterdir()}
    assert pictures == {"settings.json"} | {f"{name}-{i:04d}.png" for name in NAMES for i in range(FRAMES)}
    for name, file in videos.items():
        frames = video(file)
        assert frames.shape == (FRAMES, 16, 24, 3)
        assert cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FPS) == 12
        for i, frame in enumerate(frames):
            picture = np.asarray(Image.open(tmp_path / "new" / "fly" / f"{name}-{i:04d}.png")).astype(int)
            assert picture.shape == (16, 24, 3)
            assert np.abs(picture.mean((0, 1)) - frame.mean((0, 1))).max() < 12  # compressed, channels in their order
    loaded, taken = load(Path(model))
    cameras = camera_path(path, FRAMES, taken, loaded.occupancy.box, 24, 16)
    wanted = colour_picture(loaded.draw_image(cameras, 3)).astype(int)
    found = np.asarray(Image.open(tmp_path / "new" / "fly" / "colour-0003.png")).astype(int)
    assert np.abs(found - wanted).max() <= 1
    assert found.std() > 5


def test_a_field_without_experts_has_no_video_of_them(tmp_path):
    save(renderer("single_grid"), tmp_path / "model", scene())
    fly(str(tmp_path / "model"), tmp_path / "fly.mp4", "--frames", "1")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "fly", "fly.mp4", "fly-depth.mp4"}
    assert video(tmp_path / "fly.mp4").shape == (1, 16, 24, 3)


@pytest.mark.parametrize("size", [(34, 18), (2, 2)])
def test_tiny_sizes(size, model, tmp_path):
    fly(model, tmp_path / "fly.mp4", "--frames", "2", "--size", "{}x{}".format(*size))
    with Image.open(tmp_path / "fly" / "colour-0001.png") as picture:
        assert picture.size == size
    assert video(tmp_path / "fly.mp4").shape == (2, *size[::-1], 3)


def test_default_size_is_that_of_the_pictures_enlarged(model, tmp_path):
    main(["render", model, "--output", str(tmp_path / "fly.mp4"), "--frames", "1"])
    assert video(tmp_path / "fly.mp4").shape == (1, 320, 320, 3)


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_a_flight_that_was_stopped_goes_on(model, tmp_path, monkeypatch, capsys):
    fly(model, tmp_path / "whole.mp4")
    draw, drawn = render.frames_of, []

    def stops(renderer, cameras, index, memory):
        if index == 2 and not drawn.count(2):
            drawn.append(index)
            raise KeyboardInterrupt
        drawn.append(index)
        return draw(renderer, cameras, index, memory)

    monkeypatch.setattr(render, "frames_of", stops)
    with pytest.raises(SystemExit) as stop:
        fly(model, tmp_path / "fly.mp4")
    assert stop.value.code == 130
    before = modified(tmp_path / "fly")
    assert sorted(before) == sorted(f"{name}-{i:04d}.png" for name in NAMES for i in (0, 1))
    assert not (tmp_path / "fly.mp4").exists()
    (tmp_path / "fly" / "colour-0001.png").unlink()  # as if it had stopped between the pictures of a frame
    (tmp_path / "fly" / ".partial-x.png").write_bytes(b"")  # as if it had been killed
    drawn.clear()
    drawn.append(2)
    fly(model, tmp_path / "fly.mp4")
    assert drawn == [2, 1, 2, 3, 4]
    after = modified(tmp_path / "fly")
    assert all(after[name] == before[name] for name in before if name.endswith("0000.png"))
    assert (video(tmp_path / "fly.mp4") == video(tmp_path / "whole.mp4")).all()
    drawn.clear()
    fly(model, tmp_path / "fly.mp4", "--rate", "5", "--memory", "7")  # of the videos alone
    assert drawn == []
    assert modified(tmp_path / "fly") == after
    assert cv2.VideoCapture(str(tmp_path / "fly.mp4")).get(cv2.CAP_PROP_FPS) == 5


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def smaller(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", [damaged, smaller, Path.unlink, lambda path: path.write_bytes(b"")], ids=[
    "damaged", "of another size", "missing", "empty"
])  # fmt: skip
def test_frames_with_a_bad_picture_are_drawn_again(harm, name, model, tmp_path):
    fly(model, tmp_path / "fly.mp4")
    whole, before = (
        {name: video(tmp_path / f"fly{'' if name == 'colour' else '-' + name}.mp4") for name in NAMES},
        {path.name: path.read_bytes() for path in (tmp_path / "fly").glob("*.png")},
    )
    harm(tmp_path / "fly" / f"{name}-0002.png")
    fly(model, tmp_path / "fly.mp4")
    assert {path.name: path.read_bytes() for path in (tmp_path / "fly").glob("*.png")} == before
    for name, frames in whole.items():
        assert (video(tmp_path / f"fly{'' if name == 'colour' else '-' + name}.mp4") == frames).all()


def test_many_frames_are_in_their_order(model, tmp_path, monkeypatch):
    """Beyond ten thousand, whose numbers are longer; they are written as if drawn, but the first and last."""
    count, order = 10_002, []
    grey = Image.new("RGB", (2, 2))
    grey.save(tmp_path / "grey.png")
    monkeypatch.setattr(render, "is_drawn", lambda frame, size: True)
    monkeypatch.setattr(render, "write_video", lambda path, frames, rate: order.append([f.name for f in frames]))
    fly(model, tmp_path / "fly.mp4", "--frames", str(count), "--size", "2x2")
    numbers = [[int(name.split("-")[1].removesuffix(".png")) for name in names] for names in order]
    assert numbers == [list(range(count))] * 3


def test_on_a_device(model, tmp_path, monkeypatch, capsys):
    fly(model, tmp_path / "fly.mp4", "--frames", "1", "--device", "cpu")
    moved = []
    with monkeypatch.context() as patched:
        patched.setattr(render, "device_of", lambda options: torch.device("meta"))
        for kind in (Renderer, Cameras):
            patched.setattr(kind, "to", lambda self, target: moved.append((type(self), target)) or self)
        fly(model, tmp_path / "other.mp4", "--frames", "1")
    assert [(kind, target) for kind, target in moved if target == torch.device("meta")] == [
        (Renderer, torch.device("meta")), (Cameras, torch.device("meta"))
    ]  # fmt: skip
    message = said(capsys, model, "--output", str(tmp_path / "third.mp4"), "--device", "gpu")
    assert "error: --device is 'gpu'; valid here are cpu" in message


@pytest.mark.parametrize("name", ["fly.mp4", "fly-depth.mp4"])
def test_videos_of_others_are_left(name, model, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"mine")
    message = said(capsys, model, "--output", str(tmp_path / "fly.mp4"), "--frames", "1", "--size", "24x16")
    assert f"error: --output: '{tmp_path / name}' is there already, not of the frames in" in message
    assert "remove it, or name another output" in message
    assert (tmp_path / name).read_bytes() == b"mine"
    assert not (tmp_path / "fly").exists() or not list((tmp_path / "fly").iterdir())


def test_colours_of_depths_are_those_of_the_box(model):
    """From the nearest to the farthest point of a ball about the box, but no nearer than `near`."""
    loaded, taken = load(Path(model))
    cameras = camera_path("orbit", 4, taken, loaded.box, 24, 16)
    drawn = loaded.draw_image(cameras, 1, memory=1 << 22)
    centre, corner = loaded.box.mean(0), (loaded.box[1] - loaded.box[0]).norm() / 2
    middle = (cameras.c2w[1, :, 3] - centre).norm()
    nearest = max(0.5, float(middle - corner))
    wanted = depth_picture(drawn, nearest, float(middle + corner))
    found = render.frames_of(loaded, cameras, 1, 1 << 22)["depth"]
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, depth_picture(drawn, nearest, float(middle)))
    assert not np.array_equal(found, depth_picture(drawn, 2 * nearest, float(middle + corner)))


def test_processes_share_the_frames(model, tmp_path, monkeypatch, capsys):
    draw, drawn = render.frames_of, []
    monkeypatch.setattr(render, "frames_of", lambda r, c, index, m: drawn.append(index) or draw(r, c, index, m))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    fly(model, tmp_path / "fly.mp4")
    assert drawn == [1, 3]
    assert "3 frames are with other processes; the last one to end makes the videos" in capsys.readouterr().out
    assert not (tmp_path / "fly.mp4").exists()
    monkeypatch.setenv("RANK", "0")
    fly(model, tmp_path / "fly.mp4")
    assert drawn == [1, 3, 0, 2, 4]
    assert video(tmp_path / "fly.mp4").shape == (FRAMES, 16, 24, 3)


def test_processes_may_begin_at_once(tmp_path, monkeypatch):
    """Another one writes the settings after this one has looked for them, or is about to put them in place."""
    render.prepare_frames(tmp_path / "a", {"frames": 3})
    render.prepare_frames(tmp_path / "a", {"frames": 3})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".partial-1.json").write_text("{")
    render.prepare_frames(tmp_path / "b", {"frames": 3})
    assert json.loads((tmp_path / "b" / "settings.json").read_text()) == {"frames": 3}
    exists, seen = Path.exists, []

    def written_meanwhile(path):
        if path.name == "settings.json" and not seen:
            seen.append(path)
            path.write_text('{"frames": 3}')
            (path.parent / "colour-0000.png").write_bytes(b"")
        return exists(path)

    monkeypatch.setattr(Path, "exists", written_meanwhile)
    render.prepare_frames(tmp_path / "c", {"frames": 3})
    assert seen


@pytest.mark.parametrize("flag", [("--frames", "6"), ("--size", "24x18"), ("--path", "spiral")])
def test_frames_of_another_flight_are_not_mixed(flag, model, tmp_path, capsys):
    output = str(tmp_path / "fly.mp4")
    fly(model, tmp_path / "fly.mp4", "--frames", "1")
    before = modified(tmp_path / "fly")
    message = said(capsys, model, "--output", output, "--frames", "1", "--size", "24x16", *flag)
    name, value = flag[0][2:], {"6": 6, "24x18": [24, 18]}.get(flag[1], flag[1])
    before_and_now = {"frames": (1, 6), "size": ([24, 16], [24, 18]), "path": ("orbit", "spiral")}[name]
    assert value == before_and_now[1]
    which = "{} is {!r}, not {!r};".format(name, *before_and_now)
    assert f"error: --output: '{tmp_path / 'fly'}' holds frames of another flight, whose {which}" in message
    assert "remove it, or name another output" in message
    assert modified(tmp_path / "fly") == before


def test_frames_of_a_model_that_was_trained_anew_are_not_mixed(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    fly(str(tmp_path / "model"), tmp_path / "fly.mp4", "--frames", "1")
    other = renderer()
    torch.nn.init.ones_(other.field.base[0].bias)
    save(other, tmp_path / "model", scene())
    arguments = ["--output", str(tmp_path / "fly.mp4"), "--frames", "1", "--size", "24x16"]
    assert "holds frames of another flight, whose weights is '" in said(capsys, str(tmp_path / "model"), *arguments)


def test_a_folder_in_the_way(model, tmp_path, capsys):
    output = str(tmp_path / "fly.mp4")
    (tmp_path / "fly").mkdir()
    (tmp_path / "fly" / "notes.txt").write_text("mine")
    assert "is a folder with other files; name another output" in said(capsys, model, "--output", output)
    (tmp_path / "fly" / "settings.json").write_text("{")
    assert f"'{tmp_path / 'fly' / 'settings.json'}' is damaged" in said(capsys, model, "--output", output)
    shutil.rmtree(tmp_path / "fly")
    (tmp_path / "fly").write_text("mine")
    assert "there is a file of that name" in said(capsys, model, "--output", output)
    assert (tmp_path / "fly").read_text() == "mine"
    (tmp_path / "fly.mp4").mkdir()
    assert "that is a folder, and it must be a file" in said(capsys, model, "--output", output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames", "0"], "--frames is 0; it must be from 1 to 100000"),
        (["--rate", "0"], "--rate is 0; it must be from 1 to 240"),
        (["--memory", "0"], "--memory is 0; it must be from 1 to"),
        (["--path", "line"], "argument --path: invalid choice: 'line'"),
        (["--output", "fly.avi"], "--output is fly.avi; it must end in .mp4"),
        (["--size", "320"], "argument --size: '320'; it must be WIDTHxHEIGHT, even, from 2 to 16384 pixels each"),
        (["--size", "25x16"], "argument --size: '25x16'"),
        (["--size", "1x20"], "argument --size: '1x20'"),
        (["--size", "20x-3"], "argument --size: '20x-3'"),
        (["--size", "20x99999"], "argument --size: '20x99999'"),
    ],
)
def test_bad_options(arguments, words, model, capsys):
    assert words in said(capsys, model, *arguments)


def test_models_that_are_none(model, tmp_path, monkeypatch, capsys):
    output = ["--output", str(tmp_path / "out" / "fly.mp4")]
    monkeypatch.setattr(model_folders, "CHECKPOINTS", tmp_path / "shipped")
    assert f"error: model is '{tmp_path}'; expected a folder with config.json" in said(capsys, str(tmp_path), *output)
    assert "error: model is 'city'; expected a folder with config.json" in said(capsys, *output)
    assert not (tmp_path / "out").exists()
    for folder in SHIPPED.values():
        shutil.copytree(model, tmp_path / "shipped" / folder)
    assert "expected city or a folder with config.json" in said(capsys, "village", *output)
    assert "city, the folder of a training run or a renderer (default: city)" in said(capsys, "--help")
    shutil.copytree(model, tmp_path / "run" / "renderer")
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    for write, where in (
        (lambda: torch.save({"global_step": 480, "state_dict": {}}, checkpoint), " at step 480"),
        (lambda: checkpoint.write_text("x"), ""),
    ):
        write()
        message = said(capsys, str(tmp_path / "stopped"), *output)
        assert f"error: model is '{tmp_path / 'stopped'}'; this run was stopped{where} and left no" in message
        assert "--ckpt_path last" in message
    fly(str(tmp_path / "run"), tmp_path / "fly.mp4", "--frames", "1")
    assert (tmp_path / "fly.mp4").is_file()
