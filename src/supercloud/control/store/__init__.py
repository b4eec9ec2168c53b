"""The control plane's state: the protocol, its SQLite implementation, leases and exports."""

from supercloud.control.store.base import Change, Compacted, Conflict, Row, Store, Watch
from supercloud.control.store.leases import Lease, Leases
from supercloud.control.store.sqlite import SqliteStore

__all__ = [
    "Change",
    "Compacted",
    "Conflict",
    "Lease",
    "Leases",
    "Row",
    "SqliteStore",
    "Store",
    "Watch",
]
