"""Photographs of the city written in each format a scene is read from.

The writers state each format's convention on their own, from world-to-camera matrices in OpenCV's axes.
"""

import json
import struct
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from generation.radiance_field.cameras import Cameras
from generation.radiance_field.district_city import City, trace

CITY = City(samples=1, train_views=10, test_views=0)
WIDTH, HEIGHT = 24, 18
DRB = torch.tensor([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]])  # of the city's axes: down is -z, right x, backward -y
ORIGIN = torch.tensor([2.0, -5.0, 11.0])
LENSES = {
    "SIMPLE_PINHOLE": ("f cx cy", 0),
    "PINHOLE": ("fx fy cx cy", 1),
    "SIMPLE_RADIAL": ("f cx cy k1", 2),
    "RADIAL": ("f cx cy k1 k2", 3),
    "OPENCV": ("fx fy cx cy k1 k2 p1 p2", 4),
}
VALUES = {"fx": 21.0, "fy": 19.0, "f": 20.0, "cx": 11.3, "cy": 9.6, "k1": -0.15, "k2": 0.03, "p1": 0.01, "p2": -0.02}


@dataclass(frozen=True)
class Photographs:
    """Pictures of the city, uint8 [N, H, W, 3], with exact cameras of one lens, and what the sky was."""

    cameras: Cameras
    images: torch.Tensor
    sky: torch.Tensor
    distances: torch.Tensor

    @property
    def world_to_camera(self):
        """`[N, 4, 4]` in OpenCV's axes."""
        c2w = torch.eye(4, dtype=torch.float64).repeat(len(self.cameras), 1, 1)
        c2w[:, :3] = self.cameras.c2w
        c2w[:, :3, 1:3] *= -1
        return torch.linalg.inv(c2w)


def photograph(model="PINHOLE", count=10, **other):
    lens = {name: VALUES[name] for name in LENSES[model][0].split()} | other
    focal = [lens.get("fx", lens.get("f")), lens.get("fy", lens.get("f"))]
    cameras = Cameras(
        CITY.cameras.c2w[:count],
        torch.tensor([[*focal, lens["cx"], lens["cy"]]], dtype=torch.float64).expand(count, 4),
        torch.full((count,), WIDTH),
        torch.full((count,), HEIGHT),
        torch.tensor([[lens.get(n, 0.0) for n in ("k1", "k2", "k3", "p1", "p2")]], dtype=torch.float64).expand(
            count, 5
        ),
    )
    seen = [trace(CITY, *(rays.reshape(-1, 3) for rays in cameras.image_rays(i))) for i in range(count)]
    colour, depth = (torch.stack([getattr(one, name) for one in seen]) for name in ("colour", "depth"))
    images = (colour * 255).round().to(torch.uint8).reshape(count, HEIGHT, WIDTH, 3)
    depth = depth.reshape(count, HEIGHT, WIDTH)
    return Photographs(cameras, images, depth.isinf(), depth)


def save_picture(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.numpy()).save(path)


def write_nerfstudio(taken, folder, shared=True, **top):
    intrinsics = {"fl_x": 21.0, "fl_y": 19.0, "cx": 11.3, "cy": 9.6, "w": WIDTH, "h": HEIGHT, "camera_model": "OPENCV"}
    frames = []
    for i, matrix in enumerate(torch.linalg.inv(taken.world_to_camera)):
        save_picture(taken.images[i], folder / "images" / f"{i:03d}.png")
        pose = matrix @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
        frame = {"file_path": f"images/{i:03d}.png", "transform_matrix": pose.tolist()}
        frames.append(frame if shared else frame | intrinsics)
    data = {**(intrinsics if shared else {}), "frames": frames[::-1], **top}
    (folder / "transforms.json").write_text(json.dumps(data))
    return data


def write_blender(taken, folder, splits=(("train", 6), ("val", 1), ("test", 3))):
    start = 0
    for split, count in splits:
        frames = []
        for i in range(start, start + count):
            rgba = torch.cat([taken.images[i], torch.where(taken.sky[i], 0, 255).to(torch.uint8)[..., None]], -1)
            rgba[taken.sky[i]] = 0  # black, but transparent
            save_picture(rgba, folder / split / f"r_{i}.png")
            pose = torch.linalg.inv(taken.world_to_camera[i]) @ torch.diag(torch.tensor([1.0, -1, -1, 1]).double())
            frames.append({"file_path": f"./{split}/r_{i}", "rotation": 0.01, "transform_matrix": pose.tolist()})
        angle = 2 * np.arctan(0.5 * WIDTH / 20.0)
        data = {"camera_angle_x": angle, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(data))
        start += count


