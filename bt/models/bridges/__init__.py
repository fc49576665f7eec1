"""Bridges: how the uni-modal layers feed the cross-modal ones."""
