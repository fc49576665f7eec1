"""The encoders against the libraries that they come from, and images of other sizes and channels."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import Normalize
from transformers import RobertaConfig, RobertaModel

from bt.checkpoint import main as checkpoint_command
from bt.errors import ConfigError
from bt.models.encoders.base import CLIP_MEAN, CLIP_STD, adapt_channels, resize_positions
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision
from bt.models.encoders.timm_vit import TimmVision
from tests.golden_helpers import difference, tensors
from tests.models.towers import TEXT, VISION, make_images, make_texts


def clip_file(tmp_path, name="clip.safetensors"):
    """A file with a tiny CLIP's weights: its image tower under `visual.`, and something of its text tower."""
    torch.manual_seed(0)
    state = OpenClipVision(image_size=24, architecture=VISION).state_dict()
    state = {**state, "visual.proj": torch.randn(24, 7), "logit_scale": torch.tensor(1.0)}
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / name)
    return tmp_path / name, state


def test_last_state_is_open_clips_output_before_the_projection():
    """open_clip's own model of the paper's name, at one of its sizes, with the same weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-S-32", pretrained=None, force_quick_gelu=True).visual.eval()
    theirs.output_tokens = True
    architecture = {"width": 384, "layers": 12, "patch_size": 32, "quick_gelu": True}
    ours = OpenClipVision(image_size=224, architecture=architecture).eval()
    ours.load_state_dict({f"visual.{k}": v for k, v in theirs.state_dict().items() if k != "proj"})
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        pooled, tokens = theirs(images)
        states = ours(images, 3)
        own = theirs.forward_intermediates(
            images, indices=3, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
        )
    assert len(states) == 3 and states[-1].shape == (2, ours.tokens, 384)
    assert difference(states[-1][:, 0] @ theirs.proj, pooled) <= 1e-5
    assert difference(states[-1][:, 1:], tokens) <= 1e-5
    pairs = zip(states, own["image_intermediates"], own["image_intermediates_prefix"], strict=True)
    for state, patches, cls in pairs:
        assert difference(state, torch.cat([cls, patches], dim=1)) <= 1e-5


def test_named_model_takes_its_sizes_from_open_clip():
    with torch.device("meta"):
        vision = OpenClipVision("ViT-L-14-quickgelu", None, image_size=294, remove_last_layers=1)
    assert (vision.width, vision.depth, vision.tokens) == (1024, 23, 442)
    assert len(vision.visual.transformer.resblocks) == 23
    assert type(vision.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert vision.visual.transformer.resblocks[0].attn.num_heads == 16


def test_text_states_are_robertas_hidden_states():
    torch.manual_seed(0)
    config = {key: value for key, value in TEXT.items() if key != "model_type"}
    theirs = RobertaModel(RobertaConfig(**config, attn_implementation="eager")).eval()
    ours = HFText(config=TEXT).eval()
    state = {f"model.{key}": tensor for key, tensor in theirs.state_dict().items() if "pooler" not in key}
    ours.load_state_dict(state)
    texts = make_texts(5)
    with torch.no_grad():
        expected = theirs(texts.ids, texts.mask.long(), output_hidden_states=True).hidden_states
        states = ours(texts.ids, texts.mask, 3)
    assert len(states) == 3
    for state, hidden in zip(states, expected[1:], strict=True):
        assert difference(state[texts.mask], hidden[texts.mask]) <= 1e-5
    assert ours.model.config._attn_implementation == "sdpa"
    assert (ours.width, ours.depth, ours.vocab_size, ours.pad_id, ours.max_positions) == (20, 3, 50, 1, 32)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "electra", "distilbert", "mpnet", "deberta-v2"])
def test_other_text_encoders_of_transformers(kind):
    """Their last state is the model's output, sizes and longest text are found under each one's own names."""
    sizes = {key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    if kind == "distilbert":
        sizes = {"vocab_size": 50, "dim": 20, "n_layers": 3, "n_heads": 2, "hidden_dim": 40}
    text = HFText(config={"model_type": kind, **sizes, "pad_token_id": 1}).eval()
    texts = make_texts(4)
    states = text(texts.ids, texts.mask, 3)
    expected = text.model(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
    assert len(states) == 3 and torch.equal(states[-1], expected)
    assert (text.width, text.depth) == (20, 3)
    assert text.max_positions == {"xlm-roberta": 510, "mpnet": 510}.get(kind, 512)


def test_small_vision_has_sixteen_tokens_and_a_class_token():
    torch.manual_seed(0)
    vision = TimmVision(image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    states = vision(images, 2)
    assert [state.shape for state in states] == [(2, 17, 128)] * 2 and vision.tokens == 17
    # timm's own forward pass is the last of them; the first is normalised by the same norm.
    assert difference(states[-1], vision.visual.forward_features(images)) <= 1e-6
    first = vision.visual.blocks[0](vision.visual._pos_embed(vision.visual.patch_embed(images)))
    assert difference(states[0], vision.visual.norm(first)) <= 1e-6


def test_an_image_of_the_small_encoder_does_not_depend_on_its_batch():
    vision = TimmVision(image_size=64).train()
    images = torch.randn(3, 3, 64, 64)
    assert difference(vision(images, 1)[0][:1], vision(images[:1], 1)[0]) <= 1e-5


@pytest.mark.parametrize("pixels", [48, 64, 80, 96])
def test_position_table_is_resized_as_released(pixels):
    table = tensors("bridgetower/position_table/input")["table"]
    expected = tensors("bridgetower/position_table/outputs")[f"image_{pixels}"]
    assert difference(resize_positions(table, pixels // 16), expected) <= 1e-6
    vision = OpenClipVision(image_size=pixels, architecture={"width": 128, "layers": 1, "patch_size": 16})
    adapted = vision.adapt({"visual.positional_embedding": table})["visual.positional_embedding"]
    assert difference(adapted, expected) <= 1e-6


def test_position_table_of_the_small_encoder_keeps_its_shape():
    state = TimmVision(image_size=64).state_dict()
    vision = TimmVision(image_size=96)
    adapted = vision.adapt(state)
    vision.load_state_dict(adapted)
    assert adapted["visual.pos_embed"].shape == (1, 37, 128)
    assert torch.equal(adapted["visual.pos_embed"][:, 0], state["visual.pos_embed"][:, 0])


@pytest.mark.parametrize("kind", ["clip", "stem"])
@torch.no_grad()
def test_grey_images_equal_their_stacked_copies(kind):
    torch.manual_seed(0)

    def make(channels):
        if kind == "clip":
            return OpenClipVision(image_size=24, channels=channels, architecture=VISION).eval()
        sizes = {"width": 16, "heads": 2, "stem_channels": (4, 8, 8, 16), "mean": (0.9, 0.5, 0.2)}
        return TimmVision(image_size=32, channels=channels, **sizes).eval()

    colour, grey = make(3), make(1)
    assert grey.channels == 1
    state = colour.state_dict()
    assert all(adapted is state[key] for key, adapted in grey.adapt(state).items() if key == grey.patch_key)
    grey.load_state_dict(state)
    pixels = torch.randint(0, 256, (2, 1, grey.image_size, grey.image_size), dtype=torch.uint8)
    stacked = pixels.repeat(1, 3, 1, 1)
    assert torch.equal(grey.normalize(pixels), colour.normalize(stacked))
    floats = torch.randn(pixels.shape)
    assert grey.normalize(floats) is floats
    for one, three in ((pixels, stacked), (floats, floats.repeat(1, 3, 1, 1))):
        found, expected = grey(grey.normalize(one), 2), colour(colour.normalize(three), 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="channels"):
        colour(floats, 1)


def test_other_numbers_of_channels_repeat_and_scale():
    weight = torch.arange(2 * 3 * 1 * 1.0).view(2, 3, 1, 1)
    assert torch.equal(adapt_channels(weight, 6)[1].flatten(), torch.tensor([3.0, 4, 5, 3, 4, 5]) / 2)
    assert torch.equal(adapt_channels(weight, 2)[0].flatten(), torch.tensor([0.0, 1.0]) * 3 / 2)
    assert adapt_channels(weight, 3) is weight


def test_pixels_are_normalised_as_totensor_and_normalize_do():
    vision = OpenClipVision(image_size=24, architecture=VISION)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    expected = Normalize(CLIP_MEAN, CLIP_STD)(pixels.float() / 255)
    assert difference(vision.normalize(pixels), expected) <= 5e-7
    planes_last = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(vision.normalize(planes_last), vision.normalize(pixels))
    assert vision.normalize(expected) is expected
    # Without statistics of its own for so many channels, each has the mean of the three.
    two = OpenClipVision(image_size=24, channels=2, architecture=VISION)
    mean, std = sum(CLIP_MEAN) / 3, sum(CLIP_STD) / 3
    assert difference(two.normalize(pixels[:, :2]), (pixels[:, :2].float() / 255 - mean) / std) <= 1e-6


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pt"])
def test_weights_from_a_file(tmp_path, name):
    """The text tower's tensors and the projection are ignored, the size and channels adapted, the top block cut."""
    path, state = clip_file(tmp_path, name)
    vision = OpenClipVision(pretrained=str(path), image_size=24, architecture=VISION)
    assert all(torch.equal(tensor, state[key]) for key, tensor in vision.state_dict().items())
    other = OpenClipVision(
        pretrained=str(path), image_size=32, channels=6, remove_last_layers=1, architecture=VISION
    ).state_dict()
    assert torch.equal(other["visual.conv1.weight"], state["visual.conv1.weight"].repeat(1, 2, 1, 1) / 2)
    assert other["visual.positional_embedding"].shape == (17, 24)
    block = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    assert torch.equal(other[block], state[block])


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_torchscript_archive_is_not_opened_but_can_be_converted(tmp_path, monkeypatch):
    torch.manual_seed(0)
    source = OpenClipVision(image_size=24, architecture=VISION)

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = source.visual

        def forward(self, x):
            return self.visual.conv1(x)

    torch.jit.trace(Holder(), make_images(1)).save(str(tmp_path / "clip.pt"))
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="is a TorchScript archive") as caught:
        patched.setattr(torch.jit, "load", None)
        OpenClipVision(pretrained=str(tmp_path / "clip.pt"), image_size=24, architecture=VISION)
    message = str(caught.value)
    assert "\n" not in message
    # The command that the message gives does the conversion.
    _, module, *arguments = message.split("`")[1].replace("DIR", str(tmp_path / "out")).removeprefix("python ").split()
    assert module == "bt.checkpoint"
    checkpoint_command(arguments)
    vision = OpenClipVision(pretrained=str(tmp_path / "out/vision.safetensors"), image_size=24, architecture=VISION)
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in vision.state_dict().items())


