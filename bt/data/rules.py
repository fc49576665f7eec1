"""What the converter does to texts and images, as options: the same for every source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class CaptionRules:
    """Which texts are kept, in text fields whose entries are strings. Empty ones are left out in any case.

    deduplicate: of equal texts of one sample the first is kept, as the official code does, which loses their order
    (datasets/base_dataset.py). min_words, max_words: bounds of the number of words between white space, both included.
    """

    deduplicate: bool = True
    min_words: int | None = field(default=None, metadata={"low": 1})
    max_words: int | None = field(default=None, metadata={"low": 1})

    def keep(self, texts: Iterable[str], field_name: str, left_out: Counter[str]) -> list[str]:
        """The texts that are kept, in their order; the others are counted in left_out by reason."""
        kept: list[str] = []
        seen: set[str] = set()
        for text in texts:
            words = len(text.split())
            if self.min_words is not None and words < self.min_words:
                left_out[f"too few words ({field_name})"] += 1
            elif self.max_words is not None and words > self.max_words:
                left_out[f"too many words ({field_name})"] += 1
            elif self.deduplicate and text in seen:
                left_out[f"duplicate text ({field_name})"] += 1
            else:
                kept.append(text)
                seen.add(text)
        return kept


@dataclass
class ImageRules:
    """How images are checked, and what is done to their bytes, by default nothing.

    check: "full" decodes each image; "header" reads no further than its size, so that damage behind it is found when
    training reads the image. max_side: larger images are shrunk until their longer side has as many pixels. reencode:
    quality (1 to 100) at which images without transparency become JPEG. exif: "ignore" leaves images as they lie in
    the file, as the official code does, whatever orientation their EXIF data asks for; "apply" turns them.
    An image that is shrunk or turned is written anew: JPEG as JPEG (quality 95 unless `reencode` says another), others
    as PNG unless `reencode` is given. What is written anew is 8 bits a channel, and the first frame of an animation.
    """

    check: str = field(default="full", metadata={"choices": ["full", "header"]})
    max_side: int | None = field(default=None, metadata={"low": 1})
    reencode: int | None = field(default=None, metadata={"low": 1, "high": 100})
    exif: str = field(default="ignore", metadata={"choices": ["ignore", "apply"]})
