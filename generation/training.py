"""`python -m generation fit|validate --config configs/generation/NAME.yaml`; see `training_runs.command_line`."""

from training_runs.command_line import run


def main(arguments: list[str]) -> None:
    """Train or validate as the command line says, without the program's name."""
    run("generation", arguments)
