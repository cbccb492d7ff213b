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
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from generation.argument_checks import check_numbers
from generation.atomic_files import prepare_output, write_json
from generation.radiance_field.city_scene import load_city
from generation.radiance_field.district_city import City
from generation.radiance_field.heads import put_back
from generation.radiance_field.renderer import Renderer, first_rays, ray_of, rays_within
from generation.radiance_field.switch_nerf import ExpertPerceptrons
from kernels.expert_dispatch import Routing, combine, dispatch, load_balance_loss, route
from kernels.hash_encoding import HashGrid, hash_encoding
from kernels.interleaved_timing import Timing, machine, print_table, ratio, time_interleaved
from kernels.native.memory import keep_freed_memory
from kernels.occupancy_grid import march
from kernels.volume_rendering import composite

SECTIONS = {
    "encoding": "Hash encoding, {levels} levels of 2 features, {points} random points, float32",
    "encoding-kept": "Hash encoding, freed memory kept",
    "threads": "Hash encoding on one thread and on two, forward and backward, by wall time",
    "mixture": "Eight grids of 2^{eighth} against one of 2^{whole}, forward and backward",
    "experts": "Forward and backward by the number of experts",
    "rendering": "Marching and compositing of a training step's rays in the city",
    "dispatch": "Routing, sorting and putting back beside the experts, forward and backward",
    "step": "A training step of the city, by part",
}
CORNERS = ((1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1, 0))
SMALL_POINTS = 4096  # of the comparisons
SWITCH_NERF = {"experts": 8, "width": 256, "layers": 7, "skips": (3,)}
CITY, CONFIG = City(), "generation/city_hmohe.yaml"
RAYS, JITTERED_SEED = 4096, 0


@dataclass
class Run:
    """How to measure.

    Attributes:
        seconds: about how long the rounds of a row take.
        clock: see `time_interleaved`.
        levels, points: of the hash grids.
        tables: log2 of their rows a level.
        samples: of a training step.
        switch_points: that the experts of Switch-NeRF are given.
        bars: what is asked and what was found.
    """

    seconds: float
    clock: Callable[[], float]
    levels: int
    points: int
    tables: list[int]
    samples: int
    switch_points: int
    bars: list[dict[str, Any]]

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


def check_encoding(levels: int, log2_table_size: int) -> None:
    """Exit unless features and gradients are those of indexing, and in our convention those of the `torch` backend."""
    points, upstream = torch.rand(SMALL_POINTS, 3), torch.randn(SMALL_POINTS, 2 * levels)
    size = {"levels": levels, "log2_table_size": log2_table_size}
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


def measure_encoding(run: Run, kept: bool = False) -> list[dict]:
    rows = []
    points = torch.rand(run.points, 3)
    for log2_table_size in run.tables:
        grids = {c: HashGrid(levels=run.levels, log2_table_size=log2_table_size, convention=c)
                 for c in ("tiny-cuda-nn", "nerfstudio")}  # fmt: skip
        rivals = {
            "ours": Encoding(hash_encoding, points, grids["tiny-cuda-nn"]),
            "ours, same numbers": Encoding(hash_encoding, points, grids["nerfstudio"]),
            "indexing": Encoding(indexing, points, grids["nerfstudio"]),
        }
        for pass_name in ("forward", "both"):
            timings = run.time({name: getattr(rival, pass_name) for name, rival in rivals.items()}, fewest=3)
            own = run.time({"ours": getattr(rivals["ours"], pass_name)})["ours"].median  # the rival leaves few rounds
            faster = ratio(timings["indexing"], timings["ours"])
            name = "forward" if pass_name == "forward" else "forward and backward"
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
            if pass_name == "both":
                memory = ", memory kept" if kept else ""
                run.expect(f"hash encoding 2^{log2_table_size}{memory}, times faster", faster, least=45.0)
    return rows


def measure_threads(run: Run) -> list[dict]:
    rows = []
    before = torch.get_num_threads()
    for log2_table_size in run.tables:
        grid = HashGrid(levels=run.levels, log2_table_size=log2_table_size)
        encoding = Encoding(hash_encoding, torch.rand(run.points, 3), grid)

        def with_threads(count: int, encoding: Encoding = encoding) -> None:
            torch.set_num_threads(count)
            encoding.both()

        counts = {"one": partial(with_threads, 1), "two": partial(with_threads, 2)}
        timings = time_interleaved(counts, seconds=run.seconds, rounds=(5, 200))
        torch.set_num_threads(before)
        scaling = ratio(timings["one"], timings["two"])
        best = min(timings["one"].seconds) / min(timings["two"].seconds)
        rows.append({"rows a level": f"2^{log2_table_size}", "one_ms": 1e3 * timings["one"].median,
                     "two_ms": 1e3 * timings["two"].median, "scaling": scaling, "scaling of the fastest": best})  # fmt: skip
        run.expect(f"hash encoding 2^{log2_table_size}, two threads", scaling, least=1.8)
    return rows


