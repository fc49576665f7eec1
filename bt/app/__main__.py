"""A web page on which to ask about a picture.

python -m bt.app --run-dir runs/demo/vqa runs/demo/pretrain

Each question goes to the first of the runs that can answer it. The page is for this machine alone (127.0.0.1); --host
opens it to others, who can then all ask: there are no accounts.
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
import sys

from bt.config.entry import one_line
from bt.errors import UserError

LOOPBACK = "127.0.0.1"


def main(given: list[str] | None = None) -> None:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bt.app", description=__doc__, formatter_class=shown)
    parser.add_argument("--run-dir", required=True, nargs="+", metavar="DIR", help="run or checkpoint directories")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of forward passes")
    parser.add_argument("--host", default=LOOPBACK, help=f"address to listen on (default: {LOOPBACK})")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any that is free")
    parser.add_argument("--max-mb", type=float, default=10, help="largest picture file in MB (default: 10)")
    arguments = parser.parse_args(given)
    if not (0 <= arguments.port < 65536 and arguments.max_mb > 0):
        parser.error("--port must be 0 to 65535, --max-mb above 0")
    try:
        serve(arguments)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")


def serve(arguments: argparse.Namespace) -> None:
    import bt

    try:
        import uvicorn

        from bt.app.server import make_app
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'bt[app]'") from error
    models = [bt.load(path, arguments.device, arguments.dtype) for path in arguments.run_dir]
    listener = listen(arguments.host, arguments.port)
    app = make_app(models, max_bytes=int(arguments.max_mb * 1e6), hosts=own_names(arguments.host, listener))
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"open http://{shown}:{listener.getsockname()[1]} in a browser; Ctrl-C ends it", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the first address of `host`, of IPv4 where it has both."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(places, key=lambda place: place[0] != socket.AF_INET)
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on: {error.strerror}") from error
    return listener


def own_names(host: str, listener: socket.socket) -> list[str]:
    """The names that requests may call this server by: any where it is not for this machine alone."""
    address = listener.getsockname()[0]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return ["*"]
    return [f"[{name}]" if ":" in name else name for name in dict.fromkeys(("localhost", LOOPBACK, host, address))]


if __name__ == "__main__":
    main()
