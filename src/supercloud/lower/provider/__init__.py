"""The provider's components: front door, multiplexing, drivers, admin console."""
