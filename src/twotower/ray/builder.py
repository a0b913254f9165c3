"""`app`: the Ray Serve application of `serve run twotower.ray:app NAME=VALUE …`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.errors import ArgumentError, TwoTowerError

if TYPE_CHECKING:
    from twotower.server.options import ServiceOptions

# Arguments beside those of `ServiceOptions`: the least value, and the default.
NUMBERS = {"replicas": (1, 1), "drain": (0, 30), "gpus": (0, -1)}


def app(args: dict[str, object]) -> object:
    """The application of Ray Serve with these arguments; `serve run` calls it.

    args: options of `twotower serve` by name (`model`, `setting`, `rows`, …), as text or as values; `replicas`, 1 by
    default; `drain`, the seconds that running requests have when a replica ends, 30 by default; `gpus` of a replica,
    by default one for each CUDA device that the options name.

    Raises:
        click.ClickException: an argument is wrong; `serve run` prints it in one line.
    """
    import click

    try:
        return _application(args)
    except TwoTowerError as error:
        raise click.ClickException(str(error)) from error


def _application(args: dict[str, object]) -> object:
    from twotower.ray.cluster import import_ray

    import_ray("twotower.ray:app", "ray.serve")
    import_ray("twotower.ray:app", "uvicorn")
    from twotower.ray.replica import application
    from twotower.server.options import ServiceOptions

    rest = dict(args)
    numbers = {name: _whole(name, rest.pop(name, default)) for name, (_, default) in NUMBERS.items()}
    options = ServiceOptions.of_text(rest)
    door = options.check()
    check_suited(options)
    gpus = named_gpus(options) if numbers["gpus"] < 0 else numbers["gpus"]
    return application(options.for_nodes(), door, numbers["replicas"], gpus, numbers["drain"])


def _whole(name: str, value: object) -> int:
    least, default = NUMBERS[name]
    try:
        count = int(str(value))
    except ValueError:
        raise ArgumentError(f"{name} is {value!r}; give a whole number", param=name) from None
    if count < least and count != default:
        raise ArgumentError(f"{name} is {count}; give at least {least}", param=name)
    return count


def check_suited(options: ServiceOptions) -> None:
    """Raises ArgumentError if an option has no meaning for several replicas."""
    if options.per_key is not None:
        raise ArgumentError(
            "--per-key counts the requests of one process, and replicas are several; leave it out, or serve without "
            "replicas",
            param="per_key",
        )


def named_gpus(options: ServiceOptions) -> int:
    """The number of CUDA devices that the options name."""
    named = {options.context_device, options.denoiser_device or options.context_device}
    return len({device for device in named if device is not None and device.startswith("cuda")})
