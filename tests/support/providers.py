"""Each kind of provider that can be had here, for the suites that all of them keep to."""

import contextlib
import secrets

import pytest

from supercloud.providers.fake.cloud import FakeCloud
from supercloud.providers.fake.options import Options
from supercloud.providers.fake.provider import FakeProvider
from support.host import LoopbackHost, provider_of


@contextlib.asynccontextmanager
async def _fake(_request, tmp_path, _link):
    provider = FakeProvider(FakeCloud("fake", Options(), str(tmp_path / "fake")))
    yield provider
    await provider.close()


@contextlib.asynccontextmanager
async def _wire(_request, tmp_path, link):
    """The lower layer's provider over its wire to a user domain whose machines are pretended."""
    async with LoopbackHost(tmp_path / "host", link.authority.root_pem).running() as host:
        provider = provider_of(link, host)
        yield provider
        await provider.close()


@contextlib.asynccontextmanager
async def _real(request, _tmp_path, link):
    """A host that really runs; every test is a user of its own there.

    Who asks for platforms waits for a machine's turn first: not later, with connections open.
    """
    if "ask" in request.fixturenames:
        request.getfixturevalue("vm_lock")
    host = request.getfixturevalue("real_host")
    user = f"u{secrets.token_hex(3)}"
    host.admin("user.add", user=user, ca_pem=link.authority.root_pem, quota={})
    provider = provider_of(link, host, user=user)
    yield provider
    for platform in await provider.platforms():
        await provider.delete_platform(platform.name)
    await provider.close()
    host.admin("user.remove", user=user)


KINDS = {"fake": _fake, "lower_layer over the wire": _wire, "lower_layer": _real}
PRETENDED = ["fake", "lower_layer over the wire"]
REAL = pytest.param(
    "lower_layer", marks=[pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(900)]
)
