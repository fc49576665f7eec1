"""The page of `make app`: over HTTP what is refused, and in a real browser what a user does."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import uvicorn
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException

from bt.app import server
from bt.app.__main__ import LOOPBACK, listen, main, own_names
from bt.app.server import make_app
from bt.data.shards import ShardSet
from bt.errors import UserError

BINARY = {"Content-Type": "application/octet-stream"}
LIMIT = 300_000


@contextlib.contextmanager
def serving(app) -> Iterator[int]:
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def app(vqa, pretrained) -> Iterator[SimpleNamespace]:
    made = make_app([vqa, pretrained], max_bytes=LIMIT, hosts=["localhost", LOOPBACK])
    with serving(made) as port:

        def request(method: str, path: str, body: bytes = b"", headers: dict | None = None):
            connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
            try:
                connection.request(method, path, body, BINARY if headers is None else headers)
                response = connection.getresponse()
                return response.status, response.read(), dict(response.getheaders())
            finally:
                connection.close()

        yield SimpleNamespace(port=port, request=request)


@pytest.fixture(scope="module")
def pictures(smoke_runs) -> list[bytes]:
    shards = ShardSet(str(smoke_runs / "data/samples/vqav2"), "val")
    return [shards.read(number).images["image"] for number in range(2)]


def test_a_reply_is_what_the_models_say(app, vqa, pretrained, pictures):
    status, body, _ = app.request("POST", f"/ask?text={quote('is it red?')}", pictures[0])
    reply = json.loads(body)
    assert status == 200 and reply["task"] == "answer"
    said = [(choice["name"], choice["probability"]) for choice in reply["groups"][0]]
    expected = vqa.answer(pictures[0], "is it red?")
    assert said == [(choice.name, pytest.approx(choice.probability, abs=1e-6)) for choice in expected]
    assert reply["match"]["score"] == pytest.approx(pretrained.match(pictures[0], "is it red?"), abs=1e-6)
    tokens, grid = len(reply["tokens"]), vqa.tower.vision.grid
    assert len(reply["heat"]) == len(reply["seen"]) == tokens and len(reply["heat"][0]) == grid
    assert sum(map(sum, reply["heat"][1])) == pytest.approx(1) and sum(reply["seen"]) == pytest.approx(1)
    assert reply["picture"].startswith("data:image/png;base64,")
    status, body, _ = app.request("POST", f"/ask?text={quote('a [MASK] thing')}", pictures[0])
    ((best, *_),) = pretrained.fill_mask(pictures[0], "a [MASK] thing")
    reply = json.loads(body)
    assert reply["groups"][0][0]["name"] == best.name and reply["match"] is None and "<mask>" in reply["tokens"]


def picture_of(size: tuple[int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, kind)
    return buffer.getvalue()


def test_what_is_refused_says_why(app, pictures):
    good, text = pictures[0], "/ask?text=is%20it%20red"
    for path, body, headers, status, said in (
        (text, good[:200], BINARY, 400, "not a whole picture"),
        (text, b"%!PS-Adobe-3.0 EPSF-3.0\n", BINARY, 400, "not a whole picture"),
        (text, picture_of((40, 40), "TIFF"), BINARY, 400, "not a whole picture"),
        (text, b"", BINARY, 400, "there is no picture"),
        (text, bytes(LIMIT + 1), BINARY, 413, "larger than 0.3 MB"),
        (text, picture_of((8000, 8000)), BINARY, 413, "more than 50 million pixels"),
        (text, picture_of((14_000, 13_000)), BINARY, 413, "more than 50 million pixels"),
        ("/ask?text=%20", good, BINARY, 400, "there is no text"),
        ("/ask", good, BINARY, 400, "there is no text"),
        (f"/ask?text={'x' * 501}", good, BINARY, 400, "longer than 500"),
        (text, good, {"Content-Type": "text/plain"}, 415, "application/octet-stream"),
    ):
        found, reply, _ = app.request("POST", path, body, headers)
        assert (found, said in json.loads(reply)["error"]) == (status, True), reply
    # A body of unknown length is counted while it comes.
    connection = http.client.HTTPConnection(LOOPBACK, app.port, timeout=60)
    connection.request("POST", text, iter([bytes(100_000)] * 4), BINARY, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_nothing_else_of_the_disk_is_served(app):
    for path in ("/../server.py", "/..%2fserver.py", "/page.html", "/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc"):
        assert app.request("GET", path)[0] == 404, path
    status, page, headers = app.request("GET", "/")
    assert status == 200 and b"Ask about a picture" in page
    assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert app.request("GET", "/docs")[0] == app.request("GET", "/openapi.json")[0] == 404
    # Another name for this machine, as a foreign page may have given it.
    assert app.request("GET", "/", headers={"Host": "evil.example"})[0] == 400
    assert app.request("OPTIONS", "/ask", headers={"Origin": "http://evil.example"})[0] == 405


def test_many_at_once_each_get_their_own_or_wait_or_are_told(vqa, pictures, monkeypatch):
    monkeypatch.setattr(server, "WAITING", 4)
    gate = threading.Event()
    inner = server.reply

    def slow(models, data, text):
        gate.wait(30)
        return inner(models, data, text)

    monkeypatch.setattr(server, "reply", slow)
    made = make_app([vqa], max_bytes=LIMIT, hosts=["*"])
    with serving(made) as port:

        def ask(number: int) -> tuple[int, dict]:
            connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
            connection.request("POST", f"/ask?text=what%20{number}", pictures[number % 2], BINARY)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        with ThreadPoolExecutor(10) as pool:
            running = [pool.submit(ask, number) for number in range(10)]
            while sum(future.done() for future in running) < 6:
                time.sleep(0.01)
            assert all(future.result()[0] == 503 for future in running if future.done())
            gate.set()
            replies = [future.result() for future in running]
    answered = [number for number, (status, _) in enumerate(replies) if status == 200]
    assert len(answered) == 4
    for number in answered:
        expected = vqa.answer(pictures[number % 2], f"what {number}")
        assert replies[number][1]["groups"][0][0]["probability"] == pytest.approx(expected[0].probability, abs=1e-6)


def test_the_command_stays_on_the_loopback_and_says_what_is_wrong(smoke_runs, monkeypatch):
    run = str(smoke_runs / "runs/vqa_base")
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(SystemExit) as end:
            main(["--run-dir", run, "--port", str(taken.getsockname()[1])])
    assert f"error: {LOOPBACK}:" in end.value.code and "Address already in use" in end.value.code
    bound = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: bound.extend(s.getsockname() for s in sockets))
    main(["--run-dir", run, "--port", "0"])
    assert [place[0] for place in bound] == [LOOPBACK]
    with pytest.raises(SystemExit, match="error: no-such-host.invalid:7860 cannot be listened on: "):
        main(["--run-dir", run, "--host", "no-such-host.invalid"])


def test_other_names_of_this_machine_are_as_guarded(smoke_runs, monkeypatch):
    """By --host localhost, another site's name that points here gets nothing either."""
    apps = []
    with monkeypatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", lambda self, sockets: apps.append(self.config.app))
        main(["--run-dir", str(smoke_runs / "runs/vqa_base"), "--port", "0", "--host", "localhost"])
    with serving(apps[0]) as port:
        for host, status in ((f"localhost:{port}", 200), (f"{LOOPBACK}:{port}", 200), ("evil.example", 400)):
            connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
            connection.request("GET", "/models", headers={"Host": host})
            assert connection.getresponse().status == status, host
            connection.close()
    found = {}
    for host in ("localhost", "127.0.0.2", "0.0.0.0", "::1"):
        with contextlib.suppress(UserError), listen(host, 0) as listener:  # not every machine has IPv6
            found[host] = own_names(host, listener)
    assert found.pop("::1", ["localhost", LOOPBACK, "[::1]"]) == ["localhost", LOOPBACK, "[::1]"]
    assert found == {
        "localhost": ["localhost", LOOPBACK],
        "127.0.0.2": ["localhost", LOOPBACK, "127.0.0.2"],
        "0.0.0.0": ["*"],
    }


