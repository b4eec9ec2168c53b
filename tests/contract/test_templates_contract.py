"""What every provider's templates keep to."""

import hashlib

import pytest

from supercloud.model.errors import Invalid, NotFound
from supercloud.wire.host import TemplateSpec
from supercloud.wire.messages import Blob, EnvironmentSpec, ImageRef
from support.providers import KINDS, PRETENDED, REAL

MIB = 1 << 20
DATA = b"an image" * 1000
BLOB = Blob(digest=f"sha256:{hashlib.sha256(DATA).hexdigest()}", size_bytes=len(DATA))
WEB = EnvironmentSpec(
    name="web", uid="web-1", kind="container", image=ImageRef(format="erofs", blobs={"root": BLOB})
)


@pytest.fixture(params=[*PRETENDED, REAL])
async def provider(request, tmp_path, link):
    if request.node.callspec.params["provider"] not in PRETENDED:
        request.getfixturevalue("vm_lock")
    async with KINDS[request.param](request, tmp_path, link) as made:
        yield made


@pytest.fixture
async def asked(provider):
    image = (await provider.hosts())[0].images[0]
    return TemplateSpec(
        image=image, memory_bytes=256 * MIB, scratch_bytes=512 * MIB, environments=[WEB]
    )


@pytest.fixture
async def host(provider):
    return (await provider.hosts())[0].name


async def pieces(data):
    for start in range(0, len(data), 3000):
        yield data[start : start + 3000]


async def test_a_provider_says_that_it_has_templates(provider):
    assert (await provider.features())["templates"] == ""
    assert provider.templates is not None


async def test_what_is_missing_is_said_and_once_it_is_there_one_is_made(provider, host, asked):
    status = await provider.templates.prepare(host, asked)
    assert (status.state, status.missing) == ("absent", [BLOB.digest])
    with pytest.raises(Invalid):
        await provider.templates.offer(host, BLOB, pieces(b"something else"))
    await provider.templates.offer(host, BLOB, pieces(DATA))
    status = await provider.templates.prepare(host, asked)
    assert status.state in ("making", "ready")
    assert status.missing == []


async def test_an_unknown_image_or_host_has_none(provider, host, asked):
    with pytest.raises(NotFound):
        await provider.templates.prepare("nowhere", asked)
    with pytest.raises(NotFound):
        await provider.templates.offer("nowhere", BLOB, pieces(DATA))
    with pytest.raises(NotFound):
        await provider.templates.prepare(
            host, TemplateSpec(image="sha256:" + "f" * 64, environments=[])
        )
