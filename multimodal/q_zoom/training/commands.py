"""Commands that make samples of Q-Zoom's stages, as folders that `FolderData` reads (see `samples`).

    python -m multimodal label regions --backbone PATH --samples IN --out OUT               attention, for stage 1
    python -m multimodal label gate --backbone PATH --samples IN --out OUT                  what answers need, stage 3
    python -m multimodal label tuning --backbone PATH --heads PATH --samples IN --out OUT   harmed answers, stage 2
    python -m multimodal label convert --records PKL --images FOLDER --stage 1 --out OUT    the authors' records

IN is a folder with samples.jsonl: one {"image": ..., "question": ..., "answer": ...} a line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from multimodal.q_zoom.pseudo_labels import POINTING_HEADS, PointingHeads
from multimodal.q_zoom.routing_labels import Match
from multimodal.q_zoom.training.gate_labels import label_by_region, label_by_resolution, mine_harmed
from multimodal.q_zoom.training.loading import load_to_answer, load_zoom
from multimodal.q_zoom.training.official_records import gate_samples, region_samples
from multimodal.q_zoom.training.region_labels import choose_heads, natural_request, with_attention
from multimodal.q_zoom.training.samples import SampleFolder, check_new, write_samples


def regions(
    backbone: str,
    samples: str,
    out: str,
    pointing: str | None = None,
    mode: Literal["textual", "natural"] = "textual",
    system: str | None = None,
    head_samples: int = 128,
    head_count: int = 3,
    count_prompt: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    settings: dict[str, Any] | str | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Let a backbone answer and keep what some of its heads look at.

    Args:
        backbone: folder, hub name, or shipped model.
        samples: folder of questions.
        out: folder to write, which must not be there yet.
        pointing: name of a published model whose heads are taken; otherwise heads are chosen by the boxes of samples.
        mode: "natural" asks for boxes instead of the answer, for photographs, and takes the heads found with that.
        system: text of a system message before every question (see natural_request for the published one); by default
            what the model's chat format has.
        head_samples: samples with a box that heads are chosen by.
        head_count: how many are chosen.
        count_prompt: the step of the prompt's last token counts as well.
        batch_size: samples answered at a time.
        max_new_tokens: of an answer.
        settings: of QZoomConfig or a preset's name, for the budget of tokens of samples that have none; by default
            256 to 576, or what the model takes of every image.
        options: of the model's from_pretrained.
    """
    check_new(out)
    asked = list(SampleFolder(samples))
    if pointing is not None and (pointing not in POINTING_HEADS or mode not in POINTING_HEADS[pointing]):
        known = ", ".join(f"{name} ({', '.join(modes)})" for name, modes in POINTING_HEADS.items())
        raise ValueError(f"pointing is {pointing!r} and mode {mode!r}; published heads are of {known}")
    zoom = load_to_answer(backbone, settings, **options or {})
    recording = {"count_prompt": count_prompt, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    recording |= {"request": natural_request if mode == "natural" else None, "system": system}
    if pointing is None:
        boxed = [sample for sample in asked if sample.box is not None][:head_samples]
        chosen = choose_heads(zoom, boxed, head_count, **recording)
        hits = {
            f"{layer}.{head}": float(chosen.hits[layer, head]) for layer in chosen.heads for head in chosen.heads[layer]
        }
        print(f"pointing heads (layer.head: share of {len(boxed)} samples whose box they point at): {json.dumps(hits)}")
        heads = PointingHeads(chosen.heads, {})
    else:
        heads = POINTING_HEADS[pointing][mode]
    made = with_attention(zoom, asked, heads, **recording)
    write_samples(out, made)
    print(f"{len(made)} of {len(asked)} samples with attention: {out}")


def gate(
    backbone: str,
    samples: str,
    out: str,
    heads: str | None = None,
    resolutions: Sequence[int] = (64, 128, 256, 512),
    match: Match = "exact",
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    settings: dict[str, Any] | str | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Label questions by whether they need a closer look.

    Args:
        backbone: folder, hub name, or shipped model.
        samples: folder of questions with answers.
        out: folder to write, which must not be there yet.
        heads: folder of branches: answers with the proposed region then tell, instead of several resolutions.
        resolutions: visual tokens, ascending, at least 3.
        match: "exact", or "substring" as published.
        seed: of what is drawn.
        batch_size: samples answered at a time.
        max_new_tokens: of an answer.
        settings: of QZoomConfig or a preset's name.
        options: of the model's from_pretrained.
    """
    check_new(out)
    asked, answering = list(SampleFolder(samples)), {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    if heads is None:
        zoom = load_to_answer(backbone, settings, **options or {})
        made = label_by_resolution(zoom, asked, list(resolutions), match=match, seed=seed, **answering)
    else:
        zoom = load_zoom(backbone, heads, settings, **options or {})
        made = label_by_region(zoom, asked, match=match, seed=seed, **answering)
    print(f"questions by kind: {dict(made.kinds)}")
    write_samples(out, made.samples)
    print(f"{len(made.samples)} of {len(asked)} samples labelled: {out}")


def tuning(
    backbone: str,
    heads: str,
    samples: str,
    out: str,
    match: Match = "exact",
    batch_size: int = 16,
    max_new_tokens: int = 32,
    options: dict[str, Any] | None = None,
) -> None:
    """Keep questions that a backbone answers right and, with the proposed region, wrong.

    Args:
        backbone: folder, hub name, or shipped model.
        heads: folder of branches.
        samples: folder of questions with answers.
        out: folder to write, which must not be there yet.
        match: "exact", or "substring".
        batch_size: samples answered at a time.
        max_new_tokens: of an answer.
        options: of the model's from_pretrained.
    """
    check_new(out)
    asked = list(SampleFolder(samples))
    zoom = load_zoom(backbone, heads, None, **options or {})
    made = mine_harmed(zoom, asked, match=match, batch_size=batch_size, max_new_tokens=max_new_tokens)
    print(f"questions by kind: {dict(made.kinds)}")
    write_samples(out, made.samples)
    print(f"{len(made.samples)} of {len(asked)} samples kept: {out}")


def convert(
    records: str, images: str, out: str, stage: Literal[1, 3] = 1, match: Match = "exact", seed: int = 0
) -> None:
    """Convert a pickle of the authors; code in it is never run.

    Args:
        records: the pickle.
        images: folder its paths of images are relative to.
        out: folder to write, which must not be there yet.
        stage: 1 for records with attention, 3 for records with answers at several resolutions.
        match: for stage 3: "exact", or "substring" as published.
        seed: for stage 3: of the resolutions drawn.
    """
    check_new(out)
    if not Path(images).is_dir():
        raise ValueError(f"images is {images!r}; there is no such folder")
    if stage == 1:
        made = region_samples(records, images)
    else:
        labelled = gate_samples(records, images, match=match, seed=seed)
        print(f"questions by kind: {dict(labelled.kinds)}")
        made = labelled.samples
    write_samples(out, made)
    print(f"{len(made)} samples: {out}")


def main(arguments: list[str]) -> None:
    """Run the command that `arguments` name."""
    commands = {"regions": regions, "gate": gate, "tuning": tuning, "convert": convert}
    auto_cli(commands, args=arguments, prog="python -m multimodal label", description=__doc__, as_positional=False)
