"""Cache: the folder of a node into which each object is fetched once, for all processes there.

1. `homes.homes_for` chooses the folders: the one that was given, else memory or disk, as there is room.
2. `NodeCache.entry` (in `node`) gives an object's entry, and registers this process as its user.
3. `CacheEntry.fill`: the first process that asks claims the product, makes it in a work folder, and moves it to its
   name; the others wait, and take over where that process dies.
4. `holes.PartialFile` holds an object of which only ranges were fetched, and records those; `holes.Landed` reads the
   record in other processes.
5. When the load ends, `node` gives up its entries, and `bounds.bound` evicts down to the size that may stay.

`memory` tells how much memory this process may take, where a folder lies in it. `records` reads and writes an entry's
small files, and removes what dead processes left. `folder.locked` is the lock under which all of them decide.
`upkeep` lists and removes between loads, for a person.

What stays for another load is compared there with the CRC-32s that it had; what differs is made, or fetched, again. Not
promised: while one load lasts, a product counts as whole by the sizes of its files. Sizes are bounds, not reservations:
another program may fill the disk.

May import `stores`, `byte_ranges`, `checksums` and `errors`; ``distributed.liveness``.
"""
