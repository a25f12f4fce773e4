"""Data on the host: sources -> examples -> documents -> packed rows. numpy and plain Python; no import of jax."""
