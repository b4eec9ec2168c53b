"""Templates without a machine: what they are of, who may have one, what becomes of them."""

import contextlib
import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from supercloud.lower.user_domain import templates as module
from supercloud.lower.vmm.machine import Descriptors, Machine, command_line
from supercloud.lower.vmm.template import Inputs, key_of, load, machine_of, save
from supercloud.model.capability import Limits
from supercloud.model.errors import Busy
from supercloud.wire.messages import Blob, EnvironmentSpec, ImageRef
from supercloud.wire.portal import Closed
from support.templates import INPUTS, MIB, World, allowed

CHANGES = {
    "image": "sha256:" + "3" * 64, "runtime_sha256": "4" * 64, "kernel": "6.19",
    "accelerator": "kvm", "cpus": 2, "memory_bytes": 512 * MIB, "scratch_bytes": 513 * MIB,
    "content": "5" * 64,
}  # fmt: skip


# -- what a template is of


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Inputs)])
def test_another_input_is_another_template(field: str) -> None:
    changed = dataclasses.replace(INPUTS, **{field: CHANGES[field]})
    assert key_of(changed) != key_of(INPUTS)
    assert key_of(dataclasses.replace(INPUTS)) == key_of(INPUTS)


def test_another_command_line_is_another_template(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(INPUTS)
    monkeypatch.setattr("supercloud.lower.vmm.machine.FREE_ROOT_PORTS", 5)
    assert key_of(INPUTS) != before


def arguments(start: str) -> list[str]:
    machine = dataclasses.replace(machine_of(INPUTS), start=start)
    numbers = range(20, 20 + len(Descriptors.__slots__))
    return command_line(machine, Descriptors(**dict(zip(Descriptors.__slots__, numbers, strict=True))))  # fmt: skip


def test_all_starts_have_the_same_devices_in_the_same_places() -> None:
    def devices(start: str) -> list[tuple[str, str]]:
        argv = arguments(start)
        wanted = ("-M", "-cpu", "-smp", "-m", "-device", "-accel")
        return [pair for pair in itertools.pairwise(argv) if pair[0] in wanted]

    assert devices("boot") == devices("template") == devices("clone")


def test_a_clone_has_no_kernel_and_cannot_write_to_the_templates_memory() -> None:
    argv = arguments("clone")
    assert not {"-kernel", "-initrd", "-append"} & {*argv}
    backend = next(word for word in argv if word.startswith("memory-backend-file"))
    assert backend.endswith("share=off,readonly=on,rom=off")
    assert argv[argv.index("-incoming") + 1] == "defer"
    template = next(word for word in arguments("template") if word.startswith("memory-backend"))
    assert template.endswith("share=on")


# -- QEMU's part


class Commands:
    """A QMP whose answers the test gives."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.answer: Any = None

    def command(self, name: str, arguments: Any, answered: Any) -> None:
        self.sent.append((name, arguments))
        self.answer = answered


@pytest.mark.parametrize(("begin", "last"), [(save, "migrate"), (load, "migrate-incoming")])
def test_saving_and_loading_go_step_by_step(begin: Any, last: str) -> None:
    qmp, done, failed = Commands(), [], []
    sequence = begin(qmp, lambda: done.append(1), failed.append)
    sequence.migration("completed")  # of nothing of ours
    while qmp.sent[-1][0] != last:
        assert not done
        qmp.answer({"return": {}})
    capabilities = dict(qmp.sent)["migrate-set-capabilities"]["capabilities"]
    assert {"capability": "x-ignore-shared", "state": True} in capabilities
    sequence.migration("active")
    assert not done
    sequence.migration("completed")
    sequence.migration("completed")
    assert (done, failed) == ([1], [])


@pytest.mark.parametrize("begin", [save, load])
def test_what_qemu_refuses_is_said(begin: Any) -> None:
    qmp, failed = Commands(), []
    begin(qmp, lambda: failed.append("done"), failed.append)
    qmp.answer({"error": {"desc": "it does not like that"}})
    assert len(failed) == 1
    assert "it does not like that" in failed[0]


# -- this domain's templates


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_made_template_is_found_and_only_its_memory_stays_booked(world: World) -> None:
    assert world.templates.find(INPUTS) is None
    key = await world.make()
    found = world.templates.find(INPUTS)
    assert found is not None
    assert (found.key, found.state_bytes) == (key, 5)
    assert world.core.held() == found.booked_bytes == INPUTS.memory_bytes + 4096
    assert world.core.domains() == 0
    for name, value in CHANGES.items():
        assert world.templates.exact(dataclasses.replace(INPUTS, **{name: value})) is None


async def test_a_restarted_domain_takes_up_what_is_whole_and_gives_back_the_rest(
    world: World,
) -> None:
    await world.make()
    world.core.create_memory(4096, "template-ram:" + "f" * 20)
    world.core.create_domain("vmm", "template:demo:" + "f" * 20, Limits(memory_bytes=MIB))
    world.start()
    assert world.templates.find(INPUTS) is not None
    assert world.core.held() == INPUTS.memory_bytes + 4096


@pytest.mark.parametrize(
    "facts", [{"runtime_sha256": "9" * 64}, {"kernel": "7"}, {"images": []}, {"accelerator": "kvm"}]
)
async def test_a_template_of_other_inputs_than_now_is_dropped_at_the_start(
    world: World, facts: dict[str, object]
) -> None:
    await world.make()
    world.start(**facts)
    assert world.templates.by_key == {}
    assert world.core.held() == 0
    assert list(world.directory.iterdir()) == []


async def test_a_record_without_its_memory_or_that_cannot_be_read_is_no_template(
    world: World,
) -> None:
    await world.make()
    (world.directory / "x.json").write_text("{")
    for name in [n for n in world.core.table if n.startswith("template")]:
        world.core.destroy(world.core.lookup(name).selector)
    world.start()
    assert world.templates.by_key == {}
    assert list(world.directory.iterdir()) == []


@pytest.mark.parametrize("how", ["failed", "died", "too large"])
async def test_a_maker_that_fails_leaves_nothing_and_is_not_tried_again(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.begin()
    if how == "failed":
        world.tell("machine.state", {"state": "failed", "reason": "a panic"}, [])
    elif how == "died":
        world.templates.ended("template:demo:" + key_of(INPUTS)[:20])
    else:
        monkeypatch.setattr(module, "MAX_STATE_BYTES", 3)
        world.saved()
    assert await world.until("refused")
    assert world.core.held() == 0
    world.templates.prepare(INPUTS)
    assert world.templates.state(INPUTS)[0] == "refused"


async def test_without_room_there_is_no_template_and_later_perhaps(tmp_path: Path) -> None:
    world = World(tmp_path, memory_bytes=INPUTS.memory_bytes + 10 * MIB)
    world.templates.prepare(INPUTS)
    state, reason = world.templates.state(INPUTS)
    assert (state, world.core.held()) == ("absent", 0)
    assert "memory_bytes" in reason
    world.core.allowed = allowed(4096 * MIB)
    await world.make()


async def test_an_idle_template_gives_way_and_one_in_use_does_not(world: World) -> None:
    key = await world.make()
    free = 4096 * MIB - world.core.held()
    await world.templates.yield_room(free)
    assert world.templates.find(INPUTS) is not None  # it fits
    assert world.templates.yielding() == (INPUTS.memory_bytes + 4096, 0)
    world.used.add(key)
    assert world.templates.yielding() == (0, 0)
    await world.templates.yield_room(free + 1)
    assert world.templates.find(INPUTS) is not None
    world.used.clear()
    await world.templates.yield_room(free + 1)
    assert (world.templates.find(INPUTS), world.core.held()) == (None, 0)


async def test_a_maker_gives_way_to_a_platform(world: World) -> None:
    await world.begin()
    memory, domains = world.templates.yielding()
    assert (memory, domains) == (world.core.held(), 1)
    await world.templates.yield_room(4096 * MIB)
    assert (world.templates.state(INPUTS), world.core.held()) == (("absent", ""), 0)
    await world.make()


async def test_of_a_template_whose_clone_failed_nothing_is_started_and_it_goes_with_the_last(
    world: World,
) -> None:
    key = await world.make()
    world.used.add(key)
    world.templates.distrust(key, "it did not come to life")
    assert world.templates.find(INPUTS) is None
    assert world.core.held() > 0  # another clone runs from it
    world.templates.drop_unused(key)
    assert world.core.held() > 0
    world.used.clear()
    world.templates.drop_unused(key)
    assert world.core.held() == 0
    assert world.templates.state(INPUTS) == ("refused", "it did not come to life")


async def test_of_what_was_refused_the_newest_is_remembered_and_what_is_there(world: World) -> None:
    distrusted = await world.make()
    world.used.add(distrusted)  # a platform runs from it
    world.templates.distrust(distrusted, "it did not come to life")
    contents = [dataclasses.replace(INPUTS, content=f"{n:064x}") for n in range(40)]
    for content in contents:
        await world.begin(content)
        world.tell("machine.state", {"state": "failed", "reason": "a panic"}, [])
        await world.until("refused", inputs=content)
    states = [world.templates.state(content)[0] for content in contents]
    kept = module.MAX_REASONS
    assert states == ["absent"] * (40 - kept) + ["refused"] * kept
    assert world.templates.state(INPUTS) == ("refused", "it did not come to life")
    assert world.templates.find(INPUTS) is None


async def test_of_what_had_no_room_the_newest_is_remembered(tmp_path: Path) -> None:
    world = World(tmp_path, memory_bytes=INPUTS.memory_bytes)
    contents = [dataclasses.replace(INPUTS, content=f"{n:064x}") for n in range(40)]
    for content in contents:
        world.templates.prepare(content)
    reasons = [world.templates.state(content)[1] for content in contents]
    assert [bool(reason) for reason in reasons] == [n >= 40 - module.MAX_REASONS for n in range(40)]


async def test_there_are_as_many_as_allowed_and_the_oldest_idle_one_goes(world: World) -> None:
    shapes = [dataclasses.replace(INPUTS, cpus=n + 1) for n in range(3)]
    for shape in shapes:
        await world.make(shape)
    assert [world.templates.state(shape)[0] for shape in shapes] == ["absent", "ready", "ready"]


async def test_a_platform_starts_from_the_newest_of_its_shape_whatever_is_ready_in_it(
    world: World,
) -> None:
    other = dataclasses.replace(INPUTS, content="6" * 64)
    key = await world.make()
    world.used = {key}
    await world.make(other)
    found = world.templates.find(INPUTS)
    assert found is not None
    assert found.key == key_of(other)
    assert world.templates.find(dataclasses.replace(INPUTS, cpus=2)) is None
    world.templates.distrust(key_of(other), "it did not come to life")
    left = world.templates.find(INPUTS)
    assert left is not None
    assert left.key == key


async def test_an_idle_one_of_the_same_shape_gives_way_to_what_is_to_be_ready_now(
    world: World,
) -> None:
    await world.make()
    await world.make(dataclasses.replace(INPUTS, content="6" * 64))
    assert world.templates.state(INPUTS) == ("absent", "")
    world.start()
    assert world.templates.find(INPUTS) is not None  # after a restart too


async def test_blobs_that_are_missing_are_named_before_anything_is_made(world: World) -> None:
    blob = Blob(digest="sha256:" + "7" * 64, size_bytes=10)
    image = ImageRef(format="erofs", blobs={"root": blob})
    spec = EnvironmentSpec(name="web", uid="e1", kind="container", image=image)
    wanted = dataclasses.replace(INPUTS, content="8" * 64)
    assert world.templates.prepare(wanted, [spec]) == [blob.digest]
    assert world.templates.state(wanted) == ("absent", "")
    assert world.core.held() == 0


async def test_none_gives_way_to_one_for_which_there_is_no_room_all_the_same(world: World) -> None:
    shapes = [dataclasses.replace(INPUTS, cpus=n + 1) for n in range(3)]
    for shape in shapes[:2]:
        await world.make(shape)
    world.core.allowed = allowed(world.core.held())
    world.templates.prepare(shapes[2])
    assert [world.templates.state(shape)[0] for shape in shapes] == ["ready", "ready", "absent"]
    world.core.allowed = allowed(world.core.held() + INPUTS.memory_bytes)
    await world.make(shapes[2])
    assert [world.templates.state(shape)[0] for shape in shapes] == ["absent", "ready", "ready"]


async def test_a_state_that_nobody_waits_for_any_more_is_closed(world: World) -> None:
    async def call(*_: object, **__: object) -> None:
        world.saved()
        raise Closed("its monitor died")

    def states() -> int:
        links = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return sum(link.startswith("/memfd:state") for link in links)

    before = states()
    world.hub.call = call  # type: ignore[method-assign]
    world.templates.prepare(INPUTS)
    await world.until("refused")
    assert states() == before


async def test_a_state_that_is_no_file_is_not_read(world: World) -> None:
    await world.begin()
    reading, writing = os.pipe()
    os.close(writing)
    world.tell("template.saved", {}, [reading])
    assert "no file" in await world.until("refused", "ready")
    assert world.core.held() == 0


async def test_one_is_made_at_a_time(world: World) -> None:
    world.templates.prepare(INPUTS)
    world.templates.prepare(dataclasses.replace(INPUTS, cpus=2))
    assert world.templates.state(dataclasses.replace(INPUTS, cpus=2)) == ("absent", "")
    with contextlib.suppress(Busy):
        await world.templates.give_up_making()
    assert world.core.held() == 0


def test_a_machine_for_a_template_is_nobodys() -> None:
    machine: Machine = machine_of(INPUTS)
    assert machine.start == "template"
    assert {machine.uplink_mac, machine.link_mac} == {"02:5c:00:00:00:00", "02:5c:77:00:00:00"}
