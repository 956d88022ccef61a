"""Embedding and kNN of one set of images for tests/test_torchrun.py, by all ranks of a job: DATA, OUT.npy."""

import sys

import torch

import nnclr
from nnclr import distributed, embed


def main(data, out):
    torch.set_num_threads(1)
    embed._PART_ROWS = 64  # so that there is something to share
    with distributed.process_group("cpu"):
        encoder = nnclr.open_encoder("random:small-convnet?size=16")
        written, write = [], embed._Parts.write
        embed._Parts.write = lambda self, rows, *rest: written.append(rows.start) or write(self, rows, *rest)
        rows, embed_views = [], nnclr.Encoder.embed_views
        nnclr.Encoder.embed_views = lambda self, views: rows.append(len(views)) or embed_views(self, views)
        embed.embed_to_file(encoder, data, out, batch_size=32)
        result = nnclr.evaluate(encoder, data, k=5)
        value = f"{result.value} of {result.n_test}"
        # In one write: with PYTHONUNBUFFERED `print` makes two, and the lines of the ranks mix.
        sys.stdout.write(f"rank {distributed.rank()} parts {written} rows {sum(rows)} value {value}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
