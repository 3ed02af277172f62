"""What the commands share: errors as one line, and texts that stand for objects."""

import ast
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sbm_fast.sde import EDMSDE, VESDE, VPSDE, DDPMSchedule, SubVPSDE

COUNT = click.IntRange(min=1)

_SDES: dict[str, Callable[..., object]] = {
    **{kind.__name__: kind for kind in (VESDE, VPSDE, SubVPSDE, EDMSDE)},
    "DDPMSchedule.linear": DDPMSchedule.linear,
    "DDPMSchedule.cosine": DDPMSchedule.cosine,
}


def named_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The library's own errors as one line, without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            raise click.ClickException(str(error)) from error
        except (RuntimeError, MemoryError, OverflowError) as error:
            # Torch's go on for lines of C++, and a MemoryError says nothing at all.
            first = (str(error).strip().splitlines() or [""])[0]
            name = type(error).__name__
            raise click.ClickException(f"{name}: {first}" if first else name) from error

    return run


def parse_sde(text: str) -> object:
    """'VESDE(0.01, sigma_max=50)' → the SDE. Only literals, nothing is executed."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call):
            return _SDES[ast.unparse(call)]()
        numbers = [ast.literal_eval(a) for a in call.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return _SDES[ast.unparse(call.func)](*numbers, **named)
    except (KeyError, SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"--sde: expected one of {sorted(_SDES)} with numbers in brackets, such "
                         f"as 'VESDE(0.01, 50)', got {text!r} ({error})") from error  # fmt: skip


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option: expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_options(texts: tuple[str, ...], sets: Mapping[str, str]) -> dict[str, Any]:
    """NAME=VALUE texts as keyword arguments; `sets`: those a command gives itself, and by which
    option."""
    options = dict(_parse_option(text) for text in texts)
    for name in options:
        if name in sets:
            instead = f"; use {sets[name]}" if sets[name] else ""
            raise ValueError(
                f"--option: expected an option that the command does not set itself, "
                f"got {name}{instead}"
            )
    return options


def checked_out(out: str, *endings: str) -> Path:
    """The path, if a file of one of these endings can be there; asked before any work is done."""
    path = Path(out)
    if path.suffix.lower() not in endings:
        raise ValueError(f"--out: expected a file ending in {' or '.join(endings)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out: expected a file in a folder that can be written to, got {path}")
    return path
