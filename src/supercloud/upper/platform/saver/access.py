"""The U-Cloud's store of checkpoints, from inside a platform: over the link, by TLS."""

import socket
from typing import Final

from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.s3 import S3, Bucket
from supercloud.services.checkpoint.store import Store
from supercloud.trust import tls
from supercloud.wire.checkpoints import BUCKET, StoreAccess
from supercloud.wire.places import OBJECTS_LINK_PORT, OBJECTS_PORT

ADDRESS: Final = "169.254.77.1"
_CONNECT_TIMEOUT_S: Final = 20.0
_WORKERS: Final = 2


def open_store(ucloud: str, access: StoreAccess) -> Store:
    """Nothing is asked of it yet."""
    context = tls.client_context(access.ca_pem)

    def dial() -> socket.socket:
        place = ADDRESS, OBJECTS_LINK_PORT
        plain = socket.create_connection(place, _CONNECT_TIMEOUT_S)
        try:
            return context.wrap_socket(plain, server_hostname=access.server_name)
        except BaseException:
            plain.close()
            raise

    bucket = Bucket(
        endpoint=f"https://{access.server_name}:{OBJECTS_PORT}",
        name=BUCKET,
        access_key=access.access_key,
        secret_key=access.secret_key,
        region=access.region,
    )
    return Store(
        S3(bucket, dial=dial), Keys(bytes.fromhex(access.secret), ucloud), workers=_WORKERS
    )
