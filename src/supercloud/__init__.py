"""supercloud: user-centric clouds of clouds; docs/architecture.md is the map."""

__version__ = "0.1.0"
