"""Checks of the nodes that build an object: `_target_` against the class that it names."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from bt.config.schema import BRIDGE_OPTIONS
from bt.errors import ConfigError


def add_plugins(directories: Iterable[str]) -> None:
    """Puts directories with a user's own modules first on sys.path."""
    for directory in directories:
        path = Path(directory).expanduser()
        if not path.is_dir():
            raise ConfigError(f"plugins: {directory} is not a directory")
        if str(path.resolve()) not in sys.path:
            sys.path.insert(0, str(path.resolve()))


def load_target(node: Any, key: str) -> Any:
    """The class or function that `node["_target_"]` names; ConfigError where there is none."""
    if not isinstance(node, Mapping) or not node.get("_target_"):
        raise ConfigError(f"{key} has no _target_: choose an option of the group or give {key}._target_=package.Class")
    dotted = str(node["_target_"])
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise ConfigError(f"{key}._target_={dotted}: importing {name} fails: {error}") from error
        except Exception as error:  # a plug-in's own code may raise anything
            raise ConfigError(
                f"{key}._target_={dotted}: importing {name} fails: {type(error).__name__}: {error}"
            ) from error
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                raise ConfigError(f"{key}._target_={dotted}: {name} has no {'.'.join(parts[cut:])}")
            found = getattr(found, attribute)
        if not callable(found):
            raise ConfigError(f"{key}._target_={dotted} is not a class or function")
        return found
    raise ConfigError(f"{key}._target_={dotted}: no module named {parts[0]!r} (see plugins=[DIR])")


def check_target(node: Any, key: str, *, given: Iterable[str] = (), first_given: bool = False) -> None:
    """Checks the arguments in `node` against the signature of its class.

    given: parameters that the code passes itself, so that the configuration neither must nor may set them;
    first_given: the first parameter is one of these. Values are checked where the annotation is a plain type.
    """
    target = load_target(node, key)
    parameters = dict(inspect.signature(target).parameters)
    taken = set(given) | (set(list(parameters)[:1]) if first_given else set())
    kinds = inspect.Parameter
    open_ended = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    allowed = [n for n in named if n not in taken]
    arguments = [str(n) for n in node if n != "_target_"]
    for name in arguments:
        if name in taken or (name not in named and not open_ended):
            raise ConfigError(
                f"unknown option {key}.{name}: {node['_target_']} takes {', '.join(allowed) or 'no options'}"
            )
    for name in allowed:
        if named[name].default is kinds.empty and name not in arguments:
            raise ConfigError(f"{key}.{name} must be given: {node['_target_']} needs it")
    hints = _hints(target)
    for name in arguments:
        if name in hints and not _fits(node[name], hints[name]):
            wanted = _words(hints[name])
            raise ConfigError(f"{key}.{name}={node[name]!r} has the wrong type: {node['_target_']} takes {wanted}")


def check_model_targets(cfg: Any) -> None:
    """All `_target_` nodes of a run's configuration (bt.config.Config)."""
    vision = {k: v for k, v in cfg.encoder.vision.items() if k != "freeze"}
    check_target(vision, "encoder.vision")
    # The tokenizer is built beside the encoder, and decides its vocabulary and which token is padding.
    text = {k: v for k, v in cfg.encoder.text.items() if k not in ("tokenizer", "freeze")}
    check_target(text, "encoder.text", given=("vocab_size", "pad_id"))
    if not isinstance(tokenizer := cfg.encoder.text.get("tokenizer"), Mapping):
        raise ConfigError("encoder.text.tokenizer must be given: {kind: trained} or {kind: pretrained, name: ...}")
    maker = {"_target_": "bt.data.text.make_tokenizer", **tokenizer}
    check_target(maker, "encoder.text.tokenizer", given=("texts",))
    # One bridge per modality is made to the measure of the cross-modal layers and of its encoder; what holds for every
    # bridge is the tower's.
    bridge = {k: v for k, v in cfg.bridge.items() if k not in BRIDGE_OPTIONS}
    check_target(bridge, "bridge", given=("width", "layers", "uni_width", "depth"))
    check_target(cfg.cross, "cross")
    for name, node in cfg.task.objectives.items():
        check_target(node, f"task.objectives.{name}", first_given=True)
    for name, node in cfg.task.evaluators.items():
        check_target(node, f"task.evaluators.{name}")


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations of foreign code need not be resolvable
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a configuration value fits an annotation; True where the annotation says nothing simple."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(hint))
    return "null" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))
