"""Any text encoder of transformers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel

from bt.errors import ConfigError
from bt.models import checkpointing
from bt.models.checks import check_range
from bt.models.encoders.base import TextEncoder


class HFText(TextEncoder):
    """transformers' AutoModel without its pooler.

    name: a model of the Hugging Face hub or a local folder. pretrained: load its weights; False: its configuration
    with random weights. config: {"model_type": ..., **sizes} for a model without a name, with random weights.
    vocab_size: of the tokenizer; a model with random weights takes it, a pre-trained one must have as many rows.
    pad_id: the tokenizer's, likewise: with random weights it is taken, pre-trained ones must have been trained with it.
    dropout: of attention probabilities and hidden states; None: the model's own (RoBERTa: 0.1).
    cls: which token's state stands for the text and is the first one given: the "first" token's, or the "last" real
    token's, for encoders that read from left to right (CLIP), whose first token has seen nothing.
    """

    def __init__(
        self,
        name: str | None = None,
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        dropout: float | None = None,
        pad_id: int | None = None,
        cls: Literal["first", "last"] = "first",
    ):
        super().__init__()
        if (name is None) == (config is None):
            raise ConfigError("encoder.text: give either name or config")
        settings = self._settings(name, config)
        pretrained = pretrained and name is not None
        if pretrained and vocab_size is not None and vocab_size > settings.vocab_size:
            raise ConfigError(
                f"encoder.text.tokenizer has {vocab_size} tokens, but {name} only {settings.vocab_size} embeddings"
            )
        if pretrained and pad_id is not None and pad_id != settings.pad_token_id:
            raise ConfigError(
                f"encoder.text.tokenizer pads with id {pad_id}, but {name} was trained with {settings.pad_token_id}"
            )
        if not pretrained and vocab_size is not None:
            settings.vocab_size = vocab_size
        if not pretrained and pad_id is not None:
            settings.pad_token_id = pad_id
        check_range("encoder.text.config.num_attention_heads", settings.num_attention_heads, at_least=1)
        if settings.hidden_size % settings.num_attention_heads:
            raise ConfigError(
                f"encoder.text.config.num_attention_heads={settings.num_attention_heads} does not divide "
                f"hidden_size={settings.hidden_size}"
            )
        if dropout is not None:
            check_range("encoder.text.dropout", dropout, at_least=0, below=1)
            if not hasattr(settings, "hidden_dropout_prob"):
                raise ConfigError(f"encoder.text.dropout: {settings.model_type} names its dropout otherwise, set null")
            settings.hidden_dropout_prob = settings.attention_probs_dropout_prob = dropout
        if cls not in ("first", "last"):
            raise ConfigError(f"encoder.text.cls={cls}: allowed are first, last")
        self.cls = cls
        self.model = self._model(name if pretrained else None, settings)
        # The pooler is for sentence tasks; the tower reads the states alone.
        self.model.pooler = None
        self.width = settings.hidden_size
        self.depth = settings.num_hidden_layers
        self.vocab_size = settings.vocab_size
        self.pad_id = settings.pad_token_id
        # RoBERTa counts positions from pad id + 1, so that many rows of its table are never used.
        offset = getattr(self.model.embeddings, "padding_idx", -1) + 1
        self.max_positions = settings.max_position_embeddings - offset

    @staticmethod
    def _settings(name: str | None, config: dict[str, Any] | None):
        if config is not None:
            sizes = dict(config)
            try:
                return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
            except KeyError as error:
                raise ConfigError(
                    f"encoder.text.config needs model_type, one that transformers knows: {error}"
                ) from error
            except StrictDataclassError as error:
                raise ConfigError(f"encoder.text.config: {' '.join(str(error).split())}") from error
        try:
            # Of a model of texts and images (CLIP) the text tower's.
            return AutoConfig.from_pretrained(name).get_text_config()
        except (OSError, ValueError) as error:
            raise unreachable(name, error) from error

    @staticmethod
    def _model(pretrained: str | None, settings):
        # transformers picks SDPA for every model that has it.
        if pretrained is None:
            return AutoModel.from_config(settings, dtype=torch.float32)
        try:
            model = AutoModel.from_pretrained(pretrained, config=settings, dtype=torch.float32)
        except OSError as error:
            raise unreachable(pretrained, error) from error
        return model.train()

    def forward(self, ids: Tensor, mask: Tensor, states: int) -> list[Tensor]:
        if ids.shape[1] > self.max_positions:
            raise ConfigError(
                f"data.max_text_len: texts of {ids.shape[1]} tokens, the encoder has {self.max_positions}"
            )
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        found = list(output.hidden_states[-states:])
        if (final := getattr(self.model, "final_layer_norm", None)) is not None:
            # CLIP's blocks are pre-norm; as in its image encoder every state gets the norm behind the last one.
            found = [final(state) for state in found]
        if self.cls == "last":
            last = mask.sum(dim=1) - 1
            rows = torch.arange(len(ids), device=ids.device)
            found = [torch.cat([state[rows, last][:, None], state[:, 1:]], dim=1) for state in found]
        return found

    def set_gradient_checkpointing(self, mode: str) -> None:
        # transformers runs the layers: nothing here calls run_block.
        if mode != "none":
            self.model.config.use_cache = False  # of no use without generation, and transformers warns of it
            self.model.activation_checkpointing_enable(checkpointing.options(mode))
        elif self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()


def unreachable(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"encoder.text.name={name} is neither a local folder nor in the cache, and cannot be fetched "
        f"({type(error).__name__}); fetch config.json, model.safetensors and the tokenizer's files from "
        f"huggingface.co/{name} by hand into a folder and set encoder.text.name to it"
    )
