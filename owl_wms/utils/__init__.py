"""Holds the bridge; nothing else belongs here."""