def test_weights_of_another_architecture_are_named(tmp_path):
    path, _ = clip_file(tmp_path)
    with pytest.raises(ConfigError, match=r"another architecture: visual.transformer.resblocks.3.attn.in_proj_bias"):
        OpenClipVision(pretrained=str(path), image_size=24, architecture={**VISION, "layers": 4})


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Malicious()}, tmp_path / "clip.pt")
    with pytest.raises(ConfigError, match="cannot be read as CLIP weights"):
        OpenClipVision(pretrained=str(tmp_path / "clip.pt"), image_size=24, architecture=VISION)
    assert not (tmp_path / "executed").exists()


def test_weights_that_cannot_be_had_say_what_to_fetch(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        OpenClipVision("ViT-B-16-quickgelu", "openai")
    message = str(caught.value)
    assert "\n" not in message
    assert "huggingface.co/timm/vit_base_patch16_clip_224.openai" in message and "encoder.vision.pretrained" in message
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    with pytest.raises(ConfigError, match="huggingface.co/FacebookAI/roberta-base by hand .* encoder.text.name"):
        HFText("FacebookAI/roberta-base")


def test_text_encoder_from_a_local_folder(tmp_path):
    torch.manual_seed(0)
    config = {key: value for key, value in TEXT.items() if key != "model_type"}
    theirs = RobertaModel(RobertaConfig(**config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = HFText(str(tmp_path), vocab_size=50, dropout=0.2)
    assert ours.training and ours.model.training, "transformers loads in evaluation mode, without dropout"
    assert torch.equal(ours.model.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight)
    assert {m.p for m in ours.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}
    fresh = HFText(str(tmp_path), pretrained=False, vocab_size=33)
    assert fresh.model.embeddings.word_embeddings.weight.shape == (33, 20)
    with pytest.raises(ConfigError, match="51 tokens, but .* only 50"):
        HFText(str(tmp_path), vocab_size=51)
    assert HFText(str(tmp_path), pad_id=1).pad_id == 1
    with pytest.raises(ConfigError, match="pads with id 0, but .* was trained with 1"):
        HFText(str(tmp_path), pad_id=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"image_size": 25, "architecture": VISION},
            "image_size=25 is not divisible by the patch size 8; 24 and 32 are",
        ),
        ({"image_size": 24, "architecture": {**VISION, "head_width": 5}}, "head_width=5 does not divide width=24"),
        ({"image_size": 24, "architecture": {**VISION, "deep": 5}}, "architecture: .*deep.*; allowed are width"),
        (
            {"image_size": 24, "architecture": VISION, "remove_last_layers": 3},
            "remove_last_layers=3: allowed are 0 to 2",
        ),
        ({"image_size": 24, "architecture": VISION, "channels": 0}, "channels=0"),
        ({"name": "ViT-X-1"}, "name=ViT-X-1 is no model of open_clip"),
        ({"name": "RN50"}, "name=RN50 is not a plain CLIP ViT"),
        ({}, "give either name or architecture"),
        (
            {"name": "ViT-B-16", "pretrained": "opanai"},
            "pretrained=opanai is neither a file nor a tag of ViT-B-16 .openai",
        ),
    ],
)
def test_mistakes_in_the_image_encoder(arguments, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        OpenClipVision(**arguments)


def test_mistakes_in_the_other_encoders():
    with pytest.raises(ConfigError, match="image_size=60 is not divisible by the patch size 16; 48 and 64 are"):
        TimmVision(image_size=60)
    with pytest.raises(ConfigError, match="encoder.vision.heads=5 does not divide encoder.vision.width=128"):
        TimmVision(heads=5)
    with pytest.raises(ConfigError, match="num_attention_heads=3 does not divide hidden_size=20"):
        HFText(config={**TEXT, "num_attention_heads": 3})
    with pytest.raises(ConfigError, match="encoder.text.config: .*hidden_size.* expected int, got str"):
        HFText(config={**TEXT, "hidden_size": "wide"})
    with pytest.raises(ConfigError, match="encoder.text.dropout=-0.1: must be at least 0 and below 1"):
        HFText(config=TEXT, dropout=-0.1)
    with pytest.raises(ConfigError, match="encoder.vision.std=0: must be above 0"):
        TimmVision(std=(0.2, 0, 0.2))
    with pytest.raises(ConfigError, match="encoder.vision.heads=0: must be at least 1"):
        TimmVision(heads=0)
    with pytest.raises(ConfigError, match="model_type"):
        HFText(config={"hidden_size": 20})
    with pytest.raises(ConfigError, match="texts of 40 tokens, the encoder has 32"):
        HFText(config=TEXT)(torch.full((1, 40), 7), torch.ones(1, 40, dtype=torch.bool), 1)
