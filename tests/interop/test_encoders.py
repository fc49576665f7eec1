"""CLIP's and RoBERTa's own weights, by the configuration that the import writes."""

import warnings
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from transformers import RobertaConfig, RobertaForMaskedLM

from bt.checkpoint import main
from bt.errors import CheckpointError
from bt.interop.encoders import import_clip
from bt.interop.source import open_source
from bt.models.encoders.hf_text import HFText
from tests.interop.models import tokenizer


def clip() -> CLIP:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=8, image_size=24)
    text = CLIPTextCfg(context_length=8, vocab_size=20, width=32, heads=2, layers=1)
    return CLIP(16, vision, text, quick_gelu=True).eval()


def option(folder: Path, group: str) -> dict:
    return OmegaConf.load(folder / "conf" / group / "imported.yaml")


class Visual(torch.nn.Module):
    """Stands for a scripted CLIP, whose code the archive holds beside its tensors."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.conv1 = torch.nn.Conv2d(3, 64, 8, 8, bias=False)
        self.visual.class_embedding = model.visual.class_embedding
        self.visual.positional_embedding = model.visual.positional_embedding
        self.visual.ln_pre, self.visual.ln_post = torch.nn.LayerNorm(64), torch.nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("name", ["openai-quickgelu.pt", "clip.safetensors"])
@torch.no_grad()
def test_an_image_tower(name, tmp_path, capsys):
    model = clip()
    if name.endswith(".pt"):
        torch.save(model.state_dict(), tmp_path / name)
        given = []
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), tmp_path / name)
        given = ["--set", "architecture.quick_gelu=true"]
    main(["import", str(tmp_path / name), "--out", str(tmp_path / "out"), *given])
    printed = capsys.readouterr().out
    assert "text tower, which the tower does not read" in printed and "taken for QuickGELU" in printed
    node = option(tmp_path / "out", "encoder/vision")
    encoder = instantiate({key: value for key, value in node.items() if key != "freeze"}).eval()
    images = torch.randn(2, 3, 24, 24)
    [states] = encoder(images, 1)
    features = torch.nn.functional.normalize(states[:, 0] @ model.visual.proj, dim=-1)
    torch.testing.assert_close(features, model.encode_image(images, normalize=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--labels", "labels.json", "--labels is for whole models: .*clip.pt is CLIP"),
        ("--leave-out", "vqa", "--leave-out is for whole models: .*clip.pt is CLIP"),
        ("--drop", "ln_*", "--drop is for whole models: .*clip.pt is CLIP"),
        ("--tokenizer", "t.json", "--tokenizer is for what reads texts: .*clip.pt is CLIP, of which the image"),
    ],
)
def test_options_that_an_encoder_has_no_use_for_are_refused(option, value, said, tmp_path):
    torch.save(clip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        main(["import", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "out"), option, value])
    assert not (tmp_path / "out").exists()


def test_a_torchscript_archive_that_is_no_vit_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Visual(clip()), torch.ones(1)).save(tmp_path / "model.pt")
    source = open_source(tmp_path / "model.pt")
    assert source.tensors["visual.conv1.weight"].shape == (64, 3, 8, 8)
    with pytest.raises(CheckpointError, match="its image tower is no ViT"):
        import_clip(source, tmp_path / "out", {})


@torch.no_grad()
def test_a_text_encoder(tmp_path, capsys):
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=20,
        type_vocab_size=1,
        layer_norm_eps=3e-5,
    )
    model = RobertaForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "roberta")
    tokenizer().save(tmp_path / "tokenizer.json")
    given = ["--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    main(["import", str(tmp_path / "roberta"), *given])
    assert "head of the pre-training" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--leave-out is for whole models: .*roberta is a text encoder"):
        main(["import", str(tmp_path / "roberta"), "--out", str(tmp_path / "more"), "--leave-out", "mlm"])
    node = OmegaConf.to_container(option(tmp_path / "out", "encoder/text"))
    assert node["tokenizer"] == {"kind": "pretrained", "name": str(tmp_path / "out/text")}
    encoder = HFText(node["name"], vocab_size=30, pad_id=1).eval()
    ids = torch.randint(5, 30, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    wanted = model.roberta(ids, mask.long()).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask, 1)[0], wanted, rtol=0, atol=1e-5)
    from bt.data.text import make_tokenizer

    again = make_tokenizer(texts=(), **node["tokenizer"])
    assert again.encode(["how many red dots"], 12) == tokenizer().encode(["how many red dots"], 12)
