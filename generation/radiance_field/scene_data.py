"""Scenes by name or folder, in whichever of the formats the folder has.

scene = load_scene("city")                 # four districts, traced on the first use
scene = load_scene("runs/garden")          # transforms.json, Blender, COLMAP or Mega-NeRF
origins, directions = scene.cameras.image_rays(0)
"""

from collections.abc import Sequence
from pathlib import Path

from generation.radiance_field.city_scene import load_city
from generation.radiance_field.colmap_scenes import read_colmap, sparse_folder
from generation.radiance_field.district_city import City
from generation.radiance_field.mega_nerf_scenes import read_mega_nerf
from generation.radiance_field.pybullet_scenes import PREFIX, BulletObject, load_bullet
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_files import assemble
from generation.radiance_field.stereo_pair import load_stereo_pair
from generation.radiance_field.transforms_scenes import read_blender, read_transforms

BUILT_IN = {"city": load_city, "stereo_motorcycle": load_stereo_pair}
FORMATS = (
    "transforms.json (nerfstudio), transforms_train.json (Blender), coordinates.pt (Mega-NeRF), or "
    "sparse/0/cameras.bin or .txt (COLMAP)"
)


def load_scene(
    source: str | Path | City | BulletObject = "city",
    *,
    lazy: bool = False,
    downscale: int = 1,
    alpha: bool = False,
    background: str | None = None,
    normalise: bool | None = None,
    near: float | None = None,
    box: Sequence[Sequence[float]] | None = None,
    images: str = "images",
    altitude_range: tuple[float, float] | None = None,
) -> Scene:
    """A scene.

    Args:
        source: "city" (the default city), a `City`, "stereo_motorcycle" (scikit-image's), "pybullet:" and a file of
            PyBullet's objects (see `pybullet_scenes`), a `BulletObject`, or a folder with one of: transforms.json,
            transforms_train.json, coordinates.pt, a COLMAP reconstruction; the first of them counts. All that follows
            is for folders.
        lazy: read a picture when it is asked for, rather than all of them now; they may differ in size then.
        downscale: by which pictures are made smaller, a whole number.
        alpha: keep alpha as a fourth channel, rather than composite on `background`.
        background: "white" or "black", which is behind what is transparent, and behind the whole scene even if pictures
            have no alpha (a studio's wall, an even sky). None: white behind what is transparent, and if nothing is,
            it is not known what is behind the scene.
        normalise: set the world upright, centre it, and scale the positions of the cameras into [-1, 1]; None does so
            for nerfstudio's format and COLMAP's.
        near: distance from the camera at which rays begin, in the scene's units (after `normalise`); None for the
            format's own.
        box: least and greatest corner of what is of interest, in the same units; None for the format's own.
        images: COLMAP's folder of pictures.
        altitude_range: of a Mega-NeRF scene, metres downward (see `read_mega_nerf`).

    Raises:
        ValueError: there is no such source, a file is missing, broken or not what it should be, a pose is none, or an
            argument does not apply; files, frames and arguments are named.
        ImportError: the source is PyBullet's, which is not installed.
    """
    bullet = isinstance(source, BulletObject) or str(source).startswith(PREFIX)
    if bullet or isinstance(source, City) or str(source) in BUILT_IN:
        given = {
            "lazy": lazy,
            "downscale": downscale != 1,
            "alpha": alpha,
            "background": background is not None,
            "normalise": normalise is not None,
            "near": near is not None,
            "box": box is not None,
            "images": images != "images",
            "altitude_range": altitude_range is not None,
        }
        for name in (name for name, differs in given.items() if differs):
            raise ValueError(f"{name} is given, but source is {source!r}; it is for folders")
        if bullet:
            return load_bullet(source if isinstance(source, BulletObject) else str(source))
        return load_city(source) if isinstance(source, City) else BUILT_IN[str(source)]()
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(
            f"source is {str(source)!r}; expected {', '.join(BUILT_IN)}, {PREFIX}FILE, or a folder with {FORMATS}"
        )
    is_mega_nerf, is_colmap = False, False
    if (folder / "transforms.json").exists():
        found = read_transforms(folder)
    elif (folder / "transforms_train.json").exists():
        found = read_blender(folder)
    elif is_mega_nerf := (folder / "coordinates.pt").exists():
        found = read_mega_nerf(folder, altitude_range)
    elif is_colmap := (sparse := sparse_folder(folder)) is not None:
        found = read_colmap(folder, sparse, images)
    else:
        raise ValueError(f"source is {str(source)!r}; that folder has none of {FORMATS}")
    if altitude_range is not None and not is_mega_nerf:
        raise ValueError(f"altitude_range is {altitude_range}; {str(source)!r} is no Mega-NeRF scene")
    if images != "images" and not is_colmap:
        raise ValueError(f"images is {images!r}; {str(source)!r} is no COLMAP scene")
    return assemble(found, lazy, downscale, alpha, background, normalise, near, box)
