"""A real host in which one component runs a program of ours instead of its own.

Everything else about it stays: kind, uid, namespaces, filter, capabilities, channels. So what the
program cannot do, the component cannot do however badly it is broken into. ``ATTACKER`` takes the
component's listener and executes what comes over connections to the admin socket.
"""

import json
import socket
from pathlib import Path
from typing import Any

from supercloud.wire import admin
from support.lower import RunningHost

_TOOLS = r"""
import sys; sys.path.insert(0, "/opt/supercloud/lib")
import json, os, socket, struct, errno, ctypes, select, time
from supercloud.lower.client import *
from supercloud.model.capability import Limits, ObjectType, Rights
from supercloud.model.errors import UserError
core = Core()
libc = ctypes.CDLL(None, use_errno=True)

def syscall(number, *args):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def attempt(code):
    # in a child, for the filter kills whoever does what no component does
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        space = dict(globals())
        # each call's number is used once, and the parent does not see what a child has used
        core._sequence = int.from_bytes(os.urandom(4), "big") >> 1
        try:
            exec(code, space)
            said = {"done": repr(space.get("result"))}
        except OSError as error:
            said = {"refused": errno.errorcode.get(error.errno, str(error))}
        except UserError as error:
            said = {"refused": error.code}
        except BaseException as error:
            said = {"error": repr(error)}
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    said = b""
    while more := os.read(reading, 65536):
        said += more
    os.close(reading)
    status = os.waitpid(pid, 0)[1]
    return json.loads(said) if said else {"killed": os.WTERMSIG(status)}

"""

ATTACKER = (
    _TOOLS
    + r"""
while "multiplexing" not in {e.name for e in core.entries()}:
    time.sleep(0.01)
ready = core.take(core.lookup("ready").selector)
os.write(ready, b"evil\n")
listener = socket.socket(fileno=core.take(core.lookup("listener").selector))
while True:
    connection, _ = listener.accept()
    with connection:
        code = b""
        while more := connection.recv(65536):
            code += more
        connection.sendall(json.dumps(attempt(code.decode())).encode())
"""
)

# A machine's monitor that executes what is on its config disk, and logs how each line went.
ESCAPED_GUEST = (
    _TOOLS
    + r"""
from supercloud.wire import portal

def take_when_there(name):
    while True:
        try:
            return core.take(core.lookup(name).selector)
        except UserError:
            time.sleep(0.01)

config = take_when_there("config")
attacks = json.loads(os.pread(config, os.fstat(config).st_size, 0).rstrip(b"\0"))
control = socket.socket(fileno=take_when_there("control"))
message = portal.receive(control)
portal.send(control, {"i": message.untrusted["i"], "r": {"state": "running"}})
for attack in attacks:
    print("ATTACK " + json.dumps([attack, attempt(attack)]), flush=True)
print("ATTACKS OVER", flush=True)
while True:
    time.sleep(60)
"""
)

# A user's domain that executes what stands before its CA, and logs how each line went.
EVIL_USER = (
    _TOOLS
    + r"""
from supercloud.wire.portal import Portal

def take_when_there(name):
    while True:
        try:
            return core.take(core.lookup(name).selector)
        except UserError:
            time.sleep(0.01)

identity = take_when_there("identity")
told = json.loads(os.pread(identity, os.fstat(identity).st_size, 0).rstrip(b"\0"))
for driver in ("disk", "uplink"):
    globals()[driver] = Portal(socket.socket(fileno=take_when_there(driver)), driver)
for attack in json.loads(told["ca_pem"].partition("-----BEGIN")[0]):
    print("ATTACK " + json.dumps([attack, attempt(attack)]), flush=True)
print("ATTACKS OVER", flush=True)
while True:
    time.sleep(60)
"""
)

_LAUNCHER = """
import sys
sys.path.insert(0, {src!r})
from supercloud.lower.host import grants, start
honest = grants.compile_manifest
def broken_into(*arguments):
    manifest = honest(*arguments)
    kind = manifest["kinds"][{kind!r}]
    kind["argv"] = ["/usr/bin/python3.13", "-I", "-S", "-B", "-c", {attacker!r}]
    return manifest
grants.compile_manifest = broken_into
sys.exit(start.main(sys.argv[1:]))
"""


class BrokenIntoHost(RunningHost):
    """``kind`` is the component that runs ``attacker``."""

    def __init__(
        self, directory: Path, instance: str, kind: str = "admin", attacker: str = ATTACKER
    ) -> None:
        super().__init__(directory, instance)
        src = str(Path(__file__).parents[2] / "src")
        launcher = directory / "launch.py"
        launcher.write_text(_LAUNCHER.format(src=src, kind=kind, attacker=attacker))
        self.program = str(launcher)

    def attempt(self, code: str) -> dict[str, Any]:
        """Run ``code`` inside: {"done": repr of ``result``}, {"refused": why} or {"killed": n}."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(admin.socket_path(self.instance))
            sock.sendall(code.encode())
            sock.shutdown(socket.SHUT_WR)
            said = b""
            while more := sock.recv(65536):
                said += more
        return dict(json.loads(said))
