"""The checkpointing service as its user's domain meets it: calls, descriptors, what is told."""

import contextlib
import fcntl
import json
import mmap
import os
import socket
import ssl
import subprocess
import sys
import threading

import pytest

from supercloud.model.errors import BadState, Invalid
from supercloud.services.checkpoint import dialled, s3
from supercloud.services.checkpoint.pages import Memory
from supercloud.services.checkpoint.service import CheckpointService
from supercloud.trust import keys
from supercloud.trust.authority import Authority
from supercloud.trust.names import Identity
from supercloud.wire.portal import Request
from supercloud.wire.reactor import Reactor

SIZE_BYTES = 8 << 20


class Caller:
    """Calls the service's handlers on its reactor, and waits for what it tells."""

    def __init__(self, directory):
        self.told = []
        self._reactor = Reactor()
        self.service = CheckpointService(self._reactor, self._tell)
        secret = {"ucloud": "mine", "secret": "ab" * 32, "directory": str(directory)}
        self.call("configure", {}, [memory_file(json.dumps(secret).encode())])

    def call(self, method, parameters, descriptors=()):
        request = Request("test", method, parameters, [*descriptors])
        try:
            return self.service.handlers()[method](request)
        finally:
            for descriptor in request.descriptors:
                os.close(descriptor)

    def job(self, method, parameters, descriptors=()):
        """The result of a job, or the error that is told."""
        number = self.call(method, parameters, descriptors)["job"]
        deadline = self._reactor.after(60, self._reactor.stop)
        self._reactor._stopped = False
        self._reactor.run()
        deadline.cancel()
        ((how, told),) = self.told
        self.told.clear()
        assert told["job"] == number
        return told["result"] if how == "job.done" else told["error"]

    def _tell(self, method, parameters):
        assert threading.current_thread() is threading.main_thread()
        self.told.append((method, json.loads(json.dumps(parameters))))
        self._reactor.stop()

    def close(self):
        self.service.close()


@pytest.fixture
def caller(tmp_path):
    made = Caller(tmp_path)
    yield made
    made.close()


def memory_file(data=b""):
    file = os.memfd_create("test")
    os.write(file, data)
    return file


def restored(caller, ee, head, name="memory", **more):
    file = memory_file(b"left from before")
    kept = os.dup(file)
    answer = caller.job(
        "checkpoint.restore", {"ee": ee, "head": head, "parts": [name], **more}, [file]
    )
    assert answer == {"parts": {name: os.fstat(kept).st_size}}
    data = os.pread(kept, SIZE_BYTES, 0)
    os.close(kept)
    return data


def test_streams_and_files_are_taken_and_restored(caller):
    reading, writing = os.pipe()
    feeder = threading.Thread(
        target=lambda: (os.write(writing, b"device state"), os.close(writing))
    )
    feeder.start()
    image = os.urandom(300_000)
    parts = [{"name": "device", "kind": "stream"}, {"name": "disk:root", "kind": "file"}]
    taken = caller.job(
        "checkpoint.take",
        {"ee": "web", "engine": "qemu", "parts": parts, "details": {"machine": "q35"}},
        [reading, memory_file(image)],
    )
    feeder.join()
    assert taken["parts"]["disk:root"]["size_bytes"] == 300_000
    assert restored(caller, "web", taken["head"], "disk:root") == image
    reading, writing = os.pipe()
    caller.job(
        "checkpoint.restore", {"ee": "web", "head": taken["head"], "parts": ["device"]}, [writing]
    )
    assert os.read(reading, 100) == b"device state"
    os.close(reading)


def dirty_parts(template, dirty_pages, base=None):
    """Parts and descriptors of a checkpoint of this process' private mapping of the template."""
    memory = mmap.mmap(template, SIZE_BYTES, flags=mmap.MAP_PRIVATE)
    for page in dirty_pages:
        memory[page * 4096 : page * 4096 + 5] = b"%05d" % page
    own, capture = Memory(os.getpid(), template), os.memfd_create("capture")
    own.capture(capture)
    own.close()
    whole = bytes(memory)
    memory.close()
    part = {"name": "memory", "kind": "dirty"} | ({"base": base} if base else {})
    return [part], [capture, os.dup(template)], whole


