"""Wholeness: compares all bytes of a checkpoint, or some of them, with the checksums that there are of them.

1. `check.check_whole` opens the checkpoint's outline, and has `completeness` tell which files are missing or cut short.
2. `units.contents_of` finds what each file can be compared with: the CRC-32s of a zip's records, also of zips inside a
   tar or a DCP folder's files, the checks of a compressed file, and the checksums of the whole file that a manifest or
   its store keeps.
3. `subset.choose` takes those units that are wanted: all, a random part, or the n-th of t parts.
4. `reading.compare` reads each file once, from its first wanted byte to its last, a few files at a time, and compares.
   Remote files are read in ranges, and kept nowhere.
5. `manifests.write_manifests` writes SHA-256s, once all of it was compared.

`values` has the result. What no checksum is known of is said to be compared with nothing, never to be whole. No tensor
is made, and torch is not imported.

May import `completeness`, `alone` and all that those may.
"""
