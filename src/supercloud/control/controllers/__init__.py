"""The reconcilers, one module for each kind of object."""
