"""`python -m bt.predict`: what a trained model says of pictures and texts, one pair or a file of them."""
