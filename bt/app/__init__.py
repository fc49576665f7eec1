"""`python -m bt.app` (make app): a page on which to ask trained models about a picture."""
