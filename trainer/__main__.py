"""Train, evaluate and apply classifiers of facial expressions with re-balanced attention consistency."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import config, distributed, presets
from .config import PACKAGES, Flag, UserError, expect, expect_package, flags, found, from_dict, logger, spelt, title
from .run import Stopped

#: The groups that --help shows in full; it names the others and --help GROUP shows them.
FIRST = ("", "method", "data")
#: The groups of a run's options, and those that have a name, which may stand for the group: --backbone resnet18.
GROUPS = tuple(name for name, options in vars(presets.paper()).items() if dataclasses.is_dataclass(options))
NAMED = (*PACKAGES, "backbone")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for what the user can mend, 3 for a loss that is not finite, 128 + n
    after signal n."""
    logging.basicConfig(format="%(message)s")  # warnings, of other packages too
    logger.setLevel(logging.INFO if distributed.speaks() else logging.WARNING)
    try:
        if (options := parse(sys.argv[1:] if arguments is None else arguments)) is not None:
            options.run()
        sys.stdout.flush()
        return 0
    except UserError as error:
        print("error:" if distributed.speaks() else f"rank {os.environ['RANK']}: error:", error, file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise  # the latter is what PyTorch says of a CPU
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"error: batch_size or image_size: too large for the memory: {reason}", file=sys.stderr)
        return UserError.status
    except OSError as error:  # of standard output: those of files are dealt with where they are written
        if error.filename or error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is not written yet can't be
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return UserError.status
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        return 130


def parse(arguments: list[str]) -> Any:
    """The options of the command that ``arguments`` begin with; None if they asked for help, which is printed."""
    commands = found("commands")
    command, *words = ["--help" if word == "-h" else word for word in arguments] or ["--help"]
    if command == "--help":
        print(overview(commands))
        return None
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(command, commands, n=1))
    expect((command := spelt(command)) in commands, "command", command, f"one of {', '.join(commands)}{near}")
    default = commands[command]()
    places, given = _given(words, default)
    if hasattr(default, "config"):
        default = _chosen(default, dict(given))
    if "help" in dict(given):
        print(help_text(command, default, dict(given)["help"] or ""))
        return None
    return from_dict(_typed(command, default, places, given), default)


def _given(words: list[str], default: Any) -> tuple[list[str], list[tuple[str, str | None]]]:
    """The words that stand for themselves, and key and text of each option of a command line: --a=b, --a b, --switch.

    Those of the files of --config come first: of two that say something of one option, the later one counts.
    """
    switches = {flag.key for flag in flags(default) if flag.kind is bool}
    configurable, words = hasattr(default, "config"), words.copy()
    places: list[str] = []
    files: list[tuple[str, str | None]] = []
    options: list[tuple[str, str | None]] = []
    while words:
        if not (word := words.pop(0)).startswith("--"):
            places.append(word)
            continue
        name, equals, after = word[2:].partition("=")
        key, text = name.replace("-", "_"), after if equals else None
        switch = bool(switches & {key, key.removeprefix("no_")})
        if text is None and words and (words[0] in ("true", "false") if switch else not words[0].startswith("--")):
            text = words.pop(0)
        if key == "config" and configurable:
            files += _of_file(Path(text or "").expanduser())
        else:
            options.append((f"{key}.name" if configurable and key in NAMED else key, text))
    return places, files + options


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Key and text of each option in a YAML, JSON or TOML file."""
    import yaml

    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"config: got {str(path)!r}, which can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: got {path}, which is neither YAML nor TOML: {config.one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: got {path}, expected a file of options, such as 'epochs: 10'")
    for name, value in values.items():
        if name in NAMED and isinstance(value, str):
            value = {"name": value}
        if name in GROUPS and not isinstance(value, dict | None):
            raise UserError(f"{name}: got {value!r} in {path}, expected options by name")
        inner = {f"{name}.{key}": v for key, v in (value or {}).items()} if name in GROUPS else {name: value}
        yield from ((key, v if isinstance(v, str) else json.dumps(v, default=str)) for key, v in inner.items())


def _chosen(default: Any, given: dict[str, str | None]) -> Any:
    """The command's options with the preset, the method and the data set that were asked for."""
    preset = given.get("preset", default.preset) or ""
    expect(preset in presets.found(), "preset", preset, f"one of {', '.join(presets.found())}")
    names = {kind: {"name": given[key] or ""} for kind in PACKAGES if (key := f"{kind}.name") in given}
    return dataclasses.replace(default, preset=preset, config=from_dict(names, presets.found()[preset]()))


