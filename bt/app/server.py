"""The page's server: three fixed files, and one question that carries its picture in the body.

No path of a request is a path of the disk, nothing that is sent is written or unpickled, and what is sent is limited
before it is read: the size of the body, the picture's pixels, the text, and how many questions wait.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from bt.config.entry import one_line
from bt.data.transforms import UNDECODABLE
from bt.errors import UserError
from bt.inference.encoder import NoHead
from bt.inference.inputs import data_url
from bt.inference.predictor import MASKS, Choice, Predictor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow reads many more, some by other programs
MAX_PIXELS = 50_000_000
MAX_TEXT = 500  # characters
AT_ONCE, WAITING = 2, 16  # questions in work, and those that may wait for them
SHOWN = 384  # pixels of a side of the picture as the model sees it
HEADERS = {
    # The page's own script and style and pictures that it was given; nothing from elsewhere, and in nobody's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
HERE = Path(__file__).parent


class Refused(Exception):
    """A request that is not answered; status: of HTTP."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def make_app(models: Sequence[Predictor], *, max_bytes: int, hosts: Sequence[str]) -> FastAPI:
    """The application. models: the first that can answers. hosts: names that requests may call this server by, so that
    another site's name, made to point here, gets nothing."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    working, waiting = asyncio.Semaphore(AT_ONCE), 0

    @app.middleware("http")
    async def add_headers(request: Request, call_next):
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(HERE / "page.html", media_type="text/html; charset=utf-8")

    @app.get("/page.js")
    async def script() -> FileResponse:
        return FileResponse(HERE / "page.js", media_type="text/javascript; charset=utf-8")

    @app.get("/models")
    async def about() -> dict[str, Any]:
        listed = [{"source": model.source, "abilities": model.abilities} for model in models]
        return {"models": listed, "max_bytes": max_bytes}

    @app.post("/ask")
    async def ask(request: Request, text: str = "") -> dict[str, Any]:
        nonlocal waiting
        # A page of another site can send this type only after asking, which is answered with no.
        if request.headers.get("content-type") != "application/octet-stream":
            raise Refused(415, "the picture must come as application/octet-stream")
        if not text.strip():
            raise Refused(400, "there is no text: write a question, a caption or a sentence with [MASK]")
        if len(text) > MAX_TEXT:
            raise Refused(400, f"the text is longer than {MAX_TEXT} characters")
        data = await _body(request, max_bytes)
        if waiting >= WAITING:
            raise Refused(503, "too many questions at once: try again in a moment")
        waiting += 1
        try:
            async with working:
                return await run_in_threadpool(reply, models, data, text.strip())
        finally:
            waiting -= 1

    return app


async def _body(request: Request, most: int) -> bytes:
    too_large = Refused(413, f"the file is larger than {most / 1e6:g} MB")
    if request.headers.get("content-length", "0").isdecimal() and int(request.headers.get("content-length", 0)) > most:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise too_large
    if not data:
        raise Refused(400, "there is no picture: choose a file")
    return bytes(data)


def open_picture(data: bytes) -> Image.Image:
    """The picture in a file that anybody may have sent; Refused if it is none, or too large to be unpacked."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Refused(413, f"the picture has more than {MAX_PIXELS // 1_000_000} million pixels")
        image.load()
    except Image.DecompressionBombError as error:
        raise Refused(413, f"the picture has more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except UNDECODABLE as error:
        raise Refused(400, f"the file is not a whole picture ({', '.join(FORMATS)})") from error
    return image


def reply(models: Sequence[Predictor], data: bytes, text: str) -> dict[str, Any]:
    """Answers or masked words, match, what the model sees, and where it looks."""
    image = open_picture(data)
    masked = any(mask in text for mask in MASKS)
    order = ("fill_mask",) if masked else ("answer", "entails")
    chosen = next(((model, task) for task in order for model in models if task in model.abilities), None)
    matching = None if masked else next((model for model in models if "match" in model.abilities), None)
    if chosen is None and matching is None:
        raise Refused(400, "none of the models here can do that")
    try:
        model, task = chosen or (matching, "match")
        pixels = model.preprocess(image)
        found: dict[str, Any] = {"source": model.source, "task": task, "groups": [], "match": None}
        if task == "fill_mask":
            found["groups"] = [_listed(words) for words in model.fill_mask(pixels, text)]
        elif task != "match":
            found["groups"] = [_listed(getattr(model, task)(pixels, text))]
        if matching is not None:
            kind = matching.match_kinds[0]
            found["match"] = {"score": matching.match(image, text), "by": kind, "source": matching.source}
        return {**found, "picture": _png(pixels), **_looks(model, pixels, text)}
    except UserError as error:
        raise Refused(400, one_line(error)) from error


def _listed(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    return [vars(choice) for choice in choices]


def _looks(model: Predictor, pixels, text: str) -> dict[str, Any]:
    attention = model.attention(pixels, model.with_masks(text))
    found: dict[str, Any] = {"tokens": attention.tokens, "heat": None, "seen": None}
    for name, values in (("heat", attention.heat), ("seen", attention.seen)):
        try:
            found[name] = values().tolist()
        except NoHead:  # of this direction
            continue
    return found


def _png(pixels) -> str:
    """The picture as the model sees it, as a data URL."""
    return data_url(Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).resize((SHOWN, SHOWN)))
