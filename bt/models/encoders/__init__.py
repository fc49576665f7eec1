"""Uni-modal encoders: adapters to open_clip, timm and transformers."""
