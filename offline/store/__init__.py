"""Activation vectors of many images on disk: harvested once, resumable, read in any order with constant memory.

::

    plan.json             what the store is to hold, written first: the same plan goes on, another one is refused
    000000.vectors.npy    a shard: vectors [n, C], float16 or float32, rows in random order
    000000.origins.npy    int32 [n, 2]: the image of each row, by its place in the order of visit, and its position
    000000.json           the images of the shard, its sums; written last: then the shard is there
    store.json            totals, and size and sha256 of every file; written when all shards are there
"""
