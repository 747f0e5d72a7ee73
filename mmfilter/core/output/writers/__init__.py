"""What a selection is written as: one format a file. A `FolderWriter` fills an empty folder with the kept samples."""

from __future__ import annotations

from mmfilter.core.output.writers.datacomp import write_datacomp
from mmfilter.core.output.writers.hf import write_hf
from mmfilter.core.output.writers.kept import FolderWriter
from mmfilter.core.output.writers.llava import write_llava
from mmfilter.core.output.writers.parquet import write_parquet
from mmfilter.core.output.writers.webdataset import write_shard_folder

FOLDER_WRITERS: dict[str, FolderWriter] = {
    "shards": write_shard_folder,
    "datacomp": write_datacomp,
    "parquet": write_parquet,
    "llava-json": write_llava,
    "hf": write_hf,
}
