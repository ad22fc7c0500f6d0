"""Download files by address: parse it, transfer the file, unpack it, keep it in the cache folder."""