def ranges(experts: int) -> list[tuple[float, float]]:
    """Of the field: finest levels half an octave apart, from 2^11 on, at most 2^14.5."""
    return [(16.0, 2.0 ** (11 + expert % 8 / 2)) for expert in range(experts)]


def measure_mixture(run: Run) -> list[dict]:
    points, eighth = torch.rand(run.points, 3), max(run.tables) - 3
    expert = torch.randint(8, (run.points,))
    whole = HashGrid(levels=run.levels, log2_table_size=eighth + 3)
    mixture = HashGrid(ranges(8), levels=run.levels, log2_table_size=eighth)
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
            grid = HashGrid([(16, 2048)] * experts, levels=run.levels, log2_table_size=size)
            expert = torch.randint(experts, (run.points,)).sort().values
            encodings[experts] = Encoding(hash_encoding, points, grid, expert=expert)
        timings = run.time({str(experts): encoding.both for experts, encoding in encodings.items()})
        row = {f"{experts}_ns": 1e9 * timings[str(experts)].median / run.points for experts in counts}
        rows.append({"held constant": held, "rows a level": f"2^{sizes[0]} to 2^{sizes[-1]}"} | row)
        times = list(row.values())
        run.expect(f"16 experts by one, constant {held}, time a point", times[-1] / times[0], most=1.1)
    return rows


class CityStep:
    """A training step of the city's configuration, its rays and samples; cells are occupied where surfaces are."""

    def __init__(self, samples: int):
        settings = yaml.safe_load((files("configs") / CONFIG).read_text())["model"]["init_args"]
        self.renderer = Renderer(*(settings[name] for name in ("kind", "field", "occupancy", "step"))).train()
        scene = load_city(CITY)
        self.renderer.place(scene)
        generator = torch.Generator().manual_seed(JITTERED_SEED)
        pictures = [scene.cameras.image_rays(int(frame)) for frame in scene.splits["train"]]
        origins, directions = (torch.cat([x.reshape(-1, 3) for x in part]) for part in zip(*pictures, strict=True))
        depths = scene.depths[scene.splits["train"]].flatten()
        met = depths.isfinite()
        self._occupy(origins[met] + depths[met, None] * directions[met])
        drawn = torch.randint(len(origins), (RAYS,), generator=generator)
        self.origins, self.directions = origins[drawn], directions[drawn]
        self.jitter = torch.rand(RAYS, generator=generator)
        self.wanted = scene.images[scene.splits["train"]].flatten(0, 2)[drawn][:, :3] / 255
        marched = self.march()
        self.rays = rays_within(marched.offsets, samples)
        self.samples = first_rays(marched, self.rays)
        ray, middle = ray_of(self.samples), (self.samples.start + self.samples.end) / 2
        self.along = self.directions[ray]
        self.unit = self.renderer.field.space(self.origins[ray] + middle[:, None] * self.along)

    def _occupy(self, surface: Tensor) -> None:
        """Cells that hold points `[N, 3]` of the world, and their neighbours."""
        grid = self.renderer.occupancy
        sizes = torch.tensor(grid.occupied.shape[1:])
        cells = ((surface - grid.box[0]) / (grid.box[1] - grid.box[0]) * sizes).long().clamp(min=0).minimum(sizes - 1)
        held = torch.zeros(grid.occupied.shape)
        held[(0, *cells.T)] = 1
        grid.occupied.copy_(F.max_pool3d(held, 3, 1, 1) > 0)

    def march(self, backend: str | None = None):
        occupancy, near, far = self.renderer.occupancy, float(self.renderer.near), float(self.renderer.far)
        options = {"step": self.renderer.step, "jitter": self.jitter, "backend": backend}
        return march(self.origins, self.directions, near, far, occupancy.occupied, occupancy.box, **options)

    def composite(self, density: Tensor, colour: Tensor, backend: str | None = None):
        return composite(density, colour, *self.samples, background=self.renderer.background, backend=backend)

    def error(self, colour: Tensor) -> Tensor:
        return F.smooth_l1_loss(colour, self.wanted[: self.rays], beta=0.1)

    def whole(self) -> None:
        """From rays to gradients."""
        marched = first_rays(self.march(), self.rays)
        said = self.renderer.ask(self.origins[: self.rays], self.directions[: self.rays], marched)
        (self.error(self.renderer.composite(said, marched).colour) + 1e-2 * said.balance_loss).backward()


