"""From a data set's official raw files to a finished epoch of training, in two commands."""

import json

from tests.data.sources.raw_trees import jpeg, put, words
from tests.test_train import journal, run

SPLITS = {number: "train" if number < 16 else "val" if number < 20 else "test" for number in range(24)}


def test_flickr30k(tmp_path):
    entries = [
        {"filename": f"{1000 + n}.jpg", "split": split, "sentences": [{"raw": text} for text in words(n, 5)]}
        for n, split in SPLITS.items()
    ]
    put(tmp_path / "raw/karpathy/dataset_flickr30k.json", {"images": entries})
    for number in SPLITS:
        put(tmp_path / "raw/flickr30k-images" / f"{1000 + number}.jpg", jpeg(number))
    captions = {split: sum(len(e["sentences"]) for e in entries if e["split"] == split) for split in ("train", "val")}

    done = run("bt.convert", "source=flickr30k_karpathy", "raw_dir=raw", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"train: 16 samples, {captions['train']} captions" in done.stdout
    small = ["encoder=tiny", "cross=tiny", "tracking=none", "data.workers=1", "trainer.log_every=1"]
    settings = ["data=flickr30k_karpathy", "task=pretrain", "global_batch=8", "trainer.epochs=1", "run_dir=run", *small]
    done = run("bt.train", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    steps = [line for line in journal(tmp_path / "run") if "mlm/train/loss" in line]
    assert steps[-1]["epoch"] >= 1 and len(steps) == -(-captions["train"] // 8)
    metrics = json.loads((tmp_path / "run/report.json").read_text())["metrics"]
    assert 0 <= metrics["itm/test/accuracy"] <= 1 and metrics["mlm/test/loss"] > 0.5
