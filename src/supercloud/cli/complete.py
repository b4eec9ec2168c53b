"""Shell completion: three short scripts that ask ``supercloud _complete`` for words."""

import argparse
import json
import os
from typing import Any

from supercloud.cli import client
from supercloud.cli.commands import COMMANDS, Argument, Command
from supercloud.cli.failure import printable
from supercloud.model.errors import SupercloudError

TIMEOUT_S = 1.0

SCRIPTS = {
    "bash": r"""
_supercloud() {
  local IFS=$'\n'
  COMPREPLY=($(supercloud _complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _supercloud supercloud
""",
    "zsh": r"""
#compdef supercloud
_supercloud() {
  local -a found
  found=(${(f)"$(supercloud _complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  if (( $#found )); then compadd -a found; else _files; fi
}
compdef _supercloud supercloud
""",
    "fish": r"""
function __supercloud
  supercloud _complete -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c supercloud -a '(__supercloud)'
""",
}


def script(arguments: argparse.Namespace) -> None:
    """Print a shell's completion script."""
    text = SCRIPTS[arguments.shell].strip()
    print(json.dumps({"shell": arguments.shell, "script": text}) if arguments.json else text)


def words(arguments: argparse.Namespace) -> None:
    """Print what the last of the given words may become, one a line; nothing: names of files."""
    given = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    *before, prefix = given or [""]
    for word in candidates(before, prefix):
        if word.startswith(prefix):
            print(printable(word))


def candidates(before: list[str], prefix: str) -> list[str]:
    """The words that may follow ``before``."""
    if not before:
        return ["-h", "--help", "--version"] if prefix.startswith("-") else list(COMMANDS)
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    options = {name: item for item in command.arguments for name in item.names if name[0] == "-"}
    last = options.get(before[-1])
    if last is not None and _takes_value(last):
        return _offered(last)
    if prefix.startswith("-"):
        return [*options, "-h", "--help", "--json"]
    argument = _positional(command, before[1:], options)
    return _offered(argument) if argument else []


def _takes_value(argument: Argument) -> bool:
    return argument.options.get("action") != "store_true"


def _positional(
    command: Command, given: list[str], options: dict[str, Argument]
) -> Argument | None:
    """The positional argument that comes next."""
    index, skip = 0, False
    for word in given:
        if skip or word.startswith("-"):
            skip = not skip and word in options and _takes_value(options[word])
        else:
            index += 1
    positional = [item for item in command.arguments if item.names[0][0] != "-"]
    if index < len(positional):
        return positional[index]
    last = positional[-1] if positional else None
    return last if last is not None and last.options.get("nargs") == "*" else None


def _offered(argument: Argument) -> list[str]:
    if argument.options.get("choices"):
        return list(argument.options["choices"])
    try:
        return _of_api(argument.completes)
    except (SupercloudError, OSError):
        return []  # a completion that fails offers nothing: there is no place for a message


def _of_api(what: str) -> list[str]:
    names: list[str] = []
    if what in ("uclouds", "all"):
        names += [view["name"] for view in _get("uclouds")]
    if what in ("environments", "all"):
        for row in _get("environments"):
            names += [row["name"], f"{row['ucloud']}/{row['name']}"]
    if what in ("volumes", "buckets", "checkpoints"):
        for row in _get(what):
            names += [row["name"], f"{row['ucloud']}/{row['name']}"]
    return sorted(set(names))


def _get(name: str) -> list[dict[str, Any]]:
    if not os.path.exists(client.socket_path()):
        return []
    found: list[dict[str, Any]] = client.call("GET", client.path(name), timeout_s=TIMEOUT_S)
    return found
