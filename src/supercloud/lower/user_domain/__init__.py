"""A U-Cloud's own domain on a host: ends its TLS, authenticates, runs its platforms, relays."""
