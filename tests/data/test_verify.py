import numpy as np

from bt.data.verify import verify
from tests.data.helpers import flip_byte, truncate


def test_sound_data_has_no_faults(small_dir):
    seen = []
    assert verify(str(small_dir), lambda shards: (seen.append(shard.name) or shard for shard in shards)) == []
    assert len(seen) == 6 + 1 + 6 and seen[0] == "train-000000.tar"


def test_every_fault_is_named(small_dir):
    row = np.load(small_dir / "train-000001.npy")[7]
    flip_byte(small_dir / "train-000001.tar", int(row["offset"]) + 40)
    flip_byte(small_dir / "train-000002.npy", 200)
    truncate(small_dir / "val-000000.tar", 1024)
    (small_dir / "test-000004.tar").unlink()
    (small_dir / "other-000000.tar").write_bytes(b"")
    faults = verify(str(small_dir))
    assert [fault.removeprefix(f"{small_dir}/") for fault in faults[:3]] == [
        "train-000001.tar differs from the index (SHA-256)",
        f"train-000001.tar: the bytes of sample '{row['key'].decode()}' differ from the index (CRC-32)",
        "train-000002.npy differs from the index (SHA-256)",
    ]
    assert "truncated file" in faults[3] and "val-000000.tar" in faults[3]
    assert "missing file" in faults[4] and "test-000004.tar" in faults[4]
    assert faults[5:] == [f"{small_dir}/other-000000.tar is not in the index"]
