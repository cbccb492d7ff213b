"""What a comparison found: the standing of each model, as a table, in words, as CSV and as a plot."""

import csv
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from kernels.interleaved_timing import print_table


@dataclass(frozen=True)
class Result:
    """What a finished run reached.

    Args:
        stage: which evaluation `accuracy` is of: `test_ema` where there are test images and a moving average.
        accuracy: what `fit` reports in the end.
        images: how many it was measured on.
        validation_accuracy: the last one measured during the training; None if there was none.
        parameters: of the model.
        seconds: of the training with its validations; of a resumed run, all parts together.
    """

    stage: str
    accuracy: float
    images: int
    validation_accuracy: float | None
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Standing:
    """All results of one model on one dataset, in the order of the seeds."""

    model: str
    results: list[Result]

    @property
    def mean(self) -> float:
        return statistics.fmean(result.accuracy for result in self.results)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return statistics.stdev(result.accuracy for result in self.results) if len(self.results) > 1 else None

    @property
    def seconds(self) -> float:
        return statistics.fmean(result.seconds for result in self.results)


def print_standings(dataset: str, ranking: list[Standing], seeds: Sequence[int]) -> None:
    first = ranking[0].results[0]
    header = ("rank", "model", "parameters", *(f"seed {seed}" for seed in seeds), "mean", "spread", "seconds")
    rows = [
        (
            1 + sum(other.mean > standing.mean for other in ranking),  # ties share a rank
            standing.model,
            f"{standing.results[0].parameters:,}",
            *(f"{result.accuracy:.2%}" for result in standing.results),
            f"{standing.mean:.2%}",
            "-" if standing.spread is None else f"{standing.spread:.2%}",
            f"{standing.seconds:.0f}",
        )
        for standing in ranking
    ]
    print_table(f"{dataset}: {first.stage} accuracy of {first.images} images", header, rows)


def verdict(ranking: list[Standing], expected_order: list[str] | None) -> list[str]:
    """In words: whether the expected order came out, and how the differences compare with the spread.

    The spread of a difference is that of two single runs: the root of the sum of both models' variances.
    """
    standing_of = {standing.model: standing for standing in ranking}
    ordered = [standing_of[name] for name in expected_order or standing_of]
    pairs = [(ordered[i], ordered[i + 1]) for i in range(len(ordered) - 1)]
    lines = []
    if expected_order is not None:
        as_expected = all(better.mean > worse.mean for better, worse in pairs)
        outcome = "came out" if as_expected else f"did not come out; measured: {_order(ranking)}"
        lines.append(f"The expected order {' > '.join(expected_order)} {outcome}.")
    for better, worse in pairs:
        difference = 100 * (better.mean - worse.mean)
        if better.spread is None or worse.spread is None:
            comparison = "one seed shows no spread to compare it with"
        else:
            spread = 100 * math.hypot(better.spread, worse.spread)
            exceeds = "more than" if abs(difference) > spread else "within"
            comparison = f"{exceeds} the spread of such a difference, {spread:.2f}"
        lines.append(f"{better.model} against {worse.model}: {difference:+.2f} points, {comparison}.")
    return lines


def _order(ranking: list[Standing]) -> str:
    """The models in the order of a ranking, with > or, between equal means, = between them."""
    said = ranking[0].model
    for better, worse in itertools.pairwise(ranking):
        said += f" {'=' if better.mean == worse.mean else '>'} {worse.model}"
    return said


def write_table(path: str, ranked: dict[str, list[Standing]], seeds: Sequence[int]) -> None:
    with Path(path).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["dataset", "model", "seed", *Result.__dataclass_fields__])
        for dataset, ranking in ranked.items():
            for standing in ranking:
                for seed, result in zip(seeds, standing.results, strict=True):
                    rows.writerow([dataset, standing.model, seed, *asdict(result).values()])


def plot_comparison(standings_of: dict[str, list[Standing]]) -> Figure:
    """Accuracy of each model, one panel a dataset: a dot a seed, and the mean with the spread beside the dots."""
    figure = Figure(figsize=(4.5 * len(standings_of), 4), layout="constrained")
    panels = figure.subplots(1, len(standings_of), squeeze=False)[0]
    for axes, (dataset, standings) in zip(panels, standings_of.items(), strict=True):
        for position, standing in enumerate(standings):
            accuracies = [100 * result.accuracy for result in standing.results]
            axes.plot([position - 0.1] * len(accuracies), accuracies, "o", color=f"C{position}", alpha=0.7)
            spread = None if standing.spread is None else 100 * standing.spread
            axes.errorbar(position + 0.1, 100 * standing.mean, spread, fmt="_", color="black", capsize=4, markersize=14)
        axes.set_xticks(range(len(standings)), [standing.model for standing in standings])
        axes.set(
            title=dataset, ylabel=f"{standings[0].results[0].stage} accuracy, %", xlim=(-0.6, len(standings) - 0.4)
        )
        axes.grid(axis="y", alpha=0.3)
    figure.supxlabel("dots: seeds; bars: mean and sample standard deviation", fontsize=8)
    return figure
