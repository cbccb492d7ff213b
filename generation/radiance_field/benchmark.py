"""`python -m generation benchmark radiance-field`: hash grids, rendering, dispatch and a training step beside rivals.

Hash grids are timed beside nerfstudio's way of reading them, which indexes one tensor with another in plain PyTorch;
compositing and marching beside this suite's own `torch` backends. Nothing is timed before the numbers agree. Rivals run
in turn in one process, ratios are medians over rounds, and one thread is timed by the processor's clock, which other
programs disturb least. Memory is the allocator's as it comes in "encoding"; from "encoding-kept" on what is freed is
kept, as `python -m generation fit` has it. Experts are sorted, as the field has them. What the project asks of the
numbers comes last, with what was found.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from generation.argument_checks import check_numbers
from generation.radiance_field.city_scene import load_city
from generation.radiance_field.district_city import City
from generation.radiance_field.heads import put_back
from generation.radiance_field.renderer import Renderer, first_rays, ray_of, rays_within
from generation.radiance_field.switch_nerf import ExpertPerceptrons
from kernels.expert_dispatch import Routing, combine, dispatch, route
from kernels.hash_encoding import HashGrid, hash_encoding
from kernels.interleaved_timing import Timing, machine, print_table, ratio, time_interleaved
from kernels.native.memory import keep_freed_memory
from kernels.occupancy_grid import Marched
from kernels.volume_rendering import composite
from training_runs.atomic_files import prepare_output, write_json

CORNERS = ((1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1, 0))
SMALL_POINTS = 4096  # of the comparisons
LEVELS = 16
SWITCH_NERF = {"experts": 8, "width": 256, "layers": 7, "skips": (3,)}
SWITCH_POINTS = 1 << 13
CITY, CONFIG = City(), "generation/city_hmohe.yaml"
RAYS = 4096


class Run:
    """How to measure, and what is asked.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace):
        self.seconds, self.points, self.tables = options.seconds, options.points, options.tables
        # The machine may be busy with other things: one thread is timed by the processor's clock.
        self.clock = time.process_time if options.threads == 1 else time.perf_counter
        self.bars: list[dict[str, Any]] = []
        self.step: CityStep | None = None
        if not {"rendering", "dispatch", "step"}.isdisjoint(options.only):
            self.step = CityStep(options.samples)

    def time(self, rivals: dict[str, Callable[[], object]], fewest: int = 5) -> dict[str, Timing]:
        return time_interleaved(rivals, seconds=self.seconds, rounds=(fewest, 200), clock=self.clock)

    def expect(self, what: str, found: float, *, least: float = 0.0, most: float = float("inf")) -> None:
        bar = f"at least {least}" if least else f"at most {most}"
        self.bars.append({"of": what, "found": found, "bar": bar, "met": "yes" if least <= found <= most else "no"})


