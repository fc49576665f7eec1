"""Encoders, bridges, the cross-modal encoder, heads, and the tower that joins them."""
