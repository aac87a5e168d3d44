"""Train, evaluate and apply classifiers of facial expressions with re-balanced attention consistency."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
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
from typing import Any, NamedTuple

import torch

from . import distributed, presets
from .config import PACKAGES, Config, Named, UserError, found, from_dict, select, spelt
from .run import Stopped

#: The groups that --help shows in full; it names the others and --help GROUP shows them.
FIRST = ("", "method", "data")
#: Groups whose own name on the command line stands for their field ``name``: --method cb is --method.name cb.
BY_NAME = (*PACKAGES, "backbone")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for what the user can mend, 3 for a loss that is not finite, 128 + n
    after signal n."""
    logging.basicConfig(format="%(message)s")  # warnings, of other packages too
    logging.getLogger("trainer").setLevel(logging.INFO if distributed.speaks() else logging.WARNING)
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return 0 if options is None else options.run()
    except UserError as error:
        print("error:" if distributed.speaks() else f"rank {os.environ['RANK']}: error:", error, file=sys.stderr)
        return error.status
    except torch.OutOfMemoryError as error:
        print(
            f"error: batch_size: too large for the memory of the device: {str(error).splitlines()[0]}", file=sys.stderr
        )
        return UserError.status
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        return 130


def parse(arguments: list[str]) -> Any:
    """The options of the command that ``arguments`` begin with; None if they asked for help, which is printed."""
    commands = found("commands")
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(overview(commands))
        return None
    if (command := spelt(command)) not in commands:
        raise UserError(f"command: got {command!r}, expected one of {', '.join(commands)}{_near(command, commands)}")
    rest, wanted = _help_wanted(rest)
    default = commands[command]()
    keys = {flag.key for flag in flags(default)}
    rest = [_spelt(a, keys) for a in rest]
    files: list[dict] = []
    if _flat(default):
        rest, files = _take_files(rest)
        default = _default(default, rest, files)
    if wanted is not None:
        print(help_text(command, default, wanted))
        return None
    return _parsed(command, default, rest, files)


class Flag(NamedTuple):
    """A field as an option of the command line."""

    group: str
    title: str  #: of the group
    key: str  #: "optim.decay"
    kind: Any
    value: Any  #: the default
    metadata: Any


def flags(options: Any, group: str = "", title: str = "") -> Iterator[Flag]:
    """Every field of nested options, the groups in the order of the fields."""
    kinds = typing.get_type_hints(type(options))
    if isinstance(options, Named):
        yield Flag(group, title, f"{group}.name", str, options.name, {"choices": tuple(found(PACKAGES[group]))})
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if f.metadata.get("flat"):
            yield from flags(value)
        elif dataclasses.is_dataclass(value):
            yield from flags(value, f.name, (type(value).__doc__ or "").splitlines()[0])
        else:
            yield Flag(group, title, f"{group}.{f.name}".lstrip("."), kinds[f.name], value, f.metadata)


def _parsed(command: str, default: Any, arguments: list[str], files: list[dict]) -> Any:
    parser, known = _parser(command, default), {flag.key: flag for flag in flags(default)}
    arguments = [_switched(argument, known) for argument in arguments]
    for key in [*(key for file in files for key in _keys(file, known)), *_given(arguments)]:
        if key not in known and known.get(key.removeprefix("no_"), FREE).kind is not bool:
            raise _unknown(key, known, default)
    try:
        for file in files:
            parser.set_defaults(dict(parser.parse_object(file).items()))
        values = parser.parse_args(arguments).as_dict()
    except Exception as error:
        if type(error).__name__ not in ("ArgumentError", "ParserError"):
            raise
        raise _refused(str(error), known, arguments, files) from None
    return _filled(default, values)


FREE = Flag("", "", "", str, "", {})  #: one that stands for no field


def _switched(argument: str, known: dict[str, Flag]) -> str:
    """--pictures=false as --no_pictures, --pictures=true as --pictures; others as they are."""
    option, equals, value = argument.partition("=")
    key, value = option.removeprefix("--"), value.lower()
    if equals and known.get(key, FREE).kind is bool and value in ("true", "false"):
        return f"--{key}" if value == "true" else f"--no_{key}"
    return argument


def _given(arguments: list[str]) -> list[str]:
    """The keys of the options among ``arguments``."""
    before = itertools.takewhile(lambda argument: argument != "--", arguments)
    return [argument[2:].partition("=")[0] for argument in before if argument.startswith("--")]


def _keys(file: dict, known: dict[str, Flag], group: str = "") -> Iterator[str]:
    """The keys in a file's groups."""
    for name, value in file.items():
        key = f"{group}{name}"
        if isinstance(value, dict) and key not in known:
            yield from _keys(value, known, f"{key}.")
        elif value is not None or key in known:  # an empty group says nothing
            yield key


