"""A city of four districts with growing detail, computed by an analytic ray tracer: no download, exact depth.

The ground is the square [-4, 4]² at z = 0, in metres. A district is a quadrant: 0 has x < 0 and y < 0, 1 has x >= 0 and
y < 0, 2 has x < 0 and y >= 0, 3 has both >= 0. On each stand three boxes and a sphere with the district's texture in
random colours. One sun casts hard shadows; all else is white sky.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from generation.argument_checks import check_choice, check_whole
from generation.radiance_field.cameras import Cameras

HALF_SIDE = 4.0
DISTRICTS = 4
BOXES = 3  # of a district
BOX = ((-4.1, -4.1, -0.15), (4.1, 4.1, 1.8))  # around everything but the sky
NEAR, FAR = 0.5, 13.0
SUN = (0.4, 0.3, 0.85)  # towards it; not of unit length
AMBIENT, DIFFUSE = 0.4, 0.65
TEXTURES = ("waves", "checker", "stripes")
GROUND = (
    ((0.16, 0.42, 0.18), (0.55, 0.80, 0.40)),
    ((0.30, 0.28, 0.34), (0.82, 0.78, 0.70)),
    ((0.62, 0.30, 0.20), (0.92, 0.80, 0.58)),
    ((0.16, 0.24, 0.46), (0.78, 0.84, 0.92)),
)  # darkest and lightest colour of each district
SKY = (1.0, 1.0, 1.0)
GOLDEN_STEP = 2.618  # radians between the azimuths of one camera and the next
LIFT = 1e-6  # metres, by which a shadow ray starts above its surface
RAYS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class City:
    """What a city and the pictures of it depend on.

    Attributes:
        detail: of each district, how many times a metre its texture changes between dark and light.
        textures: of each district, one of `TEXTURES`. Cells of checkers and stripes are 1 / detail wide; a wave has the
            length 1 / detail, and 1.18 / detail along y.
        image_size: width and height of the pictures in pixels.
        train_views, test_views: cameras.
        samples: the colour of a pixel is the mean of samples x samples rays; odd, so that one is in the middle.
        field_of_view: degrees.
        seed: of the buildings and the cameras.

    Raises:
        ValueError: one of them is not valid.
    """

    detail: tuple[float, float, float, float] = (0.207, 1.0, 3.0, 4.0)
    textures: tuple[str, str, str, str] = ("waves", "checker", "stripes", "checker")
    image_size: int = 100
    train_views: int = 36
    test_views: int = 6
    samples: int = 3
    field_of_view: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in (("detail", self.detail), ("textures", self.textures)):
            object.__setattr__(self, name, tuple(values))
            if len(values) != DISTRICTS:
                raise ValueError(f"{name} are {len(values)}; there are {DISTRICTS} districts")
        for value in self.detail:
            if not 0 < value < math.inf:
                raise ValueError(f"detail is {self.detail}; each must be a finite number above 0")
        for texture in self.textures:
            check_choice("textures", texture, TEXTURES)
        limits = {"image_size": 4096, "train_views": 10_000, "test_views": 10_000, "samples": 15, "seed": 2**32 - 1}
        for name, most in limits.items():
            check_whole(name, getattr(self, name), 0 if name in ("test_views", "seed") else 1, most)
        if self.samples % 2 == 0:
            raise ValueError(f"samples is {self.samples}; it must be odd")
        if not 1 <= self.field_of_view <= 170:
            raise ValueError(f"field_of_view is {self.field_of_view}; it must be from 1 to 170 degrees")

    @cached_property
    def buildings(self) -> "Buildings":
        return _build(self.seed)

    @cached_property
    def cameras(self) -> Cameras:
        """float64; those for training come first."""
        count, size = self.train_views + self.test_views, self.image_size
        draws = np.random.default_rng([self.seed, 1]).random((count, 4))
        azimuth = GOLDEN_STEP * np.arange(count)
        radius, height = 3 + 3 * draws[:, 0], 2.2 + 1.8 * draws[:, 1]
        position = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), height], -1)
        target = np.concatenate([3 * draws[:, 2:] - 1.5, np.full((count, 1), 0.3)], 1)
        backward = _unit(position - target)
        right = _unit(np.cross([0.0, 0.0, 1.0], backward))
        c2w = np.stack([right, np.cross(backward, right), backward, position], -1)
        focal = 0.5 * size / math.tan(math.radians(self.field_of_view) / 2)
        intrinsics = torch.tensor([focal, focal, size / 2, size / 2], dtype=torch.float64).repeat(count, 1)
        return Cameras(torch.from_numpy(c2w), intrinsics, torch.full((count,), size), torch.full((count,), size))


@dataclass(frozen=True)
class Buildings:
    """Boxes and spheres, three and one a district, in this order; float64, in metres.

    Attributes:
        box_least, box_greatest: `[12, 3]` corners.
        centre, radius: `[4, 3]` and `[4]` of the spheres.
        dark, light: `[16, 3]` colours in [0, 1], of the boxes, then of the spheres.
    """

    box_least: np.ndarray
    box_greatest: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    dark: np.ndarray
    light: np.ndarray


@dataclass(frozen=True)
class Seen:
    """What P rays meet first.

    Attributes:
        colour: float64 `[P, 3]` in [0, 1].
        depth: float64 `[P]`, distance along the ray in metres; inf is the sky.
        district: int8 `[P]`, -1 is the sky.
        normal: float64 `[P, 3]`, outward and of length 1; 0 in the sky.
    """

    colour: Tensor
    depth: Tensor
    district: Tensor
    normal: Tensor


def trace(city: City, origins: Tensor, directions: Tensor) -> Seen:
    """What rays see of the city.

    Args:
        origins, directions: `[P, 3]`, of unit length, in metres; origins lie outside of the buildings.
    """
    from_, along = (rays.reshape(-1, 3).double().cpu().numpy() for rays in (origins, directions))
    parts = [
        _trace(city, from_[start : start + RAYS_AT_ONCE], along[start : start + RAYS_AT_ONCE])
        for start in range(0, max(len(from_), 1), RAYS_AT_ONCE)
    ]
    return Seen(*(torch.from_numpy(np.concatenate(several)) for several in zip(*parts, strict=True)))


def picture(city: City, cameras: Cameras, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a camera sees: uint8 colours `[H, W, 3]`, the mean of `city.samples`² rays a pixel; and of the ray of each
    pixel's centre float32 depth `[H, W]`, int8 district `[H, W]` and float32 normal `[H, W, 3]`."""
    height, width, samples = int(cameras.height[index]), int(cameras.width[index]), city.samples
    cameras = cameras.to(torch.float64)
    x, y = ((torch.arange(size * samples, dtype=torch.float64) + 0.5) / samples for size in (width, height))
    directions = cameras.directions(index, x.expand(len(y), -1), y[:, None].expand(-1, len(x)))
    seen = trace(city, cameras.c2w[index, :, 3].expand_as(directions), directions)
    colour = seen.colour.reshape(height, samples, width, samples, 3).mean((1, 3))
    middle = slice(samples // 2, None, samples)
    depth, district, normal = (
        values.reshape(len(y), len(x), -1)[middle, middle] for values in (seen.depth, seen.district, seen.normal)
    )
    return (colour * 255).round().to(torch.uint8), depth[..., 0].float(), district[..., 0], normal.float()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _build(seed: int) -> Buildings:
    generator = np.random.default_rng([seed, 0])
    corner = np.array([[-HALF_SIDE, -HALF_SIDE], [0, -HALF_SIDE], [-HALF_SIDE, 0], [0, 0]])  # least x and y
    half = generator.uniform(0.2, 0.45, (DISTRICTS, BOXES, 2))
    height = generator.uniform(0.4, 1.4, (DISTRICTS, BOXES))
    middle = corner[:, None] + generator.uniform(0.55, HALF_SIDE - 0.55, (DISTRICTS, BOXES, 2))
    radius = generator.uniform(0.25, 0.5, DISTRICTS)
    centre = corner + generator.uniform(0.55, HALF_SIDE - 0.55, (DISTRICTS, 2))
    light = generator.uniform(0.35, 1.0, (DISTRICTS * (BOXES + 1), 3))
    return Buildings(
        box_least=np.concatenate([middle - half, np.zeros((DISTRICTS, BOXES, 1))], -1).reshape(-1, 3),
        box_greatest=np.concatenate([middle + half, height[..., None]], -1).reshape(-1, 3),
        centre=np.concatenate([centre, radius[:, None]], 1),
        radius=radius,
        dark=light * generator.uniform(0.25, 0.55, (len(light), 1)),
        light=light,
    )


def _trace(city: City, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, ...]:
    buildings = city.buildings
    depth, hit = _nearest(buildings, origins, directions)
    colour, normal = np.tile(SKY, (len(depth), 1)).astype(float), np.zeros_like(origins)
    district = np.full(len(depth), -1, np.int8)
    solid = hit >= 0
    points, hit = origins[solid] + depth[solid, None] * directions[solid], hit[solid]
    facing = _normals(buildings, points, hit)
    quadrant = (points[:, 0] >= 0) + 2 * (points[:, 1] >= 0)  # a building stands in one quadrant
    sun = _unit(np.array(SUN))
    lit = np.maximum(facing @ sun, 0)
    towards_sun = lit > 0
    shadow, _ = _nearest(
        buildings,
        points[towards_sun] + LIFT * facing[towards_sun],
        np.broadcast_to(sun, (int(towards_sun.sum()), 3)),
    )
    lit[towards_sun] *= np.isinf(shadow)
    albedo = _albedo(city, points, hit, quadrant)
    colour[solid] = np.minimum(albedo * (AMBIENT + DIFFUSE * lit)[:, None], 1)
    normal[solid], district[solid] = facing, quadrant
    return colour, depth, district, normal


def _nearest(buildings: Buildings, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance `[P]` to the first surface and its number `[P]`: box or sphere, then the ground; inf and -1 for none."""
    ox, oy, oz = np.ascontiguousarray(origins.T)
    dx, dy, dz = np.ascontiguousarray(directions.T)
    ground = len(buildings.box_least) + len(buildings.radius)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = [1 / d for d in (dx, dy, dz)]
        depth = -oz * slopes[2]
        inside = (np.abs(ox + depth * dx) <= HALF_SIDE) & (np.abs(oy + depth * dy) <= HALF_SIDE) & (depth > 0)
        depth = np.where(inside, depth, np.inf)
        hit = np.where(inside, ground, -1)
        for number, (least, greatest) in enumerate(zip(buildings.box_least, buildings.box_greatest, strict=True)):
            enter, leave = np.zeros_like(depth), depth
            for origin, slope, low, high in zip((ox, oy, oz), slopes, least, greatest, strict=True):
                first, second = (low - origin) * slope, (high - origin) * slope
                enter = np.maximum(enter, np.fmin(first, second))
                leave = np.minimum(leave, np.fmax(first, second))
            nearer = (enter < leave) & (enter > 0)
            depth, hit = np.where(nearer, enter, depth), np.where(nearer, number, hit)
        for number, (centre, radius) in enumerate(zip(buildings.centre, buildings.radius, strict=True)):
            x, y, z = ox - centre[0], oy - centre[1], oz - centre[2]
            half_b = x * dx + y * dy + z * dz
            enter = -half_b - np.sqrt(half_b * half_b - (x * x + y * y + z * z - radius * radius))
            nearer = (enter > 0) & (enter < depth)  # NaN, a ray that passes by, is neither
            depth = np.where(nearer, enter, depth)
            hit = np.where(nearer, len(buildings.box_least) + number, hit)
    return depth, hit


def _normals(buildings: Buildings, points: np.ndarray, hit: np.ndarray) -> np.ndarray:
    boxes = len(buildings.box_least)
    normal = np.zeros_like(points)
    normal[:, 2] = 1  # of the ground
    own = np.flatnonzero(hit < boxes)
    least, greatest = buildings.box_least[hit[own]], buildings.box_greatest[hit[own]]
    off = np.concatenate([np.abs(points[own] - least), np.abs(points[own] - greatest)], 1)  # (P, 6) from each face
    face = off.argmin(1)
    normal[own] = np.where(np.arange(3) == (face % 3)[:, None], np.where(face < 3, -1.0, 1.0)[:, None], 0.0)
    own = np.flatnonzero((hit >= boxes) & (hit < boxes + len(buildings.radius)))
    normal[own] = _unit(points[own] - buildings.centre[hit[own] - boxes])
    return normal


def _albedo(city: City, points: np.ndarray, hit: np.ndarray, quadrant: np.ndarray) -> np.ndarray:
    """Colours `[P, 3]` before light falls on them."""
    on_ground = hit == len(city.buildings.light)
    number = np.minimum(hit, len(city.buildings.light) - 1)
    dark, light = city.buildings.dark[number], city.buildings.light[number]
    ground_dark, ground_light = np.array(GROUND)[quadrant].transpose(1, 0, 2)
    dark, light = np.where(on_ground[:, None], ground_dark, dark), np.where(on_ground[:, None], ground_light, light)
    x, y, z = points.T
    z = np.where(on_ground, 0.0, z)  # exactly, for a cell of a checker ends there
    lightness = np.zeros(len(points))
    for district, (texture, detail) in enumerate(zip(city.textures, city.detail, strict=True)):
        own = quadrant == district
        lightness[own] = _lightness(texture, detail, x[own], y[own], z[own])
    return dark + (light - dark) * lightness[:, None]


def _lightness(texture: str, detail: float, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """In [0, 1], of a texture that fills space."""
    if texture == "waves":
        turn = 2 * math.pi * detail
        return 0.5 + 0.5 * np.sin(turn * (x + z)) * np.cos(turn * 1.1 / 1.3 * y)
    if texture == "checker":
        return (np.floor(x * detail) + np.floor(y * detail) + np.floor(z * detail)) % 2
    return np.floor((x + z) * detail) % 2
