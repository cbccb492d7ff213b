"""`python -m multimodal benchmark`: what Q-Zoom costs and saves on a CPU, measured beside the count of operations.

A stock Qwen2.5-VL with random weights (width 384, 12 layers, tap after 8, branches of 3) answers one question with one
token: alone at several sizes of its image, and inside a Q-Zoom whose gate stays shut ("closed") or opens ("open"). Both
pay for the gate, "open" for the region proposal too. Times are of everything from pixel values to the answer; only the
preparation of pixel values is left out, for the base, closed and open alike, as in the count. Nothing is timed before
the numbers agree with the stock model's. Rivals run in turn in one process and the fastest round of each counts. One
thread is timed by the processor's clock, not by the wall's, because other programs may share the cores.

At the same budget of visual tokens a zoom costs time. It saves time only against a base that reads a larger image, as
in the paper's 2.52x and 4.39x, which compare unequal budgets.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kernels.interleaved_timing import machine, print_table, time_interleaved
from multimodal.argument_checks import check_whole
from multimodal.q_zoom.configuration import QZoomConfig
from multimodal.q_zoom.model import QZoom, ZoomInfo
from multimodal.q_zoom.operation_count import PUBLISHED, OperationCount, operation_table
from multimodal.q_zoom.prefill import fuse, read_on, read_to_tap, reread

# (visual tokens of the whole image, of the region, of the base's image); sides in tokens are whole
ROWS = (
    (144, 144, 576),
    (144, 144, 1024),
    (256, 144, 1024),
    (256, 256, 1024),
    (144, 144, 144),
    (256, 256, 256),
)
QUICK_ROWS = ((36, 36, 144), (36, 36, 36))
BEFORE, AFTER = 16, 40  # text tokens before the image and after it
TEXT, START, END, IMAGE, VIDEO, VOCABULARY = 900, 900, 901, 902, 903, 1000  # ids below TEXT are words
PATCH, MERGE = 14, 2
TAP = 8
SAME_BUDGET_ROUNDS = 3  # times as many: their ratios lie near 1 and their runs are short
REUSE_TOLERANCE = 2e-5  # by the greatest logit

# What the project asks of the rows.
WITHIN = (0.85, 1.15)  # measured by predicted
CLOSED_COST, OPEN_COST = 1.12, 2.2  # time by the base's at the same budget
CROSS_SPEED_UP = 3.5  # open, of the row below
CROSS = (144, 144, 1024)

# (whole image, region, base's image, share of questions zoomed, speed-up the paper measured with Qwen2.5-VL-7B).
# The paper gives mean numbers of visual tokens; shares and regions here make the same means.
PUBLISHED_ROWS = (
    (576, 576, 576, 0.5, None),
    (576, 400, 576, 0.36, 0.81),
    (855, 347, 2085, 0.36, 2.52),
    (560, 480, 3430, 0.75, 4.39),
)
PUBLISHED_MODELS = {"Qwen2.5-VL-7B": "qwen2_5_vl_7b", "Qwen3-VL-4B": "qwen3_vl_4b"}


class RandomPixels:
    """Stands for a processor whose pixel values are there already: prepared ahead of time, for squares only."""

    def __init__(self):
        self.image_processor = self
        self.prepared: dict[int, BatchFeature] = {}

    def __call__(self, images: Sequence[Image.Image], size: Mapping[str, int], return_tensors: str) -> BatchFeature:
        return self.of(size["longest_edge"] // (PATCH * MERGE) ** 2)

    def of(self, tokens: int) -> BatchFeature:
        """Pixel values of a square image of so many visual tokens, the same for each call."""
        if tokens not in self.prepared:
            side = math.isqrt(tokens) * MERGE
            generator = torch.Generator().manual_seed(tokens)
            pixels = torch.randn(side**2, 3 * 2 * PATCH**2, generator=generator)
            grid = torch.tensor([[1, side, side]])
            self.prepared[tokens] = BatchFeature({"pixel_values": pixels, "image_grid_thw": grid})
        return self.prepared[tokens]


def build_model(width: int = 384, layers: int = 12) -> Qwen2_5_VLForConditionalGeneration:
    """A stock Qwen2.5-VL in float32 with random weights; its vision transformer has half the width and depth."""
    heads, seen = width // 64, width // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": width,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "max_position_embeddings": 4096,
        },
        vision_config={
            "hidden_size": seen,
            "out_hidden_size": width,
            "depth": layers // 2,
            "num_heads": heads // 2,
            "intermediate_size": seen * 8 // 3,
            "fullatt_block_indexes": [layers // 4 - 1, layers // 2 - 1],
            "patch_size": PATCH,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


class Rivals:
    """One model, alone and inside a Q-Zoom, and what is asked of both.

    Args:
        model: stock Qwen2.5-VL.
        tap: layers before the branches.
        share: gate and region proposal share their first layer.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, tap: int = TAP, *, share: bool = False):
        self.model, self.tap, self.share = model, tap, share
        self.pixels = RandomPixels()
        self.zooms: dict[int, QZoom] = {}
        self.words = torch.randint(TEXT, (BEFORE - 1 + AFTER - 1,), generator=torch.Generator().manual_seed(0))
        self.picture = Image.new("RGB", (448, 448))
        self.count = OperationCount.from_configs(
            model.config, self.settings(1), tokens_before=BEFORE, tokens_after=AFTER, last_token_only=True
        )

    def settings(self, region: int) -> QZoomConfig:
        """With regions of exactly so many tokens."""
        # A threshold of 0 takes every cell into the region, whatever untrained branches say of it.
        return QZoomConfig(
            self.tap,
            share_first_layer=self.share,
            region_threshold=0.0,
            sink="none",
            region_tokens=(region, region),
        )

    def zoom(self, region: int) -> QZoom:
        """With regions of exactly so many tokens; all have the same branches."""
        if region not in self.zooms:
            config = self.settings(region)
            if self.zooms:
                like = next(iter(self.zooms.values()))
                self.zooms[region] = QZoom(self.model, self.pixels, config, like.proposal, like.gate).eval()
            else:
                self.zooms[region] = QZoom.wrap(self.model, self.pixels, config)
        return self.zooms[region]

    def inputs(self, tokens: int) -> dict[str, Tensor]:
        """As a processor makes them, of an image of so many tokens."""
        marks = torch.tensor([START]), torch.full((tokens,), IMAGE), torch.tensor([END])
        ids = torch.cat((self.words[: BEFORE - 1], *marks, self.words[BEFORE - 1 :]))[None]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            **self.pixels.of(tokens),
        }

    def base(self, tokens: int, **options: Any) -> Any:
        return self.model.generate(**self.inputs(tokens), max_new_tokens=1, do_sample=False, **options)

    def closed(self, coarse: int, **options: Any) -> tuple[Any, ZoomInfo]:
        return self._asked(self.zoom(coarse), coarse, 1.0, options)

    def open(self, coarse: int, region: int, **options: Any) -> tuple[Any, ZoomInfo]:
        return self._asked(self.zoom(region), coarse, 0.0, options)

    def _asked(self, zoom: QZoom, coarse: int, threshold: float, options: dict[str, Any]) -> tuple[Any, ZoomInfo]:
        output, (info,) = zoom.generate(
            self.inputs(coarse),
            self.picture,
            gate_threshold=threshold,
            return_zoom_info=True,
            max_new_tokens=1,
            do_sample=False,
            **options,
        )
        return output, info


