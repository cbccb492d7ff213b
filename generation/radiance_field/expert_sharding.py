"""Experts shared out over processes: each keeps the tables of some, and points travel to the process of their expert.

Mathematics. Of P processes, process r owns experts floor(r E / P) to floor((r + 1) E / P) - 1. Each has points of its
own, sorted by expert, and a copy of gate and heads. In the forward pass its points, with their gates, go to the owners
of their experts (all-to-all), which read their tables; features come back. In the backward pass gradients of features
go the same way as the points, and gradients of gates (and points, where wanted) come back. A table's gradient is made
where the table is, of all points of all processes, and never moves; neither do the table and its optimiser's moments.

With B bytes a number, L F features and D dimensions, a point that is not at home moves

    forward   B (D + 1) + B L F           backward   B L F + B (1 + D if points have gradients)

and (P - 1) / P of the points are not at home, if processes draw points alike. `docs/radiance_field_scale.md` says what
follows from that. A table's gradient is that of the sum of the processes' losses: where gradients of gate and heads are
averaged, as by DDP, divide it by P.

    python -m generation.radiance_field.expert_sharding --processes 4

compares with the field in one piece, on CPU, and prints the bytes that were counted.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from generation.argument_checks import check_numbers, check_whole
from generation.radiance_field.hash_experts import HashExpertField
from generation.radiance_field.single_grid import GridTable
from kernels.hash_encoding import HashGrid, hash_encoding

PHASES = ("forward", "backward")
LIMITS = {
    "processes": (1, 64),
    "experts": (1, 1024),
    "samples": (1, 1 << 22),
    "levels": (1, 32),
    "log2_table_size": (3, 24),
}


def owned(experts: int, rank: int, processes: int) -> range:
    """The experts of a process.

    Raises:
        ValueError: there are fewer experts than processes.
    """
    check_whole("processes", processes, 1)
    if experts < processes:
        raise ValueError(f"experts are {experts}; they must be as many as the {processes} processes, or more")
    return range(rank * experts // processes, (rank + 1) * experts // processes)


class _Exchange(torch.autograd.Function):
    """Rows `[N, C]`, of which the first send[0] go to process 0 and so on: what this one gets, by sender."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], traffic: "Traffic") -> Tensor:
        ctx.send, ctx.receive, ctx.traffic = send, receive, traffic
        return traffic.exchange(rows, send, receive, "forward")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.traffic.exchange(gradient, ctx.receive, ctx.send, "backward"), None, None, None


