"""The trained models that come with the suite: where they lie, and what timm must know of their training."""

from pathlib import Path

_SHIPPED = Path(__file__).parent / "checkpoints"
# Entries of the pretrained cfg of models trained on the categories of OpenMoji (pictures CC BY-SA 4.0, openmoji.org).
OPENMOJI = {
    "num_classes": 9,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "label_names": (
        "Smileys & Emotion",
        "People & Body",
        "Animals & Nature",
        "Food & Drink",
        "Travel & Places",
        "Activities",
        "Objects",
        "Symbols",
        "Flags",
    ),
}


def shipped_checkpoint(name: str) -> str:
    """Path of a checkpoint that comes with the suite."""
    return str(_SHIPPED / f"{name}.safetensors")
