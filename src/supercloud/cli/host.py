"""``supercloud-host``, the provider's command line: starts a host, and asks its admin console."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from supercloud.cli.failure import report
from supercloud.cli.table import table
from supercloud.model.errors import BadState, Invalid, NotFound, SupercloudError
from supercloud.model.sizes import UNITS, format_size, parse_size
from supercloud.wire import admin

STOP_TIMEOUT_S: Final = 60.0
_START: Final = Path(__file__).resolve().parents[1] / "lower" / "host" / "__main__.py"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run and look after a Lower Layer host.",
)
users = typer.Typer(no_args_is_help=True, help="Who may use this host.")
app.add_typer(users, name="user")

Instance = Annotated[str, typer.Option(help="Which host of this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UserName = Annotated[str, typer.Argument(help="The user's name.", metavar="NAME")]
Cpus = Annotated[float | None, typer.Option(help="Processors, for example 1.5.")]
Size = Annotated[str | None, typer.Option(help="For example 4GiB.")]
Vms = Annotated[int | None, typer.Option(help="How many platforms.")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def run(context: typer.Context) -> None:
    """Start a host in the foreground; see its own --help for the options."""
    argv = [sys.executable, "-I", "-S", "-B", str(_START), *context.args]
    os.execv(sys.executable, argv)  # noqa: S606 - our own program, by its path


@users.command("add")
def user_add(
    name: UserName,
    ca: Annotated[Path, typer.Option(help="The user's root certificate (PEM).")],
    instance: Instance = "default",
    cpus: Cpus = None,
    memory: Size = None,
    disk: Size = None,
    vms: Vms = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Enrol a user, with a quota: what is not given goes by what the host has left."""
    quota = _quota(cpus, memory, disk, vms)
    try:
        pem = ca.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"cannot read {ca}: {error}", where="--ca") from error
    row = admin.call(instance, "user.add", {"user": name, "ca_pem": pem, "quota": quota})
    _show(row, _user_table, as_json=as_json)


@users.command("remove")
def user_remove(name: UserName, instance: Instance = "default", *, as_json: AsJson = False) -> None:
    """End a user's domain with all of its platforms, and forget what it stored."""
    _show(admin.call(instance, "user.remove", {"user": name}), lambda _: "", as_json=as_json)


@users.command("list")
def user_list(instance: Instance = "default", *, as_json: AsJson = False) -> None:
    """Users with their quotas and what they use."""
    _show(admin.call(instance, "user.list"), _user_tables, as_json=as_json)


@app.command()
def quota(
    name: UserName,
    instance: Instance = "default",
    cpus: Cpus = None,
    memory: Size = None,
    disk: Size = None,
    vms: Vms = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Change a user's quota; what is not given stays.

    Memory counts guests and the templates that a user's platforms start from, which give way to
    platforms: a template makes nobody's platform fail, but shows in what is used.
    """
    changes = _quota(cpus, memory, disk, vms)
    if not changes:
        raise Invalid("nothing to change", hint="give --cpus, --memory, --disk or --vms")
    row = admin.call(instance, "user.quota", {"user": name, "quota": changes})
    _show(row, _user_table, as_json=as_json)


@app.command()
def status(instance: Instance = "default", *, as_json: AsJson = False) -> None:
    """What the host is, holds, and has in use."""
    _show(admin.call(instance, "status"), _status_text, as_json=as_json)


@app.command()
def domains(instance: Instance = "default", *, as_json: AsJson = False) -> None:
    """Users' domains, as far as the provider sees them."""
    _show(admin.call(instance, "host.domains"), _domain_table, as_json=as_json)


@app.command()
def drivers(instance: Instance = "default", *, as_json: AsJson = False) -> None:
    """Drivers, and what they have handed out."""
    _show(admin.call(instance, "drivers"), _driver_text, as_json=as_json)


@app.command()
def stop(instance: Instance = "default", *, as_json: AsJson = False) -> None:
    """Stop the host with everything on it, and wait until nothing of it is left."""
    run_directory = Path(admin.RUN) / instance
    pid = _running_pid(run_directory / "host.pid")
    if pid:
        os.kill(pid, signal.SIGTERM)
        _wait_for_end(pid)
    shutil.rmtree(run_directory, ignore_errors=True)
    _show({"stopped": bool(pid)}, lambda _: "" if pid else "it was not running", as_json=as_json)


def _running_pid(path: Path) -> int:
    """The host's process, or 0: a process of that id that started at another time is not it."""
    try:
        pid, started = path.read_text().split()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ValueError):
        return 0
    return int(pid) if stat[19] == started and stat[0] != "Z" else 0


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    path = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    raise BadState(
        f"process {pid} does not end within {STOP_TIMEOUT_S:g} s",
        hint=f"see the host's log; kill -KILL {pid} ends it, then `supercloud-host stop` again",
    )


