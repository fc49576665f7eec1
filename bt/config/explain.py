"""Hydra's and OmegaConf's many-line errors as one line that names the key and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bt.config import schema

# Groups that are chosen on the command line but are no keys of the configuration themselves.
GROUPS_ONLY = ("experiment", "sweep")


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """One line for an error of composing or converting a configuration.

    overrides: the command line, to say which argument was meant where the error does not.
    """
    source = error.__cause__ if getattr(error.__cause__, "full_key", None) else error
    text = str(source)
    where = re.match(r"In '([^']+)'", str(error))
    prefix = f"conf/{where[1]}: " if where and where[1] != "config" else ""
    if options := getattr(error, "options", None):
        return _unknown_option(str(error), options)
    if match := re.search(r"Could not find '([^']+)'", str(error)):
        return f"{prefix}there is no {match[1]}"
    if match := re.search(r"Key '([^']*)' (?:is )?not in '?(\w+)'?", text):
        return prefix + _unknown_key(source, match[1], match[2])
    if match := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text, re.S):
        return f"{prefix}{_full_key(source)}={match[1]} has the wrong type: must be {_type_words(match[2])}"
    if match := re.search(
        r"Value '(.*)' of type '\w+' is incompatible with type hint 'Union\[int, float\]'", text, re.S
    ):
        return f"{prefix}{_full_key(source)}={match[1]} has the wrong type: must be a number"
    if match := re.search(r"Value '(.*)' is not a valid bool", text, re.S):
        return f"{prefix}{_full_key(source)}={match[1]} has the wrong type: must be true or false"
    if "mandatory value" in text.lower():
        return f"{_full_key(source)} must be given"
    if "Ambiguous value" in text:
        return f"{text.splitlines()[0]}: several values need -m (multirun), a list is written key=[a,b]"
    if type(error).__name__ in ("OverrideParseException", "LexerNoViableAltException"):
        return _parse_error(text, overrides)
    first = [line.strip() for line in text.splitlines() if line.strip() and not _is_detail(line)]
    key = _full_key(source)
    return prefix + (f"{key}: " if key and key not in first[0] else "") + first[0]


def unknown_keys(node: DictConfig, path: str = "") -> str | None:
    """The first key of a composed configuration that its dataclass does not have (`+key=value` lets them in)."""
    typed = OmegaConf.get_type(node)
    names = [f.name for f in dataclasses.fields(typed)] if dataclasses.is_dataclass(typed) else None
    for key in node:
        if names is not None and key not in names:
            return unknown(f"{path}{key}", names)
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            child = node[key]
            if isinstance(child, DictConfig) and (found := unknown_keys(child, f"{path}{key}.")):
                return found
    return None


def unknown(key: str, allowed: Iterable[str]) -> str:
    """The line for a key that does not exist."""
    allowed = [str(name) for name in allowed if name not in ("hydra", "_target_")]
    parent, _, last = key.rpartition(".")
    if not parent:
        allowed += GROUPS_ONLY
    near = difflib.get_close_matches(last, allowed, n=1)
    hint = f" (did you mean {parent + '.' if parent else ''}{near[0]}?)" if near else ""
    return f"unknown option {key}{hint}; {parent or 'top-level options'}: {', '.join(sorted(allowed))}"


def _unknown_key(source: BaseException, key: str, holder: str) -> str:
    typed = getattr(schema, holder, None)
    parent = getattr(source, "parent_node", None)
    if dataclasses.is_dataclass(typed):
        names: Iterable[Any] = [f.name for f in dataclasses.fields(typed)]
    else:
        names = list(parent) if isinstance(parent, Mapping) else []
    return unknown(_full_key(source) or key, names)


def _unknown_option(text: str, options: Sequence[str]) -> str:
    match = re.search(r"Could not find '(?:(.*)/)?([^/']+)'", text)
    group, name = (match[1] or "", match[2]) if match else ("", "?")
    return f"{group}={name} does not exist; {group} is one of: {', '.join(options)}"


def _parse_error(text: str, overrides: Sequence[str]) -> str:
    first = text.splitlines()[0]
    if match := re.match(r"Error parsing override '(.*)'", first):
        return f"argument {match[1]!r} is not understood: options are written key=value"
    if match := re.search(r"at input '(.*)'", first):
        for argument in overrides:
            if argument.endswith(match[1]) or match[1] in argument:
                return f"argument {argument!r} is not understood: quote values that hold any of (){{}}[],: or spaces"
    return f"{first}: quote values that hold any of (){{}}[],: or spaces"


def _full_key(error: BaseException) -> str:
    match = re.search(r"^\s*full_key: (\S+)", str(error), re.M)
    return getattr(error, "full_key", None) or (match[1] if match else "")


def _is_detail(line: str) -> bool:
    return re.match(r"\s*(full_key|reference_type|object_type)", line) is not None or "raised while" in line


def _type_words(name: str) -> str:
    return {
        "Float": "a number",
        "Integer": "a whole number",
        "String": "text",
    }.get(name, name)
