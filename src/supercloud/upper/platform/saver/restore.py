"""Reading a checkpoint: everything is verified before anything of it is used."""

import contextlib
import os

from supercloud.model.errors import Invalid
from supercloud.services.checkpoint.manifest import Head
from supercloud.services.checkpoint.reader import Reader
from supercloud.upper.platform.saver.access import open_store
from supercloud.upper.platform.saver.lines import Lines
from supercloud.upper.platform.saver.requests import FILES, MEMORY, Found, Restore
from supercloud.upper.platform.saver.trees import unpack


def serve(lines: Lines, wanted: Restore) -> None:
    """The whole conversation after ``restore``."""
    with contextlib.ExitStack() as opened:
        store = open_store(wanted.ucloud, wanted.store)
        opened.callback(store.close)
        head = Head(wanted.head.sequence, wanted.head.root)
        checkpoint = store.open(wanted.ee, head, wanted.sequence)
        manifest = checkpoint.manifest
        sizes = {part.name: part.size_bytes for part in manifest.parts}
        lines.say("found", Found(
            engine=manifest.engine, sequence=manifest.sequence, parts=sizes,
            details=manifest.details,
        ))  # fmt: skip
        lines.next("fetch")
        reader = Reader(store, checkpoint)
        for name, size in sizes.items():
            if name == MEMORY and wanted.ram >= 0:
                _into_ram(reader, wanted.ram, size)
            else:
                _into_file(reader, name, f"{wanted.directory}/{name.replace(':', '-')}")
        if FILES in sizes:
            _unpacked(f"{wanted.directory}/{MEMORY}", f"{wanted.directory}/criu", 0)
            _unpacked(f"{wanted.directory}/{FILES}", wanted.layer, wanted.owner)
        lines.say("fetched", {})


def _into_ram(reader: Reader, ram: int, size: int) -> None:
    if os.fstat(ram).st_size != size:
        raise Invalid(f"a machine with {size} bytes of memory does not fit its specification")
    reader.copy(MEMORY, ram)


def _into_file(reader: Reader, name: str, path: str) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        reader.copy(name, file)
    finally:
        os.close(file)


def _unpacked(image: str, top: str, owner: int) -> None:
    """A directory out of its image, which is not needed any more."""
    os.makedirs(top, mode=0o700, exist_ok=True)
    file = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        unpack(file, top, owner)
    finally:
        os.close(file)
    os.unlink(image)
