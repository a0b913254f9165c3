"""Continues prompts on a Ray cluster, from Parquet files to Parquet files: python ray_batch.py s3://b/in s3://b/out

The files have a column `prompt`, and may have columns such as `mode` and `max_new_tokens`. Needs the extra `ray`.
"""

import argparse

import ray

from twotower.ray import TwoTowerPredictor, actor_options

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", help="a file or folder that all nodes can read, e.g. s3://bucket/prompts")
    parser.add_argument("answers", help="a folder that all nodes can write, e.g. s3://bucket/answers")
    parser.add_argument("--model", help="a checkpoint directory of every node, or a hub id")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of an actor")
    args = parser.parse_args()

    prompts = ray.data.read_parquet(args.prompts).repartition(target_num_rows_per_block=64)
    answers = prompts.map_batches(
        TwoTowerPredictor,
        fn_constructor_kwargs={"model": args.model, "setting": "verified", "dtype": "float32"},
        batch_size=64,
        **actor_options(args.actors, gpus=args.gpus),
    )
    answers.write_parquet(args.answers)
