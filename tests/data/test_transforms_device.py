import csv
import io
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch

from bt.assemble import Data
from bt.config.schema import DataConfig
from bt.data.collate import BatchMaker
from bt.data.dataset import eval_loader, train_loader
from bt.data.decode import decode
from bt.data.device import DeviceTransform, Encoded, Pending, distance
from bt.data.device_augment import blip_operation, pil_operation
from bt.data.plan import EvalPlan, PairIndex, TrainPlan
from bt.data.randaugment import _PIL_OPS, COLOUR_OPS, PLAIN_OPS, BlipRandAugment, to_image
from bt.data.randaugment import blip_operation as blip_on_cpu
from bt.data.randaugment import pil_operation as pil_on_cpu
from bt.data.rules import ImageRules
from bt.data.shards import ShardSet
from bt.data.sources.image_folder_csv import ImageFolderCSV
from bt.data.text import train_tokenizer
from bt.data.transforms import TRANSFORMS, UNDECODABLE, make_transform
from bt.data.write import convert
from bt.errors import DataError

# torchvision hands its decoders over to TorchCodec; the version that is pinned has them.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

CPU = torch.device("cpu")
PHOTO = (Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").read_bytes()  # 512 x 600
SMALL = np.array(decode(PHOTO).resize((97, 130)))
PICTURES = [SMALL, np.maximum(SMALL, 9), np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)]


def planes(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def apart(tensor: torch.Tensor, wanted) -> np.ndarray:
    return np.abs(tensor.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted))


@pytest.mark.parametrize("name", PLAIN_OPS + COLOUR_OPS)
def test_blip_operations_are_those_of_the_cpu(name):
    exact = name not in ("ShearX", "ShearY", "Rotate", "Color")
    for pixels in [*PICTURES, *(picture[..., :1].copy() for picture in PICTURES)]:
        for level, sign in ((5, 1), (5, -1), (7, 1), (7, -1)):
            difference = apart(
                blip_operation(name, planes(pixels), level, sign), blip_on_cpu(name, pixels, level, sign)
            )
            assert difference.max() <= (0 if exact else 1) and (difference > 0).mean() < 0.03


@pytest.mark.parametrize("name", _PIL_OPS)
def test_pil_operations_are_pillows(name):
    most = 1 if name in ("Color", "Contrast", "AutoContrast") else 0
    for pixels in PICTURES:
        for level, negative in ((7, False), (7, True), (9, False), (9, True)):
            negative = negative and _PIL_OPS[name][3]
            got = pil_operation(name, planes(pixels), level, negative)
            difference = apart(got, pil_on_cpu(name, to_image(pixels), level, negative))
            if name == "Rotate":  # of two equally near pixels the other one
                assert (difference > 0).mean() < 0.001
            else:
                assert difference.max() <= most


