"""`fit` and `validate` of generation and multimodal: a LightningCLI with run folders, checkpoints and a clean stop.

The YAML names the system (`model.class_path`) and its data; every argument of both and of the trainer is a key of it
and a flag. A run writes into `<runs>/<experiment>/<number>/`: config.yaml, metrics.csv, checkpoints/last.ckpt, and what
the system reports (see its module). `--ckpt_path last` resumes the experiment's newest run, in a folder of its own;
Ctrl-C leaves a checkpoint of the step it came in.
"""

import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from kernels.native.memory import keep_freed_memory
from training_runs.atomic_files import prepare_output

CHECKPOINT_EVERY = 500  # steps
SHARDED = (".metadata", "meta.pt")  # of a folder that is a checkpoint of FSDP
UNION = "Does not validate against any of the Union subtypes"


def checkpoint_path(given: str | None, root: Path, numbers: Sequence[int]) -> str | None:
    """What `--ckpt_path` means.

    Args:
        given: a path or URL, the folder of a run, or "last" for the newest checkpoint of the runs `numbers`, in
            ascending order, in `root`.

    Raises:
        ValueError: there is no such checkpoint, or the file is none.
    """
    if given == "last":
        checkpoints = [root / str(number) / "checkpoints" / "last.ckpt" for number in reversed(numbers)]
        found = next((str(path) for path in checkpoints if path.is_file()), None)
        if found is None:
            raise ValueError(f"ckpt_path is 'last', but no run in {root} has a checkpoint")
        return check_checkpoint(found)
    if given is None or "://" in given:
        return given
    valid = "valid are a checkpoint, the folder of a run that has checkpoints/last.ckpt, and 'last'"
    path = Path(given)
    if not path.exists():
        raise ValueError(f"ckpt_path is {given!r}; there is no such file; {valid}")
    if path.is_dir() and not any((path / name).exists() for name in SHARDED):
        if not (path / "checkpoints" / "last.ckpt").is_file():
            raise ValueError(f"ckpt_path is {given!r}; that folder is of no run that left a checkpoint; {valid}")
        path = path / "checkpoints" / "last.ckpt"
    return check_checkpoint(str(path)) if path.is_file() else given


def check_checkpoint(path: str) -> str:
    """`path`.

    Raises:
        ValueError: the file is no checkpoint of a training.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, ValueError) as error:
        words = "it cannot be read as a checkpoint; valid is one that a training left, such as checkpoints/last.ckpt"
        raise ValueError(f"ckpt_path is {path!r}; {words}") from error
    if not isinstance(found, dict) or not {"state_dict", "global_step"} <= found.keys():
        raise ValueError(f"ckpt_path is {path!r}; it is no checkpoint of a training: it has no state_dict of a step")
    return path


def check_experiment(experiment: str) -> str:
    """`experiment`.

    Raises:
        ValueError: it would lie outside of the folder of all runs.
    """
    if not Path(experiment).parts or Path(experiment).is_absolute() or ".." in Path(experiment).parts:
        raise ValueError(f"experiment is {experiment!r}; it must be the name of a folder within that of all runs")
    return experiment


def check_writable(folder: Path) -> None:
    """See that `folder` can be made and written into, without making it.

    Raises:
        ValueError: it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    prepare_output("runs", there, as_folder=True)


def innermost(error: ValueError) -> ValueError:
    """What an argument's own check says, without the types by which jsonargparse tried to take it."""
    while str(error).startswith(UNION) and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    return error


class StopAfterStep(pl.Callback):
    """Ctrl-C lets the step end, leaves a checkpoint and then interrupts; a second one interrupts at once.

    Processes of a distributed run may be in different steps when it reaches them: there it is as Lightning has it.

    Args:
        checkpoint: the file.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.asked, self.before = checkpoint, False, None

    def on_train_start(self, trainer: Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if self.asked and (batch_index + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise KeyboardInterrupt(f"step {trainer.global_step} is kept: go on with --ckpt_path last")

    def teardown(self, trainer: Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class TrainingCommandLine(LightningCLI):
    """LightningCLI with run folders.

    Args:
        room: the package whose command this is.
        args: the subcommand and its flags.
    """

    def __init__(self, room: str, args: ArgsType = None) -> None:
        self.run_folder: Path | None = None
        try:
            super().__init__(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={"prog": f"python -m {room}", "description": __doc__},
                args=args,
            )
        except ValueError as error:
            self._leave_no_empty_folder()
            raise innermost(error) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--experiment", type=str | None, default=None, help="Folder in it. Default: the name of the config file."
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own version warns of arguments given from Python, which is how `python -m` gives them here.
        self.config = parser.parse_args(args)
        given = self.config[self.config.subcommand].get("ckpt_path")
        if given is not None and Path(given).is_file():  # Lightning reads it next
            check_checkpoint(given)

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        if "weights_only" in settings:
            settings.weights_only = True  # Lightning would unpickle a checkpoint that lies behind a URL
        files = settings.get("config") or []
        experiment = settings.experiment or (Path(str(files[-1])).stem if files else "unnamed")
        try:
            root = Path(settings.runs) / check_experiment(experiment)
            check_writable(root)
            numbers = sorted(int(entry.name) for entry in root.glob("*") if entry.name.isdecimal())
            settings.ckpt_path = checkpoint_path(settings.get("ckpt_path"), root, numbers)
        except ValueError as error:
            sys.exit(f"error: {error}")
        self.run_folder = root / str(numbers[-1] + 1 if numbers else 0)

    def _leave_no_empty_folder(self) -> None:
        """Of a run that failed before there was anything to keep of it but its settings."""
        folder = self.run_folder
        if folder is None or not folder.is_dir():
            return
        files = {entry.name for entry in folder.iterdir()}
        if files <= {"config.yaml", "hparams.yaml"}:
            for name in files:
                (folder / name).unlink()
            folder.rmdir()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        given = settings.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            folder, kept = self.run_folder / "checkpoints", {"filename": "last", "enable_version_counter": False}
            callbacks.append(ModelCheckpoint(folder, every_n_train_steps=CHECKPOINT_EVERY, **kept))
            callbacks.append(StopAfterStep(folder / "last.ckpt"))
        kwargs = {"default_root_dir": self.run_folder, "callbacks": callbacks} | kwargs
        if settings.logger is None:
            kwargs["logger"] = CSVLogger(self.run_folder, name="", version="")
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        self.trainer.save_checkpoint(self.run_folder / "checkpoints" / "last.ckpt", weights_only=False)


# Lightning's warnings that are wrong here: frozen networks stay in evaluation mode, the batches do resume in mid-epoch,
# a resumed run keeps its checkpoints in a folder of its own, and data drawn on the fly is faster without workers.
_MISTAKEN_WARNINGS = (
    r"The dirpath has changed",
    r".*module\(s\) in eval mode at the start of training",
    r".*your dataloader is not resumable",
    r".*does not have many workers",
    r".*isinstance\(treespec, LeafSpec\)",
)


def prepare_process() -> None:
    """Once in a process that trains: keep freed memory, and be silent where warnings and notices are wrong."""
    keep_freed_memory()
    for message in _MISTAKEN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def run(room: str, arguments: list[str]) -> None:
    """Train or validate as the command line says, without the program's name; `room` is the package asked."""
    prepare_process()
    TrainingCommandLine(room, arguments)
