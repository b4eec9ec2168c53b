"""What the control plane may ask of the agent: each declared method and what does it."""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from supercloud.model.errors import BadState, Unsupported
from supercloud.upper.platform.agent import syscalls
from supercloud.upper.platform.agent.container import Container
from supercloud.upper.platform.agent.execute import Execution
from supercloud.upper.platform.agent.logs import Log
from supercloud.upper.platform.agent.machine import Machine
from supercloud.upper.platform.agent.manager import Manager
from supercloud.upper.platform.agent.worker import Worker
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken
from supercloud.wire.messages import (
    Apply,
    ByName,
    Empty,
    Exec,
    Implementation,
    Logs,
    PlatformReport,
)
from supercloud.wire.peer import Call, Stream

POWER_OFF_DELAY_S = 0.2
CONSOLE_TAIL_LINES = 100


class Methods:
    """Implementations by name; parameters have been decoded by their declarations."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def table(self) -> Mapping[str, Implementation]:
        """For ``messages.handlers``."""
        return {
            "ee.apply": self.apply,
            "ee.list": self.list,
            "ee.exec": self.execute,
            "ee.logs": self.logs,
            "ee.console": self.console,
            "ee.restart": self.restart,
            "ee.checkpoint": self.checkpoint,
            "platform.shutdown": self.shut_down,
        }

    async def apply(self, _: Call, desired: Apply) -> PlatformReport:
        """Returns at once."""
        return self._manager.apply(desired)

    async def list(self, _: Call, __: Empty) -> PlatformReport:
        """Everything, with usage."""
        return self._manager.report(figures=True)

    async def execute(self, call: Call, wanted: Exec) -> dict[str, int]:
        """Containers only: a VM's inside is its own."""
        worker = self._manager.find(wanted.name)
        if not isinstance(worker.engine, Container):
            raise Unsupported(f"{wanted.name} is a VM; exec works in containers",
                              hint=f"supercloud console {wanted.name}")  # fmt: skip
        worker.check_running()
        return await Execution(worker.engine, wanted).serve(call)

    async def logs(self, call: Call, wanted: Logs) -> Any:
        """What is kept, and what comes."""
        log = _log(self._manager.find(wanted.name))
        stream = call.accept()
        if wanted.follow:
            async for data in log.follow(wanted.tail):
                await stream.write(data)
        else:
            for data in log.tail(wanted.tail):
                await stream.write(data)
        return {}

    async def console(self, call: Call, wanted: ByName) -> Any:
        """The last lines, then live, both ways."""
        worker = self._manager.find(wanted.name)
        machine = worker.engine
        if not isinstance(machine, Machine):
            raise Unsupported(f"{wanted.name} is a container, which has no console",
                              hint=f"supercloud exec -it {wanted.name} sh")  # fmt: skip
        log, stream = _log(worker), call.accept()
        output = asyncio.ensure_future(_follow(log, stream))
        try:
            async for data in stream.chunks():
                if machine.console:
                    await machine.console.write(data)
        finally:
            output.cancel()
        return {}

    async def restart(self, _: Call, wanted: ByName) -> Empty:
        """Returns at once."""
        self._manager.find(wanted.name).restart()
        return Empty()

    async def checkpoint(self, _: Call, wanted: CheckpointTake) -> CheckpointTaken:
        """Answers when it is in the store."""
        return await self._manager.find(wanted.name).checkpoint(wanted)

    async def shut_down(self, _: Call, __: Empty) -> Empty:
        """Answers when all EEs are gone; the power goes right after."""
        await self._manager.shut_down()
        os.sync()
        asyncio.get_running_loop().call_later(POWER_OFF_DELAY_S, syscalls.power_off)
        return Empty()


def _log(worker: Worker) -> Log:
    """The EE's log; BadState while it is being prepared for the first time."""
    if worker.engine.log is None:
        raise BadState(f"{worker.spec.name} is {worker.state} and has no output yet")
    return worker.engine.log


async def _follow(log: Log, stream: Stream) -> None:
    async for data in log.follow(CONSOLE_TAIL_LINES):
        await stream.write(data)
