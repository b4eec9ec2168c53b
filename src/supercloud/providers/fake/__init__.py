"""A provider that pretends: hosts, platforms and agents without machines.

Ships in the product, for trying placement wishes and for tests of the control plane: its agents
speak the real protocol, with real keys over real TLS, so the control plane runs the code that it
runs with machines. State is kept in files: it survives the process, and a count of creations by
name shows whether anything was made twice.
"""
