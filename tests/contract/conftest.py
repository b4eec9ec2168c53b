"""What the providers' suites have in common: a U-Cloud, a host that really runs, requests."""

import os

import pytest

from support.link import Link
from support.link import request as request_for
from support.lower import running_host


@pytest.fixture
def link(tmp_path):
    return Link(tmp_path / "trust")


@pytest.fixture(scope="module")
def real_host(tmp_path_factory):
    """One host for all the tests of a suite: a second to start, and nothing is left of it."""
    directory = tmp_path_factory.mktemp("host")
    with running_host(directory, f"contract{os.getpid()}") as host:
        yield host


@pytest.fixture
async def ask(provider, link):
    """Makes requests that fit the first host."""
    host = (await provider.hosts())[0]

    def make(name="p1", **changes):
        return request_for(link, host.name, name, **{"image": host.images[0], **changes})

    return make
