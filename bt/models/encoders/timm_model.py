"""Image encoders of timm: ViTs (DeiT, DINOv2, SigLIP, CLIP) and hierarchical ones (Swin, ConvNeXt)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models.checkpointing import wrap_blocks
from bt.models.encoders.base import VisionEncoder, adapt_channels


class TimmModel(VisionEncoder):
    """The outputs of the top blocks of a timm model, normalised by its final norm.

    name: of timm (timm.list_models()). pretrained: its weights by timm's tag in the name, or the path of a file with
    them; False: random ones. image_size: null, the one that the model was trained with. options: further arguments of
    timm.create_model, such as the sizes of a small model.

    The first token is the class token. Encoders without one (SigLIP, Swin, ConvNeXt) get the mean of the tokens there.
    Hierarchical encoders have fewer and wider tokens in each stage: states of lower stages are averaged to the grid of
    the last one, normalised and projected to its width.
    """

    position_key = "visual.pos_embed"

    def __init__(
        self,
        name: str,
        pretrained: bool | str = True,
        image_size: int | None = None,
        channels: int = 3,
        options: dict[str, Any] | None = None,
    ):
        if name.split(".")[0] not in timm.list_models():
            raise ConfigError(f"encoder.vision.name={name} is no model of timm (timm.list_models())")
        model = create(name, pretrained, image_size, 3 if channels == 1 else channels, options or {})
        data = resolve_model_data_config(model)
        size = image_size or data["input_size"][-1]
        if hasattr(model, "blocks"):
            blocks, stride = [[*model.blocks]], model.patch_embed.patch_size[0]
        else:
            stages = stages_of(model)
            if stages is None or not all(hasattr(stage, "blocks") for stage in stages):
                raise ConfigError(f"encoder.vision.name={name} has no blocks in a row; ViTs, Swin and ConvNeXt have")
            blocks, stride = [[*stage.blocks] for stage in stages], model.feature_info[-1]["reduction"]
        super().__init__(size, stride, channels, tuple(data["mean"]), tuple(data["std"]))
        self.visual = model
        self.patch_key = "visual." + next(
            key for key in model.state_dict() if key.endswith(("proj.weight", "0.weight"))
        )
        self.prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        self.tokens = self.grid**2 + max(self.prefix_tokens, 1)
        self.width = model.num_features
        self.depth = sum(map(len, blocks))
        # Stage by stage: number of blocks, and how their states reach the width of the last stage.
        self.blocks = [len(stage) for stage in blocks]
        widths = [info["num_chs"] for info in model.feature_info] if len(blocks) > 1 else [self.width]
        self.widen = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.width)) for width in widths[:-1]
        )

    def forward(self, images: Tensor, states: int) -> list[Tensor]:
        images = self.stack_grey(images)
        if len(self.blocks) > 1:
            return self._hierarchical(images, states)
        found = self.visual.forward_intermediates(
            images, indices=states, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        if not self.prefix_tokens:
            return [with_mean(tokens) for tokens in found]
        return [torch.cat([prefix, tokens], dim=1) for tokens, prefix in found]

    def _hierarchical(self, images: Tensor, states: int) -> list[Tensor]:
        model = self.visual
        x = model.patch_embed(images) if hasattr(model, "patch_embed") else model.stem(images)
        found, number = [], 0
        for stage, module in enumerate(stages_of(model)):
            x = module.downsample(x)
            for block in module.blocks:
                x = self.run_block(block, x)
                number += 1
                if number > self.depth - states:
                    found.append(self._state(x, stage))
        return found

    def _state(self, x: Tensor, stage: int) -> Tensor:
        """A block's output, (I, h, w, C) of Swin or (I, C, h, w) of ConvNeXt -> (I, tokens, width)."""
        last_norm = self.visual.norm if hasattr(self.visual, "patch_embed") else self.visual.head.norm
        nchw = x if hasattr(self.visual, "stem") else x.permute(0, 3, 1, 2)
        if stage == len(self.blocks) - 1:
            normed = last_norm(x)
            return with_mean((normed if nchw is not x else normed.permute(0, 2, 3, 1)).flatten(1, 2))
        pooled = F.adaptive_avg_pool2d(nchw, self.grid)
        return with_mean(self.widen[stage](pooled.flatten(2).transpose(1, 2)))

    def layer_of(self, name: str) -> int:
        parts = name.split(".")
        if parts[0] == "widen":
            return self.depth + 1
        if len(self.blocks) > 1 and parts[1] in ("layers", "stages"):
            stage = int(parts[2])
            below = sum(self.blocks[:stage])
            # What joins two stages belongs to the first block behind it.
            return below + 1 + (int(parts[4]) if parts[3] == "blocks" else 0)
        return super().layer_of(name)

    def set_gradient_checkpointing(self, mode: str) -> None:
        super().set_gradient_checkpointing(mode)
        if len(self.blocks) == 1:
            wrap_blocks(self.visual.blocks, mode)

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        if self.position_key in state:
            in_table = 0 if self.visual.no_embed_class else self.prefix_tokens
            table, size = state[self.position_key], [self.grid, self.grid]
            state[self.position_key] = resample_abs_pos_embed(table, size, num_prefix_tokens=in_table)
        if self.patch_key in state:
            state[self.patch_key] = adapt_channels(state[self.patch_key], self.input_channels)
        return state


def stages_of(model: nn.Module) -> nn.Module | None:
    """The stages of a hierarchical model, by Swin's or ConvNeXt's name; None where it has neither."""
    return getattr(model, "layers", None) or getattr(model, "stages", None)


def with_mean(tokens: Tensor) -> Tensor:
    """(I, S, D) -> (I, 1 + S, D): the mean of the tokens in the place of a class token."""
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


def create(
    name: str, pretrained: bool | str, image_size: int | None, channels: int, options: dict[str, Any]
) -> nn.Module:
    """The model without its classifier. Raises ConfigError where its weights cannot be had, or options do not fit."""
    arguments = {"num_classes": 0, "in_chans": channels, **options}
    # Convolutional models take any size and have no such argument.
    if image_size is not None and not name.startswith("convnext"):
        arguments["img_size"] = image_size
    if name.startswith("vit_"):
        arguments["global_pool"] = ""  # no attention pooling, which the tower would not use
    if isinstance(pretrained, str):
        if not Path(pretrained).is_file():
            raise ConfigError(f"encoder.vision.pretrained={pretrained} is no file: give its path, true or false")
        arguments["pretrained_cfg_overlay"] = {"file": pretrained}
    try:
        return timm.create_model(name, pretrained=bool(pretrained), **arguments)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"encoder.vision.options={options} or image_size={image_size}: {error} ({name})") from error
    except Exception as error:  # the hub's own errors, files that hold other weights
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        source = timm.get_pretrained_cfg(name, allow_unregistered=True)
        repository = (source.hf_hub_id if source else None) or "timm"
        raise ConfigError(
            f"encoder.vision.pretrained={pretrained}: the weights of {name} cannot be had ({reason}); fetch "
            f"model.safetensors from huggingface.co/{repository} by hand and set encoder.vision.pretrained to its path"
        ) from error