def test_dirty_pages_are_taken_over_a_base_and_a_new_base_when_they_are_many(caller):
    template = memory_file(os.urandom(SIZE_BYTES))
    take = {"ee": "web", "engine": "qemu"}
    parts, files, whole = dirty_parts(template, [1, 5])
    first = caller.job("checkpoint.take", take | {"parts": parts}, files)
    assert first["parts"]["memory"]["new_bytes"] > SIZE_BYTES
    assert restored(caller, "web", first["head"]) == whole

    base = {"ee": "web", "head": first["head"]}
    parts, files, whole = dirty_parts(template, range(0, 100, 3), base)
    second = caller.job("checkpoint.take", take | {"parts": parts, "head": first["head"]}, files)
    assert second["parts"]["memory"]["new_bytes"] < 60 * 4096
    # pages 1 and 5 of the base are the first checkpoint's, and not dirty in this process
    expected = bytearray(whole)
    for page in (1, 5):
        expected[page * 4096 : page * 4096 + 5] = b"%05d" % page
    assert restored(caller, "web", second["head"]) == expected

    base = {"ee": "web", "head": second["head"]}
    parts, files, whole = dirty_parts(template, range(600), base)
    third = caller.job("checkpoint.take", take | {"parts": parts, "head": second["head"]}, files)
    assert restored(caller, "web", third["head"]) == whole
    listed = caller.job("checkpoint.list", {"ee": "web", "head": third["head"]})["checkpoints"]
    assert [row["sequence"] for row in listed] == [3, 2, 1]

    keep = {"web": {"head": third["head"], "retention": {"last": 1}}}
    report = caller.job("checkpoint.collect", {"keep": keep})
    assert len(report["dropped"]) == 2
    assert restored(caller, "web", third["head"]) == whole
    os.close(template)


def test_a_refused_checkpoint_says_why(caller, tmp_path):
    taken = caller.job(
        "checkpoint.take",
        {"ee": "web", "engine": "qemu", "parts": [{"name": "fs", "kind": "file"}]},
        [memory_file(b"x" * 100_000)],
    )
    for pack in (tmp_path / "packs").iterdir():
        pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    error = caller.job(
        "checkpoint.restore",
        {"ee": "web", "head": taken["head"], "parts": ["fs"]},
        [memory_file()],
    )
    assert error["code"] == "denied"
    assert error["details"] == {"reason": "tampered"}


def test_reading_all_of_one_to_nowhere_finds_what_a_restore_would(caller, tmp_path):
    head, heads = None, []
    for number in range(2):
        asked = {"ee": "web", "engine": "qemu", "parts": [{"name": "fs", "kind": "file"}]}
        file = memory_file(os.urandom(200_000) + bytes(1 << 20) + b"%d" % number)
        head = caller.job("checkpoint.take", asked | {"head": head}, [file])["head"]
        heads.append(head)
    newest = {"ee": "web", "head": head}
    older = newest | {"sequence": heads[0]["sequence"]}
    assert caller.job("checkpoint.verify", newest)["read_bytes"] >= 200_001
    assert caller.job("checkpoint.verify", older)["read_bytes"] >= 200_001
    with_root = {"ee": "web", "head": head | {"root": "0" * 64}}
    assert caller.job("checkpoint.verify", with_root)["details"] == {"reason": "replayed"}
    assert caller.job("checkpoint.verify", newest | {"sequence": 9})["code"] == "not_found"
    before = set((tmp_path / "packs").iterdir())
    data = memory_file(os.urandom(300_000))
    third = caller.job("checkpoint.take", asked | {"head": head}, [data])["head"]
    for pack in set((tmp_path / "packs").iterdir()) - before:
        pack.unlink()  # the manifest is there, and whole
    error = caller.job("checkpoint.verify", {"ee": "web", "head": third})
    assert (error["code"], error["details"]) == ("denied", {"reason": "missing"})
    assert caller.job("checkpoint.verify", newest | {"head": third, "sequence": head["sequence"]})
    for pack in before:
        pack.write_bytes(pack.read_bytes()[:-1])
    assert caller.job("checkpoint.verify", newest)["details"] == {"reason": "truncated"}


