"""The control plane: desired state, reconcilers, API."""
