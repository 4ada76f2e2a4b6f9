"""Reads a DeepSpeed checkpoint of ZeRO stage 0 to 3: which files a rank needs, and where each parameter lies in them.

Names of files are derived from rank and stage (`file_names`); nothing is listed. `open.Zero` is the source; in order:

1. `open.ZeroFiles.begin` reads the first rank's model file (`model_states`), and compares how the model was split over
   pipeline stages and tensor-parallel ranks with this job (`model_parallel`).
2. `open.gather_files` works out from the `Demand` which saved ranks' files this rank needs (`needs`), fetches them from
   a folder or from archives (`files`), and reads them: the optimizer (`optim_states`), experts (`experts`), pipeline
   layers (`layers`).
3. `contents.zero_contents` computes where every parameter's elements lie (`layout.zero_checkpoint`), and checks that
   the files were saved together.
4. `tree.zero_saved` gives all as one `Saved`, in which a partitioned tensor is a `SavedTensor` of runs in the files'
   flat tensors (`partitioned`); runs in files that were not read are `Unread`.

The padding of partitions is that of `saved.partitions`: `padded_partition` (stages 1 and 2), `padded_share` (stage 3).

Not guaranteed: no tensor is read, so the bytes of a partition are not checked here. Every rank of the job must call
`Zero.open`, and in it `ZeroSource.locate_optimizer`, `ZeroSource.fetch` and `gather_files`; the rest works on one rank
alone.

Imports `sources.base`, `sources.single_file`, `formats`, `saved` and `errors`.
"""
