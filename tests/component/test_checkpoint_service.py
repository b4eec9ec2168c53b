"""The checkpointing service as its user's domain meets it: calls, descriptors, what is told."""

import json
import mmap
import os
import subprocess
import sys
import threading

import pytest

from supercloud.model.errors import BadState, Invalid
from supercloud.services.checkpoint.pages import Memory
from supercloud.services.checkpoint.service import CheckpointService
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
