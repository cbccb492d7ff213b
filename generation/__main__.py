"""The command line of image generation.

    python -m generation sample "a red circle above a blue square" --output out.png    draw pictures of captions (LINA)
    python -m generation fit --config configs/generation/lina_shapes.yaml              train a model
    python -m generation evaluate shapes                                              score a model with the checker
    python -m generation evaluate-openmoji                                           what a model of OpenMoji draws
    python -m generation ablation --config configs/generation/lina_ablation.yaml       what its parts are worth
    python -m generation benchmark lina                                                speed of the models

Each takes --help.
"""

import sys
from importlib import import_module

HOME_OF = {
    "fit": "generation.training",
    "validate": "generation.training",
    "sample": "generation.lina.sample",
    "evaluate": "generation.lina.shape_scores",
    "evaluate-openmoji": "generation.lina.openmoji_scores",
    "ablation": "generation.lina.ablation",
    "benchmark": "generation.benchmark",
}


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in HOME_OF:
        sys.exit(f"unknown command {command!r}; valid are {', '.join(HOME_OF)}")
    home = import_module(HOME_OF[command])
    home.main(arguments if HOME_OF[command] == "generation.training" else arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
