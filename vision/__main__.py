"""The command line of image classification.

    python -m vision fit|validate|test --config configs/vision/vig_nano_mnist5k.yaml    train and evaluate
    python -m vision predict --checkpoint <model> <images or folders>                   classify pictures
    python -m vision explain --model <model> picture.png                                look inside: decays, gates
    python -m vision compare --config configs/vision/compare_retention.yaml             train models and rank them
    python -m vision linear-probe                                                       a baseline for OpenMoji
    python -m vision benchmark                                                          speed of the models

Each takes --help.
"""

import sys
from importlib import import_module

HOME_OF = {
    "fit": "vision.training",
    "validate": "vision.training",
    "test": "vision.training",
    "predict": "vision.predict",
    "explain": "vision.explain",
    "compare": "vision.compare",
    "linear-probe": "vision.linear_probe",
    "benchmark": "vision.benchmark",
}


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in HOME_OF:
        sys.exit(f"unknown command {command!r}; valid are {', '.join(HOME_OF)}")
    home = import_module(HOME_OF[command])
    home.main(arguments if HOME_OF[command] == "vision.training" else arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
