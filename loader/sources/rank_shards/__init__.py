"""Opens checkpoints of which each rank saved one file, with its own shards of tensors that are spread over ranks.

- `open`: finds out how many ranks there were, fetches their files, and says which parts they are.
- `join`: puts the ranks' trees together as one, each tensor made of all ranks' shards.

Every rank reads the index of every saved rank's file: only together do they prove that each element is there once.
Which bytes are fetched follows from what the rank keeps, as for any other source.
"""
