"""`python -m vision fit|validate|test --config configs/vision/<experiment>.yaml`: a LightningCLI.

Every argument of the model, the data and the trainer is a key of the YAML and a flag. Three values are linked, and
therefore no flags of their own: `model.num_classes` and `model.in_chans` come from the data, and the data's seed is
`seed_everything`.

A run writes into `<runs>/<experiment>/<number>/`: config.yaml, metrics.csv, TensorBoard's events, checkpoints/last.ckpt
and what `vision.reports.RunReport` adds. `fit --ckpt_path last` resumes the experiment's newest run.
"""

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kernels.native.memory import keep_freed_memory
from vision.class_folders import ClassFolders  # noqa: F401  `--data ClassFolders` finds the name
from vision.classification import ImageClassification
from vision.image_data import Cifar, ImageDataModule, ImageFolder  # noqa: F401
from vision.in_memory_images import Digits, Mnist5k, OpenMoji  # noqa: F401
from vision.reports import RunReport


class TrainingCommandLine(LightningCLI):
    """LightningCLI with run folders, reports, and a test at the end of every fit.

    Args:
        args: the subcommand and its flags. With `run=False` the settings of a fit alone, as flags or as a dict.
        run: False builds the model, the data and the trainer, and does nothing with them; what is wrong then raises.
    """

    def __init__(self, args: ArgsType = None, *, run: bool = True) -> None:
        super().__init__(
            ImageClassification,
            ImageDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "python -m vision", "description": __doc__, "exit_on_error": run},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--experiment", type=str | None, default=None, help="Folder in it. Default: the name of the config file."
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own version warns of arguments given from Python, which is how `python -m vision` gives them.
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand] if self.subcommand else self.config
        files = settings.get("config") or []
        if "weights_only" in settings:
            settings.weights_only = True  # Lightning would unpickle a checkpoint that lies behind a URL
        experiment = settings.experiment or (Path(str(files[-1])).stem if files else "unnamed")
        root = Path(settings.runs) / experiment
        numbers = sorted(int(entry.name) for entry in root.glob("*") if entry.name.isdecimal())
        self.run_folder = root / str(numbers[-1] + 1 if numbers else 0)
        if settings.get("ckpt_path") == "last":
            checkpoints = [root / str(number) / "checkpoints" / "last.ckpt" for number in reversed(numbers)]
            found = next((path for path in checkpoints if path.is_file()), None)
            if found is None:
                raise ValueError(f"ckpt_path is 'last', but no run in {root} has a checkpoint")
            settings.ckpt_path = str(found)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        callbacks = list(settings.callbacks or [])
        if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            # After every epoch, whether or not the run is validated after it.
            folder, kept = self.run_folder / "checkpoints", {"filename": "last", "enable_version_counter": False}
            callbacks.append(ModelCheckpoint(folder, save_on_train_epoch_end=True, **kept))
        kwargs = {"default_root_dir": self.run_folder, "callbacks": [*callbacks, RunReport(self.run_folder)]} | kwargs
        if settings.logger is None:
            kwargs["logger"] = [kind(self.run_folder, name="", version="") for kind in (CSVLogger, TensorBoardLogger)]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        has_test = self.datamodule.test_set is not None
        evaluate = self.trainer.test if has_test else self.trainer.validate
        evaluate(self.model, datamodule=self.datamodule, verbose=False)


# Lightning's warnings that are wrong here: the moving average is meant to stay in evaluation mode, the sampler does
# resume in mid-epoch, a resumed run keeps its checkpoints in a folder of its own, and the sets in memory are faster
# without workers. The last one is about Lightning's own code.
_MISTAKEN_WARNINGS = (
    r"The dirpath has changed",
    r".*module\(s\) in eval mode at the start of training",
    r".*your dataloader is not resumable",
    r".*does not have many workers",
    r".*isinstance\(treespec, LeafSpec\)",
)


def prepare_process() -> None:
    """Once in a process that trains: keep freed memory, and be silent where Lightning's warnings are wrong."""
    keep_freed_memory()
    for message in _MISTAKEN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def main(arguments: list[str]) -> None:
    prepare_process()
    TrainingCommandLine(arguments)