def indexing(points: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """The features of a grid in nerfstudio's convention, (P, L F), as its `HashEncoding` computes them in PyTorch."""
    scales = torch.tensor([level.scale for level in grid.rows])
    size = grid.rows[0].size
    offsets = torch.arange(grid.levels) * size
    primes = torch.tensor([1, 2654435761, 805459861])
    scaled = points[:, None, :] * scales[:, None]  # (P, L, 3)
    lower, upper = scaled.floor().int(), scaled.ceil().int()
    along_x, along_y, along_z = (scaled - lower).split(1, -1)

    def row(corner: tuple[int, ...]) -> Tensor:
        vertex = torch.cat([(upper if up else lower)[..., d : d + 1] for d, up in enumerate(corner)], -1) * primes
        mixed = torch.bitwise_xor(torch.bitwise_xor(vertex[..., 0], vertex[..., 1]), vertex[..., 2])
        return mixed % size + offsets

    read = [table[row(corner)] for corner in CORNERS]
    edges = [read[a] * along_x + read[b] * (1 - along_x) for a, b in ((0, 3), (1, 2), (5, 6), (4, 7))]
    far, near = (edges[a] * along_y + edges[b] * (1 - along_y) for a, b in ((0, 1), (3, 2)))
    return (far * along_z + near * (1 - along_z)).flatten(1)


def expect_equal(what: str, wanted: list[Tensor], actual: list[Tensor], tolerance: float) -> None:
    """Exit unless tensors agree, relative to the largest number of each."""
    for w, a in zip(wanted, actual, strict=True):
        if w.shape != a.shape or (w.numel() and (w - a).abs().max() > tolerance * w.abs().max().clamp(min=1e-6)):
            sys.exit(f"{what}: the numbers are not those of the rival")


def check_encoding(log2_table_size: int) -> None:
    """Exit unless features and gradients are those of indexing, and in our convention those of the `torch` backend."""
    points, upstream = torch.rand(SMALL_POINTS, 3), torch.randn(SMALL_POINTS, 2 * LEVELS)
    size = {"levels": LEVELS, "log2_table_size": log2_table_size}
    expert, gate = torch.randint(3, (SMALL_POINTS,)), torch.rand(SMALL_POINTS)
    mixture = {"grid": HashGrid(((16, 64), (16, 512), (16, 2048)), **size), "expert": expert, "gate": gate}
    for name, arguments, rival, tolerance in (
        ("nerfstudio's convention", {"grid": HashGrid(convention="nerfstudio", **size)}, indexing, 2e-5),
        # A position at the finest scale, 2047, is exact to 2^-13 in float32: rows of weights near 0 and 1 differ so.
        ("tiny-cuda-nn's convention", {"grid": HashGrid(**size)}, partial(hash_encoding, backend="torch"), 1e-3),
        ("the mixture", mixture, partial(hash_encoding, backend="torch"), 1e-3),
    ):
        grid = arguments["grid"]
        table = torch.randn(grid.entries, grid.features, requires_grad=True)
        found = [form(points, table, **arguments) for form in (rival, hash_encoding)]
        gradients = [torch.autograd.grad(features, table, upstream) for features in found]
        results = [[features.detach(), *of_table] for features, of_table in zip(found, gradients, strict=True)]
        expect_equal(f"hash encoding in {name}", *results, tolerance)


class Encoding:
    """A grid with a table, points and an upstream gradient as a linear layer gives it; calls take nothing."""

    def __init__(self, form: Callable[..., Tensor], points: Tensor, grid: HashGrid, **options: Any):
        self.table = grid.initialize().requires_grad_()
        self.form, self.arguments = partial(form, grid=grid, **options), (points, self.table)
        self.upstream = torch.randn_like(self.forward())

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.form(*self.arguments)

    def both(self) -> None:
        torch.autograd.grad(self.form(*self.arguments), self.table, self.upstream)


def measure_encoding(run: Run, memory: str = "") -> list[dict]:
    rows = []
    points = torch.rand(run.points, 3)
    for log2_table_size in run.tables:
        grids = {c: HashGrid(levels=LEVELS, log2_table_size=log2_table_size, convention=c)
                 for c in ("tiny-cuda-nn", "nerfstudio")}  # fmt: skip
        rivals = {
            "ours": Encoding(hash_encoding, points, grids["tiny-cuda-nn"]),
            "ours, same numbers": Encoding(hash_encoding, points, grids["nerfstudio"]),
            "indexing": Encoding(indexing, points, grids["nerfstudio"]),
        }
        for name, passes in (("forward", "forward"), ("forward and backward", "both")):
            timings = run.time({rival: getattr(encoding, passes) for rival, encoding in rivals.items()}, fewest=3)
            own = run.time({"ours": getattr(rivals["ours"], passes)})["ours"].median  # the rival leaves few rounds
            faster = ratio(timings["indexing"], timings["ours"])
            rows.append(
                {
                    "rows a level": f"2^{log2_table_size}",
                    "of": name,
                    "ours_ms": 1e3 * own,
                    "ours_Mpoints/s": run.points / own / 1e6,
                    "indexing_ms": 1e3 * timings["indexing"].median,
                    "times faster": faster,
                    "times faster, same numbers": ratio(timings["indexing"], timings["ours, same numbers"]),
                }
            )
            if passes == "both":
                run.expect(f"hash encoding 2^{log2_table_size}{memory}, times faster", faster, least=45.0)
    return rows


def measure_scaling(run: Run) -> list[dict]:
    rows = []
    before = torch.get_num_threads()
    for log2_table_size in run.tables:
        grid = HashGrid(levels=LEVELS, log2_table_size=log2_table_size)
        encoding = Encoding(hash_encoding, torch.rand(run.points, 3), grid)

        def with_threads(count: int, encoding: Encoding = encoding) -> None:
            torch.set_num_threads(count)
            encoding.both()

        counts = {"one": partial(with_threads, 1), "two": partial(with_threads, 2)}
        timings = time_interleaved(counts, seconds=run.seconds, rounds=(5, 200))
        torch.set_num_threads(before)
        scaling = ratio(timings["one"], timings["two"])
        best = min(timings["one"].seconds) / min(timings["two"].seconds)
        row = {f"{count}_ms": 1e3 * timing.median for count, timing in timings.items()}
        row |= {"scaling": scaling, "of the fastest runs": best}
        rows.append({"rows a level": f"2^{log2_table_size}"} | row)
        run.expect(f"hash encoding 2^{log2_table_size}, two threads", scaling, least=1.8)
    return rows


def measure_mixture(run: Run) -> list[dict]:
    points, eighth = torch.rand(run.points, 3), max(run.tables) - 3
    expert = torch.randint(8, (run.points,))
    whole = HashGrid(levels=LEVELS, log2_table_size=eighth + 3)
    finest = [2.0 ** (11 + number / 2) for number in range(8)]  # as the field has them
    mixture = HashGrid([(16, most) for most in finest], levels=LEVELS, log2_table_size=eighth)
    encodings = {
        "one grid": Encoding(hash_encoding, points, whole),
        "8 experts, points sorted": Encoding(hash_encoding, points, mixture, expert=expert.sort().values),
        "8 experts, points as they come": Encoding(hash_encoding, points, mixture, expert=expert),
    }
    timings = run.time({name: encoding.both for name, encoding in encodings.items()})
    costs = {name: ratio(timing, timings["one grid"]) for name, timing in timings.items()}
    run.expect("8 experts by one grid of their size", costs["8 experts, points sorted"], most=1.0)
    return [{"grid": name, "table_MiB": encodings[name].table.numel() / 2**18, "ms": 1e3 * timing.median,
             "by one grid": costs[name]} for name, timing in timings.items()]  # fmt: skip


def measure_experts(run: Run) -> list[dict]:
    points, most = torch.rand(run.points, 3), max(run.tables)
    counts = (1, 2, 4, 8, 16)
    rows = []
    for held, sizes in (
        ("table of an expert", [most - 5] * len(counts)),
        ("table of all", [most - power for power in range(len(counts))]),
    ):
        encodings = {}
        for experts, size in zip(counts, sizes, strict=True):
            grid = HashGrid([(16, 2048)] * experts, levels=LEVELS, log2_table_size=size)
            expert = torch.randint(experts, (run.points,)).sort().values
            encodings[experts] = Encoding(hash_encoding, points, grid, expert=expert)
        timings = run.time({str(experts): encoding.both for experts, encoding in encodings.items()})
        row = {f"{experts}_ns": 1e9 * timings[str(experts)].median / run.points for experts in counts}
        rows.append({"held constant": held, "rows a level": f"2^{sizes[0]} to 2^{sizes[-1]}"} | row)
        times = list(row.values())
        run.expect(f"16 experts by one, constant {held}, time a point", times[-1] / times[0], most=1.1)
    return rows


class CityStep:
    """A training step of the city's configuration, its rays and samples; cells are occupied where surfaces are.

    The parts, forward and backward, are methods that take nothing: each alone on what it has in the step.
    """

    def __init__(self, samples: int):
        settings = yaml.safe_load((files("configs") / CONFIG).read_text())["model"]["init_args"]
        self.beta = settings["beta"]
        self.renderer = Renderer(*(settings[name] for name in ("kind", "field", "occupancy", "step"))).train()
        self.field, scene = self.renderer.field, load_city(CITY)
        self.renderer.place(scene)
        train = scene.splits["train"]
        rays = [[part.reshape(-1, 3) for part in scene.cameras.image_rays(int(frame))] for frame in train]
        origins, directions = (torch.cat(part) for part in zip(*rays, strict=True))
        depths = scene.depths[train].flatten()
        met = depths.isfinite()
        self._occupy(origins[met] + depths[met, None] * directions[met])
        drawn = torch.randint(len(origins), (RAYS,))
        self.origins, self.directions, self.jitter = origins[drawn], directions[drawn], torch.rand(RAYS)
        marched = self.march()
        self.marched, self.rays = len(marched.start), rays_within(marched.offsets, samples)
        self.wanted = scene.images[train].flatten(0, 2)[drawn[: self.rays], :3] / 255
        self.samples = first_rays(marched, self.rays)
        ray, middle = ray_of(self.samples), (self.samples.start + self.samples.end) / 2
        self.along = self.directions[ray]
        self.unit = self.field.space(self.origins[ray] + middle[:, None] * self.along)
        self.density, self.colour = _leaf(torch.rand(len(ray)) * 20), _leaf(torch.rand(len(ray), 3))
        self.scores = _leaf(self.field.gate(self.unit))
        self.routing = route(self.scores.detach())
        self.sorted_unit, self.sorted_along = (dispatch(x, self.routing).tokens for x in (self.unit, self.along))
        self.expert, self.gates = _sorted_expert(self.routing), _leaf(torch.rand(len(ray)))
        self.features = _leaf(self._features())
        self.optimizer = torch.optim.Adam(self.renderer.parameters(), 1e-4, fused=True)

    def _occupy(self, surface: Tensor) -> None:
        """Cells that hold points `[N, 3]` of the world, and their neighbours."""
        grid = self.renderer.occupancy
        sizes = torch.tensor(grid.occupied.shape[1:])
        cells = ((surface - grid.box[0]) / (grid.box[1] - grid.box[0]) * sizes).long().clamp(min=0).minimum(sizes - 1)
        held = torch.zeros(grid.occupied.shape)
        held[(0, *cells.T)] = 1
        grid.occupied.copy_(F.max_pool3d(held, 3, 1, 1) > 0)

    def march(self, backend: str | None = None) -> Marched:
        near, far = float(self.renderer.near), float(self.renderer.far)
        options = {"step": self.renderer.step, "jitter": self.jitter, "backend": backend}
        return self.renderer.occupancy.march(self.origins, self.directions, near, far, **options)

    def gate(self) -> None:
        _back(self.field.gate(self.unit))

    def dispatch(self) -> None:
        """Points and directions go to the experts, densities and colours come back."""
        chosen = route(self.scores)
        sent = dispatch((chosen.gates[0] * self.field.gate_scale)[:, None], chosen).tokens
        dispatch(self.unit, chosen), dispatch(self.along, chosen), _sorted_expert(chosen)
        _back(sent, put_back(self.density[:, None], chosen), put_back(self.colour, chosen))

    def _features(self) -> Tensor:
        return self.field.experts(self.sorted_unit, self.expert, self.gates)

    def experts(self) -> None:
        _back(self._features())

    def heads(self) -> None:
        raw = self.field.base(self.features)
        _back(self.field.density_of(raw), self.field.colour_of(raw, self.sorted_along, None))

    def composite(self, backend: str | None = None) -> list[Tensor]:
        """Colours and gradients."""
        options = {"background": self.renderer.background, "backend": backend}
        colour = composite(self.density, self.colour, *self.samples, **options).colour
        return [colour.detach(), *torch.autograd.grad(self._error(colour), (self.density, self.colour))]

    def _error(self, colour: Tensor) -> Tensor:
        return F.smooth_l1_loss(colour, self.wanted, beta=self.beta)

    def whole(self) -> None:
        self.optimizer.zero_grad()
        samples = first_rays(self.march(), self.rays)
        said = self.renderer.ask(self.origins[: self.rays], self.directions[: self.rays], samples)
        (self._error(self.renderer.composite(said, samples).colour) + 1e-2 * said.balance_loss).backward()
        self.optimizer.step()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _back(*made: Tensor) -> None:
    """Gradients of half the sum of squares."""
    torch.autograd.backward(made, [tensor.detach() for tensor in made])


def _sorted_expert(routing: Routing) -> Tensor:
    return routing.indices[0].index_select(0, routing.places.order)


def check_rendering(step: CityStep) -> None:
    """Exit unless samples, colours and gradients of the kernels are those of the `torch` backends."""
    expect_equal("marching", *([x.double() for x in step.march(form)] for form in ("torch", "native")), 1e-6)
    expect_equal("compositing", *(step.composite(form) for form in ("torch", "native")), 1e-4)


def measure_rendering(run: Run) -> list[dict]:
    step = run.step
    rows = []
    for name, form, rays, samples in (
        ("marching", step.march, RAYS, step.marched),
        ("compositing, forward and backward", step.composite, step.rays, len(step.unit)),
    ):
        timings = run.time({backend: partial(form, backend) for backend in ("native", "torch")})
        times = {f"{backend}_ms": 1e3 * timing.median for backend, timing in timings.items()}
        faster = ratio(timings["torch"], timings["native"])
        rows.append({"of": name, "rays": rays, "samples": samples} | times | {"times faster": faster})
    return rows


def measure_dispatch(run: Run) -> list[dict]:
    step = run.step
    timings = run.time({"dispatch": step.dispatch, "experts": step.experts, "heads": step.heads})
    overhead, experts, heads = timings.values()
    with_heads = Timing([a + b for a, b in zip(experts.seconds, heads.seconds, strict=True)])
    count, width = SWITCH_POINTS, SWITCH_NERF["width"]
    layers = ExpertPerceptrons(**SWITCH_NERF)
    tokens, scores = _leaf(torch.randn(count, width)), _leaf(torch.randn(count, SWITCH_NERF["experts"]))
    sent = dispatch(tokens.detach(), route(scores.detach()))

    def there_and_back() -> None:
        routing = route(scores)
        _back(combine(dispatch(tokens, routing).tokens, routing))

    switch = run.time({"dispatch": there_and_back, "experts": lambda: _back(layers(sent.tokens, sent.starts))}, 3)
    rows = []
    for name, points, spent, on in (
        ("the city's hash experts without their heads", len(step.unit), overhead, experts),
        ("the city's hash experts and heads", len(step.unit), overhead, with_heads),
        (f"Switch-NeRF's experts, {width} wide", count, switch["dispatch"], switch["experts"]),
    ):
        percent = 100 * ratio(spent, on)
        run.expect(f"dispatch, percent of {name}", percent, most=15.0)
        times = {"dispatch_ms": 1e3 * spent.median, "experts_ms": 1e3 * on.median}
        rows.append({"of": name, "points": points} | times | {"percent": percent})
    return rows


def measure_step(run: Run) -> list[dict]:
    step = run.step
    step.whole()  # leaves gradients, for the optimiser
    parts = {
        "marching": step.march,
        "gate": step.gate,
        "dispatch": step.dispatch,
        "experts": step.experts,
        "heads": step.heads,
        "compositing": step.composite,
        "optimiser": step.optimizer.step,
    }
    timings = run.time(parts | {"whole step": step.whole})
    times = {name: 1e3 * timing.median for name, timing in timings.items()}
    whole = times.pop("whole step")
    times |= {"everything else": whole - sum(times.values()), "whole step": whole}
    return [{"part": name, "ms": ms, "percent": 100 * ms / whole} for name, ms in times.items()]


SECTIONS = {
    "encoding": ("Hash encoding, random points", measure_encoding),
    "encoding-kept": ("Hash encoding, freed memory kept", partial(measure_encoding, memory=", memory kept")),
    "scaling": ("Hash encoding on one thread and on two, forward and backward, by wall time", measure_scaling),
    "mixture": ("Eight grids against one, forward and backward", measure_mixture),
    "experts": ("Forward and backward by the number of experts, ns a point", measure_experts),
    "rendering": ("Marching and compositing of a training step's rays in the city", measure_rendering),
    "dispatch": ("Routing, sorting and putting back beside the experts, forward and backward", measure_dispatch),
    "step": ("A training step of the city by part, forward and backward", measure_step),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m generation benchmark radiance-field",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    seconds = "about how long the rounds of a row take, if rivals allow (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=5.0, help=seconds)
    points = "of the hash grids (default: %(default)s); indexing takes seconds for the default"
    parser.add_argument("--points", type=int, default=1 << 18, help=points)
    tables = "log2 of the rows of a hash grid's level (default: 19 14)"
    parser.add_argument("--tables", type=int, nargs="+", default=[19, 14], help=tables)
    parser.add_argument("--samples", type=int, default=1 << 15, help="of a training step (default: %(default)s)")
    output = "JSON file (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/radiance_field.json"), help=output)
    options = parser.parse_args(arguments)
    limits = {"threads": (1, 4096), "seconds": (0, 1e6), "points": (1, 1 << 24), "tables": (8, 24)}
    check_numbers(parser, options, limits | {"samples": (1, 1 << 24)})
    prepare_output("--output", options.output)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    run = Run(options)
    for log2_table_size in run.tables:
        check_encoding(log2_table_size)
    if run.step is not None:
        check_rendering(run.step)
    print(f"correct: the numbers are those of the rivals; {options.threads} thread(s), {run.points} points")
    report = {"machine": machine(), "threads": options.threads, "points": run.points}
    for name, (title, measure) in SECTIONS.items():
        if name not in options.only:
            continue
        if name != "encoding":
            keep_freed_memory()  # as `fit` does, for good
        report[name] = rows = measure(run)
        print_table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])
        sys.stdout.flush()
    if run.bars:
        report["bars"] = run.bars
        print_table("What is asked", tuple(run.bars[0]), [tuple(bar.values()) for bar in run.bars])
    write_json(options.output, report)
    print(f"\nwritten to {options.output}")
