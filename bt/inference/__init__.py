"""Trained models in use: loading, and questions about pictures in plain Python."""
