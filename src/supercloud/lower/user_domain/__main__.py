"""Process 1 of a user's domain."""

import asyncio
import json
import logging
import os

from supercloud.lower.client import Core
from supercloud.lower.component import set_up_logging
from supercloud.lower.user_domain.checkpoint_sessions import Sessions
from supercloud.lower.user_domain.checkpoints import Checkpoints
from supercloud.lower.user_domain.deposits import Deposits
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.hub import Hub
from supercloud.lower.user_domain.identity import IdentityStore, read_birth
from supercloud.lower.user_domain.mirrors import Mirrors
from supercloud.lower.user_domain.object_service import object_methods, service_methods
from supercloud.lower.user_domain.objects import Objects
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.lower.user_domain.service import Service
from supercloud.lower.user_domain.services import Services
from supercloud.lower.user_domain.tunnel import Tunnels
from supercloud.lower.user_domain.volume_service import mirror_methods, shielded, volume_methods
from supercloud.lower.user_domain.volumes import Volumes

STATE = "/run/state"

log = logging.getLogger("supercloud.lower.user_domain")


async def serve(core: Core) -> None:
    """Compose the parts and serve until the host goes down."""
    facts = json.loads(os.environ["SUPERCLOUD_HOST"])
    descriptor = core.take(core.lookup("identity").selector)
    birth = read_birth(descriptor)
    os.close(descriptor)
    identity = IdentityStore(STATE, birth, facts["instance"])
    hub = Hub(core)
    feed = Feed(identity.ucloud or birth.user, f"host/{facts['instance']}")
    platforms = Platforms(hub, birth.user, facts, feed, f"{STATE}/platforms")
    services = Services(hub, birth.user)
    tunnels = Tunnels(hub.join("uplink"), identity, f"{STATE}/tunnel")
    mirrors = Mirrors(core, services, tunnels, feed)
    volumes = Volumes(hub, services, mirrors, feed, f"{STATE}/volumes", platforms.machine)
    objects = Objects(hub.join("disk"), services, feed, f"{STATE}/objects")
    tunnels.replica = volumes.share
    tunnels.object_client = objects.client_here
    objects.elsewhere = tunnels.object_client_elsewhere
    platforms.on_object_client = objects.client
    sessions = Sessions(services, objects.client, lambda: identity.ucloud or birth.user)
    checkpoints = Checkpoints(hub, sessions, platforms, volumes, feed)

    async def platform_ended(name: str) -> None:
        await checkpoints.platform_ended(name)
        await volumes.platform_ended(name)

    platforms.on_end = platform_ended
    owners = (volumes.service_ended, objects.service_ended, sessions.service_ended)

    def ended(entry: str) -> None:
        if not any(owner(entry) for owner in owners):
            platforms.domain_ended(entry)

    hub.ended = ended
    hub.start()
    sessions.adopt()  # before a platform's disk is written to that it may be reading
    await platforms.adopt()
    await volumes.adopt(platforms.running())
    objects.adopt()
    implemented = {
        **volume_methods(volumes),
        **mirror_methods(mirrors),
        **object_methods(objects, lambda: identity.ucloud or birth.user),
        **service_methods(services),
        **Deposits(platforms, checkpoints.is_under_way).methods(),
        "platform.checkpoint": shielded(checkpoints.take),
        "checkpoint.collect": shielded(checkpoints.collect),
        "checkpoint.verify": shielded(checkpoints.verify),
    }
    service = Service(facts, identity, platforms, tunnels, implemented, feed)
    hub.join("front_door", service.connection)
    log.info("serving %s", birth.user)
    await hub.gone.wait()


if __name__ == "__main__":
    os.umask(0o077)
    set_up_logging()
    asyncio.run(serve(Core()))