@torch.no_grad()
def check_closed(rivals: Rivals, coarse: int) -> None:
    """Exit unless a shut gate gives the stock model's logits, and the answer timed the same but for rounding."""
    zoom, inputs = rivals.zoom(coarse), rivals.inputs(coarse)
    (prompt,) = zoom.adapter.prompts(inputs)
    read = read_on(zoom.adapter, read_to_tap(zoom.adapter, prompt, rivals.tap), exact=True)
    if not read.logits.equal(rivals.model(**inputs, logits_to_keep=1).logits[0, -1]):
        sys.exit(f"closed, {coarse} tokens: the logits are not the stock model's bit for bit")
    asked = {"return_dict_in_generate": True, "output_logits": True}
    output, info = rivals.closed(coarse, **asked)
    expect_close(f"closed, {coarse} tokens, by generate", output.logits[0], rivals.base(coarse, **asked).logits[0])
    if info.opened or info.gate_probability is None or info.source_tokens != coarse:
        sys.exit(f"closed, {coarse} tokens: the gate was not asked, or opened: {info}")


@torch.no_grad()
def check_open(rivals: Rivals, coarse: int, region: int) -> None:
    """Exit unless what is kept of the first reading serves as well as reading all again, and the tokens are those."""
    zoom = rivals.zoom(region)
    adapter = zoom.adapter
    (prompt,) = adapter.prompts(rivals.inputs(coarse))
    tap = read_to_tap(adapter, prompt, rivals.tap)
    tokens = adapter.encode([rivals.picture], zoom.config.region_tokens)
    rows, columns = prompt.grid
    fused = fuse(adapter, prompt, tokens, [(0, 0, columns, rows)], zoom.config.alignment)
    kept, again = (read_on(adapter, reread(adapter, tap, fused, reuse=reuse)) for reuse in (True, False))
    what = f"open, {coarse} + {region} tokens"
    expect_close(f"{what}, reused and read again", kept.logits, again.logits)
    output, info = rivals.open(coarse, region, return_dict_in_generate=True, output_logits=True)
    expect_close(f"{what}, by generate", output.logits[0][0], again.logits)
    if not info.opened or info.gate_probability is None or (info.source_tokens, info.region_tokens) != (coarse, region):
        sys.exit(f"{what}: the gate was not asked, or the tokens are others: {info}")


