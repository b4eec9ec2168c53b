"""A U-Cloud's keys and certificates."""
