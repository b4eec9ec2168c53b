"""The Lower Layer: the core, and around it, deprivileged, everything else of a host."""
