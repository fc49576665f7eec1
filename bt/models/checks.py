"""Ranges of constructor arguments, where a value out of range would pass or fail far from its cause."""

from __future__ import annotations

from bt.errors import ConfigError


def check_range(
    key: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """ConfigError "key=value: must be ..." unless all bounds given hold; NaN is never in a range."""
    bounds = [
        (at_least, "at least", lambda bound: value >= bound),
        (above, "above", lambda bound: value > bound),
        (at_most, "at most", lambda bound: value <= bound),
        (below, "below", lambda bound: value < bound),
    ]
    given = [(bound, word, holds) for bound, word, holds in bounds if bound is not None]
    if not all(holds(bound) for bound, _, holds in given):
        raise ConfigError(f"{key}={value}: must be {' and '.join(f'{word} {bound}' for bound, word, _ in given)}")
