"""What is minimised: one module per trainer id."""
