"""Changes to a decoder before it is exported."""