def check_rendering(step: CityStep) -> None:
    """Exit unless samples, colours and gradients of the kernels are those of the `torch` backends."""
    marched = [[x.double() for x in step.march(backend)] for backend in ("torch", "native")]
    expect_equal("marching", *marched, 1e-6)
    count = len(step.samples.start)
    density, colour = torch.rand(count).mul_(20).requires_grad_(), torch.rand(count, 3, requires_grad=True)
    results = []
    for backend in ("torch", "native"):
        made = step.composite(density, colour, backend).colour
        gradients = torch.autograd.grad(step.error(made), (density, colour))
        results.append([made.detach(), *gradients])
    expect_equal("compositing", *results, 1e-4)


def measure_rendering(run: Run, step: CityStep) -> list[dict]:
    count = len(step.samples.start)
    density, colour = torch.rand(count).mul_(20).requires_grad_(), torch.rand(count, 3, requires_grad=True)

    def composited(backend: str) -> None:
        torch.autograd.grad(step.error(step.composite(density, colour, backend).colour), (density, colour))

    rows = []
    for name, form, rays in (
        ("marching", step.march, RAYS),
        ("compositing, forward and backward", composited, step.rays),
    ):
        timings = run.time({backend: partial(form, backend) for backend in ("native", "torch")})
        rows.append({"of": name, "rays": rays, "samples": count if rays == step.rays else len(step.march().start),
                     "native_ms": 1e3 * timings["native"].median, "torch_ms": 1e3 * timings["torch"].median,
                     "times faster": ratio(timings["torch"], timings["native"])})  # fmt: skip
    return rows


def measure_dispatch(run: Run, step: CityStep) -> list[dict]:
    return [*_city_dispatch(run, step), _switch_dispatch(run)]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def sorted_expert(routing: Routing) -> Tensor:
    return routing.indices[0].index_select(0, routing.places.order)


def _city_dispatch(run: Run, step: CityStep) -> list[dict]:
    """Points and directions go to the experts, densities and colours come back."""
    field, unit = step.renderer.field, step.unit
    scores = _leaf(field.gate(unit))
    routing = route(scores.detach())
    rows, along, expert = dispatch(unit, routing).tokens, dispatch(step.along, routing).tokens, sorted_expert(routing)
    gate = _leaf(torch.rand(len(unit)))
    said = _leaf(torch.rand(len(unit), 4))

    def overhead() -> None:
        chosen = route(scores)
        sent = dispatch((chosen.gates[0] * field.gate_scale)[:, None], chosen).tokens
        dispatch(unit, chosen), dispatch(step.along, chosen), sorted_expert(chosen)
        back = [put_back(said[:, :1], chosen), put_back(said[:, 1:], chosen)]
        torch.autograd.backward([sent, *back], [sent.detach(), *(x.detach() for x in back)])

    def grids() -> Tensor:
        return field.experts(rows, expert, gate)

    def experts() -> None:
        features = grids()
        features.backward(features.detach())

    def with_heads() -> None:
        raw = field.base(grids())
        density, colour = field.density_of(raw), field.colour_of(raw, along, None)
        torch.autograd.backward([density, colour], [density.detach(), colour.detach()])

    timings = run.time({"dispatch": overhead, "experts": experts, "heads": with_heads})
    return [_share(run, f"city, hash experts{more}", len(unit), timings["dispatch"], timings[name])
            for name, more in (("experts", " alone"), ("heads", " and their heads"))]  # fmt: skip


def _switch_dispatch(run: Run) -> dict:
    count, width = run.switch_points, SWITCH_NERF["width"]
    experts = ExpertPerceptrons(**SWITCH_NERF)
    tokens, scores = _leaf(torch.randn(count, width)), _leaf(torch.randn(count, SWITCH_NERF["experts"]))
    sent = dispatch(tokens.detach(), route(scores.detach()))

    def overhead() -> None:
        routing = route(scores)
        back = combine(dispatch(tokens, routing).tokens, routing)
        back.backward(back.detach())

    def mixture() -> None:
        out = experts(sent.tokens, sent.starts)
        out.backward(out.detach())

    timings = run.time({"dispatch": overhead, "experts": mixture}, fewest=3)
    return _share(run, f"Switch-NeRF, {width} wide", count, timings["dispatch"], timings["experts"])


def _share(run: Run, name: str, points: int, overhead: Timing, experts: Timing) -> dict:
    percent = 100 * ratio(overhead, experts)
    run.expect(f"dispatch of {name}, percent of the experts' time", percent, most=15.0)
    times = {"dispatch_ms": 1e3 * overhead.median, "experts_ms": 1e3 * experts.median}
    return {"of": name, "points": points} | times | {"percent": percent}


