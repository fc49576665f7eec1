"""The part of a model in use that every question needs: pictures and texts through their encoders."""

from __future__ import annotations

import threading
from typing import TypeVar

import torch
from torch import Tensor

from bt.data.batch import Texts
from bt.data.transforms import Transform, make_transform
from bt.engine.precision import AUTOCAST, autocast
from bt.errors import CheckpointError, ConfigError, DataError, UserError
from bt.inference.inputs import Picture, Pictures, Strings, as_list, check_texts, read_pixels
from bt.interop.load import Loaded
from bt.models.bridgetower import Encoded
from bt.tasks.base import Objective

Head = TypeVar("Head", bound=Objective)


class NoHead(UserError):
    """What is asked for needs a head that the model was not trained with."""


class Encoder:
    """Encoders, tokenizer and transform of a loaded model, on a device. See Predictor."""

    def __init__(self, loaded: Loaded, device: str | torch.device, dtype: str | torch.dtype, batch: int = 32):
        if batch < 1:
            raise ConfigError(f"batch={batch} is out of range: must be at least 1")
        if loaded.tokenizer is None:
            raise CheckpointError(f"{loaded.source} has no tokenizer: give one (bt.load(..., tokenizer=), --tokenizer)")
        self.loaded, self.batch, self.source = loaded, batch, loaded.source
        self.device, self.precision = _device(device), _precision(dtype)
        self.model = loaded.model.to(self.device).eval().requires_grad_(False)
        self.tower, self.tokenizer = self.model.tower, loaded.tokenizer
        data, vision = loaded.config.data, self.tower.vision
        self.max_text_len = min(data.max_text_len, self.tower.text.max_positions)
        self.transform: Transform = make_transform(
            data.eval_transform,
            vision.image_size,
            vision.channels,
            resize=data.resize,
            decode_draft=data.decode_draft,
        )
        self._tokenizing = threading.Lock()

    @property
    def abilities(self) -> list[str]:
        """What else than encoding it can do."""
        return []

    @property
    def contrast(self) -> Objective | None:
        """The objective whose uni-modal features compare images with texts."""
        objectives = self.model.objectives.values()
        return next((objective for objective in objectives if hasattr(objective, "image_features")), None)

    def find(self, kind: type[Head]) -> Head | None:
        """The model's objective of this class, whatever the task calls it."""
        return next((part for part in self.model.objectives.values() if isinstance(part, kind)), None)

    def _head(self, kind: type[Head], what: str) -> Head:
        return self._found(self.find(kind), what)

    def _found(self, head: Head | None, what: str) -> Head:
        if head is None:
            raise NoHead(f"{self.source} has no head for {what}; it can {', '.join(self.abilities) or 'encode alone'}")
        return head

    def preprocess(self, picture: Picture) -> Tensor:
        """(channels, size, size) uint8 pixels, which other methods take in place of the picture."""
        return read_pixels(picture, self.transform)

    @torch.no_grad()
    def encode_images(self, pictures: Picture | list[Picture], type_id: int = 1) -> Encoded:
        """Images after the vision encoder, on the device: states (images, tokens, width) of each bridged layer, and cls
        (images, vision width). type_id: row of the type table; 2 is the second image of a pair (NLVR2)."""
        parts = []
        pictures = as_list(pictures)
        for start in range(0, len(pictures), self.batch):
            pixels = [self.preprocess(picture) for picture in pictures[start : start + self.batch]]
            with autocast(self.device, self.precision):
                images = self.tower.vision.normalize(self.transform.stack(pixels).to(self.device))
                parts.append(self.tower.encode_images(images, type_id))
        return _joined(parts, "pictures")

    @torch.no_grad()
    def encode_texts(self, texts: Strings) -> Encoded:
        """Texts after the text encoder, on the device: states (texts, tokens, width) of each bridged layer, cls (texts,
        text width) and mask (texts, tokens)."""
        texts = check_texts(as_list(texts))
        if not texts:
            raise DataError("no texts were given")
        tokens, parts = self._tokens(texts), []
        for ids, mask in zip(tokens.ids.split(self.batch), tokens.mask.split(self.batch), strict=True):
            parts.append(self._encode_tokens(Texts(ids, mask)))
        return _joined(parts, "texts")

    def _tokens(self, texts: list[str]) -> Texts:
        with self._tokenizing:
            return self.tokenizer.batch(texts, self.max_text_len)

    def _encode_tokens(self, texts: Texts) -> Encoded:
        with autocast(self.device, self.precision):
            return self.tower.encode_texts(Texts(texts.ids.to(self.device), texts.mask.to(self.device)))

    @torch.no_grad()
    def image_features(self, pictures: Pictures) -> Tensor:
        """(images, size) float32, L2-normalised: what ITC compares by a dot product."""
        head = self._found(self.contrast, "ITC features")
        images = pictures if isinstance(pictures, Encoded) else self.encode_images(pictures)
        with autocast(self.device, self.precision):
            return head.image_features(images).float()

    @torch.no_grad()
    def text_features(self, texts: Strings | Encoded) -> Tensor:
        """(texts, size) float32, L2-normalised."""
        head = self._found(self.contrast, "ITC features")
        encoded = texts if isinstance(texts, Encoded) else self.encode_texts(texts)
        with autocast(self.device, self.precision):
            return head.text_features(encoded).float()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device} is no device to use: allowed are auto, cpu, cuda, cuda:N")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device={device}: {torch.cuda.device_count()} GPUs are visible here")
    return found


def _precision(dtype: str | torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = names.get(dtype, dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in AUTOCAST:
        raise ConfigError(f"dtype={dtype} is not one of: {', '.join(AUTOCAST)}")
    return name


def _joined(parts: list[Encoded], what: str) -> Encoded:
    if not parts:
        raise DataError(f"no {what} were given")
    if len(parts) == 1:
        return parts[0]
    states = [torch.cat(layer) for layer in zip(*(part.states for part in parts), strict=True)]
    mask = None if parts[0].mask is None else torch.cat([part.mask for part in parts])
    return Encoded(states, torch.cat([part.cls for part in parts]), mask)
