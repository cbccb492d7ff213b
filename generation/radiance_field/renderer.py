"""Draws a radiance field: where rays are sampled, and what the samples make of them.

Rays march through the occupied cells of a grid; the field says density and colour at the middle of each sample's
interval; compositing makes a colour, an opacity and a depth of them, and in a mixture the share that each expert has in
a pixel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from generation.argument_checks import check_choice, check_real, check_whole
from generation.radiance_field.cameras import Cameras
from generation.radiance_field.hash_experts import HashExpertField
from generation.radiance_field.heads import FieldOutput
from generation.radiance_field.occupancy import OccupancyGrid
from generation.radiance_field.scene import Scene
from generation.radiance_field.single_grid import SingleGridField
from generation.radiance_field.switch_nerf import SwitchNeRFField
from kernels.occupancy_grid import Marched
from kernels.volume_rendering import Composited, composite, expected_depth

FIELDS = {"hash_experts": HashExpertField, "single_grid": SingleGridField, "switch_nerf": SwitchNeRFField}
RAYS_AT_ONCE = 1 << 13  # of a picture: marching them takes no more memory than a few hundred steps of each
BYTES_A_SAMPLE = 4096  # of a field's activations, about, with 64 channels


@dataclass(frozen=True)
class Drawn:
    """Of R rays, or of a picture's (H, W) instead of R.

    Attributes:
        colour: `[R, 3]` in [0, 1].
        opacity: `[R]` in [0, 1].
        depth: `[R]`, the expected distance along the ray; inf where nothing is met.
        experts: `[R, E]`, each expert's share of the opacity; None of a field without experts.
    """

    colour: Tensor
    opacity: Tensor
    depth: Tensor
    experts: Tensor | None

    def reshape(self, *shape: int) -> "Drawn":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Drawn(**{name: None if v is None else v.reshape(*shape, *v.shape[1:]) for name, v in values.items()})


class Renderer(nn.Module):
    """A field in a scene's box.

    Args:
        kind: of field: "hash_experts" (Switch-NeRF++), "single_grid" (as instant-ngp has) or "switch_nerf".
        field: arguments of the field; its box is the scene's.
        occupancy: arguments of the occupancy grid; its box is the scene's.
        step: least length of a sample, in the scene's units.
        cone_angle: growth of samples with distance; 0 for none.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        kind: str,
        field: dict[str, Any],
        occupancy: dict[str, Any],
        step: float,
        cone_angle: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = {"kind": kind, "field": field, "occupancy": occupancy, "step": step, "cone_angle": cone_angle}
        if check_real("step", step) == 0:
            raise ValueError("step is 0; it must be above 0")
        self.step, self.cone_angle = step, check_real("cone_angle", cone_angle)
        unit = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        for name, arguments in (("field", field), ("occupancy", occupancy)):
            if "box" in arguments:
                raise ValueError(f"{name} has a box, {arguments['box']}; it is the scene's")
        self.field = FIELDS[check_choice("kind", kind, tuple(FIELDS))](**field)
        self.occupancy = OccupancyGrid(box=unit, **occupancy)
        for name, value in (("near", 0.0), ("far", 1.0)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("background", torch.ones(3))

    @property
    def experts(self) -> int:
        """Of the field; 0 if it is none of experts."""
        if isinstance(self.field, HashExpertField):
            return self.field.experts.grid.experts
        return self.field.experts.weights[0].shape[0] if isinstance(self.field, SwitchNeRFField) else 0

    def place(self, scene: Scene) -> None:
        """Take box, distances and background of a scene.

        Raises:
            ValueError: the field has embeddings, but not one for each appearance of the training pictures.
        """
        embedding = self.field.appearance
        wanted = len(scene.appearance_ids[scene.splits["train"]].unique())
        if embedding is not None and embedding.num_embeddings != wanted:  # of more, some were noise in their mean
            given = embedding.num_embeddings
            raise ValueError(f"field.appearances is {given}; of scene {scene.name!r} it must be {wanted}, or 0")
        self.field.space.box.copy_(scene.box)
        self.occupancy.box.copy_(scene.box)
        self.near.fill_(scene.near)
        self.far.fill_(scene.far)
        self.background.copy_(torch.tensor(scene.background or (0.0, 0.0, 0.0)))

    def march(self, origins: Tensor, directions: Tensor, jitter: Tensor | None = None) -> Marched:
        """Samples of rays `[R, 3]`; `jitter` `[R]` shifts each ray's by a part of a step."""
        options = {"step": self.step, "cone_angle": self.cone_angle, "jitter": jitter}
        return self.occupancy.march(origins, directions, float(self.near), float(self.far), **options)

    def ask(
        self, origins: Tensor, directions: Tensor, samples: Marched, appearance: Tensor | int | None = None
    ) -> FieldOutput:
        """What the field says of samples.

        Args:
            origins, directions: `[R, 3]`.
            samples: S of the rays.
            appearance: `[R]`, or one for all: see the fields.
        """
        ray = ray_of(samples)
        middle = (samples.start + samples.end) / 2
        along = directions.index_select(0, ray)
        points = torch.addcmul(origins.index_select(0, ray), along, middle[:, None])
        return self.field(points, along, appearance[ray] if isinstance(appearance, Tensor) else appearance)

    def composite(self, said: FieldOutput, samples: Marched) -> Composited:
        return composite(said.density, said.colour, *samples, background=self.background)

    def update_occupancy(self, number: int, generator: torch.Generator | None = None) -> bool:
        """Look at the occupancy grid's cells again if step `number` is one at which that is done.

        The field is asked as in evaluation: without noise, and without a capacity that would drop points.
        """

        def density_times_step(points: Tensor) -> Tensor:
            training = self.field.training
            self.field.eval()
            parts = [self.field.density(part).density for part in points.split(1 << 15)]
            self.field.train(training)
            return torch.cat(parts).float() * self.step

        return self.occupancy.update(number, density_times_step, generator)

    @torch.no_grad()
    def draw(
        self,
        origins: Tensor,
        directions: Tensor,
        appearance: int | None = None,
        *,
        memory: int = 1 << 29,
    ) -> Drawn:
        """Draw rays.

        Args:
            origins, directions: `[R, 3]`, directions of unit length. A ray without direction meets nothing.
            appearance: of the training pictures, by number; None for the mean of all.
            memory: bytes that activations may take, about; how many samples are worked on at once. A ray is drawn
                whole, however many it has.

        Raises:
            ValueError: rays are none, of another shape, or hold NaN or infinity (on CPU: on GPUs, where to look would
                be to wait, they mean nothing), or memory is less than a sample takes.
        """
        check_whole("memory", memory, BYTES_A_SAMPLE)
        if origins.dim() != 2 or origins.shape[1] != 3 or directions.shape != origins.shape or not len(origins):
            shapes = f"{tuple(origins.shape)} and {tuple(directions.shape)}"
            raise ValueError(f"origins and directions have shapes {shapes}; both must be (R, 3), of one ray at least")
        parts = []
        for first in range(0, len(origins), RAYS_AT_ONCE):
            some = slice(first, first + RAYS_AT_ONCE)
            samples = self.march(origins[some], directions[some])
            for rays, portion in portions(samples, memory // BYTES_A_SAMPLE):
                parts.append(self._draw(origins[some][rays], directions[some][rays], portion, appearance))
        together = {}
        for field in fields(Drawn):
            several = [getattr(part, field.name) for part in parts]
            together[field.name] = None if several[0] is None else torch.cat(several)
        return Drawn(**together)

    def _draw(self, origins: Tensor, directions: Tensor, samples: Marched, appearance: int | None) -> Drawn:
        said = self.ask(origins, directions, samples, appearance)
        made = self.composite(said, samples)
        experts = None
        if self.experts:
            one_hot = torch.nn.functional.one_hot(said.expert, self.experts).to(made.weights.dtype)
            experts = composite(said.density, one_hot, *samples).colour
        depth = expected_depth(made.depth, made.opacity)
        met = made.opacity > torch.finfo(torch.float32).eps
        return Drawn(made.colour.clamp(0, 1), made.opacity, depth.masked_fill(~met, torch.inf), experts)

    def draw_image(self, cameras: Cameras, index: int, appearance: int | None = None, **options: Any) -> Drawn:
        """`draw` of all pixels of a camera's picture, `[H, W, ...]`."""
        origins, directions = cameras.image_rays(index)
        height, width = origins.shape[:2]
        drawn = self.draw(origins.reshape(-1, 3), directions.reshape(-1, 3), appearance, **options)
        return drawn.reshape(height, width)


def ray_of(samples: Marched) -> Tensor:
    """int64 `[S]`, the ray of each sample."""
    counts = samples.offsets.diff()
    return torch.repeat_interleave(counts, output_size=len(samples.start))


def first_rays(samples: Marched, rays: int) -> Marched:
    """The samples of the first rays."""
    last = int(samples.offsets[rays])
    return Marched(samples.start[:last], samples.end[:last], samples.offsets[: rays + 1])


def rays_within(offsets: Tensor, most: int) -> int:
    """How many rays, from the first, have at most so many samples together; one at least."""
    return max(1, int(torch.searchsorted(offsets, most, right=True)) - 1)


def portions(samples: Marched, most: int) -> Iterator[tuple[slice, Marched]]:
    """Rays in a row that have at most so many samples together (or are a single one), and these samples."""
    first, rays = 0, len(samples.offsets) - 1
    while first < rays:
        start = int(samples.offsets[first])
        last = max(first + 1, int(torch.searchsorted(samples.offsets, start + most, right=True)) - 1)
        end = int(samples.offsets[last])
        offsets = samples.offsets[first : last + 1] - start
        yield slice(first, last), Marched(samples.start[start:end], samples.end[start:end], offsets)
        first = last
