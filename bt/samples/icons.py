"""Pictures of emoji on coloured grounds, by two artists, with names and words of the Unicode data.

Packages of npm, fetched once (29 MB):

    emoji-datasource 15.1.2   MIT; of its images those of Noto Emoji (Google, Apache 2.0) and of Twemoji (CC BY 4.0)
    openmoji 15.1.0           names and tags alone (CC BY-SA 4.0)

A picture of 96 x 96 pixels shows one drawing one to three times in a row, at the top, in the middle or at the bottom,
on a ground of one colour. All facts and, among the kinds, all drawings are drawn evenly. A drawing belongs to one
split, so that pictures of val and test show drawings that training never does; the same thing by the other artist may
be in training.
"""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bt.errors import ConfigError
from bt.samples.collection import SPLITS, Collection, Fact, Item, generator, split_sizes
from bt.samples.packages import fetch

_SHEETS = {artist: f"img/{artist}/sheets/32.png" for artist in ("google", "twitter")}
_SIDE = 32  # pixels of a drawing; in a sheet each has a border of one

_KINDS = {  # kind -> the subcategories whose names begin so
    "animal": ("animal-",),
    "building": ("place-building", "place-religious"),
    "clock": ("time",),
    "face": ("face-",),
    "flag": ("country-flag", "subdivision-flag"),
    "hand": ("hand-", "hands"),
    "person": ("person-role", "person-activity", "person-sport"),
    "piece of food": ("food-asian", "food-fruit", "food-prepared", "food-sweet", "food-vegetable"),
    "plant": ("plant-",),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
}
_OTHER = set(  # of these subcategories what is not of the kind
    "bricks building_construction rock wedding wood "
    "hourglass hourglass_flowing_sand "
    "hankey skull_and_crossbones "
    "horse_racing nail_care selfie writing_hand "
    "coral feather microbe paw_prints feet pig_nose shell spider_web wing "
    "empty_nest mushroom nest_with_eggs rosette "
    "anchor busstop construction fuelpump motorway octagonal_sign oil_drum parachute railway_track ring_buoy "
    "roller_skate rotating_light satellite seat station traffic_light vertical_traffic_light wheel".split()
)
_COLORS = {
    "red": (220, 60, 60),
    "orange": (245, 150, 50),
    "yellow": (250, 225, 80),
    "green": (80, 170, 80),
    "teal": (40, 150, 150),
    "blue": (70, 110, 220),
    "purple": (140, 80, 180),
    "pink": (245, 160, 190),
    "brown": (140, 95, 60),
    "gray": (150, 150, 150),
}
FACTS = {
    "kind": Fact(tuple(_KINDS), "you can see {a}", "can you see {a}?", "what can you see?", "kind of thing"),
    "color": Fact(
        tuple(_COLORS),
        "the background is {}",
        "is the background {}?",
        "what color is the background?",
        "color of the background",
    ),
    "number": Fact(
        ("1", "2", "3"),
        "the number of copies is {}",
        "is the number of copies {}?",
        "how many copies are there?",
        "number of copies",
        "number",
    ),
    "height": Fact(
        ("top", "middle", "bottom"),
        "it is drawn in the {} row",
        "is it drawn in the {} row?",
        "in which row is it drawn?",
        "row",
    ),
}
CAPTIONS = (
    "{title} , {kind} , {number} times in the {height} row on {color} ground",
    "a picture of {title} on a {color} background",
    "{number} x {title} in the {height} row",
    "{color} background with {kind} : {tags}",
    "{title} : {kind} , drawn {number} times",
)


@dataclass(frozen=True)
class Drawing:
    """image: RGBA, 32 x 32."""

    kind: str
    title: str
    tags: tuple[str, ...]
    image: Image.Image


def icons(limit: int | None = None, seed: int = 0, cache: Path | None = None) -> Collection:
    """limit: so many pictures, 3,000 if None, drawn with `seed`. cache: where packages are kept (bt.samples.packages).

    DataError in one line if npm is missing or the packages cannot be fetched.
    """
    if limit is not None and limit < 3:
        raise ConfigError(f"limit={limit}: must be at least 3, one for each split")
    draw = generator("icons", seed)
    parts = _parts(drawings(cache), draw)
    items = [
        _item(f"{split}-{number:05d}", split, parts[split], draw)
        for split, count in split_sizes(limit or 3000).items()
        for number in range(count)
    ]
    hues = tuple(color for color in _COLORS if color != "gray")
    return Collection("icons", tuple(items), FACTS, hues, CAPTIONS)


def drawings(cache: Path | None = None) -> list[Drawing]:
    """All that are of a kind, by artist and in the order of the package."""
    emoji = fetch("emoji-datasource", "15.1.2", ["emoji.json", *_SHEETS.values()], cache)
    words = _words(fetch("openmoji", "15.1.0", ["data/openmoji.json"], cache) / "data/openmoji.json")
    entries = json.loads((emoji / "emoji.json").read_text(encoding="utf-8"))
    found = []
    for artist, sheet in _SHEETS.items():
        image = Image.open(emoji / sheet).convert("RGBA")
        for entry in entries:
            kind, known = _kind(entry), words.get(_code(entry["unified"]))
            if kind and known and entry[f"has_img_{artist}"]:
                left, top = (entry[axis] * (_SIDE + 2) + 1 for axis in ("sheet_x", "sheet_y"))
                found.append(Drawing(kind, *known, image.crop((left, top, left + _SIDE, top + _SIDE))))
    return found


def _code(name: str) -> str:
    """An emoji's code points without those that only choose how it is shown."""
    return "-".join(part for part in name.upper().split("-") if part != "FE0F")


def _words(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Title and tags by code points: "flag: Chad" becomes "flag of Chad"."""
    return {
        _code(entry["hexcode"]): (
            entry["annotation"].replace("flag: ", "flag of "),
            tuple(tag.strip() for tag in entry["tags"].split(",") if tag.strip()),
        )
        for entry in json.loads(path.read_text(encoding="utf-8"))
    }


def _kind(entry: dict) -> str | None:
    if _OTHER.intersection(entry["short_names"]):
        return None
    return next((kind for kind, starts in _KINDS.items() if entry["subcategory"].startswith(starts)), None)


def _parts(every: list[Drawing], draw: random.Random) -> dict[str, dict[str, list[Drawing]]]:
    """Drawings by split and kind: of each kind a sixth, but at least one, for val and for test."""
    parts: dict[str, dict[str, list[Drawing]]] = {split: {} for split in SPLITS}
    for kind in _KINDS:
        own = [drawing for drawing in every if drawing.kind == kind]
        draw.shuffle(own)
        for split, count in split_sizes(len(own)).items():
            parts[split][kind], own = own[:count], own[count:]
    return parts


def _item(name: str, split: str, part: dict[str, list[Drawing]], draw: random.Random) -> Item:
    facts = {name: draw.choice(fact.values) for name, fact in FACTS.items()}
    drawing = draw.choice(part[facts["kind"]])
    scene = Image.new("RGB", (3 * _SIDE, 3 * _SIDE), _COLORS[facts["color"]])
    copies, top = int(facts["number"]), _SIDE * FACTS["height"].values.index(facts["height"])
    for place in range(copies):
        scene.paste(drawing.image, (_SIDE * (3 - copies) // 2 + _SIDE * place, top), drawing.image)
    buffer = io.BytesIO()
    scene.save(buffer, "PNG")
    return Item(name, split, buffer.getvalue(), facts, drawing.title, drawing.tags)
