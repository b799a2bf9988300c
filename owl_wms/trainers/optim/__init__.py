"""Optimisers: Muon and AdamW."""