def _unknown(key: str, known: dict[str, Flag], default: Any) -> UserError:
    """What is wrong with an option that the command, its method or its data set does not have."""
    group, _, name = key.rpartition(".")
    inside = [k for k in known if group and k.startswith(f"{group}.")]
    # Suggestions by the last part: in the group that was named if it has one like it.
    of_name = {k.rpartition(".")[2]: k for k in [*known, *inside]}
    close = difflib.get_close_matches(name, of_name, n=1, cutoff=0.7)
    whose = f"{group} {known[f'{group}.name'].value}" if group in PACKAGES and inside else "this command"
    said = f"{key}: got an option that {whose} does not have"
    if close:
        return UserError(f"{said}; did you mean {of_name[close[0]]}?")
    return UserError(f"{said}, expected one of {', '.join(inside)}" if inside else said)


def _refused(text: str, known: dict[str, Flag], arguments: list[str], files: list[dict]) -> UserError:
    """The parser's error, by the option's name, what came and what was expected."""
    text = re.sub(r"\s+", " ", text)
    key = next((word for word in re.findall(r"[\w.]+", text) if word in known), "")
    if not key or text.startswith(("unrecognized", "the following")):
        return UserError(text)
    kind, choices = known[key].kind, known[key].metadata.get("choices")
    kinds = [EXPECTED.get(k, k.__name__) for k in typing.get_args(kind) or [kind]]
    if typing.get_origin(kind) is list:
        kinds = ["a list, such as '[a, b]'"]
    value = _asked(key, arguments, files, "")
    return UserError(f"{key}: got {value!r}, expected {' or '.join(kinds if not choices else choices)}")


#: What is expected of an option by its type, in words.
EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "values by name, such as '{a: 1}'",
    types.NoneType: "null",
}


def _filled(default: Any, values: dict) -> Any:
    """``default`` with the parsed ``values``; those of a flat field stand beside its own."""
    flat = {name: getattr(default, name) for name in _flat(default)}
    own = {f.name for f in dataclasses.fields(default)} - set(flat)
    inner = {
        name: from_dict({k: v for k, v in values.items() if k not in own}, options) for name, options in flat.items()
    }
    return dataclasses.replace(default, **inner, **{k: v for k, v in values.items() if k in own})


def _parser(command: str, default: Any):
    try:
        from jsonargparse import ActionYesNo, ArgumentParser
    except ImportError:
        raise UserError("the command line needs the package jsonargparse >= 4.53: pip install jsonargparse") from None
    parser = ArgumentParser(prog=f"python -m trainer {command}", exit_on_error=False, add_help=False)
    for flag in flags(default):
        if flag.metadata.get("positional"):
            parser.add_argument(flag.key, type=str, nargs=None if flag.kind is str else "+")
        elif flag.kind is bool:
            parser.add_argument(f"--{flag.key}", action=ActionYesNo, default=flag.value)
        else:
            named = flag.key in (f"{kind}.name" for kind in PACKAGES)  # found already, in either spelling
            choices: dict[str, Any] = {k: v for k, v in flag.metadata.items() if k == "choices" and not named}
            parser.add_argument(f"--{flag.key}", type=flag.kind, default=flag.value, **choices)
    return parser


def _default(default: Any, arguments: list[str], files: list[dict]) -> Any:
    """The command's options with the preset, the method and the data set that were asked for."""
    preset = _asked("preset", arguments, files, default.preset)
    if preset not in presets.found():
        raise UserError(f"preset: got {preset!r}, expected one of {', '.join(presets.found())}")
    config: Config = presets.found()[preset]()
    for kind in PACKAGES:
        current = getattr(config, kind)
        name = _asked(f"{kind}.name", arguments, files, current.name)
        if name != current.name:
            config = dataclasses.replace(config, **{kind: select(kind, name)()})
    return dataclasses.replace(default, preset=preset, **{_flat(default)[0]: config})


def _flat(options: Any) -> list[str]:
    """The fields whose own fields are options of the command, without a group."""
    return [f.name for f in dataclasses.fields(options) if f.metadata.get("flat")]


def _asked(key: str, arguments: list[str], files: list[dict], default: str) -> str:
    """The last value of an option before the parser exists, which depends on it."""
    group, _, name = key.rpartition(".")
    for file in files:
        default = (file.get(group, {}) if group else file).get(name, default)
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == f"--{key}":
            default = value if equals else next(iter(arguments[i + 1 :]), "")
    return str(default)


