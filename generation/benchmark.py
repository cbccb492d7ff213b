"""`python -m generation benchmark SYSTEM`: speed of a generative model beside an unoptimised one of the same numbers.

    python -m generation benchmark lina              linear attention, sampling and memory of LINA
    python -m generation benchmark radiance-field    hash grids, rendering and dispatch of Switch-NeRF++
    python -m generation benchmark spiking           spiking neurons

Each takes --help.
"""

import sys
from importlib import import_module

HOME_OF = {
    "lina": "generation.lina.benchmark",
    "radiance-field": "generation.radiance_field.benchmark",
    "spiking": "generation.spiking_diffusion.benchmark",
}


def main(arguments: list[str]) -> None:
    system = arguments[0] if arguments else "--help"
    if system in ("-h", "--help"):
        print(__doc__)
        return
    if system not in HOME_OF:
        sys.exit(f"unknown system {system!r}; valid are {', '.join(HOME_OF)}")
    import_module(HOME_OF[system]).main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
