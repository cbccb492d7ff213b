"""Of what scene and model a checkpoint is, so that a run does not go on with one of another."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from generation.radiance_field.scene import Scene

COMPARED = ("kind", "sampler", "background", "field", "proposal", "background_field")
OF_TRAINING = ("gate_noise", "density_noise", "capacity_factor", "batch_prioritized", "anneal_steps")
TOLERANCE = 1e-3  # of poses, which another machine may compute a little differently


def origin_of(scene: Scene) -> dict[str, Any]:
    """What a checkpoint keeps of its scene: name, and poses of the training cameras."""
    return {"name": scene.name, "poses": scene.cameras.c2w[scene.splits["train"]].cpu().clone()}


def check_origin(
    checkpoint: Mapping[str, Any], scene: Scene, settings: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """See that a checkpoint is of a scene and a model.

    Arguments of a model that count in training alone may differ, and so may rates and losses.

    Args:
        checkpoint: of Lightning.
        scene: of this run.
        settings: arguments of its `RadianceFieldTraining`.
        state: its weights.

    Raises:
        ValueError: the checkpoint is of another scene, of another model, or of no radiance field.
    """
    theirs = checkpoint.get("hyper_parameters", {})
    if "kind" not in theirs:
        raise ValueError("the checkpoint is of no radiance field")
    _check_scene(checkpoint.get("scene"), scene)
    for name, there, here in _differences(theirs, settings):
        raise ValueError(f"the checkpoint is of another model: {name} is {there!r} there and {here!r} here")
    there, here = (
        {name: tuple(value.shape) for name, value in weights.items()} for weights in (checkpoint["state_dict"], state)
    )
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            shapes = f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            raise ValueError(f"the checkpoint is of another model: {name} is {shapes}")


def _check_scene(origin: Mapping[str, Any] | None, scene: Scene) -> None:
    if origin is None:  # of a run that did not keep it
        return
    here, poses = origin_of(scene), origin["poses"]
    count = len(here["poses"])
    if origin["name"] != here["name"] or len(poses) != count:
        raise ValueError(
            f"the checkpoint is of scene {origin['name']!r} with {len(poses)} training pictures, and this is "
            f"{here['name']!r} with {count}; a run goes on with the scene that it began with"
        )
    if not torch.allclose(poses, here["poses"], rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(
            f"the checkpoint is of scene {origin['name']!r} with {count} training pictures, whose cameras stand "
            "elsewhere than here; a run goes on with the scene that it began with"
        )


def _differences(theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, and values there and here, of arguments that both have and that make another model."""
    found = []
    for name in COMPARED:
        there, here = (json.loads(json.dumps(own.get(name))) for own in (theirs, settings))  # tuples are lists
        if not isinstance(there, dict) or not isinstance(here, dict):
            parts = [] if name not in theirs or isinstance(there or here, dict) else [(name, there, here)]
        else:
            common = [key for key in there if key in here and key not in OF_TRAINING]
            parts = [(f"{name}.{key}", there[key], here[key]) for key in common]
        found += [part for part in parts if part[1] != part[2]]
    return found
