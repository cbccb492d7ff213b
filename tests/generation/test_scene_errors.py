"""What is wrong with a scene's files is named: poses, sizes, missing and broken pictures, cut files, pickles."""

import json

import numpy as np
import pytest
import torch

from generation.radiance_field.scene_data import load_scene
from tests.generation.written_scenes import (
    CITY,
    HEIGHT,
    WIDTH,
    WRITERS,
    photograph,
    save_picture,
    write_colmap,
    write_mega_nerf,
    write_nerfstudio,
)


@pytest.fixture(scope="module")
def taken():
    return photograph()


def edit_json(folder, change):
    path = folder / "transforms.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def first_pose(change):
    def applied(data):
        pose = np.array(data["frames"][-1]["transform_matrix"])  # of images/000.png
        change(pose)
        data["frames"][-1]["transform_matrix"] = pose.tolist()

    return applied


def mirror(pose):
    pose[:3, 0] *= -1


def set_key(key, value):
    return lambda data: data.update({key: value})


def drop(*keys):
    return lambda data: [data.pop(key) for key in keys]


BAD_JSON = {
    "nan": (first_pose(lambda pose: pose.__setitem__((0, 0), np.nan)), "pose of frame 'images/000.png' holds NaN"),
    "not-orthonormal": (first_pose(lambda pose: pose.__imul__(1.5)), "frame 'images/000.png' is not orthonormal"),
    "left-handed": (first_pose(mirror), "frame 'images/000.png' is left-handed"),
    "no-frames": (set_key("frames", []), "transforms.json' has no frames"),
    "no-frame-list": (drop("frames"), "transforms.json' has no frames"),
    "no-path": (lambda data: data["frames"][3].pop("file_path"), "frame 3 has no 'file_path'"),
    "no-pose": (lambda data: data["frames"][0].pop("transform_matrix"), "'images/009.png' has no 'transform_matrix'"),
    "small-pose": (
        lambda data: data["frames"][0].update(transform_matrix=[[1, 2], [3, 4]]),
        r"'images/009.png': transform_matrix has shape \(2, 2\)",
    ),
    "words-in-pose": (
        lambda data: data["frames"][0].update(transform_matrix=[["a"] * 4] * 4),
        "transform_matrix is no matrix of numbers",
    ),
    "other-size": (set_key("w", 48), "000.png' is 24 x 18 pixels; its camera says 48 x 18"),
    "no-focal-length": (drop("fl_x"), "there is neither fl_x nor camera_angle_x"),
    "no-number": (set_key("cx", "middle"), "cx is 'middle'; it must be a finite number"),
    "fisheye": (set_key("camera_model", "OPENCV_FISHEYE"), "camera_model is 'OPENCV_FISHEYE'; valid are OPENCV"),
    "k4": (set_key("k4", 0.1), "k4 is 0.1; valid is 0"),
    "orientation": (set_key("orientation_override", "pca"), "orientation_override is 'pca'; valid are 'up', 'none'"),
    "unknown-split-frame": (set_key("train_filenames", ["x.png"]), "train_filenames has 'x.png', which no frame has"),
    "no-training": (set_key("train_filenames", []), "has no training frame"),
    "missing-mask": (
        lambda data: data["frames"][0].update(mask_path="m.png"),
        "1 of 10 mask files are missing: .*m.png",
    ),
    "missing-image": (
        lambda data: data["frames"][0].update(file_path="images/gone.png"),
        "1 of 10 image files are missing: .*gone.png",
    ),
    "missing-image-without-suffix": (
        lambda data: data["frames"][0].update(file_path="images/gone"),
        "frame 'images/gone' has no suffix, and there is neither that file nor, with .png added, .*gone.png",
    ),
    "same-frame-twice": (
        lambda data: data["frames"][0].update(file_path="images/008.png"),
        "frame 'images/008.png' is listed twice",
    ),
    "one-pose-for-all": (
        lambda data: [frame.update(transform_matrix=data["frames"][0]["transform_matrix"]) for frame in data["frames"]],
        "all 10 frames have one and the same pose",
    ),
    "principal-point-far-outside": (set_key("cx", 80.0), r"principal point .*'images/000.png' is \(80, 9.6\)"),
    "principal-point-above": (set_key("cy", -30.0), r"is \(11.3, -30\) pixels in a picture of 24 x 18"),
    "angle-too-wide": (
        lambda data: [data.pop("fl_x"), data.update(camera_angle_x=4.0)],
        "camera_angle_x is 4.0; it must be above 0 and below pi",
    ),
    "angle-of-nothing": (
        lambda data: [data.pop("fl_x"), data.update(camera_angle_x=1.0, camera_angle_y=0.0)],
        "camera_angle_y is 0.0; it must be above 0 and below pi",
    ),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_transforms_are_named(taken, tmp_path, case):
    change, message = BAD_JSON[case]
    write_nerfstudio(taken, tmp_path)
    edit_json(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_scene(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"frames": 3}'], ids=["cut-short", "list", "frames-are-a-number"])
def test_no_transforms_at_all(tmp_path, text):
    (tmp_path / "transforms.json").write_text(text)
    with pytest.raises(ValueError, match=r"transforms\.json"):
        load_scene(tmp_path)


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("damage", ["missing", "cut-short", "no-picture"])
def test_pictures_that_are_missing_or_broken_are_named(taken, tmp_path, source, damage):
    WRITERS[source](taken, tmp_path)
    picture = sorted(tmp_path.rglob("*.png"))[4]
    content = picture.read_bytes()
    picture.unlink()
    if damage != "missing":
        picture.write_bytes(content[: len(content) // 2] if damage == "cut-short" else b"no picture at all")
    with pytest.raises(ValueError, match=picture.stem):
        load_scene(tmp_path)


def test_sizes_that_differ_load_lazily_only(taken, tmp_path):
    data = write_nerfstudio(taken, tmp_path, shared=False)
    save_picture(taken.images[2][:10, :12], tmp_path / "images" / "002.png")
    data["frames"][7] |= {"w": 12, "h": 10}
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"'images/002.png' 12 x 10; .* lazy=True"):
        load_scene(tmp_path)
    scene = load_scene(tmp_path, lazy=True)
    assert [tuple(scene.images[i].shape) for i in (1, 2)] == [(HEIGHT, WIDTH, 3), (10, 12, 3)]
    assert scene.cameras.image_rays(2)[1].shape == (10, 12, 3)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.99, 1.1], ids=["empty", "third", "last-bytes", "too-long"])
def test_colmap_files_that_are_cut_short_are_named(taken, tmp_path, name, kept):
    path = write_colmap(taken, tmp_path) / name
    content = path.read_bytes()
    length = int(len(content) * kept)
    path.write_bytes(content[:length] if kept < 1 else content + b"more")
    with pytest.raises(ValueError, match=f"{name}' (is cut short|has {len(content) + 4} bytes)"):
        load_scene(tmp_path)


BAD_COLMAP = {
    "model": ("cameras.txt", "3 FOV 24 18 1 2 3 4 5\n", "camera 3 is of model FOV; valid are SIMPLE_PINHOLE, PINHOLE"),
    "parameters": ("cameras.txt", "3 PINHOLE 24 18 1 2\n", "has 2 parameters; PINHOLE has 4: fx fy cx cy"),
    "words": ("cameras.txt", "3 PINHOLE wide 18 1 2 3 4\n", "line 1 is .*expected: id model width height"),
    "other-camera": ("cameras.txt", "4 PINHOLE 24 18 1 2 3 4\n", r"is of camera 3; there are \[4\]"),
    "no-images": ("images.txt", "# none\n", "images.txt' has no images"),
    "short-line": ("images.txt", "1 1 0 0 0 0 0 0 3\n\n", "line 1 is .*expected: id qw qx"),
    "no-quaternion": ("images.txt", "1 0 0 0 0 0 0 0 3 a.png\n\n", "image 'a.png' has a quaternion of length 0"),
    "no-second-lines": (
        "images.txt",
        "1 1 0 0 0 0 0 0 3 a.png\n2 1 0 0 0 1 0 0 3 b.png\n",
        "line 2 .*'2 1 0 0 0 1 0 0 3 b.png'; it must hold the points of 'a.png', or be empty: .*two lines",
    ),
    "no-second-lines-and-spaces": (
        "images.txt",
        "1 1 0 0 0 0 0 0 3 a\n2 1 0 0 0 1 0 0 3 b 12 c.png\n",
        "line 2 .*must hold the points of 'a', or be empty",
    ),
    "image-twice": (
        "images.txt",
        "".join(f"{i} 1 0 0 0 {i} 0 0 3 photo {i // 2:02d}.png\n\n" for i in range(3)),
        "frame 'photo 00.png' is listed twice",
    ),
}


@pytest.mark.parametrize("case", BAD_COLMAP)
def test_bad_colmap_texts_are_named(taken, tmp_path, case):
    name, text, message = BAD_COLMAP[case]
    (write_colmap(taken, tmp_path, binary=False) / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_scene(tmp_path)


def test_what_is_no_binary_file_of_colmap_is_said(taken, tmp_path):
    """No advice to undistort what was never a camera."""
    (write_colmap(taken, tmp_path) / "cameras.bin").write_bytes(
        b"\x01" + bytes(7) + b"this is a text and no camera at all"
    )
    with pytest.raises(
        ValueError, match=r"COLMAP has no such model: .*cameras.bin' is damaged, or not COLMAP's"
    ) as found:
        load_scene(tmp_path)
    assert "undistort" not in str(found.value)


def test_colmap_images_are_missing(taken, tmp_path):
    sparse = write_colmap(taken, tmp_path)
    (sparse / "images.bin").unlink()
    with pytest.raises(ValueError, match=r"images\.bin' cannot be read"):
        load_scene(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("this pickle ran",))


@pytest.mark.parametrize("name", ["coordinates.pt", "train/metadata/000002.pt"])
def test_pickles_are_refused(taken, tmp_path, name, capsys):
    write_mega_nerf(taken, tmp_path)
    torch.save({"origin_drb": Evil(), "W": Evil()}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}' is damaged, or holds more than tensors"):
        load_scene(tmp_path)
    assert "this pickle ran" not in capsys.readouterr().out


GOOD_METADATA = {"W": WIDTH, "H": HEIGHT, "c2w": torch.eye(3, 4), "intrinsics": torch.ones(4)}
MIRRORED = torch.eye(3, 4) * torch.tensor([-1.0, 1, 1, 1])
BAD_MEGA_NERF = {
    "no-scale": ("coordinates.pt", {"origin_drb": torch.zeros(3)}, "has no 'pose_scale_factor'"),
    "scale": ("coordinates.pt", {"origin_drb": torch.zeros(3), "pose_scale_factor": 0.0}, "pose_scale_factor is 0.0"),
    "no-dictionary": ("train/metadata/000001.pt", torch.ones(3), "000001.pt' has no 'W'"),
    "shape": ("train/metadata/000001.pt", GOOD_METADATA | {"c2w": torch.eye(2)}, r"c2w has shape \(2, 2\)"),
    "words": ("train/metadata/000001.pt", GOOD_METADATA | {"W": "wide"}, "W are no numbers"),
    "left-handed": ("train/metadata/000001.pt", GOOD_METADATA | {"c2w": MIRRORED}, "frame 'DJI_1.JPG' is left-handed"),
    "nan": ("train/metadata/000001.pt", GOOD_METADATA | {"c2w": torch.eye(3, 4) / 0}, "frame 'DJI_1.JPG' holds NaN"),
    "size": ("train/metadata/000001.pt", GOOD_METADATA | {"H": 7}, "000001.png' is 24 x 18 pixels; .* 24 x 7"),
}


@pytest.mark.parametrize("case", BAD_MEGA_NERF)
def test_bad_mega_nerf_files_are_named(taken, tmp_path, case):
    name, content, message = BAD_MEGA_NERF[case]
    write_mega_nerf(taken, tmp_path)
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_scene(tmp_path)


@pytest.mark.parametrize("case", ["cut-short", "no-metadata", "mappings"])
def test_other_damage_to_mega_nerf_files(taken, tmp_path, case):
    write_mega_nerf(taken, tmp_path)
    if case == "cut-short":
        path = tmp_path / "val" / "metadata" / "000003.pt"
        path.write_bytes(path.read_bytes()[:100])
        message = "000003.pt'"
    elif case == "no-metadata":
        for path in (tmp_path / "train" / "metadata").iterdir():
            path.unlink()
        message = r"has no metadata \(\*.pt\)"
    else:
        (tmp_path / "mappings.txt").write_text("DJI_99.JPG,000099.pt\n")
        message = "mappings.txt', line 1 is 'DJI_99.JPG,000099.pt'"
    with pytest.raises(ValueError, match=message):
        load_scene(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, "source is 'nowhere'; expected city, stereo_motorcycle, pybullet:FILE, or a folder"),
        ({"source": "city", "downscale": 2}, "downscale is given, but source is 'city'; it is for folders"),
        ({"source": CITY, "lazy": True}, "lazy is given, but source is City"),
        ({"background": "pink"}, "background is 'pink'; valid are 'white', 'black'"),
        ({"downscale": 0}, "downscale is 0; it must be a whole number from 1"),
        ({"near": -0.1}, "near is -0.1; it must be"),
        ({"near": 1000.0}, "near is 1000.0; rays of scene .* end at 1000, it must be below"),
        ({"box": [[0, 0, 0], [1, 0, 1]]}, "it must be a least and a greatest corner, finite, each axis apart"),
        ({"source": "city", "near": 0.1}, "near is given, but source is 'city'; it is for folders"),
        ({"source": "city", "background": "white"}, "background is given, but source is 'city'"),
        ({"altitude_range": (1.0, 2.0)}, "is no Mega-NeRF scene"),
        ({"images": "images_4"}, "images is 'images_4'; .* is no COLMAP scene"),
    ],
    ids=[
        *("source", "city", "own-city", "background", "downscale", "near", "near-far", "box", "city-near"),
        *("city-background", "altitude", "images"),
    ],
)
def test_arguments_that_do_not_apply_are_refused(taken, tmp_path, arguments, message):
    write_nerfstudio(taken, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_scene(**{"source": tmp_path, **arguments})


def test_folder_of_no_format(tmp_path):
    with pytest.raises(ValueError, match=r"that folder has none of transforms\.json"):
        load_scene(tmp_path)


def test_lens_that_cannot_be_meant_is_said(taken, tmp_path, caplog):
    write_nerfstudio(taken, tmp_path, k1=-0.15, k2=0.03)
    load_scene(tmp_path)
    assert "lens" not in caplog.text
    write_nerfstudio(taken, tmp_path, k1=50.0)
    load_scene(tmp_path)
    assert "The lens distortion of frame 'images/000.png' and 9 others moves a corner" in caplog.text


def test_lens_that_cannot_be_undone_is_said(taken, tmp_path, caplog):
    write_nerfstudio(taken, tmp_path, k1=-3.0)
    load_scene(tmp_path)
    assert "The lens distortion of frame 'images/000.png' and 9 others cannot be undone" in caplog.text
