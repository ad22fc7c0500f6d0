"""Addresses, transfers, archives and the store of downloaded files."""
