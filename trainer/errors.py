"""The mistakes a user can make and the reasons a run stops itself, as exceptions with clear messages."""

import re

_CAUSE = re.compile(r"\[Errno \d+\] [^'\")]+|[Tt]imed out|(?<=failed with error code )\d+")


def reason_of(error: Exception) -> str:
    """What went wrong, in one line: of the long story that a network library tells, its end."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    found = _CAUSE.findall(text) if len(text) > 100 else []
    return found[-1] if found else text


class UserError(ValueError):
    """A user's mistake, told in four parts; the command line prints it and exits with status 2."""

    def __init__(self, where: str, got: str, allowed: str, do: str) -> None:
        """Keep the four parts.

        Args:
            where: file and line, dotted key, or command that holds the mistake.
            got: what was found there.
            allowed: what would have been accepted.
            do: the one thing to do next.
        """
        self.where, self.got, self.allowed, self.do = where, got, allowed, do
        super().__init__(f"{where}\n  got:     {got}\n  allowed: {allowed}\n  do:      {do}")


class ConfigError(UserError):
    """A configuration file or a `-P` value is wrong."""


class StrategyError(UserError):
    """A strategy cannot be resolved against the model it is meant for."""


class DataError(UserError):
    """Records, images or the folder that holds them are wrong."""

    def __reduce__(self) -> tuple[type["DataError"], tuple[str, str, str, str]]:
        """Make the same one again in another process: loader processes hand theirs to the first."""
        return type(self), (self.where, self.got, self.allowed, self.do)


class ModelError(UserError):
    """The base model cannot be found, read or used as asked."""


class TrackingError(UserError):
    """The MLflow store cannot be used as asked."""


class TrainingStopped(RuntimeError):
    """Training stopped itself (gate, non-finite loss or gradient); the command line exits with status 3."""


class Interrupted(RuntimeError):
    """Training was asked to end, and has written a resume point; the command line exits as signals do."""


class Paused(Interrupted):
    """Training has come as far as it was asked to for now; the command line exits with status 0."""