@pytest.mark.parametrize(
    ("parameters", "files"),
    [
        ({"ee": "web", "engine": "qemu", "parts": []}, 0),
        ({"ee": "WEB", "engine": "qemu", "parts": [{"name": "fs", "kind": "file"}]}, 1),
        ({"ee": "web", "engine": "qemu", "parts": [{"name": "../x", "kind": "file"}]}, 1),
        ({"ee": "web", "engine": "qemu", "parts": [{"name": "fs", "kind": "file"}]}, 0),
        ({"ee": "web", "engine": "qemu", "parts": [{"name": "fs", "kind": "file"}]}, 2),
        ({"ee": "web", "engine": "qemu", "parts": [{"name": "memory", "kind": "dirty"}]}, 1),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_at_once(caller, parameters, files):
    with pytest.raises(Invalid):
        caller.call("checkpoint.take", parameters, [memory_file() for _ in range(files)])
    assert caller.call("checkpoint.status", {}) == {"jobs": {}}


def test_nothing_is_done_before_it_is_configured_and_that_once():
    service = CheckpointService(Reactor(), lambda _method, _parameters: None)
    with pytest.raises(BadState):
        service.handlers()["checkpoint.list"](
            Request("t", "m", {"ee": "web", "head": {"sequence": 1, "root": "0" * 64}})
        )
    for bad in (b"", b"{", b"[]", b'{"ucloud": "mine"}', b'{"ucloud": "mine", "secret": "ab"}'):
        request = Request("t", "configure", {}, [memory_file(bad)])
        with pytest.raises(Invalid):
            service.handlers()["configure"](request)
    service.close()


def test_a_hostile_capture_is_the_jobs_error_and_the_service_goes_on(caller):
    parts = [{"name": "memory", "kind": "dirty"}]
    error = caller.job(
        "checkpoint.take",
        {"ee": "web", "engine": "qemu", "parts": parts},
        [memory_file(b"SCDIRTY\x01" + b"\xff" * 100), memory_file()],
    )
    assert error["code"] == "invalid"
    assert caller.call("checkpoint.status", {}) == {"jobs": {}}


def test_the_monitors_half_is_small():
    """``pages`` runs in the machine's domain: without any of our dependencies."""
    program = (
        "import sys; import supercloud.services.checkpoint.pages; "
        "print([m for m in ('cryptography', 'zstandard', 'asyncio', 'http') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def fixed_file(size_bytes):
    """As the core makes a machine's memory."""
    file = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return file


def taken_file(caller, image, head=None, **details):
    parts = [{"name": "memory", "kind": "file"}]
    asked = {"ee": "p1", "engine": "qemu", "parts": parts, "details": details, "head": head}
    return caller.job("checkpoint.take", asked, [memory_file(image)])


def test_a_memory_object_of_fixed_size_is_filled_and_only_an_empty_one_of_that_size(caller):
    image = os.urandom(1 << 20) + bytes(3 << 20) + os.urandom(1 << 20)
    head = taken_file(caller, image)["head"]
    asked = {"ee": "p1", "head": head, "parts": ["memory"]}
    for size, content in ((len(image) + 4096, b""), (len(image), b"not empty")):
        file = fixed_file(size)
        os.pwrite(file, content, 0)
        assert caller.job("checkpoint.restore", asked, [file])["code"] == "invalid"
    file = fixed_file(len(image))
    kept = os.dup(file)
    assert caller.job("checkpoint.restore", asked, [file]) == {"parts": {"memory": len(image)}}
    assert os.pread(kept, len(image), 0) == image
    assert os.fstat(kept).st_blocks * 512 < 3 << 20, "what is zeros takes no memory"
    os.close(kept)


def test_a_checkpoint_of_another_machine_is_not_read(caller):
    head = taken_file(caller, b"x" * 4096, cpus="1", machine="q35")["head"]
    asked = {"ee": "p1", "head": head, "parts": ["memory"]}
    alike = {"cpus": "1", "machine": "q35", "newer": "what old ones do not say"}
    assert "parts" in caller.job(
        "checkpoint.restore", {**asked, "expected": alike}, [memory_file()]
    )
    other = caller.job(
        "checkpoint.restore", {**asked, "expected": {**alike, "cpus": "2"}}, [memory_file()]
    )
    assert other["code"] == "unsupported"
    assert "cpus 1" in other["message"]


def test_a_sparse_file_is_read_where_it_has_anything(caller):
    file = os.memfd_create("disk")
    os.ftruncate(file, 64 << 30)
    os.pwrite(file, b"early", 5)
    os.pwrite(file, b"late", (64 << 30) - 4)
    parts = [{"name": "disk:scratch", "kind": "file"}]
    asked = {"ee": "p1", "engine": "qemu", "parts": parts}
    taken = caller.job("checkpoint.take", asked, [file])  # within the minute that a job has here
    assert taken["parts"]["disk:scratch"]["size_bytes"] == 64 << 30
    back = os.memfd_create("back")
    kept = os.dup(back)
    asked = {"ee": "p1", "head": taken["head"], "parts": ["disk:scratch"]}
    caller.job("checkpoint.restore", asked, [back])
    assert os.pread(kept, 5, 5) == b"early"
    assert os.pread(kept, 10, (64 << 30) - 4) == b"late"
    os.close(kept)


@pytest.mark.parametrize("more", [0, 1 << 20])
def test_a_part_of_a_sparse_file_is_that_part(caller, more):
    file, offset, size = memory_file(b"head"), 3 << 20, 20 << 20
    os.ftruncate(file, offset + size + more)
    content = {0: b"first", (9 << 20) - 3: b"between", size - 4: b"last"}
    for at, data in content.items():
        os.pwrite(file, data, offset + at)
    os.pwrite(file, b"x" * min(more, 5), offset + size)
    part = {"name": "memory", "kind": "file", "offset_bytes": offset, "size_bytes": size}
    taken = caller.job("checkpoint.take", {"ee": "vm", "engine": "qemu", "parts": [part]}, [file])
    assert taken["parts"]["memory"]["size_bytes"] == size
    expected = bytearray(size)
    for at, data in content.items():
        expected[at : at + len(data)] = data
    into = memory_file()
    kept = os.dup(into)
    asked = {"ee": "vm", "head": taken["head"], "parts": ["memory"]}
    caller.job("checkpoint.restore", asked, [into])
    assert os.pread(kept, size + 1, 0) == expected
    os.close(kept)


def test_a_part_that_is_longer_than_its_file_is_refused(caller):
    part = {"name": "memory", "kind": "file", "offset_bytes": 8, "size_bytes": 1 << 20}
    asked = {"ee": "vm", "engine": "qemu", "parts": [part]}
    error = caller.job("checkpoint.take", asked, [memory_file(b"x" * (1 << 20))])
    assert "shorter" in error["message"]


def test_what_is_to_stay_may_be_said_by_sequence(caller):
    heads = [taken_file(caller, os.urandom(4096))["head"]]
    for _ in range(3):
        heads.append(taken_file(caller, os.urandom(4096), heads[-1])["head"])
    keep = {"p1": {"head": heads[3], "sequences": [heads[1]["sequence"]]}}
    report = caller.job("checkpoint.collect", {"keep": keep})
    assert len(report["dropped"]) == 2
    rows = caller.job("checkpoint.list", {"ee": "p1", "head": heads[3]})["checkpoints"]
    asked = {"ee": "p1", "head": heads[3], "parts": ["memory"]}
    for number, there in enumerate((False, True, False, True)):
        sequence = {"sequence": heads[number]["sequence"]}
        answer = caller.job("checkpoint.restore", asked | sequence, [memory_file()])
        assert ("parts" in answer) == there, rows


class Server:
    """Hands the service connections on which a server of ``name`` answers nothing but 404."""

    def __init__(self, directory, name):
        self.authority = Authority.ensure(str(directory), "mine")
        identity = Identity("mine", "service", name)
        key = directory / "server.key"
        keys.make_key(str(key))
        made = self.authority.issue(
            keys.make_request(str(key), identity.uri, identity.dns), identity
        )
        chain = directory / "server.pem"
        chain.write_text(made.cert_pem + made.chain_pem)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(chain, key)
        self.name, self.requests = identity.dns, []

    def serve(self, end):
        with contextlib.suppress(OSError), self.context.wrap_socket(end, server_side=True) as tls:
            data = b""
            while b"\r\n\r\n" not in data:
                data += tls.recv(4096)
            self.requests.append(data.partition(b"\r\n")[0])
            tls.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")


def dialling(server, name, tmp_path, gives=True):
    """A service configured for a server of that name; what a job says."""
    caller = Caller.__new__(Caller)
    caller.told, caller._reactor = [], Reactor()
    plain = caller._tell

    def tell(method, parameters):
        if method != "connection.wanted":
            plain(method, parameters)
            return
        for _ in range(parameters["count"] if gives else 0):
            ours, theirs = socket.socketpair()
            threading.Thread(target=server.serve, args=(theirs,), daemon=True).start()
            caller.call("connection", {}, [ours.detach()])

    caller.service = CheckpointService(caller._reactor, tell)
    configured = {
        "ucloud": "mine", "secret": "ab" * 32, "server_name": name, "bucket": "b",
        "ca_pem": server.authority.root_pem, "access_key": "a", "secret_key": "s",
    }  # fmt: skip
    caller.call("configure", {}, [memory_file(json.dumps(configured).encode())])
    head = {"sequence": 1, "root": "0" * 64}
    try:
        return caller.job("checkpoint.list", {"ee": "p1", "head": head})
    finally:
        caller.close()


def test_its_connections_are_asked_for_and_speak_tls_with_the_named_server_only(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(s3, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(dialled, "PATIENCE_S", 0.1)
    server = Server(tmp_path, "objects")
    said = dialling(server, server.name, tmp_path)
    assert (said["code"], len(server.requests)) == ("not_found", 1)
    assert server.requests[0].startswith(b"GET /b?")
    said = dialling(server, server.name.replace("objects", "other"), tmp_path)
    assert "certificate" in said["message"]
    said = dialling(server, server.name, tmp_path, gives=False)
    assert (said["code"], len(server.requests)) == ("temporary", 1)
    assert "nobody gave a connection" in said["message"]
