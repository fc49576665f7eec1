"""Trains an experiment and evaluates it: `python -m bt.train experiment=NAME key=value ...`.

The same command again continues an unfinished run exactly where its last checkpoint is.
"""

from __future__ import annotations

from bt.config import Config, entry


@entry("config", Config)
def main(cfg: Config) -> float | None:
    """Returns the objective metric of the best checkpoint, for sweepers."""
    # Here, so that --help and a mistyped option answer at once instead of after importing torch.
    from bt.run import train

    return train(cfg)


if __name__ == "__main__":
    main()
