"""Training checkpoints hold more than tensors; none of it is ever run."""

import argparse
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from bt.errors import CheckpointError
from bt.interop.pickles import Placeholder, read_pickle


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Unknown(dict):
    pass


def test_options_and_callbacks_become_inert(tmp_path):
    options = argparse.Namespace(lr=1e-5, nested={"layers": 6})
    content = {"state_dict": {"a": torch.arange(4.0)}, "callbacks": {argparse.ArgumentParser: {"best": torch.ones(1)}}}
    torch.save({**content, "hyper_parameters": options}, tmp_path / "a.ckpt")
    found = read_pickle(tmp_path / "a.ckpt")
    assert torch.equal(found["state_dict"]["a"], torch.arange(4.0))
    assert isinstance(found["hyper_parameters"], Placeholder)
    assert found["hyper_parameters"].state == {"lr": 1e-5, "nested": {"layers": 6}}
    [callback] = found["callbacks"]
    assert issubclass(callback, Placeholder) and callback.__name__ == "ArgumentParser"


@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, "touch {}"),
        (exec, "open({!r}, 'w')"),
        (eval, "open({!r}, 'w')"),
        (Path.touch, "{}"),
    ],
    ids=["system", "exec", "eval", "method"],
)
def test_code_is_never_run(function, arguments, tmp_path):
    """Either refused with the reason and what to do, or a placeholder; but not run."""
    mark = tmp_path / "mark"
    argument = arguments.format(str(mark))
    touch = Touch(function, Path(argument) if function is Path.touch else argument)
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": touch}, tmp_path / "a.ckpt")
    try:
        found = read_pickle(tmp_path / "a.ckpt")
    except CheckpointError as error:
        assert "code is never executed" in str(error) and "weights_only=False" in str(error)
    else:
        assert isinstance(found["hyper_parameters"], Placeholder)
    assert not mark.exists()
    # It would run where it is trusted.
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert mark.exists()


def test_what_the_reader_refuses_is_explained(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "rest": Unknown(a=1)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a.ckpt is refused: .*Can only SETITEMS? for dict.* If you trust it"):
        read_pickle(tmp_path / "a.ckpt")
    for content in (b"nothing of the kind", b"junk\n" * 100, b"cos\nsystem\n(S'true'\ntR.", b""):
        (tmp_path / "b.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match="b.ckpt is no checkpoint: neither a zip archive nor a pickle"):
            read_pickle(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="none.ckpt cannot be read: No such file or directory"):
        read_pickle(tmp_path / "none.ckpt")


def test_torchs_older_format_is_read(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(tmp_path / "a.pt")["a"], torch.arange(4.0))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.ModuleDict({"norm": nn.LayerNorm(3)})
        self.scale = nn.Parameter(torch.arange(6.0).half().view(2, 3).T)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x):
        return self.visual["norm"](x) * self.scale[0]


@pytest.fixture
def archive(tmp_path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Small()).save(tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


def test_a_torchscript_archive_gives_its_tensors(archive):
    found, wanted = read_pickle(archive), Small().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


def test_code_in_a_torchscript_archive_is_not_run(archive, tmp_path):
    """Its data as a pickle that would call os.system."""
    import pickle
    import zipfile

    mark = tmp_path / "mark"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "evil.pt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/data.pkl"):
                content = pickle.dumps(Touch(os.system, f"touch {mark}"), protocol=2)
            target.writestr(name, content)
    assert read_pickle(tmp_path / "evil.pt") == {}
    assert not mark.exists() and "posix" in sys.modules
