"""The computation of a decoder: shapes, recording, digest, export."""