# In a browser


@pytest.fixture(scope="module")
def browsers(tmp_path_factory) -> Iterator:
    """Opens real browsers without a display; all are closed at the end."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if not path]:
        pytest.skip(f"{' and '.join(missing)} not found (Debian: chromium, chromium-driver)")
    from selenium.webdriver.chrome.service import Service

    opened = []

    def launch():
        options = webdriver.ChromeOptions()
        options.binary_location = programs["chromium"]
        profile = tmp_path_factory.mktemp("profile")
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        opened.append(webdriver.Chrome(options, Service(programs["chromedriver"])))
        return opened[-1]

    yield launch
    for browser in opened:
        browser.quit()


class Page:
    """What a user does and sees."""

    def __init__(self, browser, port: int):
        self.browser = browser
        browser.get(f"http://{LOOPBACK}:{port}/")

    def find(self, name: str):
        return self.browser.find_element("id", name)

    def wait(self, holds, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (found := self.now(holds)):
            assert time.monotonic() < end, self.browser.find_element("tag name", "body").text
            time.sleep(0.05)
        return found

    def now(self, holds):
        """None where the page changes under the look at it."""
        with contextlib.suppress(StaleElementReferenceException):
            return holds()

    def ask(self, file: Path | None, text: str) -> None:
        if file is not None:
            self.find("file").send_keys(str(file))
        self.find("text").clear()
        self.find("text").send_keys(text)
        self.find("ask").click()

    def answers(self) -> list[list[str]]:
        self.wait(lambda: self.find("result").is_displayed())
        rows = self.find("answers").find_elements("css selector", "tr")
        return [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]

    def error(self) -> str:
        self.wait(lambda: self.find("error").text)
        assert not self.find("result").is_displayed()
        return self.find("error").text

    def painted(self) -> int:
        """Patches of the heat map that are coloured."""
        return self.browser.execute_script(
            "const c = document.getElementById('heat'); const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; return d.filter((v, i) => i % 4 == 3 && v > 0).length"
        )


def shown(choices) -> list[list[str]]:
    return [[choice.name, f"{choice.probability:.4f}"] for choice in choices]


def test_a_user_uploads_asks_and_sees(app, browsers, vqa, pretrained, pictures, tmp_path):
    files = [tmp_path / f"{number}.jpg" for number in range(2)]
    for file, data in zip(files, pictures, strict=True):
        file.write_bytes(data)
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(pictures[0][:300])
    huge.write_bytes(bytes(LIMIT + 1))
    page, other = Page(browsers(), app.port), Page(browsers(), app.port)
    page.ask(None, "is it red?")
    assert page.error() == "there is no picture: choose a file"
    page.ask(files[0], " ")
    assert page.error().startswith("there is no text")
    page.ask(broken, "is it red?")
    assert "not a whole picture" in page.error()
    page.ask(huge, "is it red?")
    assert page.error() == "the file is larger than 0.3 MB"
    page.ask(files[0], "is it red?")
    assert page.answers() == shown(vqa.answer(pictures[0], "is it red?"))
    assert f"{pretrained.match(pictures[0], 'is it red?'):.4f} (itm)" in page.find("match").text
    assert page.find("picture").get_property("naturalWidth") == 384
    words = page.find("words").find_elements("css selector", "button")
    assert [word.text for word in words] == vqa.attention(pictures[0], "is it red?").tokens
    assert page.painted() > 1
    words[2].click()
    assert words[2].get_attribute("aria-pressed") == "true" and page.find("heat").get_attribute("data-token") == "2"
    # Two users at once, and markup that is shown and not run.
    text = "<img src=x onerror=alert(1)> is it a circle?"
    page.ask(None, text)
    other.ask(files[1], "is it a square?")
    assert other.answers() == shown(vqa.answer(pictures[1], "is it a square?"))
    page.wait(lambda: page.answers() == shown(vqa.answer(pictures[0], text)))
    page.ask(None, "a [MASK] thing")
    page.wait(lambda: page.answers() == shown(pretrained.fill_mask(pictures[0], "a [MASK] thing")[0]))
    severe = [line["message"] for line in page.browser.get_log("browser") if line["level"] == "SEVERE"]
    # The broken picture's own 400, and nothing that the page's policy or script ran into.
    assert len(severe) == 1 and "400" in severe[0], severe
