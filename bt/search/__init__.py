"""`python -m bt.search`: pictures found by what they show."""
