"""Where the control plane keeps things and listens: arguments, then environment, then XDG."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supercloud.model.errors import Invalid

DEFAULT_LISTEN = "127.0.0.1:7444"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``listen`` is ``ADDRESS:PORT``, or empty: no TCP. ``socket_group`` may use the socket too."""

    state: Path
    cache: Path
    socket: Path
    listen: str = DEFAULT_LISTEN
    log: Path | None = None
    socket_group: str = ""
    allowed_uids: frozenset[int] = frozenset()
    export: Path | None = None
    adopt: Path | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """What to listen on, or None. Raises Invalid."""
        if not self.listen:
            return None
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
            raise Invalid(f"found {self.listen!r}, allowed is ADDRESS:PORT", where="--listen")
        return host.strip("[]"), int(port)


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings of a command line. Raises Invalid (and SystemExit for ``--help``)."""
    parser = argparse.ArgumentParser(
        prog="python -m supercloud.control.main", description="The control plane of supercloud."
    )
    parser.add_argument("--state", type=Path, help="directory of its state")
    parser.add_argument("--cache", type=Path, help="directory of converted images")
    parser.add_argument("--socket", type=Path, help="unix socket of the API")
    parser.add_argument("--listen", help=f"ADDRESS:PORT for agents and API ({DEFAULT_LISTEN})")
    parser.add_argument("--log", type=Path, help="log file; - is standard error")
    parser.add_argument("--socket-group", default="", help="group that may use the socket, too")
    moving = parser.add_mutually_exclusive_group()
    moving.add_argument("--export", type=Path, help="write the state, keys and all, to a new file")
    moving.add_argument("--adopt", type=Path, help="fill an empty state directory from an export")
    given = parser.parse_args(list(arguments))
    state = given.state or _xdg(environment, "XDG_STATE_HOME", ".local/state") / "supercloud"
    log = given.log or state / "control.log"
    return Settings(
        state=state.absolute(),
        cache=(
            given.cache or _xdg(environment, "XDG_CACHE_HOME", ".cache") / "supercloud"
        ).absolute(),
        socket=given.socket or _socket(environment),
        listen=DEFAULT_LISTEN if given.listen is None else given.listen,
        log=None if str(log) == "-" else log.absolute(),
        socket_group=given.socket_group,
        allowed_uids=frozenset({0, os.getuid()}),
        export=given.export,
        adopt=given.adopt,
    )


def _xdg(environment: Mapping[str, str], name: str, below_home: str) -> Path:
    if given := environment.get(name):
        return Path(given)
    home = environment.get("HOME")
    if not home:
        raise Invalid(f"neither {name} nor HOME is set", hint="give --state and --cache")
    return Path(home) / below_home


def _socket(environment: Mapping[str, str]) -> Path:
    if given := environment.get("SUPERCLOUD_SOCKET"):
        return Path(given)
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "supercloud" / "api.sock"
    return Path("/run/supercloud/api.sock")
