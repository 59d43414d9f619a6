"""What can go wrong that the user can mend, each with the exit status that a launcher acts on."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: printed as one line, never as a traceback."""

    exit_status = 78  # configuration or data: a launcher must not retry


class UsageError(UserError):
    """The command text itself is wrong: unknown verb, option or `--set` key."""

    exit_status = 2


class ConfigError(UserError):
    """A configuration that contradicts itself or what is on disk."""


class DataError(UserError):
    """A corpus, tokenizer or token store that is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """No usable checkpoint where one is needed."""


class CheckFailed(UserError):
    """A check that was asked for found a difference; what was computed is printed all the same."""

    exit_status = 1


class Unfinished(UserError):
    """Part of the work is done and kept; the same command goes on with it."""

    exit_status = 75


class Preempted(UserError):
    """The run was asked to stop, saved, and should be started again."""

    exit_status = 75
