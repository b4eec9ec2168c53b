"""Every command of ``supercloud``, declared once: parser, help and completion come from here.

argparse and no framework above it: the whole table is parsed in a few milliseconds
(docs/decisions/0004-cli.md). ``run`` names a module of this package and a function in it, which is
imported when the command is; it takes the parsed arguments and returns the exit status.
"""

import argparse
import importlib
import os
from collections.abc import Callable
from typing import Any, NoReturn

from supercloud import __version__

DEFAULT_MANIFEST = "supercloud.yaml"
TAIL_MAX = 10_000_000


class Argument:
    """One argument or option. ``completes``: what completion offers for it."""

    __slots__ = ("completes", "names", "options")

    def __init__(self, *names: str, completes: str = "", **options: Any) -> None:
        self.names, self.options, self.completes = names, options, completes


class Command:
    """One command: what ``-h`` says, what it takes, ``module:function`` that runs it.

    ``forms``: what it can be called with, and what it does then.
    """

    __slots__ = ("arguments", "doc", "forms", "run")

    def __init__(
        self, doc: str, run: str, *arguments: Argument, forms: dict[str, str] | None = None
    ) -> None:
        self.doc, self.run, self.arguments, self.forms = doc, run, arguments, forms or {}


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= TAIL_MAX:
        raise argparse.ArgumentTypeError(f"found {text}, allowed is 0 to {TAIL_MAX}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"found {text}, allowed are seconds above 0")
    return value


MANIFEST = Argument(
    "manifest",
    nargs="?",
    default=DEFAULT_MANIFEST,
    metavar="FILE",
    help=f"the manifest ({DEFAULT_MANIFEST})",
    completes="files",
)
ENVIRONMENT = Argument(
    "environment",
    metavar="[UCLOUD/]NAME",
    help="an environment; without UCLOUD the only one that has it",
    completes="environments",
)
FOLLOW = Argument("-f", "--follow", action="store_true", help="go on with what comes")
WAIT = (
    Argument("--no-wait", action="store_true", help="return at once"),
    Argument(
        "--timeout", type=_seconds, default=900.0, metavar="SECONDS", help="wait at most (900)"
    ),
)
UCLOUD_OPTION = Argument(
    "-u", "--ucloud", default="", metavar="UCLOUD", help="only this U-Cloud", completes="uclouds"
)

NOTHING = "(nothing)"
VOLUME_FORMS = {
    "list": "how large they are, where, in what state, and what uses them",
    "inspect NAME": "all that is known of one, and what its snapshots are for",
    "snapshot NAME SNAPSHOT": "keep what is in it now under that name; it may be in use",
    "revert NAME SNAPSHOT": "go back to that while nothing uses it; what came since is lost",
    "forget-snapshot NAME SNAPSHOT": "delete a snapshot",
    "backup NAME": "bring a volume that is a backup up to date now",
    "delete NAME": "with all that is in it, once no manifest that is up has it",
    "accept NAME --root HEX": "use a halted one as its host has it; inspect says why it is halted",
    "rotate-key UCLOUD": "a new key around the keys of its volumes and buckets; data stays",
}
BUCKET_FORMS = {
    "list": "how full they are, where, in what state, and what uses them",
    "inspect NAME": "all that is known of one",
    "delete NAME": "with all that is in it, once no manifest that is up has it",
}
CHECKPOINT_FORMS = {
    "": "of what there are some, how many, and when the next one is due",
    "UCLOUD": "the same, of one U-Cloud",
    "NAME": "those of one, the newest first: restore --checkpoint takes their numbers",
    "delete NAME": "all of one",
}


def _words(forms: dict[str, str]) -> tuple[str, ...]:
    """What they begin with."""
    return tuple(form.partition(" ")[0] for form in forms)


def _platform_option(action: str, text: str) -> Argument:
    """``--platform``, once or several times."""
    default: Any = [] if action == "append" else ""
    options = {"metavar": "[UCLOUD/]NAME", "completes": "checkpoints"}
    return Argument("--platform", action=action, default=default, help=text, **options)


COMMANDS = {
    "plan": Command("Show what `up` would change; change nothing.", "apply:plan", MANIFEST),
    "up": Command("Make a manifest so, and wait until it serves.", "apply:up", MANIFEST, *WAIT),
    "down": Command(
        "Take a U-Cloud down; only volumes, buckets and checkpoints are left at its providers.",
        "apply:down",
        Argument(
            "ucloud",
            metavar="UCLOUD|FILE",
            help="its name, or its manifest",
            completes="uclouds",
        ),
        Argument(
            "--volumes",
            action="store_true",
            help="its volumes, buckets and checkpoints go too, with all that is in them",
        ),
        Argument("--checkpoints", action="store_true", help="its checkpoints go too"),
        *WAIT,
    ),
    "volumes": Command(
        "List volumes, or do something with one: they outlive what uses them.",
        "volumes:run",
        Argument(
            "action",
            nargs="?",
            default="list",
            choices=_words(VOLUME_FORMS),
            metavar="ACTION",
            help="what to do, see below (list)",
        ),
        Argument(
            "volume",
            nargs="?",
            default="",
            metavar="[UCLOUD/]NAME",
            help="a volume; for rotate-key a U-Cloud",
            completes="volumes",
        ),
        Argument("snapshot", nargs="?", default="", metavar="SNAPSHOT", help="a snapshot's name"),
        Argument(
            "--root",
            default="",
            metavar="HEX",
            help="accept: the beginning of the root that the volume was found with",
        ),
        UCLOUD_OPTION,
        forms=VOLUME_FORMS,
    ),
    "buckets": Command(
        "List buckets, show or delete one: they outlive what uses them.",
        "buckets:run",
        Argument(
            "action",
            nargs="?",
            default="list",
            choices=_words(BUCKET_FORMS),
            metavar="ACTION",
            help="what to do, see below (list)",
        ),
        Argument(
            "bucket",
            nargs="?",
            default="",
            metavar="[UCLOUD/]NAME",
            help="a bucket",
            completes="buckets",
        ),
        UCLOUD_OPTION,
        forms=BUCKET_FORMS,
    ),
    "checkpoint": Command(
        "Take a checkpoint of what has `checkpoint` in the manifest: of its memory and disks.",
        "checkpoints:take",
        Argument(
            "names",
            nargs="*",
            metavar="[UCLOUD/]NAME",
            help="an environment",
            completes="checkpoints",
        ),
        _platform_option("append", "a platform, with all that runs in it"),
        *WAIT,
    ),
    "restore": Command(
        "Go back to a checkpoint, with memory, disks and volumes: what was written since is lost.",
        "checkpoints:restore",
        Argument(
            "name",
            nargs="?",
            default="",
            metavar="[UCLOUD/]NAME",
            help="an environment",
            completes="checkpoints",
        ),
        Argument(
            "--checkpoint",
            type=_count,
            default=0,
            metavar="N",
            help="the number of one, as supercloud checkpoints NAME lists it; else the newest",
        ),
        Argument(
            "--to",
            default="",
            metavar="PROVIDER",
            help="at that provider, under the address it has",
        ),
        _platform_option("store", "a platform instead, with all that runs in it"),
        *WAIT,
    ),
    "checkpoints": Command(
        "List checkpoints, or delete them; `checkpoint` takes one, `restore` goes back to one.",
        "checkpoints:run",
        Argument(
            "first",
            nargs="?",
            default="",
            metavar="[UCLOUD/]NAME|delete",
            help="an environment, a platform or a U-Cloud",
            completes="checkpoints",
        ),
        Argument(
            "second",
            nargs="?",
            default="",
            metavar="[UCLOUD/]NAME",
            help="whose checkpoints to delete",
            completes="checkpoints",
        ),
        UCLOUD_OPTION,
        forms=CHECKPOINT_FORMS,
    ),
    "services": Command(
        "List your services on the hosts, below the machines.", "buckets:services", UCLOUD_OPTION
    ),
    "ps": Command(
        "List environments: what runs where, and how it is reached.", "listing:ps", UCLOUD_OPTION
    ),
    "ls": Command(
        "List U-Clouds.",
        "listing:ls",
        Argument("-q", "--quiet", action="store_true", help="only their names"),
    ),
    "inspect": Command(
        "Show everything about an environment or a U-Cloud.",
        "listing:inspect",
        Argument(
            "name",
            metavar="UCLOUD|[UCLOUD/]NAME",
            help="a U-Cloud or an environment",
            completes="all",
        ),
    ),
    "logs": Command(
        "Print the output of an environment.",
        "streams:logs",
        FOLLOW,
        Argument("--tail", type=_count, default=-1, metavar="N", help="only the last N lines"),
        ENVIRONMENT,
    ),
    "exec": Command(
        "Run a program in a container.",
        "terminal:execute",
        Argument("-i", "--interactive", action="store_true", help="pass this side's input on"),
        Argument("-t", "--tty", action="store_true", help="give it a terminal"),
        Argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE"),
        Argument("-w", "--workdir", default="", metavar="DIRECTORY"),
        Argument("--user", default="", metavar="UID[:GID]|NAME"),
        ENVIRONMENT,
        Argument("argv", nargs=argparse.REMAINDER, metavar="PROGRAM ARGUMENT..."),
    ),
    "console": Command(
        "Use the serial console of a virtual machine; Ctrl-] leaves it.",
        "terminal:console",
        ENVIRONMENT,
    ),
    "events": Command(
        "Print what happened.",
        "streams:events",
        FOLLOW,
        Argument("--since", default="", metavar="ID", help="only what came after this event"),
        UCLOUD_OPTION,
    ),
    "doctor": Command("Say what this machine can do, and how to fix what it lacks.", "doctor:run"),
    "ca": Command(
        "Print your certificate authority, for a provider to enrol you by.", "listing:ca"
    ),
    "version": Command(
        "Print the versions of this program and the control plane.", "listing:version"
    ),
    "completion": Command(
        "Print the completion script of a shell.",
        "complete:script",
        Argument("shell", choices=("bash", "zsh", "fish"), help='eval "$(... bash)" in ~/.bashrc'),
    ),
}
# What the completion scripts call; not shown.
HIDDEN = {
    "_complete": Command("", "complete:words", Argument("words", nargs=argparse.REMAINDER)),
}


class _Formatter(argparse.HelpFormatter):
    """Asks the terminal for its width; argparse would load shutil, with its archives, for that."""

    def __init__(self, prog: str) -> None:
        try:
            columns = os.get_terminal_size(1).columns
        except OSError:
            columns = 100
        super().__init__(prog, max_help_position=28, width=max(40, columns - 2))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines that were broken stay so."""
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as every other error is said."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n  what to do: {self.prog} -h\n")


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of one command; ``run`` runs it. Wrong ones end the process, status 2.

    Only the parser of the command that is called is made; that of all commands is for help and
    for words that are none.
    """
    name = words[0] if words else ""
    command = COMMANDS.get(name) or HIDDEN.get(name)
    if command is None:
        _not_a_command(name)
        _overview().parse_args(words)
        raise AssertionError("a word that is no command was parsed")
    forms = _shown(name, command.forms)
    parser = _Parser(prog=f"supercloud {name}", description=command.doc, epilog=forms)
    _fill(parser, command)
    return parser.parse_args(words[1:])


def _shown(name: str, forms: dict[str, str]) -> str | None:
    if not forms:
        return None
    wide = max(map(len, (*forms, NOTHING)))
    lines = [f"  {form or NOTHING:{wide}}  {doc}" for form, doc in forms.items()]
    return "\n".join([f"what may follow supercloud {name}:", *lines])


def _not_a_command(word: str) -> None:
    """Ends the process, with a hint, if a word stands where a command should."""
    if not word or word.startswith("-"):
        return
    import difflib  # noqa: PLC0415 - only here

    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean 'supercloud {close[0]}'?" if close else "supercloud -h"
    message = f"no command {word[:40]!r}, allowed are {', '.join(COMMANDS)}"
    _overview().exit(2, f"error: {message}\n  what to do: {hint}\n")


def _overview() -> argparse.ArgumentParser:
    parser = _Parser(prog="supercloud", description="Your own cloud over anybody's clouds.")
    parser.add_argument("--version", action="version", version=f"supercloud {__version__}")
    under = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        under.add_parser(name, help=command.doc)
    return parser


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    for argument in command.arguments:
        parser.add_argument(*argument.names, **argument.options)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=_runner(command.run))


def _runner(run: str) -> Callable[[argparse.Namespace], int | None]:
    module, _, function = run.partition(":")

    def imported(arguments: argparse.Namespace) -> int | None:
        found = getattr(importlib.import_module(f"supercloud.cli.{module}"), function)
        status: int | None = found(arguments)
        return status

    return imported
