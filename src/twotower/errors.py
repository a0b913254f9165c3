"""Errors a user can cause. Each message says what is wrong, the value met, and the remedy, in one line."""


class TwoTowerError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it and exits with code 2."""


class ConfigError(TwoTowerError, ValueError):
    """A model configuration that no model can be built from."""


class CheckpointError(TwoTowerError, ValueError):
    """A file on disk that is not the checkpoint it should be; names the file and the tensor."""


class ArgumentError(TwoTowerError, ValueError):
    """A bad argument of a public call, found before any work is done.

    param: the name of the parameter that the error is about, as the call spells the name; None: several parameters, or
    no parameter of a call.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
