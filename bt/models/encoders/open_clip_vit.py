"""CLIP's image encoder (ViT) by open_clip's names and weights."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models.checks import check_range
from bt.models.encoders.base import VisionEncoder
from bt.models.quick_gelu import QuickGELU


@dataclass(frozen=True)
class Architecture:
    """Sizes of a CLIP ViT, named as in open_clip's model configurations."""

    width: int
    layers: int
    patch_size: int
    head_width: int = 64
    mlp_ratio: float = 4.0
    quick_gelu: bool = False

    @staticmethod
    def of_name(name: str, pretrained: str | None) -> Architecture:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ConfigError(f"encoder.vision.name={name} is no model of open_clip (open_clip.list_models())")
        sizes = dict(config["vision_cfg"])
        sizes.pop("image_size", None)
        known = {"width", "layers", "patch_size", "head_width", "mlp_ratio"}
        other = sorted(set(sizes) - known)
        if other or not isinstance(sizes.get("layers"), int):
            raise ConfigError(f"encoder.vision.name={name} is not a plain CLIP ViT (it has {', '.join(other)})")
        weights = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        quick_gelu = config.get("quick_gelu", False) or weights.get("quick_gelu", False)
        return Architecture(quick_gelu=quick_gelu, **sizes)

    @staticmethod
    def of_config(config: dict[str, Any]) -> Architecture:
        try:
            return Architecture(**config)
        except TypeError as error:
            allowed = ", ".join(Architecture.__dataclass_fields__)
            raise ConfigError(f"encoder.vision.architecture: {error}; allowed are {allowed}") from error


def fetch(name: str | None, pretrained: str) -> Path:
    """The weights' file: `pretrained` itself if it is one, else open_clip's weights of that tag, from its cache or
    the network (HF_HUB_OFFLINE=1 keeps it off the network)."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    config = open_clip.get_pretrained_cfg(name, pretrained) if name else {}
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) if name else "none without a name"
        raise ConfigError(f"encoder.vision.pretrained={pretrained} is neither a file nor a tag of {name} ({tags})")
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:
        repository = config.get("hf_hub", "").rstrip("/")
        source = f"open_clip_model.safetensors from huggingface.co/{repository}" if repository else config["url"]
        raise ConfigError(
            f"encoder.vision.pretrained={pretrained}: the weights of {name} are not in the cache and cannot be fetched "
            f"({type(error).__name__}); fetch {source} by hand and set encoder.vision.pretrained to the file's path"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The image tower's tensors of a CLIP file: safetensors or a state dict. Nothing that a file holds is executed."""
    if is_torchscript(path):
        # What open_clip fetches is safetensors or a state dict, also for OpenAI's models, so this is a file given.
        raise ConfigError(
            f"encoder.vision.pretrained={path} is a TorchScript archive, which can hold code and is not opened here; "
            f"`python -m bt.checkpoint import {path} --out DIR` reads its tensors alone"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"encoder.vision.pretrained={path} cannot be read as CLIP weights: {reason}") from error
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return {key: tensor.float() for key, tensor in state.items() if key.startswith("visual.") and key != "visual.proj"}


def is_torchscript(path: Path) -> bool:
    """TorchScript archives hold their constants beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class OpenClipVision(VisionEncoder):
    """CLIP ViT trunk: `ln_post` is applied to every bridged layer's output, the output projection is left out.

    name, pretrained: a model and a weights tag of open_clip, or a file with its weights; pretrained None: random.
    architecture: the sizes of `Architecture` for a model without a name.
    remove_last_layers: blocks cut from the top (METER: 1).
    """

    position_key = "visual.positional_embedding"
    patch_key = "visual.conv1.weight"
    pre_norm = True

    def __init__(
        self,
        name: str | None = None,
        pretrained: str | None = None,
        image_size: int = 224,
        channels: int = 3,
        remove_last_layers: int = 0,
        architecture: dict[str, Any] | None = None,
    ):
        if (name is None) == (architecture is None):
            raise ConfigError("encoder.vision: give either name or architecture")
        sizes = Architecture.of_name(name, pretrained) if name else Architecture.of_config(architecture)
        for key in ("width", "layers", "patch_size", "head_width"):
            check_range(f"encoder.vision.architecture.{key}", getattr(sizes, key), at_least=1)
        check_range("encoder.vision.architecture.mlp_ratio", sizes.mlp_ratio, above=0)
        super().__init__(image_size, sizes.patch_size, channels)
        if sizes.width % sizes.head_width:
            raise ConfigError(
                f"encoder.vision.architecture.head_width={sizes.head_width} does not divide width={sizes.width}"
            )
        if not 0 <= remove_last_layers < sizes.layers:
            raise ConfigError(
                f"encoder.vision.remove_last_layers={remove_last_layers}: allowed are 0 to {sizes.layers - 1}"
            )
        self.width = sizes.width
        self.depth = sizes.layers - remove_last_layers
        self.visual = VisionTransformer(
            image_size=image_size,
            patch_size=sizes.patch_size,
            width=sizes.width,
            layers=self.depth,
            heads=sizes.width // sizes.head_width,
            mlp_ratio=sizes.mlp_ratio,
            act_layer=QuickGELU if sizes.quick_gelu else nn.GELU,
        )
        self.visual.proj = None
        if self.input_channels != 3:
            patch = sizes.patch_size
            self.visual.conv1 = nn.Conv2d(self.input_channels, sizes.width, kernel_size=patch, stride=patch, bias=False)
        if pretrained is not None:
            self._load(read_weights(fetch(name, pretrained)), pretrained)

    def _load(self, state: dict[str, Tensor], source: str) -> None:
        own = self.state_dict()
        # Blocks above `depth` are those that remove_last_layers cut.
        cut = {key for key in state if key.startswith("visual.transformer.resblocks.") and key not in own}
        state = self.adapt({key: tensor for key, tensor in state.items() if key not in cut})
        wrong = sorted(
            key
            for key in own.keys() | state.keys()
            if key not in own or key not in state or own[key].shape != state[key].shape
        )
        if wrong:
            raise ConfigError(f"encoder.vision.pretrained={source} is of another architecture: {', '.join(wrong[:3])}")
        self.load_state_dict(state)

    def forward(self, images: Tensor, states: int) -> list[Tensor]:
        # The steps of VisionTransformer.forward_intermediates, which would split off the class token.
        x = self.visual._embeds(self.stack_grey(images))
        return self.run_blocks(self.visual.transformer.resblocks, x, states, self.visual.ln_post)