@pytest.mark.parametrize("randaug", ["official", "torchvision"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_draws_give_the_pixels_of_the_fast_route(name, randaug):
    cpu = make_transform(name, 64, randaug=randaug, resize="fast")
    device = DeviceTransform(cpu, CPU)
    assert device.random == cpu.random
    for seed in range(6):
        image = device(PHOTO, np.random.default_rng(seed))
        assert isinstance(image, Encoded)
        (got,) = device.finish(device.stack([image]))
        difference = (got.int() - cpu(PHOTO, np.random.default_rng(seed)).int()).abs()
        if not cpu.random:
            assert difference.max() == 0
        elif isinstance(cpu.last, BlipRandAugment):
            assert difference.float().mean() < 0.01
        else:  # what is one level before equalising or solarising can be more behind it
            assert difference.float().mean() < 1.2


def test_only_plain_jpeg_is_left_to_the_device():
    """Also the grey ones, for a model of grey images."""
    buffers = {"PNG": io.BytesIO(), "CMYK": io.BytesIO(), "L": io.BytesIO()}
    image = decode(PHOTO)
    image.save(buffers["PNG"], "PNG")
    for mode in ("CMYK", "L"):
        image.convert(mode).save(buffers[mode], "JPEG")
    files = {name: buffer.getvalue() for name, buffer in buffers.items()} | {"RGB": PHOTO}
    for channels, kept in ((3, "RGB"), (1, "L")):
        cpu = make_transform("blip", 48, channels, resize="fast")
        device = DeviceTransform(cpu, CPU)
        images = [device(data) for data in files.values()]
        assert [name for name, image in zip(files, images, strict=True) if isinstance(image, Encoded)] == [kept]
        pending = device.stack(images)
        assert pending.pin_memory() is pending
        done = device.finish(pending)
        assert done.shape == (4, channels, 48, 48) and done.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(row, cpu(data)) for row, data in zip(done, files.values(), strict=True))
        assert device.finish(device.stack([])).shape == (0, channels, 48, 48)
    with pytest.raises(UNDECODABLE):
        device(b"no image")
    with pytest.raises(UNDECODABLE):
        device.finish(Pending([Encoded(PHOTO[:9000], None)]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Twelve photos, of which number 5 is cut in half and number 8 a PNG."""
    root = tmp_path_factory.mktemp("photos")
    photo = decode(PHOTO)
    with open(root / "photos.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text"])
        for number in range(12):
            name = f"{number:02d}.{'png' if number == 8 else 'jpg'}"
            photo.crop((10 * number, 20 * number, 300 + 10 * number, 280 + 20 * number)).save(root / name)
            rows.writerow([name, f"photo {number}"])
    half = root / "05.jpg"
    half.write_bytes(half.read_bytes()[:4000])
    convert(ImageFolderCSV(str(root)), root / "shards", images=ImageRules(check="header"))
    return ShardSet(str(root / "shards"), "train")


def maker_of(shards: ShardSet, transform, **options) -> BatchMaker:
    index, tokenizer = PairIndex(shards.counts("captions")), train_tokenizer(["photo"])
    return BatchMaker(shards, index, text_field="captions", tokenizer=tokenizer, transform=transform, seed=3, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_what_they_give_on_the_cpu(shards, workers):
    """A damaged image is found only after its batch was put together; it is left out and counted all the same."""
    for name in ("clip", "blip_randaug"):
        cpu = make_transform(name, 48, resize="fast")
        index = PairIndex(shards.counts("captions"))
        train = TrainPlan(index, shards.starts, seed=3, global_batch=4)
        whole = EvalPlan(index, seed=0, batch=5, world=1, rank=0)
        loaded = {}
        for kind, transform in (("cpu", cpu), ("device", DeviceTransform(cpu, CPU))):
            maker = maker_of(shards, transform, on_bad_sample="skip")
            loaded[kind] = [
                *train_loader(train, maker, start_step=1, total_steps=6, workers=workers),
                *eval_loader(whole, maker, workers=workers),
            ]
        (skipped,) = {reason for batch in loaded["device"] for reason in batch.skipped}
        assert skipped.endswith(": image cannot be decoded")
        for ours, wanted in zip(loaded["device"], loaded["cpu"], strict=True):
            assert ours.keys == wanted.keys and ours.skipped == wanted.skipped
            assert torch.equal(ours.pairs, wanted.pairs) and torch.equal(ours.texts.ids, wanted.texts.ids)
            difference = (ours.images.int() - wanted.images.int()).abs()
            assert difference.float().mean() < 0.3 if cpu.random else difference.max() == 0


def test_a_damaged_image_stops_where_it_may_not_be_left_out(shards):
    maker = maker_of(shards, DeviceTransform(make_transform("clip", 48, resize="fast"), CPU))
    plan = EvalPlan(PairIndex(shards.counts("captions")), seed=0, batch=12, world=1, rank=0)
    with pytest.raises(DataError, match="the image of sample '.*' cannot be decoded"):
        list(eval_loader(plan, maker))


def test_distance_from_the_official_pixels():
    """Without crop, flip and augmentation, which would hide it."""
    assert distance(make_transform("blip_randaug", 96), PHOTO) == (0, 0)
    fast = make_transform("blip_randaug", 96, resize="fast")
    mean, largest = distance(fast, PHOTO)
    squash = [make_transform("blip", 96, resize=kind)(PHOTO).int() for kind in ("pil", "fast")]
    assert mean == pytest.approx((squash[0] - squash[1]).abs().float().mean().item())
    assert 0 < mean < 0.02 and largest == (squash[0] - squash[1]).abs().max()
    assert distance(DeviceTransform(fast, CPU), PHOTO) == (mean, largest)
    assert distance(make_transform("clip", 48, decode_draft=True), PHOTO)[0] > 1
    assert distance(make_transform("clip_randaug", 48, resize="fast"), PHOTO)[1] == 1
    assert fast.random and fast.chain.flip  # unchanged


def test_a_run_says_how_far_its_pixels_are(shards, monkeypatch):
    """Measured on the first image that can be read."""
    vision = SimpleNamespace(image_size=96, channels=3)

    def note(**options) -> str | None:
        parts = SimpleNamespace(data=DataConfig(dir="d", **options)), SimpleNamespace(device=CPU)
        return Data(*parts, SimpleNamespace(tower=SimpleNamespace(vision=vision)), None).pixel_note(shards, "clip")

    assert note() is None
    first, sixth, seventh = (next(iter(shards.read(number).images.values())) for number in (0, 5, 6))
    mean, largest = distance(make_transform("clip", 96, resize="fast"), first)
    wanted = f"{mean:.4f} grey levels from the official pixels on average, at most {largest} (the first image)"
    assert note(resize="fast") == f"data.resize=fast, decode_draft=false, decode_on=cpu: {wanted}"
    assert note(resize="fast", decode_on="device").endswith(f"decode_on=device: {wanted}")
    read = shards.read
    monkeypatch.setattr(shards, "read", lambda number: read(number + 5))
    with pytest.raises(UNDECODABLE):
        decode(sixth)
    mean, _ = distance(make_transform("clip", 96, resize="fast"), seventh)
    assert f": {mean:.4f} grey levels" in note(resize="fast")
