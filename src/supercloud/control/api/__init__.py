"""The control plane's HTTP API: declared routes, access, streams, sockets."""