def measure_step(run: Run, step: CityStep) -> list[dict]:
    """Each part alone on what it has in the step, forward and backward, and the whole."""
    renderer, field, unit = step.renderer, step.renderer.field, step.unit
    optimizer = torch.optim.Adam(renderer.parameters(), 1e-4, fused=True)
    routing = route(field.gate(unit).detach())
    rows, along, expert = dispatch(unit, routing).tokens, dispatch(step.along, routing).tokens, sorted_expert(routing)
    gate = _leaf(dispatch(routing.gates[0][:, None], routing).tokens[:, 0])
    features = _leaf(field.experts(rows, expert, gate))
    density, colour = _leaf(torch.rand(len(unit))), _leaf(torch.rand(len(unit), 3))

    def gating() -> None:
        chosen = route(field.gate(unit))
        (load_balance_loss(chosen.probabilities, chosen.indices[0]) + chosen.gates.sum()).backward()

    def experts() -> None:
        made = field.experts(rows, expert, gate)
        made.backward(features.detach())

    def heads() -> None:
        raw = field.base(features)
        made = [put_back(field.density_of(raw)[:, None], routing), put_back(field.colour_of(raw, along, None), routing)]
        torch.autograd.backward(made, [x.detach() for x in made])

    def composited() -> None:
        step.error(step.composite(density, colour).colour).backward()

    def optimise() -> None:
        optimizer.step()

    def whole() -> None:
        optimizer.zero_grad()
        step.whole()
        optimizer.step()

    whole()  # gradients that the optimiser can take
    parts = {"marching": step.march, "gate": gating, "experts": experts, "heads": heads,
             "compositing": composited, "optimiser": optimise}  # fmt: skip
    timings = run.time(parts | {"whole step": whole})
    total = timings["whole step"].median
    found = [{"part": name, "ms": 1e3 * timing.median, "percent": 100 * timing.median / total}
             for name, timing in timings.items()]  # fmt: skip
    rest = total - sum(timings[name].median for name in parts)
    found.insert(-1, {"part": "everything else", "ms": 1e3 * rest, "percent": 100 * rest / total})
    return found


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
    parser.add_argument("--levels", type=int, default=16, help="of the hash grids (default: %(default)s)")
    tables = "log2 of the rows of a hash grid's level (default: 19 14)"
    parser.add_argument("--tables", type=int, nargs="+", default=[19, 14], help=tables)
    parser.add_argument("--samples", type=int, default=1 << 15, help="of a training step (default: %(default)s)")
    switch = "points for the experts of Switch-NeRF (default: %(default)s)"
    parser.add_argument("--switch-points", type=int, default=1 << 13, help=switch)
    output = "JSON file (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/radiance_field.json"), help=output)
    options = parser.parse_args(arguments)
    limits = {"threads": (1, 4096), "seconds": (0, 1e6), "points": (1, 1 << 24), "levels": (1, 32), "tables": (8, 24)}
    check_numbers(parser, options, limits | {"samples": (1, 1 << 24), "switch_points": (1, 1 << 24)})
    prepare_output("--output", options.output)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # The machine may be busy with other things: one thread is timed by the processor's clock.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    sizes = {name: getattr(options, name) for name in ("seconds", "levels", "points", "samples", "switch_points")}
    run = Run(clock=clock, tables=options.tables, bars=[], **sizes)
    for log2_table_size in run.tables:
        check_encoding(run.levels, log2_table_size)
    step = None
    if not {"rendering", "dispatch", "step"}.isdisjoint(options.only):
        step = CityStep(run.samples)
        check_rendering(step)
    print(f"correct: the numbers are those of the rivals; {options.threads} thread(s)")
    report = {"machine": machine(), "threads": options.threads}
    sections = {
        "encoding": partial(measure_encoding, run),
        "encoding-kept": partial(measure_encoding, run, kept=True),
        "threads": partial(measure_threads, run),
        "mixture": partial(measure_mixture, run),
        "experts": partial(measure_experts, run),
        "rendering": partial(measure_rendering, run, step),
        "dispatch": partial(measure_dispatch, run, step),
        "step": partial(measure_step, run, step),
    }
    whole = max(run.tables)
    named = {"levels": run.levels, "points": run.points, "whole": whole, "eighth": whole - 3}
    for name in [name for name in SECTIONS if name in options.only]:
        if name != "encoding":
            keep_freed_memory()  # as `fit` does, for good
        report[name] = rows = sections[name]()
        print_table(SECTIONS[name].format(**named), tuple(rows[0]), [tuple(row.values()) for row in rows])
        sys.stdout.flush()
    if run.bars:
        report["bars"] = run.bars
        print_table("What is asked", tuple(run.bars[0]), [tuple(bar.values()) for bar in run.bars])
    write_json(options.output, report)
    print(f"\nwritten to {options.output}")
