import json
import shutil
from importlib.resources import files
from pathlib import Path

RAW = Path(str(files("easy_vqa"))) / "data"


def make_raw_tree(root: Path, images: int) -> Path:
    """Raw files of easy-VQA with the first images of each part and their questions."""
    for part in ("train", "test"):
        (root / "data" / part / "images").mkdir(parents=True)
        questions = [q for q in json.loads((RAW / part / "questions.json").read_text()) if q[2] < images]
        (root / "data" / part / "questions.json").write_text(json.dumps(questions))
        for number in range(images):
            shutil.copy(RAW / part / "images" / f"{number}.png", root / "data" / part / "images")
    shutil.copy(RAW / "answers.txt", root / "data")
    return root


def flip_byte(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path: Path, lost: int) -> None:
    """Cut the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-lost])
