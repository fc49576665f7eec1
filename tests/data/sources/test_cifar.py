import io
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from bt.data.sources.cifar import CIFAR10, CIFAR100, read_batch
from bt.errors import DataError
from tests.data.sources.labelled import converted, picture

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which the real files are full of."""

    dispatch = dict(pickle._Pickler.dispatch)

    def _save_string(self, data):
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(data)

    dispatch[bytes] = _save_string


def dump(path, data, python2=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    if python2:
        Python2Pickler(buffer, 2).dump(data)
    else:
        pickle.dump(data, buffer, 2)
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def pixels(numbers):
    """(images, 32, 32, 3) uint8 of easy-VQA's images, half their size."""
    return np.stack([np.array(picture(n).resize((32, 32))) for n in numbers])


def batch(numbers, label=b"labels", classes=10):
    data = pixels(numbers).transpose(0, 3, 1, 2).reshape(len(numbers), 3072)
    return {
        b"data": np.ascontiguousarray(data),
        label: [n % classes for n in numbers],
        b"filenames": [b"x"] * len(data),
    }


def cifar10_tree(root, python2=True):
    folder = root / "cifar-10-batches-py"
    for n in range(5):
        dump(folder / f"data_batch_{n + 1}", batch(range(4 * n, 4 * n + 4)), python2)
    dump(folder / "test_batch", batch(range(40, 46)), python2)
    dump(folder / "batches.meta", {b"label_names": [name.encode() for name in NAMES], b"num_vis": 3072}, python2)
    return root


@pytest.mark.parametrize("python2", [True, False])
def test_cifar10(tmp_path, python2):
    tree = cifar10_tree(tmp_path / "raw", python2)
    samples, skipped, data = converted(CIFAR10(str(tree)), tmp_path / "out", "train")
    assert data.labels == {"classes": NAMES} and skipped == {}
    assert list(samples) == [f"train-{n:05d}" for n in range(20)]
    for number, sample in enumerate(samples.values()):
        assert sample.info == {"label": number % 10}
        assert np.array_equal(np.array(Image.open(io.BytesIO(sample.images["image"]))), pixels([number])[0])
    test = list(CIFAR10(str(tree / "cifar-10-batches-py"), "test").samples(print))
    assert [sample.info["label"] for sample in test] == [0, 1, 2, 3, 4, 5]
    assert CIFAR10(str(tree)).count() == 26


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    dump(folder / "train", batch(range(95, 103), b"fine_labels", 100) | {b"coarse_labels": [0] * 8})
    dump(folder / "test", batch(range(3), b"fine_labels", 100))
    names = [f"class {n}" for n in range(100)]
    dump(folder / "meta", {b"fine_label_names": [n.encode() for n in names], b"coarse_label_names": [b"all"]})
    source = CIFAR100(str(tmp_path))
    samples = list(source.samples(print))
    assert source.labels() == {"classes": names}
    assert [sample.info["label"] for sample in samples] == [95, 96, 97, 98, 99, 0, 1, 2, 0, 1, 2]
    assert [sample.key for sample in samples[-3:]] == ["test-00000", "test-00001", "test-00002"]
    image = Image.open(io.BytesIO(samples[1].images[""].data))
    assert np.array_equal(np.array(image), pixels([96])[0])


class Calls:
    """Pickled, it is a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("python2", [True, False])
@pytest.mark.parametrize("name", ["posix.system", "builtins.eval"])
def test_a_file_that_calls_functions_is_refused(tmp_path, python2, name):
    mark = tmp_path / "mark"
    evil = Calls(os.system, f"touch {mark}") if name == "posix.system" else Calls(eval, f"open({str(mark)!r}, 'w')")
    tree = cifar10_tree(tmp_path)
    path = tree / "cifar-10-batches-py/data_batch_3"
    dump(path, batch(range(4)) | {b"more": evil}, python2)
    name = name.replace("builtins", "__builtin__")
    with pytest.raises(DataError, match=f"data_batch_3: it asks for {name}, which no file of CIFAR does") as caught:
        next(CIFAR10(str(tree)).samples(print))
    assert "\n" not in str(caught.value) and not mark.exists()
    pickle.loads(pickle.dumps(evil))  # the same call where it is allowed
    assert mark.exists()


def test_other_functions_of_numpy_are_refused(tmp_path):
    dump(tmp_path / "file", {b"data": Calls(np.fromfile, "/etc/hostname", "u1")})
    with pytest.raises(DataError, match="it asks for numpy.*fromfile"):
        read_batch(tmp_path / "file")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({b"data": np.zeros((4, 3000), np.uint8)}, "no array 'data' of images with 3072 bytes each"),
        ({b"data": np.zeros((4, 3072))}, "no array 'data' of images with 3072 bytes each"),
        ({b"labels": [0, 1, 2]}, "no list 'labels' with a class below 10 for each image"),
        ({b"labels": [0, 1, 2, 10]}, "no list 'labels' with a class below 10 for each image"),
        ({b"labels": [0, 1, 2, [3]]}, "no list 'labels' with a class below 10 for each image"),
    ],
)
def test_batches_of_another_shape(tmp_path, damage, says):
    tree = cifar10_tree(tmp_path)
    dump(tree / "cifar-10-batches-py/test_batch", batch(range(4)) | damage)
    with pytest.raises(DataError, match=f"test_batch has {says}"):
        next(CIFAR10(str(tree), ["train", "test"]).samples(print))


def test_missing_and_cut_files(tmp_path):
    with pytest.raises(DataError, match="missing raw file: .*/cifar-10-batches-py/batches.meta"):
        CIFAR10(str(tmp_path)).labels()
    tree = cifar10_tree(tmp_path)
    path = tree / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot read the raw file .*data_batch_2"):
        next(CIFAR10(str(tree)).samples(print))
    path.unlink()
    with pytest.raises(DataError, match="missing raw file: .*data_batch_2"):
        next(CIFAR10(str(tree)).samples(print))
