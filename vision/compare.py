"""`python -m vision compare --config configs/vision/compare_retention.yaml`: several models under one protocol.

Every model is trained on every dataset with every seed, each time as an ordinary `fit`: what `fit` and the dataset set
is the same for all models, and a model differs in its name and `model_args` alone. All settings are checked before the
first training begins. Printed in the end: for each dataset one table, and whether an expected order came out.

A run lies in `<runs>/<experiment>/<dataset>/<model>/seed<k>/`: fit.yaml (its whole configuration, which `fit --config`
takes too), the numbered folders of `fit`, and result.json once it is finished. Started again, a comparison skips
finished runs and resumes a broken one after its last whole epoch. comparison.csv and comparison.png lie in
`<runs>/<experiment>/`.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from training_runs.atomic_files import write_atomically
from vision.reports import RunReport
from vision.standings import Result, Standing, plot_comparison, print_standings, verdict, write_table
from vision.training import TrainingCommandLine, prepare_process

SETTINGS, RESULT = "fit.yaml", "result.json"
_OF_THE_COMPARISON = ("seed_everything", "experiment", "runs")


@dataclass
class Contestant:
    """A model that takes part.

    Args:
        model: a name of `timm.list_models()`.
        model_args: what else `timm.create_model` takes.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training: what it is called, where it lies, and the configuration of its `fit`."""

    dataset: str
    model: str
    seed: int
    folder: Path
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.dataset}, {self.model}, seed {self.seed}"


def compare(
    experiment: str,
    datasets: dict[str, dict],
    models: dict[str, Contestant],
    fit: dict | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    expected_order: list[str] | None = None,
    runs: str = "runs",
) -> dict[str, list[Standing]]:
    """Train every model on every dataset with every seed, print and save the comparison.

    Args:
        experiment: folder of the comparison in `runs`.
        datasets: by the name of each: settings of `fit` for it, `data` among them, that hold for all models.
        models: by the name of each: the model and its arguments.
        fit: settings of `fit` that hold for all runs.
        seeds: of the weights, the order of the images and their distortions; the split is the same for all.
        expected_order: names of all models, the best first, to be compared with what comes out.
        runs: folder of all runs.

    Returns:
        By dataset the standings of the models, the best first.

    Raises:
        ValueError: a setting is wrong, or a run in the folder has been trained with other settings.
    """
    _check_names(datasets, models, seeds, expected_order)
    folder = Path(runs) / experiment
    plan = [
        planned_run(folder, (dataset, datasets[dataset]), (model, models[model]), seed, fit or {})
        for dataset in datasets
        for seed in seeds  # before the models: a comparison cut short has compared all of them
        for model in models
    ]
    earlier = [finished_result(run) for run in plan]
    ahead = {(run.dataset, run.model): run for run, result in zip(plan, earlier, strict=True) if result is None}
    for run in ahead.values():  # the seed makes no difference to what is valid
        check_settings(run)

    standings = {dataset: {model: Standing(model, []) for model in models} for dataset in datasets}
    for number, (run, result) in enumerate(zip(plan, earlier, strict=True), 1):
        state = "training" if result is None else f"finished before, {result.accuracy:.2%}"
        if result is None and _checkpoints(run):
            state = "resuming"
        print(f"[{number}/{len(plan)}] {run}: {state}", flush=True)
        standings[run.dataset][run.model].results.append(result or train(run))
    ranked = {dataset: sorted(of.values(), key=lambda standing: -standing.mean) for dataset, of in standings.items()}

    for dataset, ranking in ranked.items():
        print_standings(dataset, ranking, seeds)
        for line in verdict(ranking, expected_order):
            print(line)
    write_atomically(folder / "comparison.csv", lambda path: write_table(path, ranked, seeds))
    figure = plot_comparison({dataset: list(of.values()) for dataset, of in standings.items()})
    write_atomically(folder / "comparison.png", lambda path: figure.savefig(path, format="png"))
    print(f"\nplot and table: {folder / 'comparison.png'}, {folder / 'comparison.csv'}")
    return ranked


def _check_names(
    datasets: dict[str, dict],
    models: dict[str, Contestant],
    seeds: Sequence[int],
    expected_order: list[str] | None,
) -> None:
    for argument, names in (("datasets", datasets), ("models", models)):
        if not names:
            raise ValueError(f"{argument} is empty; there is nothing to compare")
        for name in names:
            if name in ("", "..") or name != Path(name).name:
                raise ValueError(f"{argument} has the name {name!r}; it becomes a folder's, without '/'")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds is {list(seeds)}; it takes one or more different numbers of at least 0")
    if expected_order is not None and sorted(expected_order) != sorted(models):
        raise ValueError(f"expected_order is {expected_order}; it takes each name of models once: {', '.join(models)}")


def planned_run(folder: Path, dataset: tuple[str, dict], model: tuple[str, Contestant], seed: int, shared: dict) -> Run:
    """The run of a named dataset and a named model, with its settings merged: shared ones, dataset, model, seed."""
    settings = _merged(shared, dataset[1])
    for key in _OF_THE_COMPARISON:
        if key in settings:
            raise ValueError(f"{key} is {settings[key]!r} in fit or in dataset {dataset[0]}; the comparison decides it")
    settings = _merged({"seed_everything": seed}, settings, {"model": asdict(model[1])})
    # As JSON has it, so that it equals what is read from the run's files.
    return Run(
        dataset[0], model[0], seed, folder / dataset[0] / model[0] / f"seed{seed}", json.loads(json.dumps(settings))
    )


def _merged(*parts: dict) -> dict:
    """One nested dict of several; where two set the same key, the later one counts."""
    whole: dict = {}
    for part in parts:
        for key, value in part.items():
            nested = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = _merged(whole[key], value) if nested else value
    return whole


def check_settings(run: Run) -> None:
    """Build all that the run's `fit` will build; raise ValueError with the run's name if that fails."""
    try:
        TrainingCommandLine(run.settings, run=False)
    except Exception as error:  # models and data raise what they like
        raise ValueError(f"settings of {run}: {error}") from error


def finished_result(run: Run) -> Result | None:
    """What the run has reached before, or None if it is yet to be finished.

    Raises:
        ValueError: what lies in the run's folder came from other settings.
    """
    if (file := run.folder / RESULT).is_file():
        content = json.loads(file.read_text())
        settings, result = content.pop("settings"), Result(**content)
    elif _checkpoints(run):
        file = run.folder / SETTINGS
        settings, result = yaml.safe_load(file.read_text()), None
    else:
        return None
    if changed := list(_differences(settings, run.settings)):
        raise ValueError(
            f"{file} was written by a run with other settings ({'; '.join(changed)}): restore them, name another "
            f"experiment, or delete {run.folder}"
        )
    return result


def _checkpoints(run: Run) -> list[Path]:
    return list(run.folder.glob("[0-9]*/checkpoints/last.ckpt"))


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _differences(old.get(key, "absent"), new.get(key, "absent"), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name} was {old}, is {new}"


def train(run: Run) -> Result:
    """Run the `fit`, from its last checkpoint if there is one, and write result.json."""
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.folder / SETTINGS
    write_atomically(config, lambda path: Path(path).write_text(yaml.safe_dump(run.settings, sort_keys=False)))
    arguments = ["fit", "--config", str(config), "--runs", str(run.folder.parent), "--experiment", run.folder.name]
    line = TrainingCommandLine([*arguments, "--ckpt_path", "last"] if _checkpoints(run) else arguments)

    evaluation = line.model.last_evaluation
    [report] = (callback for callback in line.trainer.callbacks if isinstance(callback, RunReport))
    validation = f"{evaluation['stage'].replace('test', 'val')}/accuracy"
    validated = [row[validation] for row in report.history if validation in row]
    result = Result(
        stage=evaluation["stage"],
        accuracy=evaluation["accuracy"].item(),
        images=int(evaluation["confusion"].sum()),
        validation_accuracy=validated[-1] if validated else None,
        parameters=sum(parameter.numel() for parameter in line.model.model.parameters()),
        seconds=report.seconds,
    )
    content = json.dumps({**asdict(result), "settings": run.settings}, indent=1)
    write_atomically(run.folder / RESULT, lambda path: Path(path).write_text(content + "\n"))
    return result


def main(arguments: list[str]) -> None:
    for argument in arguments:
        # jsonargparse would put the one value in the place of all that stands beside it.
        if argument.startswith(("--fit.", "--datasets.")):
            sys.exit(f"{argument}: the settings of the runs stand in the YAML alone; change them in a copy of it")
    prepare_process()
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the same lines for each of the runs
    auto_cli(compare, args=arguments, as_positional=False, prog="python -m vision compare")
