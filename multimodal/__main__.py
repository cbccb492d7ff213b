"""The command line of question answering about images.

    python -m multimodal answer photo.jpg "What does the sign say?" --model PATH --heads PATH     look and answer
    python -m multimodal answer scene:7 "What is the code at red?" --show out.png                 the shipped tiny model
    python -m multimodal fit --config configs/multimodal/tiny_stage1.yaml                         train the branches
    python -m multimodal validate --config configs/multimodal/tiny_stage3.yaml                    their quality
    python -m multimodal label regions --help                                                     what they learn from
    python -m multimodal evaluate                                                                 how well it reads
    python -m multimodal benchmark                                                                speed and operations

Each takes --help.
"""

import sys
from importlib import import_module

HOME_OF = {
    "answer": "multimodal.answer",
    "fit": "multimodal.training",
    "validate": "multimodal.training",
    "label": "multimodal.q_zoom.training.commands",
    "evaluate": "multimodal.tiny_reader.zoom_evaluation",
    "benchmark": "multimodal.q_zoom.benchmark",
}
INTERRUPTED = 130  # exit code, as of shells


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in HOME_OF:
        sys.exit(f"unknown command {command!r}; valid are {', '.join(HOME_OF)}")
    home = HOME_OF[command]
    try:
        import_module(home).main(arguments if home == "multimodal.training" else arguments[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes an exit of the interrupt.
        interrupt = stop if isinstance(stop, KeyboardInterrupt) else stop.__context__
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        print("; ".join(["stopped", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main(sys.argv[1:])