def _quota(
    cpus: float | None, memory: str | None, disk: str | None, vms: int | None
) -> dict[str, int]:
    given = {
        "cpu_permille": None if cpus is None else round(cpus * 1000),
        "memory_bytes": None if memory is None else _size(memory, "--memory"),
        "disk_bytes": None if disk is None else _size(disk, "--disk"),
        "vms": vms,
    }
    return {name: value for name, value in given.items() if value is not None}


def _size(text: str, where: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise Invalid(f"{text!r:.40} is not {error}", where=where) from error


# -- showing


def _show(result: Any, text: Callable[[Any], str], *, as_json: bool) -> None:
    said = json.dumps(result, indent=1) if as_json else text(result)
    if said:
        print(said)


def _user_tables(rows: list[dict[str, Any]]) -> str:
    header = ("USER", "STATE", "CPUS", "MEMORY", "DISK", "VMS", "CA")
    return table(header, [_user_row(row) for row in rows])


def _user_table(row: dict[str, Any]) -> str:
    return _user_tables([row])


def _user_row(row: dict[str, Any]) -> tuple[str, ...]:
    quota_, used = row["quota"], row.get("used", {})

    def of(name: str, show: Callable[[int], str]) -> str:
        return f"{show(used.get(name, 0))} of {show(quota_[name])}"

    return (
        row["name"],
        row["state"] if not row.get("reason") else f"{row['state']}: {row['reason']}",
        f"{quota_['cpu_permille'] / 1000:g}",
        of("memory_bytes", format_size),
        of("disk_bytes", format_size),
        of("vms", str),
        row["ca_sha256"][:12],
    )


def _domain_table(rows: list[dict[str, Any]]) -> str:
    header = ("DOMAIN", "STATE", "STARTS", "PROCESSES", "INSIDE", "MEMORY", "CPU S")
    return table(
        header,
        [
            (
                row["name"],
                row["state"],
                str(row["starts"]),
                str(row["processes"]),
                str(row["domains_inside"]),
                _about(row["memory_bytes"]),
                f"{row['cpu_us'] / 1e6:.1f}",
            )
            for row in rows
        ],
    )


def _status_text(found: dict[str, Any]) -> str:
    usage = found["usage"]
    why = f" ({found['accelerator_reason']})" if found["accelerator_reason"] else ""
    booked, most = (_about(usage[n]) for n in ("booked_memory_bytes", "memory_bytes"))
    lines = {
        "instance": found["instance"],
        "listens on": found["listen"],
        "place": f"{found['region']}, {found['jurisdiction']}",
        "accelerator": found["accelerator"] + why,
        "kernel": found["kernel"],
        "images": ", ".join(image[:19] for image in found["images"]),
        "runtime": found["runtime_sha256"][:12],
        "users": str(found["users"]),
        "memory": f"{booked} of {most} promised, {_about(usage['used_memory_bytes'])} in use",
        "drivers": ", ".join(found["drivers"]),
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def _about(size_bytes: int) -> str:
    """A measured size, for the eye: ``18.5MiB``."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes >= UNITS[unit]:
            return f"{size_bytes / UNITS[unit]:.1f}{unit}"
    return str(size_bytes)


def _driver_text(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def main() -> None:
    """Entry point; exit status by ``model.errors.STATUS``."""
    try:
        app(standalone_mode=True)
    except SupercloudError as error:
        sys.exit(report(error, as_json="--json" in sys.argv))


if __name__ == "__main__":
    main()
