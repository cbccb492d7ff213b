"""Draws a radiance field: where rays are sampled, and what the samples make of them.

Rays march through the occupied cells of a grid, or have samples where small density fields propose them; the field says
density and colour at the middle of each sample's interval; compositing makes a colour, an opacity and a depth of them,
and in a mixture the share that each expert has in a pixel. Behind all that is the scene's background, or, outside of an
ellipsoid, a field of its own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from generation.argument_checks import check_choice, check_real, check_whole
from generation.radiance_field.cameras import Cameras
from generation.radiance_field.hash_experts import BYTES_OF_EXPERT, HashExpertField
from generation.radiance_field.heads import FieldOutput
from generation.radiance_field.occupancy import OccupancyGrid
from generation.radiance_field.outside_of_ellipsoid import OutsideOfEllipsoid
from generation.radiance_field.proposal_sampling import ProposalSampler, Proposed, Spans
from generation.radiance_field.scene import Scene
from generation.radiance_field.single_grid import BYTES_OF_POINT, SingleGridField
from generation.radiance_field.switch_nerf import SwitchNeRFField
from kernels.occupancy_grid import Marched
from kernels.volume_rendering import Composited, composite, expected_depth

FIELDS = {"hash_experts": HashExpertField, "single_grid": SingleGridField, "switch_nerf": SwitchNeRFField}
SAMPLERS = ("occupancy", "proposal")
BACKGROUNDS = ("none", "field")
RAYS_AT_ONCE, SAMPLES_AT_ONCE = 1 << 13, 1 << 17  # at most: more of them are no faster
BYTES_A_MARCHED_SAMPLE = 48  # where it begins and ends, in float64, in float32, and while they are put together


@dataclass(frozen=True)
class Drawn:
    """Of R rays, or of a picture's (H, W) instead of R.

    Attributes:
        colour: `[R, 3]` in [0, 1].
        opacity: `[R]` in [0, 1], without that of a background field, as are depth and experts.
        depth: `[R]`, the expected distance along the ray; inf where nothing is met.
        experts: `[R, E]`, each expert's share of the opacity; None of a field without experts.
    """

    colour: Tensor
    opacity: Tensor
    depth: Tensor
    experts: Tensor | None

    def reshape(self, *shape: int) -> "Drawn":
        return self._each(lambda value: value.reshape(*shape, *value.shape[1:]))

    def room_for(self, rays: int) -> "Drawn":
        """Of as many rays, with numbers that are yet to come."""
        return self._each(lambda value: value.new_empty(rays, *value.shape[1:]))

    def put(self, rays: slice, part: "Drawn") -> None:
        """What was drawn of some rays into its place."""
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                value[rays] = getattr(part, field.name)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Drawn":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Drawn(**{name: None if value is None else change(value) for name, value in values.items()})


class Renderer(nn.Module):
    """A field in a scene's box.

    Args:
        kind: of field: "hash_experts" (Switch-NeRF++), "single_grid" (as instant-ngp has) or "switch_nerf".
        field: arguments of the field; its box is the scene's.
        occupancy: arguments of the occupancy grid; its box is the scene's. None with `sampler` "proposal", which does
            not look at it, at `step` and at `cone_angle`.
        step: least length of a sample, in the scene's units.
        cone_angle: growth of samples with distance; 0 for none.
        sampler: "occupancy", which marches through the occupied cells of a grid, or "proposal": see `ProposalSampler`.
        proposal: arguments of the `ProposalSampler`; None for its defaults.
        background: "none", the scene's colour, or "field", an `OutsideOfEllipsoid` behind the foreground, whose box is
            then the one around the ellipsoid.
        background_field: arguments of the `OutsideOfEllipsoid`; None for its defaults.

    Raises:
        ValueError: an argument is out of range, or is given, but for another choice.
    """

    def __init__(
        self,
        kind: str,
        field: dict[str, Any],
        occupancy: dict[str, Any] | None = None,
        step: float | None = None,
        cone_angle: float = 0.0,
        sampler: Literal["occupancy", "proposal"] = "occupancy",
        proposal: dict[str, Any] | None = None,
        background: Literal["none", "field"] = "none",
        background_field: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = {"kind": kind, "field": field, "occupancy": occupancy, "step": step, "cone_angle": cone_angle}
        self.settings |= {"sampler": sampler, "proposal": proposal}
        self.settings |= {"background": background, "background_field": background_field}
        marching = check_choice("sampler", sampler, SAMPLERS) == "occupancy"
        outside = check_choice("background", background, BACKGROUNDS) == "field"
        if proposal is not None and marching:
            raise ValueError(f"proposal is {proposal}, but sampler is {sampler!r}; it is for sampler 'proposal'")
        if background_field is not None and not outside:
            words = f"background_field is {background_field}, but background is {background!r}"
            raise ValueError(f"{words}; it is for background 'field'")
        for name, value in (("occupancy", occupancy), ("step", step)):
            if marching and value is None:
                raise ValueError(f"{name} is None; sampler 'occupancy' needs it")
        if marching and check_real("step", step) == 0:
            raise ValueError("step is 0; it must be above 0")
        self.step, self.cone_angle = step, check_real("cone_angle", cone_angle)
        unit = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        for name, arguments in (("field", field), ("occupancy", occupancy)):
            if arguments is not None and "box" in arguments:
                raise ValueError(f"{name} has a box, {arguments['box']}; it is the scene's")
        self.field = FIELDS[check_choice("kind", kind, tuple(FIELDS))](**field)
        self.occupancy = OccupancyGrid(box=unit, **occupancy) if marching else None
        self.proposal = None if marching else ProposalSampler(**proposal or {})
        self.outside = OutsideOfEllipsoid(**background_field or {}) if outside else None
        for name, value in (("near", 0.0), ("far", 1.0)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("background", torch.ones(3))

    @property
    def experts(self) -> int:
        """Of the field; 0 if it is none of experts."""
        if isinstance(self.field, SwitchNeRFField):
            return self.field.experts.weights[0].shape[0]
        return self.field.expert_count

    @property
    def bytes_a_sample(self) -> int:
        """Of activations where the field is asked in evaluation, of each sample, at most about."""
        if isinstance(self.field, SwitchNeRFField):
            position, width = self.field.position.in_features, self.field.position.out_features
            colour = sum(layer.in_features for layer in self.field.colour)
            return 4 * (2 * position + 4 * width + colour) + BYTES_OF_POINT + self.experts * BYTES_OF_EXPERT
        return self.field.bytes_a_sample

    @property
    def box(self) -> Tensor:
        """`[2, 3]`, the scene's."""
        return self.field.space.box if self.outside is None else self.outside.box

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: the field's groups, with those of proposals, and a background's heads."""
        groups = {name: list(parameters) for name, parameters in self.field.parameter_groups().items()}
        more = {} if self.proposal is None else self.proposal.parameter_groups()
        for name, parameters in more.items():
            groups.setdefault(name, []).extend(parameters)
        if self.outside is not None:
            groups.setdefault("heads", []).extend(self.outside.parameters())
        return groups

    def place(self, scene: Scene) -> None:
        """Take box, distances and background of a scene.

        Raises:
            ValueError: a field has embeddings, but not one for each appearance of the training pictures; or, with a
                background field, the cameras have no range along an axis.
        """
        wanted = len(scene.appearance_ids[scene.splits["train"]].unique())
        outside = None if self.outside is None else self.outside.field
        for name, field in (("field", self.field), ("background_field", outside)):
            embedding = None if field is None else field.appearance
            if embedding is not None and embedding.num_embeddings != wanted:  # of more, some were noise in their mean
                given = embedding.num_embeddings
                raise ValueError(f"{name}.appearances is {given}; of scene {scene.name!r} it must be {wanted}, or 0")
        box = scene.box
        if self.outside is not None:
            self.outside.place(scene)
            box = self.outside.ellipsoid.box
        self.field.space.box.copy_(box)
        if self.occupancy is not None:
            self.occupancy.box.copy_(box)
        self.near.fill_(scene.near)
        self.far.fill_(scene.far)
        self.background.copy_(torch.tensor(scene.background or (0.0, 0.0, 0.0)))

    def march(self, origins: Tensor, directions: Tensor, jitter: Tensor | None = None) -> Marched:
        """Samples of rays `[R, 3]`; `jitter` `[R]` shifts each ray's by a part of a step, or of a bin."""
        if self.proposal is not None:
            return self.propose(origins, directions, self.spans(origins, directions), jitter).samples
        options = {"step": self.step, "cone_angle": self.cone_angle, "jitter": jitter}
        return self.occupancy.march(origins, directions, *self._ends(origins, directions), **options)

    def _ends(self, origins: Tensor, directions: Tensor) -> tuple[float, Tensor | float]:
        """Between what distances rays are sampled."""
        near, far = float(self.near), float(self.far)
        return near, far if self.outside is None else self.outside.ends(origins, directions, near, far)

    def spans(self, origins: Tensor, directions: Tensor) -> Spans:
        """Where rays `[R, 3]` may have samples, with `sampler` "proposal"."""
        return self.proposal.spans(origins, directions, *self._ends(origins, directions), self.field.space)

    def propose(
        self,
        origins: Tensor,
        directions: Tensor,
        spans: Spans,
        jitter: Tensor | None = None,
        training_step: int | None = None,
    ) -> Proposed:
        """Samples with `sampler` "proposal", and what its losses are of; see `ProposalSampler`."""
        return self.proposal(origins, directions, spans, self.field.space, jitter, training_step)

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

    def behind(
        self,
        origins: Tensor,
        directions: Tensor,
        jitter: Tensor | None = None,
        appearance: Tensor | int | None = None,
    ) -> Tensor:
        """Colours behind the foreground, `[3]` for all rays or `[R, 3]`; arguments as of `ask`, and a ray's jitter."""
        if self.outside is None:
            return self.background
        return self.outside(origins, directions, self.background, jitter, appearance)

    def composite(self, said: FieldOutput, samples: Marched, behind: Tensor | None = None) -> Composited:
        """What samples make of a ray; `behind` as of the method, the scene's colour if None."""
        behind = self.background if behind is None else behind
        return composite(said.density, said.colour, *samples, background=behind)

    def update_occupancy(self, number: int, generator: torch.Generator | None = None) -> bool:
        """Look at the occupancy grid's cells again if step `number` is one at which that is done.

        The field is asked as in evaluation: without noise, and without a capacity that would drop points. With another
        sampler there is no grid to look at.
        """
        if self.occupancy is None:
            return False

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
            memory: bytes that activations may take, about: half of it bounds how many rays are marched at once, by the
                most samples that one may have, and half how many samples the field is asked for. A ray is drawn whole,
                even if its samples alone take more.

        Raises:
            ValueError: rays are none, of another shape, or hold NaN or infinity (on CPU: on GPUs, where to look would
                be to wait, they mean nothing), or memory is less than twice what a sample takes.
        """
        check_whole("memory", memory, 2 * self.bytes_a_sample)
        if origins.dim() != 2 or origins.shape[1] != 3 or directions.shape != origins.shape or not len(origins):
            shapes = f"{tuple(origins.shape)} and {tuple(directions.shape)}"
            raise ValueError(f"origins and directions have shapes {shapes}; both must be (R, 3), of one ray at least")
        drawn, most = None, min(SAMPLES_AT_ONCE, memory // 2 // self.bytes_a_sample)
        at_once = max(1, min(RAYS_AT_ONCE, memory // 2 // self._bytes_a_ray))
        for first in range(0, len(origins), at_once):
            some = slice(first, first + at_once)
            for rays, portion in portions(self.march(origins[some], directions[some]), most):
                part = self._draw(origins[some][rays], directions[some][rays], portion, appearance)
                drawn = part.room_for(len(origins)) if drawn is None else drawn  # once: small pieces fragment memory
                drawn.put(slice(first + rays.start, first + rays.stop), part)
        return drawn

    @property
    def _bytes_a_ray(self) -> int:
        """At most, about, beside the field: of its samples, of proposals, and of the background behind it."""
        if self.proposal is None:
            box, levels = self.occupancy.box, len(self.occupancy.occupied)
            longest = float((box[1] - box[0]).norm()) * 2.0 ** (levels - 1)
            steps = most_steps(float(self.near), float(self.far), longest, self.step, self.cone_angle)
            needed = BYTES_A_MARCHED_SAMPLE * steps
        else:
            needed = self.bytes_a_sample * self.proposal.most_samples
        if self.outside is not None:
            position = self.outside.field.position
            widest = max(layer.in_features for layer in position) + 3 * position[0].out_features
            needed = max(needed, 4 * 2 * widest * self.outside.samples)
        return needed

    def _draw(self, origins: Tensor, directions: Tensor, samples: Marched, appearance: int | None) -> Drawn:
        said = self.ask(origins, directions, samples, appearance)
        made = self.composite(said, samples, self.behind(origins, directions, appearance=appearance))
        experts = None
        if self.experts:
            one_hot = torch.nn.functional.one_hot(said.expert, self.experts).to(made.weights.dtype)
            experts = composite(said.density, one_hot, *samples).colour
        depth = expected_depth(made.depth, made.opacity)
        met = made.opacity > torch.finfo(torch.float32).eps
        return Drawn(made.colour.clamp(0, 1), made.opacity, depth.masked_fill(~met, torch.inf), experts)

    def draw_image(self, cameras: Cameras, index: int, appearance: int | None = None, **options: Any) -> Drawn:
        """`draw` of all pixels of a camera's picture, `[H, W, ...]`.

        Raises:
            ValueError: there is no camera of that number, or as `draw`.
        """
        check_whole("index", index, 0, len(cameras) - 1)
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


def most_steps(near: float, far: float, longest: float, step: float, cone_angle: float) -> int:
    """At most so many samples has a ray between two distances, of which it may spend no more than `longest` in a box.

    Args:
        step, cone_angle: a sample at distance t is as long as the larger of step and cone_angle t.
    """
    if far <= near:
        return 1
    grows = math.inf if cone_angle == 0 else step / cone_angle  # from that distance on
    even = max(0.0, min(far, grows) - near) / step
    if far > grows:
        even += math.log(far / max(near, grows)) / math.log1p(cone_angle)
    return math.ceil(min(even, longest / step)) + 1


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