def quaternion_of(rotation):
    """(w, x, y, z) by the eigenvector of Bar-Itzhack's matrix."""
    r = rotation.tolist()
    matrix = torch.tensor(
        [
            [r[0][0] - r[1][1] - r[2][2], 0, 0, 0],
            [r[1][0] + r[0][1], r[1][1] - r[0][0] - r[2][2], 0, 0],
            [r[2][0] + r[0][2], r[2][1] + r[1][2], r[2][2] - r[0][0] - r[1][1], 0],
            [r[2][1] - r[1][2], r[0][2] - r[2][0], r[1][0] - r[0][1], r[0][0] + r[1][1] + r[2][2]],
        ],
        dtype=torch.float64,
    )
    x, y, z, w = torch.linalg.eigh(matrix / 3, UPLO="L").eigenvectors[:, -1].tolist()
    return w, x, y, z


def write_colmap(taken, folder, model="PINHOLE", binary=True, place="sparse/0"):
    sparse = folder / place
    sparse.mkdir(parents=True, exist_ok=True)
    layout, number = LENSES[model]
    parameters = [VALUES[name] for name in layout.split()]
    images = []
    for i, matrix in enumerate(taken.world_to_camera):
        save_picture(taken.images[i], folder / "images" / f"photo {i:02d}.png")
        images.append((i + 5, *quaternion_of(matrix[:3, :3]), *matrix[:3, 3].tolist(), 3, f"photo {i:02d}.png"))
    images.reverse()
    if not binary:
        line = " ".join(map(str, parameters))
        (sparse / "cameras.txt").write_text(f"# Camera list\n3 {model} {WIDTH} {HEIGHT} {line}\n")
        seen = ["", "10.5 3.25 -1 7.0 8.0 12"]  # the second line of a picture: none, or two points
        lines = [" ".join(map(str, image)) + "\n" + seen[i % 2] for i, image in enumerate(images)]
        (sparse / "images.txt").write_text("# Image list\n# with two lines each\n" + "\n".join(lines) + "\n")
        return sparse
    cameras = struct.pack("<Q", 1) + struct.pack("<iiQQ", 3, number, WIDTH, HEIGHT)
    (sparse / "cameras.bin").write_bytes(cameras + struct.pack(f"<{len(parameters)}d", *parameters))
    data = struct.pack("<Q", len(images))
    for i, (*pose, camera, name) in enumerate(images):
        data += struct.pack("<i7di", *pose, camera) + name.encode() + b"\0" + struct.pack("<Q", i)
        data += struct.pack("<ddq", 1.0, 2.0, -1) * i
    (sparse / "images.bin").write_bytes(data)
    return sparse


def write_mega_nerf(taken, folder, metres=7.0, held_out=(3, 7)):
    """Positions of the city, in metres, lie at ORIGIN + DRB @ position."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"origin_drb": ORIGIN, "pose_scale_factor": metres}, folder / "coordinates.pt")
    lines = []
    for i, matrix in enumerate(torch.linalg.inv(taken.world_to_camera)):
        right, down, forward = (DRB.double() @ matrix[:3, :3]).unbind(-1)  # the camera's axes in DRB
        drb = torch.stack([down, right, -forward], -1)
        position = DRB.double() @ matrix[:3, 3] / metres
        c2w = torch.stack([drb[:, 1], -drb[:, 0], drb[:, 2], position], -1).float()
        part = folder / ("val" if i in held_out else "train")
        (part / "metadata").mkdir(parents=True, exist_ok=True)
        metadata = {
            "W": WIDTH,
            "H": HEIGHT,
            "c2w": c2w,
            "intrinsics": torch.tensor([21.0, 19.0, 11.3, 9.6]),
            "distortion": torch.tensor([0.1, 0.2, 0, 0, 0]),  # the pictures are undistorted: to be ignored
        }
        torch.save(metadata, part / "metadata" / f"{i:06d}.pt")
        save_picture(taken.images[i], part / "rgbs" / f"{i:06d}.png")
        lines.append(f"DJI_{i}.JPG,{i:06d}.pt\n")
    (folder / "mappings.txt").write_text("".join(lines))


WRITERS = {
    "nerfstudio": write_nerfstudio,
    "blender": write_blender,
    "colmap": write_colmap,
    "mega-nerf": write_mega_nerf,
}
