"""Small raw trees in the official formats, out of real images and words that packages ship.

For tests, for `trainer=smoke` and for whoever has no official downloads: `python -m bt.samples`. What a data set of
this kind is made from is a Collection (bt/samples/collection.py), from easy-VQA or from icons; what is written of it
follows rules (bt/samples/words.py), so that every label is true; bt/samples/trees/ knows the formats.
"""

from bt.samples.collection import Collection, Fact, Item
from bt.samples.offline import offline_shards
from bt.samples.trees import TREES, write_tree

__all__ = ["TREES", "Collection", "Fact", "Item", "offline_shards", "write_tree"]
