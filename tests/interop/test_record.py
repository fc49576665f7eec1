"""What an export keeps beside another program's format: values alone come back, and nothing of others' is run."""

import json
import shutil

import pytest
import torch
from transformers import BridgeTowerForContrastiveLearning, BridgeTowerModel

import bt
from bt.data.text import pretrained_tokenizer
from bt.errors import CheckpointError, DataError
from bt.interop.export_released import export_released
from bt.interop.export_transformers import export_transformers
from bt.interop.imports import import_source
from bt.interop.load import load_model
from bt.interop.source import open_source
from tests.golden_helpers import GOLDEN
from tests.interop.models import bundle, released_file, save_transformers

RUNS = {"_target_": "subprocess.Popen"}
PLUGIN = """from pathlib import Path
from bt.models.cross_modal import CoAttention as Cross
Path({mark!r}).touch()
"""


def with_entry(path, **entries):
    """The golden training checkpoint with something more in it."""
    content = torch.load(GOLDEN / "bridgetower_import/official_training.ckpt", weights_only=False)
    torch.save(content | entries, path)
    return path


def test_a_record_in_a_checkpoint_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    evaluators = {"x": {**RUNS, "args": ["touch", str(mark)]}}
    record = {"settings": {"task.evaluators": [evaluators, {}]}}
    path = with_entry(tmp_path / "a.ckpt", bt=record)
    with pytest.raises(CheckpointError, match="a.ckpt: its record sets task.evaluators, which no export of bt writes"):
        load_model(path)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["", "/model.safetensors"])
def test_a_record_in_a_folder_runs_nothing(file, tmp_path):
    """A module of the author's, put on the path and named as the cross-modal layers' class."""
    mark = tmp_path / "mark"
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug/evilmod.py").write_text(PLUGIN.format(mark=str(mark)))
    save_transformers(BridgeTowerModel, tmp_path / "hf")
    cross = ["evilmod.Cross", "bt.models.cross_modal.CoAttention"]
    for settings, key in (
        ({"plugins": [[str(tmp_path / "plug")], []], "cross._target_": cross}, "plugins"),
        ({"cross._target_": cross}, "cross._target_"),
    ):
        (tmp_path / "hf/bt.json").write_text(json.dumps({"settings": settings}))
        with pytest.raises(CheckpointError, match=f"bt.json: its record sets {key}, which no export of bt writes"):
            bt.load(f"{tmp_path}/hf{file}")
    assert not mark.exists()


CREATES = "${oc.create:{_target_:subprocess.Popen,args:[touch,MARK]}}"


@pytest.mark.parametrize(
    "drop_rate", [RUNS | {"args": ["touch", "MARK"]}, CREATES, [RUNS]], ids=["node", "text", "list"]
)
def test_settings_of_others_name_no_classes(drop_rate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(GOLDEN / "bridgetower_import/official_training.ckpt", weights_only=False)
    config = dict(content["hyper_parameters"]["config"], drop_rate=drop_rate)
    path = with_entry(tmp_path / "a.ckpt", hyper_parameters={"config": config})
    with pytest.raises(CheckpointError, match=r"a.ckpt: its settings give cross.dropout.*, which is no plain value"):
        load_model(path)
    assert not (tmp_path / "MARK").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused_unasked(tmp_path, monkeypatch):
    """Where transformers would ask at the terminal, and somebody says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = tmp_path / "mark"
    (tmp_path / "code.py").write_text(PLUGIN.format(mark=str(mark)))
    about = {"auto_map": {"AutoTokenizer": [None, "code.Cross"]}, "tokenizer_class": "Cross"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        pretrained_tokenizer(str(tmp_path))
    assert not mark.exists()


MALFORMED = {
    "no object": ([], "holds no JSON object"),
    "settings": ({"settings": []}, "its settings are no object"),
    "value": ({"settings": {"cross.norm_eps": 3}}, "cross.norm_eps is no list of two float"),
    "one": ({"settings": {"cross.norm_eps": [1e-5]}}, "cross.norm_eps is no list of two float"),
    "node": ({"settings": {"cross.dropout": [RUNS, 0.1]}}, "cross.dropout is no list of two float"),
    "kind": ({"settings": {"bridge.attend_padding": [1, True]}}, "bridge.attend_padding is no list of two bool"),
    "resolver": ({"settings": {"data.eval_transform": [CREATES, "clip"]}}, "data.eval_transform is no list of two str"),
    "temperature": ({"temperature": "x"}, "its temperature is no number above 0"),
    "labels": ({"labels": [1]}, "its labels are no lists of strings"),
    "names": ({"labels": {"answers": [1]}}, "its labels are no lists of strings"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_record_is_one_line(case, tmp_path):
    record, said = MALFORMED[case]
    save_transformers(BridgeTowerModel, tmp_path)
    (tmp_path / "bt.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/bt.json.* {said}"):
        open_source(tmp_path)


def test_an_entry_of_a_checkpoint_that_is_no_record(tmp_path):
    with pytest.raises(CheckpointError, match="a.ckpt: no record of bt's export: it is no object"):
        open_source(with_entry(tmp_path / "a.ckpt", bt=["1.0"]))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_file_of_a_folder_brings_its_record(name, tmp_path):
    export_transformers(bundle(cross__norm_eps=3e-6, data__max_text_len=17), tmp_path / "hf")
    if name.endswith(".bin"):
        torch.save(open_source(tmp_path / "hf").tensors, tmp_path / "hf" / name)
    made, _ = import_source(open_source(tmp_path / "hf" / name))
    assert (made.nodes["cross"]["norm_eps"], made.nodes["data"]["max_text_len"]) == (3e-6, 17)
    shutil.copy(tmp_path / "hf/config.json", tmp_path)
    shutil.copy(tmp_path / "hf" / name, tmp_path)
    made, _ = import_source(open_source(tmp_path / name))
    assert (made.nodes["cross"]["norm_eps"], made.nodes["data"]["max_text_len"]) == (1e-5, 32)


def test_heads_are_said_to_be_left_out_only_where_they_are(tmp_path):
    """The contrastive heads of transformers have names that begin as those of ITC."""
    save_transformers(BridgeTowerForContrastiveLearning, tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    for left, said in (([], []), (["contrastive"], [("head contrastive", "as asked by --leave-out")])):
        _, rows = import_source(source, leave_out=left)
        assert [(row.part, row.note) for row in rows if row.what == "dropped"] == said
    released_file("add", tmp_path / "model.ckpt")
    _, rows = import_source(open_source(tmp_path / "model.ckpt"), leave_out=["itc", "mlm"])
    assert [row.part for row in rows if "--leave-out" in row.note] == ["head itc", "head mlm"]


@pytest.mark.parametrize("kind, option", [("manager.ManagerBridge", "attend_padding"), ("add.AddBridge", "norm_eps")])
def test_a_bridge_comes_back_as_it_was(kind, option, tmp_path):
    value = {"attend_padding": False, "norm_eps": 2e-5}[option]
    node = {"_target_": f"bt.models.bridges.{kind}", option: value}
    node |= {"managed": 2} if option == "attend_padding" else {}
    rows = export_released(bundle(bridge=node), tmp_path / "a.ckpt")
    assert f"bridge.{option}" in {row.part for row in rows if row.what == "differs"}
    back, _ = import_source(open_source(tmp_path / "a.ckpt"))
    assert back.nodes["bridge"][option] == value
