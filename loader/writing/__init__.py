"""Writing: a file or a folder that appears under its name only once it is whole, and the manifest of its SHA-256s.

`summed` writes a stream to the disk and sums it; `local` puts a file in the place of another one; `remote` uploads;
`engine` completes a folder that DeepSpeed wrote. What is not finished is called ``NAME.<8 hex digits>.part``: the next
save of the same name removes it.
"""
