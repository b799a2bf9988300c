"""What a decoder computes: shapes, recording, digest, export."""
