"""Checkpoints of other programs, read and written.

python -m bt.checkpoint import BridgeTower_pt_base.ckpt --out models/base
python -m bt.checkpoint import BridgeTower/bridgetower-base --out models/hub_base
python -m bt.checkpoint export runs/NAME --format hf --out models/mine_hf
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bt.config.entry import one_line
from bt.engine.progress import table
from bt.errors import ConfigError, UserError

FORMATS = ("hf", "official", "onnx", "torch_export")


def main(given: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(given)
    try:
        arguments.command(arguments)
    except (UserError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bt.checkpoint", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    read = commands.add_parser("import", help="a checkpoint of another program becomes a folder that bt reads")
    read.add_argument(
        "source",
        help="a file (.ckpt, .bin, .pt, .safetensors) of BridgeTower, METER, ManagerTower, CLIP or RoBERTa, a folder "
        "of transformers, or a name on the Hugging Face hub",
    )
    read.add_argument("--out", type=Path, required=True, help="the folder, which must not exist")
    read.add_argument(
        "--labels", type=Path, help='converted shards, or JSON {"answers": [...]}: what a head\'s rows mean'
    )
    read.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of the configuration that it does not say",
    )
    read.add_argument(
        "--drop", action="append", default=[], metavar="PATTERN", help="tensors that have no counterpart here, as mpp_*"
    )
    read.set_defaults(command=_import)
    write = commands.add_parser("export", help="a run or an imported folder becomes another program's")
    write.add_argument("source", type=Path, help="a run directory, a checkpoint or an imported folder")
    write.add_argument("--format", required=True, choices=FORMATS)
    write.add_argument("--out", type=Path, required=True, help="a folder, for official a .ckpt; it must not exist")
    write.add_argument("--check", action="store_true", help="hf: load it with transformers and compare the outputs")
    write.set_defaults(command=_export)
    for command in (read, write):
        command.add_argument("--tokenizer", help="a folder, a tokenizer.json or a name on the hub, where there is none")
        command.add_argument(
            "--leave-out", action="append", default=[], metavar="HEAD", help="a head by its objective's name, as vqa"
        )
    return parser


def _import(arguments: argparse.Namespace) -> None:
    from bt.interop.encoders import import_clip, import_text
    from bt.interop.folder import write_folder
    from bt.interop.imports import as_value, family_of, import_source, read_labels
    from bt.interop.source import open_source

    changes = {}
    for change in arguments.set:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: give KEY=VALUE")
        changes[key] = as_value(value)
    source = open_source(arguments.source)
    family = family_of(source.tensors)
    out = arguments.out
    if family in ("clip", "text"):
        _refuse_unused(arguments, family)
    if family == "clip":
        rows, use = import_clip(source, out, changes)
    elif family == "text":
        rows, use = import_text(source, out, arguments.tokenizer, changes)
    else:
        bundle, rows = import_source(
            source,
            tokenizer=arguments.tokenizer,
            labels=read_labels(arguments.labels) if arguments.labels else None,
            leave_out=arguments.leave_out,
            dropped=arguments.drop,
            changes=changes,
            digest=True,
        )
        write_folder(bundle, out)
        print(f"{bundle.source}, sha256 {bundle.origin['sha256']}")
        use = f"encoder=imported bridge=imported cross=imported init_from={out}"
    _print(rows)
    print(f"written: {out}")
    print(f"to train from it: python -m bt.train --config-dir {out.resolve()}/conf {use} task=... data=...")
    if family not in ("clip", "text"):
        print(f"to evaluate it: python -m bt.evaluate run_dir={out} data=...")


def _refuse_unused(arguments: argparse.Namespace, family: str) -> None:
    """Of the options, those that an encoder alone has no use for."""
    encoder = {"clip": "CLIP, of which the image encoder is read", "text": "a text encoder"}[family]
    for_models = {"--labels": arguments.labels, "--leave-out": arguments.leave_out, "--drop": arguments.drop}
    for option, given in for_models.items():
        if given:
            raise ConfigError(f"{option} is for whole models: {arguments.source} is {encoder}")
    if family == "clip" and arguments.tokenizer:
        raise ConfigError(f"--tokenizer is for what reads texts: {arguments.source} is {encoder}")


def _export(arguments: argparse.Namespace) -> None:
    from bt.interop.load import open_bundle

    if arguments.check and arguments.format != "hf":
        raise ConfigError(f"--check is for --format hf, which transformers loads, not for {arguments.format}")
    bundle = open_bundle(arguments.source, tokenizer=arguments.tokenizer, leave_out=arguments.leave_out)
    print(bundle.source)
    if arguments.format in ("onnx", "torch_export"):
        from bt.interop.graphs import export_graphs

        rows = export_graphs(bundle, arguments.out, arguments.format)
    elif arguments.format == "official":
        from bt.interop.export_released import export_released

        rows = export_released(bundle, arguments.out)
    else:
        from bt.interop.export_transformers import compare_transformers, export_transformers

        rows = export_transformers(bundle, arguments.out)
        rows += compare_transformers(bundle, arguments.out) if arguments.check else []
    _print(rows)
    print(f"written: {arguments.out}")


def _print(rows: list) -> None:
    lines = [(row.what, row.part, row.tensors or "", row.values or "", row.note) for row in rows]
    print(table(lines, ("", "part", "tensors", "values", "note")))


if __name__ == "__main__":
    main()
