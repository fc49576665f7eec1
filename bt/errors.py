"""Errors that are the user's to mend: shown as one line, without a traceback."""

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """A mistake in what was asked or given; the message names the key or file and what is allowed.

    ends_sweep: it ends a whole multirun, not only the member that raised it.
    """

    ends_sweep = False


class Stopped(UserError):
    """A signal asked for the end; everything up to the running step is saved."""

    ends_sweep = True


class ConfigError(UserError):
    """A configuration key or value that is not allowed."""


class DataError(UserError):
    """Raw data or shards that are missing, damaged or not what was asked for."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another architecture."""