def _spelt(argument: str, keys: set[str]) -> str:
    """--batch-size as --batch_size, --method cb as --method.name cb where a command has that."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument[2:].partition("=")
    option = option.replace("-", "_")
    return f"--{option}{'.name' if option in BY_NAME and option not in keys else ''}{equals}{value}"


def _take_files(arguments: list[str]) -> tuple[list[str], list[dict]]:
    """The arguments without --config FILE, and what those files say."""
    rest, files, it = [], [], iter(arguments)
    for argument in it:
        option, equals, value = argument.partition("=")
        if option == "--config":
            files.append(_read(Path(value if equals else next(it, "")).expanduser()))
        else:
            rest.append(argument)
    return rest, files


def _read(path: Path) -> dict:
    """A YAML, JSON or TOML file of options."""
    import yaml

    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"config: got {str(path)!r}, which can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config: got {path}, which is neither YAML nor TOML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"config: got {path}, expected a file of options, such as 'epochs: 10'")
    values = {k: {"name": v} if k in BY_NAME and isinstance(v, str) else v for k, v in values.items() if v is not None}
    groups = {
        f.name for f in dataclasses.fields(Config) if f.name in BY_NAME or f.default_factory is not dataclasses.MISSING
    }
    if bad := [k for k in groups & set(values) if not isinstance(values[k], dict)]:
        raise UserError(f"{bad[0]}: got {values[bad[0]]!r} in {path}, expected options by name")
    return values


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _help_wanted(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without a wish for help, and the group that it names: "" for the first ones, None for no wish."""
    for i, argument in enumerate(arguments):
        if argument in ("-h", "--help"):
            after = arguments[i + 1 : i + 2]
            named = bool(after) and not after[0].startswith("-")
            return arguments[:i] + arguments[i + 1 + named :], after[0] if named else ""
    return arguments, None


def overview(commands: dict[str, type]) -> str:
    """The commands, a line each."""
    width = max(map(len, commands)) + 2
    rows = [
        f"  {name.replace('_', '-'):<{width}}{(options.__doc__ or '').splitlines()[0]}"
        for name, options in commands.items()
    ]
    return "\n".join([str(__doc__), "", "python -m trainer COMMAND --help", "", *rows])


def help_text(command: str, default: Any, wanted: str) -> str:
    """The options of a command: the groups of ``FIRST`` and the names of the rest, or the one group that is wanted."""
    groups: dict[str, list[Flag]] = {}
    for flag in flags(default):
        groups.setdefault(flag.group, []).append(flag)
    wanted = "" if wanted == "main" else wanted
    if wanted and wanted != "all" and wanted not in groups:
        raise UserError(f"help: got {wanted!r}, expected one of {', '.join(['all', *(g for g in groups if g)])}")
    shown = [g for g in groups if wanted in (g, "all") or not wanted and g in FIRST]
    places = " ".join(flag.key.upper() for flag in groups[""] if flag.metadata.get("positional"))
    lines = [f"python -m trainer {command.replace('_', '-')} {places} [--OPTION VALUE ...]".replace("  ", " ")]
    lines += [(type(default).__doc__ or "").splitlines()[0]]
    for group in shown:
        lines += ["", groups[group][0].title] if group else [""]
        lines += [_help_line(flag) for flag in groups[group]]
    if rest := [g for g in groups if g not in shown]:
        lines += ["", "more, each with --help GROUP, or --help all:"]
        for group in rest:
            names = ", ".join(flag.key.removeprefix(f"{group}.") for flag in groups[group])
            lines += textwrap.wrap(f"{group or 'main'}: {names}", 110, initial_indent="  ", subsequent_indent="    ")
    if "preset" in {flag.key for flag in groups[""]}:
        lines += ["", "--config FILE reads options from YAML, JSON or TOML, such as a run's config.json"]
    return "\n".join(lines)


def _help_line(flag: Flag) -> str:
    kind = "|".join(k.__name__ for k in typing.get_args(flag.kind) if k is not types.NoneType) or flag.kind.__name__
    key = flag.key.removesuffix(".name") if flag.key.rpartition(".")[0] in BY_NAME else flag.key
    what = "" if flag.kind is bool else f" {kind.upper()}"
    text = flag.metadata.get("help", f"one of {', '.join(flag.metadata.get('choices', ()))}")
    if flag.key == "preset":
        text += f": {', '.join(flag.metadata['choices'])}"
    value = "" if flag.kind is bool or str(flag.value) in ("None", "", "()", "{}") else f" [{flag.value}]"
    switch = "[no-]" if flag.kind is bool and flag.value else ""
    name = key.upper() if flag.metadata.get("positional") else f"--{switch}{key}{what}"
    return f"  {name:<34}" + f"\n{'':<36}".join(textwrap.wrap(f"{text}{value}", 84) or [""])


if __name__ == "__main__":
    sys.exit(main())