class Traffic:
    """Sends rows between processes, and counts the bytes that leave this one, by pass.

    Args:
        group: of processes; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.processes = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent = dict.fromkeys(PHASES, 0)

    def exchange(self, rows: Tensor, send: list[int], receive: list[int], phase: str) -> Tensor:
        got = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(got, rows.contiguous(), receive, send, group=self.group)
        self.sent[phase] += (len(rows) - send[self.rank]) * rows[:1].numel() * rows.element_size() if len(rows) else 0
        return got


class ShardedGridTable(nn.Module):
    """The experts' tables of which this process owns some; stands in for `HashExpertField.experts`.

    All processes of the group must call it equally often, with as many points as each has, none included.

    Args:
        whole: all experts, equal on all processes.
        group: of processes; None for all.

    Raises:
        ValueError: there are fewer experts than processes.
    """

    def __init__(self, whole: GridTable, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.whole, self.traffic = whole.grid, Traffic(group)
        experts, processes = self.whole.experts, self.traffic.processes
        mine = owned(experts, self.traffic.rank, processes)
        self.counts = [len(owned(experts, rank, processes)) for rank in range(processes)]  # of experts
        self.grid = HashGrid(
            self.whole.resolutions[mine.start : mine.stop],
            self.whole.dims,
            self.whole.levels,
            self.whole.features,
            self.whole.log2_table_size,
            self.whole.interpolation,
            self.whole.convention,
        )
        self.rows = slice(self.whole.expert_base[mine.start], self.whole.expert_base[mine.stop])
        self.table = nn.Parameter(whole.table.detach()[self.rows].clone())

    def forward(self, points: Tensor, expert: Tensor, gate: Tensor, backend: str | None = None) -> Tensor:
        """Features `[N, L F]` of points `[N, D]` that are sorted by expert."""
        counts = torch.bincount(expert, minlength=self.whole.experts)  # (E)
        of_one = [self.grid.experts] * len(self.counts)
        received = self.traffic.exchange(counts, self.counts, of_one, "forward").view(len(of_one), -1)
        send = [int(of_rank.sum()) for of_rank in counts.split(self.counts)]
        receive = received.sum(1).tolist()
        own = torch.arange(received.shape[1], device=expert.device).repeat(len(receive))
        own = own.repeat_interleave(received.flatten())
        points, gate = (_Exchange.apply(rows, send, receive, self.traffic) for rows in (points, gate))
        features = hash_encoding(points, self.table, self.grid, expert=own, gate=gate, backend=backend)
        return _Exchange.apply(features, receive, send, self.traffic)


def shard_experts(field: HashExpertField, group: dist.ProcessGroup | None = None) -> ShardedGridTable:
    """Leave this process some of the experts of a field that is equal on all; returns what took their place.

    Raises:
        ValueError: there are fewer experts than processes.
    """
    field.experts = ShardedGridTable(field.experts, group)
    return field.experts


def compare(rank: int, processes: int, meeting: str, options: argparse.Namespace) -> None:
    """One process: a field in one piece on all points, and in pieces on this process's share; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        whole, pieces = (_field(options) for _ in range(2))
        table = shard_experts(pieces)
        torch.manual_seed(1)
        points = torch.rand(options.samples, 3, dtype=torch.float64)
        directions = nn.functional.normalize(torch.randn_like(points), dim=-1)
        weights = torch.randn(options.samples, 4, dtype=torch.float64)  # of densities and colours in the loss
        outputs = _outputs(whole, points, directions)
        (outputs * weights).sum().backward()
        own = slice(rank, None, processes)
        of_share = _outputs(pieces, points[own], directions[own])
        (of_share * weights[own]).sum().backward()

        apart = {"outputs": _apart(of_share, outputs[own])}
        apart["gradients of tables"] = _apart(table.table.grad, whole.experts.table.grad[table.rows])
        others = {name: p for name, p in pieces.named_parameters() if not name.startswith("experts.")}
        for parameter in others.values():
            dist.all_reduce(parameter.grad)
        wanted = dict(whole.named_parameters())
        apart["gradients of gate and heads"] = max(_apart(p.grad, wanted[name].grad) for name, p in others.items())
        worst = torch.tensor(list(apart.values()))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        sent = torch.tensor([table.traffic.sent[phase] for phase in PHASES])
        dist.all_reduce(sent)
        if rank == 0:
            for name, value in zip(apart, worst.tolist(), strict=True):
                print(f"largest difference of {name}, relative to the largest: {value:.1e}")
            width, crossing = table.grid.width, options.samples * (processes - 1) / processes
            numbers = {"forward": 3 + 1 + width, "backward": width + 1}
            for phase, count in zip(PHASES, sent.tolist(), strict=True):
                expected = 8 * numbers[phase] * crossing
                print(f"{phase}: {count:,} bytes between processes; by the formula {expected:,.0f}")
    finally:
        dist.destroy_process_group()


def _field(options: argparse.Namespace) -> HashExpertField:
    torch.manual_seed(0)
    finest = [2.0 ** (6 + e % 8 / 2) for e in range(options.experts)]
    arguments = {"levels": options.levels, "log2_table_size": options.log2_table_size, "gate_levels": 4}
    # Table and layers are drawn wide enough for the gate to use many experts.
    field = HashExpertField(
        expert_resolutions=[(16, n) for n in finest], gate_log2_table_size=12, table_bound=1.0, **arguments
    )
    return field.double()


def _outputs(field: HashExpertField, points: Tensor, directions: Tensor) -> Tensor:
    said = field(points, directions)
    return torch.cat([said.density[:, None], said.colour], 1)


def _apart(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item() if wanted.numel() else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m generation.radiance_field.expert_sharding",
        description=__doc__.split("\n")[0],
    )
    add = parser.add_argument
    add("--processes", type=int, default=4, help="on this machine (default: %(default)s)")
    add("--experts", type=int, default=8, help="of the field (default: %(default)s)")
    add("--samples", type=int, default=1 << 14, help="points of all processes (default: %(default)s)")
    add("--levels", type=int, default=16, help="of an expert, with 2 features (default: %(default)s)")
    add("--log2-table-size", type=int, default=12, help="of a level (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS)
    if options.experts < options.processes:
        parser.error(f"--experts is {options.experts}; it must be at least --processes, {options.processes}")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        processes = options.processes
        torch.multiprocessing.spawn(compare, (processes, meeting, options), nprocs=processes)


if __name__ == "__main__":
    main()