def expect_close(what: str, found: Tensor, wanted: Tensor) -> None:
    """Exit unless logits agree within `REUSE_TOLERANCE` of the greatest."""
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= REUSE_TOLERANCE:
        sys.exit(f"{what}: logits differ by {difference:.1e} of the greatest; at most {REUSE_TOLERANCE} is rounding")


@dataclass(frozen=True)
class MeasuredRow:
    """Milliseconds, and how many times faster than the base the two are: measured, and by the count of operations.

    Predicted is what is computed here; "published" counts the gate's and the decoder's last layers whole, as the
    authors' code computes them.
    """

    coarse: int
    region: int
    base: int
    base_ms: float
    closed_ms: float
    open_ms: float
    closed_measured: float
    closed_predicted: float
    closed_published: float
    open_measured: float
    open_predicted: float
    open_published: float


def measure(
    rivals: Rivals, rows: Sequence[tuple[int, int, int]], rounds: int, clock: Callable[[], float]
) -> list[MeasuredRow]:
    """Rows in one run of interleaved rounds; each function's fastest counts."""
    functions = {}
    for coarse, region, alone in rows:
        functions["base", alone] = partial(rivals.base, alone)
        functions["closed", coarse] = partial(rivals.closed, coarse)
        functions["open", coarse, region] = partial(rivals.open, coarse, region)
    for function in functions.values():
        function()
    timings = time_interleaved(functions, rounds=(rounds, rounds), clock=clock)
    fastest = {name: 1e3 * min(timing.seconds) for name, timing in timings.items()}
    measured = []
    for coarse, region, alone in rows:
        base, closed, opened = fastest["base", alone], fastest["closed", coarse], fastest["open", coarse, region]
        counts = (rivals.count, replace(rivals.count, last_token_only=False))
        ours, theirs = (operation_table(count, [(coarse, region)], base_tokens=alone)[0] for count in counts)
        faster = (base / closed, ours.closed_speed_up, theirs.closed_speed_up)
        faster += (base / opened, ours.open_speed_up, theirs.open_speed_up)
        measured.append(MeasuredRow(coarse, region, alone, base, closed, opened, *faster))
    return measured


def bars_of(row: MeasuredRow) -> list[dict[str, Any]]:
    """What the project asks of a row, with what was found."""
    name = f"{row.coarse} + {row.region} tokens, base {row.base}"
    asked = [
        ("closed, measured by predicted", row.closed_measured / row.closed_predicted, *WITHIN),
        ("open, measured by predicted", row.open_measured / row.open_predicted, *WITHIN),
        ("closed, measured by the published form's count", row.closed_measured / row.closed_published, *WITHIN),
        ("open, measured by the published form's count", row.open_measured / row.open_published, *WITHIN),
    ]
    if row.coarse == row.base:
        asked.append(("closed, time by the base's", row.closed_ms / row.base_ms, 0.0, CLOSED_COST))
    if row.coarse == row.region == row.base:
        asked.append(("open, time by the base's", row.open_ms / row.base_ms, 0.0, OPEN_COST))
    if (row.coarse, row.region, row.base) == CROSS:
        asked.append(("open, times faster than the base", row.open_measured, CROSS_SPEED_UP, math.inf))
    bars = []
    for of, found, least, most in asked:
        bar = f"at least {least}" if most == math.inf else f"{least} to {most}" if least else f"at most {most}"
        met = "yes" if least <= found <= most else "no"
        bars.append({"row": name, "of": of, "found": found, "bar": bar, "met": met})
    return bars


