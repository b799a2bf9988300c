"""By what it is minimised: Muon and AdamW."""
