"""The Upper Layer: L1 platforms and what runs in them."""