def published_table(name: str) -> list[dict[str, Any]]:
    """Operations of a released model by the formula, in units of 10^12, beside the paper's measured speed-ups."""
    count = PUBLISHED[PUBLISHED_MODELS[name]]
    table = []
    for coarse, region, alone, share, reported in PUBLISHED_ROWS:
        (row,) = operation_table(count, [(coarse, region)], base_tokens=alone, open_share=share)
        teras = {f"{kind}_T": getattr(row, kind) / 1e3 for kind in ("base", "closed", "open")}
        speed_ups = {f"{kind} x": getattr(row, f"{kind}_speed_up") for kind in ("closed", "open", "expected")}
        table.append(
            {"coarse": coarse, "region": region, "base": alone, "open share": share}
            | teras
            | {"two passes_T": count.two_pass(coarse, region) / 1e12}
            | speed_ups
            | {"paper, 7B": "" if reported is None or name != "Qwen2.5-VL-7B" else f"{reported}"}
        )
    return table


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    print_table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])


def main(arguments: list[str]) -> None:
    """Measure, print and write what the module's description says.

    Args:
        arguments: of the command line, without the command.

    Raises:
        ValueError: an option that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m multimodal benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s); several: wall time")
    rounds = f"of which the fastest counts; {SAME_BUDGET_ROUNDS} times as many at equal budgets (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=5, help=rounds)
    parser.add_argument("--share-first-layer", action="store_true", help="of gate and region proposal")
    parser.add_argument("--quick", action="store_true", help="small images, 4 layers: shows that it runs, no more")
    output = "JSON file (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/q_zoom.json"), help=output)
    options = parser.parse_args(arguments)
    check_whole("--threads", options.threads, 1, 4096)
    check_whole("--rounds", options.rounds, 1, 10_000)
    if options.output.is_dir():
        raise ValueError(f"--output is {str(options.output)!r}; that is a folder, and it must be a file")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output is {str(options.output)!r}; its folder cannot be made: {error}") from error
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = QUICK_ROWS if options.quick else ROWS
    share = options.share_first_layer
    rivals = Rivals(build_model(192, 4), 1, share=share) if options.quick else Rivals(build_model(), share=share)
    for coarse in sorted({coarse for coarse, _, _ in rows}):
        check_closed(rivals, coarse)
    for coarse, region in sorted({(coarse, region) for coarse, region, _ in rows}):
        check_open(rivals, coarse, region)
    print("correct: closed is the stock model bit for bit, reuse is reading all again")
    clock = time.process_time if options.threads == 1 else time.perf_counter
    same = [row for row in rows if row[0] == row[2]]
    larger = [row for row in rows if row[0] != row[2]]
    measured = measure(rivals, larger, options.rounds, clock)
    measured += measure(rivals, same, SAME_BUDGET_ROUNDS * options.rounds, clock)
    sizes = {"threads": options.threads, "rounds": options.rounds, "clock": clock.__name__}
    report = {"machine": machine(), **sizes, "quick": options.quick, "share first layer": share}
    report["rows"] = [asdict(row) for row in measured]
    report["bars"] = [bar for row in measured for bar in bars_of(row)]
    report["published"] = {name: published_table(name) for name in PUBLISHED_MODELS}
    of = "processor's time" if options.threads == 1 else "wall time"
    shared = ", first layer of the branches shared" if share else ""
    counts = f"{options.rounds} rounds ({SAME_BUDGET_ROUNDS * options.rounds} at equal budgets)"
    title = f"Random weights, {options.threads} thread(s), {of}, fastest of {counts}{shared}"
    print_rows(f"{title}; times faster than the base", report["rows"])
    print_rows("What is asked", report["bars"])
    for name, table in report["published"].items():
        print_rows(f"{name}: operations by the formula, in 10^12, and times fewer than the base's", table)
    print(
        "\nAt the same budget a zoom costs time; the paper's 2.52 and 4.39 are against a base that reads more tokens."
    )
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")
