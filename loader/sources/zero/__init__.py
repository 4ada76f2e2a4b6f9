"""Reads a DeepSpeed checkpoint of ZeRO stage 0 to 3: which files a rank needs, and where each parameter lies in them.

Names of files are derived from rank and stage (`file_names`); nothing is listed. In order:

1. `open.ZeroFiles.open` reads the first rank's model file (`model_states`), and compares how the model was split over
   pipeline stages and tensor-parallel ranks with this job (`model_parallel`).
2. `open.gather_files` works out which saved ranks' files this rank needs (`needs`), fetches them from a folder or from
   archives (`files`), and reads them: the optimizer (`optim_states`), experts (`experts`), pipeline layers (`layers`).
3. `open.zero_parts` computes where every parameter's elements lie (`layout.zero_checkpoint`), checks that the files
   were saved together (`contents.zero_contents`), and gives the nested dict for ``ignore_keys`` (`contents.zero_tree`).
4. For a target that is no DeepSpeed engine, `whole.whole_contents` puts each tensor's pieces together.

The padding of partitions is computed in `layout.py`: `padded_partition` (stages 1 and 2), `padded_share` (stage 3).

Not guaranteed: tensors stay lazy, so the bytes of a partition are not checked here. Every rank of the job must call
`ZeroSource.locate_optimizer`, `ZeroSource.fetch` and `gather_files`; the rest works on one rank alone.

Imports `sources.single_file`, `formats`, `stores`, `saved`, `template` and `errors`; `files` and `open` also
`checkpoint`, `fetch` and `targets`, which `tests/test_house.py` lists as exceptions.
"""
