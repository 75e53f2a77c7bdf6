"""Request-level serving: requests arrive, wait, are read and answered by one engine on one card."""
