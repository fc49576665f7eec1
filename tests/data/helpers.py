from pathlib import Path


def flip_byte(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path: Path, lost: int) -> None:
    """Cut the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-lost])
