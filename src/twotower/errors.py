"""Errors that a user can cause. A message is one line: what is wrong, the given value, and what to do."""

import shlex


def install_command(extra: str) -> str:
    """The commands that install an extra of this package, for error messages."""
    return f"pip install 'twotower[{extra}]' (in a checkout: pip install -e '.[{extra}]')"


def init_command(source: object) -> str:
    """The command that makes a two-tower model of an autoregressive one, for error messages."""
    return f"twotower init --from {shlex.quote(str(source))} -o DIR"


class TwoTowerError(Exception):
    """Base class of the errors of this package. The command line prints the message and exits with code 2."""


class ConfigError(TwoTowerError, ValueError):
    """A model configuration is not valid."""


class CheckpointError(TwoTowerError, ValueError):
    """A checkpoint is missing, damaged or of another kind; the message names the file and the tensor."""


class ArgumentError(TwoTowerError, ValueError):
    """An argument of a public call is wrong; raised before any work is done.

    param: the name of the wrong parameter in the call; None if the error concerns several parameters or none.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class LengthError(ArgumentError):
    """A prompt and its new tokens do not fit.

    prompt_tokens, new_tokens: of the request. most: the tokens that fit, of both together.
    """

    def __init__(self, message: str, *, prompt_tokens: int = 0, new_tokens: int = 0, most: int = 0) -> None:
        super().__init__(message, param="max_new_tokens")
        self.prompt_tokens, self.new_tokens, self.most = prompt_tokens, new_tokens, most


class NonFiniteLogitsError(TwoTowerError):
    """The model's logits are NaN or infinite, so no token can be chosen from them."""