def _typed(command: str, default: Any, places: list[str], given: list[tuple[str, str | None]]) -> dict:
    """All options of the command as nested values of their types; null leaves an option that can't be null as it is."""
    expect_package("command", "jsonargparse")
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"python -m trainer {command}", exit_on_error=False, add_help=False)
    known = {flag.key: flag for flag in flags(default)}
    for key, flag in known.items():
        if flag.metadata.get("positional"):
            parser.add_argument(key, type=str, nargs=None if flag.kind is str else "+")
        else:
            parser.add_argument(f"--{key}", type=flag.kind, default=flag.value)
    words = places.copy()
    for key, text in given:
        if text is None and (switch := key.removeprefix("no_")) in known and known[switch].kind is bool:
            key, text = switch, "true" if key == switch else "false"
        if key not in known:
            raise _unknown(key, known)
        if text != "null" or types.NoneType in typing.get_args(known[key].kind):
            words.append(f"--{key}" if text is None else f"--{key}={text}")
    try:
        values = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise _refused(str(error), known, dict(given)) from None
    own = {f.name for f in dataclasses.fields(default)}
    inner = {name: value for name, value in values.items() if name not in own}
    return {name: value for name, value in values.items() if name in own} | ({"config": inner} if inner else {})


def _unknown(key: str, known: dict[str, Flag]) -> UserError:
    """What is wrong with an option that the command, its method or its data set does not have."""
    group, _, name = key.rpartition(".")
    inside = [k for k in known if group and k.startswith(f"{group}.")]
    # Suggestions by the last part: in the group that was named if it has one like it.
    of_name = {k.rpartition(".")[2]: k for k in [*known, *inside]}
    close = difflib.get_close_matches(name, of_name, n=1, cutoff=0.7)
    whose = f"{group} {known[f'{group}.name'].value}" if group in PACKAGES and inside else "this command"
    expected = f", expected one of {', '.join(inside)}" if inside else ""
    others = f"; did you mean {of_name[close[0]]}?" if close else expected
    return UserError(f"{key or '--'}: got an option that {whose} does not have{others}")


def _refused(text: str, known: dict[str, Flag], given: dict[str, str | None]) -> UserError:
    """The parser's error, by the option's name, what came and what was expected."""
    text = re.sub(r"\s+", " ", text)
    key = next((word for word in re.findall(r"[\w.]+", text) if word in given), "")
    if not key or text.startswith(("unrecognized", "the following")):
        return UserError(text)
    return UserError(f"{key}: got {given[key] or ''!r}, expected {EXPECTED.get(known[key].kind, known[key].kind)}")


#: What is expected of an option by its type, in words.
EXPECTED: dict[Any, str] = {
    **config.KINDS,
    float: "a finite number",
    list[str]: "a list, such as '[a, b]'",
    float | None: "a finite number or null",
    str | None: "text or null",
}


def overview(commands: dict[str, type]) -> str:
    """The commands, a line each."""
    width = max(map(len, commands)) + 2
    rows = [f"  {name.replace('_', '-'):<{width}}{title(options)}" for name, options in commands.items()]
    return "\n".join([str(__doc__), "", "python -m trainer COMMAND --help", "", *rows])


def help_text(command: str, default: Any, wanted: str) -> str:
    """The options of a command: the groups of ``FIRST`` and the names of the rest, or the one group that is wanted."""
    groups: dict[str, list[Flag]] = {}
    for flag in sorted(flags(default), key=lambda flag: not flag.metadata.get("positional")):
        groups.setdefault(flag.key.rpartition(".")[0], []).append(flag)
    expect(wanted in ("", "all", *groups), "help", wanted, f"one of {', '.join(['all', *filter(None, groups)])}")
    places = "".join(f"{flag.key.upper()} " for flag in groups[""] if flag.metadata.get("positional"))
    lines = [f"python -m trainer {command.replace('_', '-')} {places}[--OPTION VALUE ...]", title(default)]
    rest = []
    for group, inside in groups.items():
        if wanted in (group, "all") or not wanted and group in FIRST:
            lines += ["", *([title(getattr(default.config, group))] if group else []), *map(_help_line, inside)]
        elif not wanted:
            names = ", ".join(flag.key.removeprefix(f"{group}.") for flag in inside)
            rest += textwrap.wrap(f"{group}: {names}", 110, initial_indent="  ", subsequent_indent="    ")
    lines += ["", "more, each with --help GROUP, or --help all:", *rest] if rest else []
    if hasattr(default, "config"):
        lines += ["", "--config FILE reads options from YAML, JSON or TOML, such as a run's config.json"]
    return "\n".join(lines)


def _help_line(flag: Flag) -> str:
    kind = "|".join(k.__name__ for k in typing.get_args(flag.kind) if k is not types.NoneType) or flag.kind.__name__
    key = flag.key.removesuffix(".name")
    what = "" if flag.kind is bool else f" {kind.upper()}"
    value = "" if flag.kind is bool or str(flag.value) in ("None", "", "()", "{}") else f" [{flag.value}]"
    switch = "[no-]" if flag.kind is bool and flag.value else ""
    name = key.upper() if flag.metadata.get("positional") else f"--{switch}{key}{what}"
    return f"  {name:<34}" + f"\n{'':<36}".join(textwrap.wrap(f"{flag.metadata['help']}{value}", 84) or [""])


if __name__ == "__main__":
    sys.exit(main())
